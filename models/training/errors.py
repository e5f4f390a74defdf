"""Errors of training: data that cannot be used, recipes with unknown keys, runs that are none."""

from vitrine.bundle.errors import VitrineError


class TrainingError(VitrineError):
    """Base of the errors of this package."""

    code = "training_error"


class DivergedError(TrainingError):
    """The loss, its gradient or a weight is not finite or has exploded."""

    code = "diverged"


class DataError(TrainingError):
    """A data set is missing, broken or of another layout."""

    code = "invalid_data"


class RecipeError(TrainingError):
    """A recipe is unknown, or one of its keys or values is."""

    code = "invalid_recipe"


class CheckpointError(TrainingError):
    """A run folder holds no readable checkpoint."""

    code = "invalid_checkpoint"
