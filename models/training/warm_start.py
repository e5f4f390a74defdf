"""Fine-tuning: a network takes over the weights of another run."""

from pathlib import Path

from torch import Tensor, nn

from vitrine.models.position import interpolate_positions
from vitrine.models.training.checkpoint import Checkpoint, WarmStart, checkpoint_sha256, load_checkpoint
from vitrine.models.training.errors import RecipeError
from vitrine.models.training.recipe import Recipe
from vitrine.models.vit import ViT, ViTConfig, patch_grid

_PER_LABEL = ("head.", "class_embed.", "label_embed.")
_BACKBONE = "backbone."
_OPTIONAL = ("num_batches_tracked", "label_embed.weight")
_POSITIONS = "pos_embed.embedding"


def load_initial_weights(network: nn.Module, recipe: Recipe, labels: list[str], run: Path) -> WarmStart:
    """Fill a network with a run's weights.

    Between networks of one architecture, all weights are taken; positions are interpolated where the image size
    differs, and a head for other labels starts anew. Between different ones (a DETR from a ResNet classifier), the
    backbone is taken.

    Raises:
        CheckpointError: the run cannot be read.
        RecipeError: its weights do not fit.
    """
    checkpoint = load_checkpoint(run)
    weights, own = dict(checkpoint.weights), network.state_dict()
    if checkpoint.architecture != recipe.architecture:
        weights = {name: value for name, value in weights.items() if name.startswith(_BACKBONE)}
        wanted = [name for name in own if name.startswith(_BACKBONE)]
        if not weights or not wanted:
            raise RecipeError(
                f"{run}: a {checkpoint.architecture} has no backbone that a {recipe.architecture} can use"
            )
    else:
        if isinstance(network, ViT) and _POSITIONS in weights:
            weights[_POSITIONS] = _interpolated(checkpoint, network.config)
        if checkpoint.labels != labels:
            weights = {name: value for name, value in weights.items() if not name.startswith(_PER_LABEL)}
        wanted = [name for name in own if not name.startswith(_PER_LABEL)]
    # What only training needs: frozen batch norms count nothing, and not every DETR has denoising queries.
    weights = {name: value for name, value in weights.items() if name in own or not name.endswith(_OPTIONAL)}
    wanted = [name for name in wanted if name in weights or not name.endswith(_OPTIONAL)]
    for name in [*wanted, *weights]:
        expected, found = (tuple(side[name].shape) if name in side else "none" for side in (own, weights))
        if expected != found:
            raise RecipeError(f"{run}: {name}: expected shape {expected} for {recipe.name}, found {found}")
    network.load_state_dict(weights, strict=False)
    return WarmStart(run.resolve().name, checkpoint_sha256(run), [name for name in own if name not in weights])


def _interpolated(checkpoint: Checkpoint, config: ViTConfig) -> Tensor:
    size = checkpoint.settings["image_size"]
    old = patch_grid(size if isinstance(size, int) else tuple(size), checkpoint.settings["patch_size"])
    return interpolate_positions(checkpoint.weights[_POSITIONS], old, config.grid)
