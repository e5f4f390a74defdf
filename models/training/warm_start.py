"""Fine-tuning: initialise a network with the weights of another run."""

from pathlib import Path

from torch import Tensor, nn

from vitrine.models.position import interpolate_positions
from vitrine.models.training.checkpoint import Checkpoint, WarmStart, checkpoint_sha256, load_checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import Recipe
from vitrine.models.vit import ViT, ViTConfig, patch_grid

_OF_LABELS = {"head", "class_embed", "label_embed"}  # modules with a row for each label, at any depth
_BACKBONE = "backbone."
_OPTIONAL = ("num_batches_tracked", "label_embed.weight")
_POSITIONS = "pos_embed.embedding"


def load_initial_weights(network: nn.Module, recipe: Recipe, labels: list[str], run: Path) -> WarmStart:
    """Load a run's weights into a network.

    With the same architecture, all weights are loaded; position embeddings are interpolated if the image size differs,
    and a head for other labels keeps its new weights. With different ones (a DETR from a ResNet classifier), only the
    backbone is loaded.

    Raises:
        CheckpointError: the run cannot be read.
        RecipeError: its weights do not fit the network.
    """
    checkpoint = load_checkpoint(run)
    weights, state = dict(checkpoint.weights), network.state_dict()
    if checkpoint.architecture != recipe.architecture:
        weights = {name: value for name, value in weights.items() if name.startswith(_BACKBONE)}
        required = [name for name in state if name.startswith(_BACKBONE)]
        if not weights or not required:
            raise RecipeError(
                f"{run}: a {checkpoint.architecture} has no backbone that a {recipe.architecture} can use"
            )
    else:
        if isinstance(network, ViT) and _POSITIONS in weights:
            weights[_POSITIONS] = _interpolate(checkpoint, network.config)
        if checkpoint.labels != labels:
            weights = {name: value for name, value in weights.items() if not _is_of_labels(name)}
        required = [name for name in state if not _is_of_labels(name)]
    # Optional: frozen batch norms have no counter, and not every DETR has denoising queries.
    weights = {name: value for name, value in weights.items() if name in state or not name.endswith(_OPTIONAL)}
    required = [name for name in required if name in weights or not name.endswith(_OPTIONAL)]
    for name in [*required, *weights]:
        expected, found = (tuple(side[name].shape) if name in side else "none" for side in (state, weights))
        if expected != found:
            raise RecipeError(f"{run}: {name}: expected shape {expected} for {recipe.name}, found {found}")
    network.load_state_dict(weights, strict=False)
    return WarmStart(run.resolve().name, checkpoint_sha256(run), [name for name in state if name not in weights])


def _is_of_labels(name: str) -> bool:
    return not _OF_LABELS.isdisjoint(name.split("."))


def _interpolate(checkpoint: Checkpoint, config: ViTConfig) -> Tensor:
    size = checkpoint.settings["image_size"]
    old = patch_grid(size if isinstance(size, int) else tuple(size), checkpoint.settings["patch_size"])
    return interpolate_positions(checkpoint.weights[_POSITIONS], old, config.grid)
