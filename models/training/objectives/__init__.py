"""What training minimises: losses, matching and the tasks they belong to."""
