"""Data, losses, matching, loop, evaluation and recipes: what turns an architecture into a run."""
