"""Errors of training: unusable data, invalid recipes, unreadable checkpoints, diverged runs."""

from vitrine.bundle.errors import VitrineError


class TrainingError(VitrineError):
    """Base of the errors of this package."""

    code = "training_error"


class DivergedError(TrainingError):
    """The loss, its gradient or a weight is not finite or too large."""

    code = "diverged"


class DataError(TrainingError):
    """A data set is missing, broken or in an unknown layout."""

    code = "invalid_data"


class RecipeError(TrainingError):
    """A recipe, one of its keys or one of its values is invalid."""

    code = "invalid_recipe"


class CheckpointError(TrainingError):
    """A run folder has no readable checkpoint."""

    code = "invalid_checkpoint"
