"""Running the models: sizing, the scheduler, loading and unloading."""
