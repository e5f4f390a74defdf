"""Imported MLP-Mixers compute the same as the published networks.

No public implementation can be installed: every layout is compared with a forward pass written here in its own
conventions. Google's .npz, in both namings: einsums over Flax's kernels, NHWC. timm's: functions of torch over its
names.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrine.models.published.errors import MismatchError
from vitrine.models.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("forward_only")

State = dict[str, Tensor]
Import, Agree = Callable[..., Checkpoint], Callable[..., None]
DIM, DEPTH, PATCH, SIDE, TOKENS_HIDDEN, CHANNELS_HIDDEN, CLASSES = 16, 3, 4, 3, 10, 24, 5
TOKENS = SIDE * SIDE


def images() -> Tensor:
    return torch.randn(4, 3, SIDE * PATCH, SIDE * PATCH)


def mlp_shapes(tokens: int = TOKENS) -> dict[tuple[str, int], tuple[int, int]]:
    """Inputs and outputs of both layers of token and channel mixing."""
    return {
        ("token", 0): (tokens, TOKENS_HIDDEN),
        ("token", 1): (TOKENS_HIDDEN, tokens),
        ("channel", 0): (DIM, CHANNELS_HIDDEN),
        ("channel", 1): (CHANNELS_HIDDEN, DIM),
    }


# Google ---------------------------------------------------------------------------------------------------------------


def google_arrays() -> State:
    """Random parameters; the stem is small, so that the norms' epsilon matters."""
    arrays: State = {
        "stem/kernel": torch.randn(PATCH, PATCH, 3, DIM) * 0.01 / PATCH,
        "stem/bias": torch.randn(DIM) * 0.01,
    }
    norms = [f"MixerBlock_{i}/LayerNorm_{n}" for i in range(DEPTH) for n in (0, 1)]
    for norm in (*norms, "pre_head_layer_norm"):
        arrays |= {f"{norm}/scale": torch.rand(DIM) + 0.5, f"{norm}/bias": torch.randn(DIM) * 0.3}
    shapes = {"head": (DIM, CLASSES)}
    for i in range(DEPTH):
        shapes |= {f"MixerBlock_{i}/{mix}_mixing/Dense_{n}": shape for (mix, n), shape in mlp_shapes().items()}
    for name, (inputs, outputs) in shapes.items():
        arrays[f"{name}/kernel"] = torch.randn(inputs, outputs) * 1.5 / math.sqrt(inputs)
        arrays[f"{name}/bias"] = torch.randn(outputs) * 0.3
    return arrays


def google_forward(arrays: State, pixels: Tensor) -> Tensor:
    """Logits, as Google's Flax modules compute them from images [B, H, W, 3]."""

    def affine(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,io->...o", x, arrays[f"{name}/kernel"]) + arrays[f"{name}/bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        return affine(F.gelu(affine(x, f"{name}/Dense_0"), approximate="tanh"), f"{name}/Dense_1")

    cells = pixels.reshape(len(pixels), SIDE, PATCH, SIDE, PATCH, 3)
    x = torch.einsum("nhiwjc,ijcd->nhwd", cells, arrays["stem/kernel"]).flatten(1, 2) + arrays["stem/bias"]
    for i in range(DEPTH):
        block = f"MixerBlock_{i}"
        x = x + mlp(norm(x, f"{block}/LayerNorm_0").swapaxes(1, 2), f"{block}/token_mixing").swapaxes(1, 2)
        x = x + mlp(norm(x, f"{block}/LayerNorm_1"), f"{block}/channel_mixing")
    return affine(norm(x, "pre_head_layer_norm").mean(dim=1), "head")


def behind(prefix: str, arrays: State) -> State:
    return {f"{prefix}{key}": array for key, array in arrays.items()}


def of_first_files(arrays: State, kernel_shape: str, bias_shape: str) -> State:
    """Rename as in the first files; `i` and `o` are a kernel's axes, 1 is an axis of length one."""
    renamed: State = {}
    for key, array in arrays.items():
        name = re.sub(r"^stem/", "embedding/", key)
        name = re.sub(r"^pre_head_layer_norm/", "Mixer/encoder_norm/", name)
        name = re.sub(r"^MixerBlock_(\d+)/", r"Mixer/encoderblock_\1/", name)
        mixing = re.fullmatch(r"(.*)/(token|channel)_mixing/Dense_(\d)/(kernel|bias)", name)
        if mixing is not None:
            name = f"{mixing[1]}/{mixing[2]}_mixing_phase_0/{mixing[4]}{int(mixing[3]) + 1}"
            axes = kernel_shape if mixing[4] == "kernel" else bias_shape
            lengths = iter(array.shape)
            array = array.reshape([1 if axis == "1" else next(lengths) for axis in axes])
        renamed[name] = array
    return renamed


GOOGLE: dict[str, Callable[[State], State]] = {
    "new names": dict,
    "new names in opt/target/": lambda arrays: behind("opt/target/", arrays) | {"opt/state/step": torch.tensor(3)},
    "new names in params/": lambda arrays: behind("params/", arrays) | {"chrono/accum_train_time": torch.tensor(1.0)},
    "first names": lambda arrays: of_first_files(arrays, "io", "o"),
    "first names, kernels [1, in, out]": lambda arrays: of_first_files(arrays, "1io", "1o"),
    "first names, kernels [1, 1, in, out]": lambda arrays: of_first_files(arrays, "11io", "11o"),
    "first names, kernels [1, in, 1, out]": lambda arrays: of_first_files(arrays, "1i1o", "1o"),
    "first names in opt/target/": lambda arrays: behind("opt/target/", of_first_files(arrays, "1io", "1o")),
}


@pytest.mark.parametrize("variant", GOOGLE)
def test_google_mixer(variant: str, import_file: Import, agree: Agree) -> None:
    arrays, pixels = google_arrays(), images()
    run = import_file(GOOGLE[variant](arrays), CLASSES, form="npz")
    assert run.settings == {
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "embed_dim": DIM,
        "depth": DEPTH,
        "tokens_mlp_dim": TOKENS_HIDDEN,
        "channels_mlp_dim": CHANNELS_HIDDEN,
        "gelu": "tanh",
    }
    agree(f"Google Mixer, {variant}", run.build()(pixels), google_forward(arrays, pixels.permute(0, 2, 3, 1)))


def test_google_mixer_in_bfloat16(import_file: Import, agree: Agree) -> None:
    arrays, pixels = google_arrays(), images()
    run = import_file({key: array.bfloat16() for key, array in arrays.items()}, CLASSES, form="npz")
    rounded = {key: array.bfloat16().float() for key, array in arrays.items()}
    agree("Google Mixer, bfloat16", run.build()(pixels), google_forward(rounded, pixels.permute(0, 2, 3, 1)))


# timm -----------------------------------------------------------------------------------------------------------------


def timm_state(grid: tuple[int, int] = (SIDE, SIDE)) -> State:
    state: State = {
        "stem.proj.weight": torch.randn(DIM, 3, PATCH, PATCH) * 0.01 / PATCH,
        "stem.proj.bias": torch.randn(DIM) * 0.01,
    }
    for norm in ("norm", *(f"blocks.{i}.norm{n}" for i in range(DEPTH) for n in (1, 2))):
        state |= {f"{norm}.weight": torch.rand(DIM) + 0.5, f"{norm}.bias": torch.randn(DIM) * 0.3}
    shapes = {"head": (DIM, CLASSES)}
    mlps = mlp_shapes(grid[0] * grid[1])
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.mlp_{mix}s.fc{n + 1}": shape for (mix, n), shape in mlps.items()}
    for name, (inputs, outputs) in shapes.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs) * 1.5 / math.sqrt(inputs)
        state[f"{name}.bias"] = torch.randn(outputs) * 0.3
    return state


def timm_forward(state: State, pixels: Tensor) -> Tensor:
    """Logits, as timm's MlpMixer computes them."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    x = F.conv2d(pixels, state["stem.proj.weight"], state["stem.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    for i in range(DEPTH):
        x = x + mlp(norm(x, f"blocks.{i}.norm1").transpose(1, 2), f"blocks.{i}.mlp_tokens").transpose(1, 2)
        x = x + mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp_channels")
    return linear(norm(x, "norm").mean(dim=1), "head")


TIMM: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "safetensors": (dict, "safetensors"),
    "pth": (dict, "pth"),
    "behind module. in state_dict": (lambda state: {"state_dict": behind("module.", state)}, "pth"),
}


@pytest.mark.parametrize("variant", TIMM)
def test_timm_mixer(variant: str, import_file: Import, agree: Agree) -> None:
    published, form = TIMM[variant]
    state, pixels = timm_state(), images()
    run = import_file(published(state), CLASSES, form=form)
    agree(f"timm Mixer, {variant}", run.build()(pixels), timm_forward(state, pixels))


def test_a_mixer_cannot_be_brought_to_another_resolution(import_file: Import) -> None:
    with pytest.raises(MismatchError) as caught:
        import_file(timm_state(), CLASSES, changes=[f"image_size={4 * PATCH}"])
    lines = str(caught.value)
    for i in range(DEPTH):
        assert f"blocks.{i}.mlp_tokens.fc1.weight: expected shape (10, 16), found (10, 9)" in lines
        assert f"blocks.{i}.mlp_tokens.fc2.weight: expected shape (16, 10), found (9, 10)" in lines
        assert f"blocks.{i}.mlp_tokens.fc2.bias: expected shape (16,), found (9,)" in lines


def test_image_size_tells_a_mixer_of_images_that_are_not_square(import_file: Import, agree: Agree) -> None:
    state, pixels = timm_state(grid=(2, 3)), torch.randn(4, 3, 2 * PATCH, 3 * PATCH)
    run = import_file(state, CLASSES, changes=[f"image_size=[{2 * PATCH},{3 * PATCH}]"])
    agree("timm Mixer, 8x12", run.build()(pixels), timm_forward(state, pixels))


def test_reset_head_gives_a_mixer_other_labels(import_file: Import) -> None:
    run = import_file(google_arrays(), 2, form="npz", reset_head=True)
    assert run.origin is not None
    assert run.origin.untrained == ["head"]
    assert run.build()(images()).shape == (4, 2)
