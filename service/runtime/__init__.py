"""What runs the models: processes and threads, the queue, loading and unloading."""
