"""Imported ViTs compute the same as the published networks.

Compared with a public implementation: Hugging Face's (transformers, also at full size). Compared with a forward pass
written here in the layout's own conventions: timm's (functions of torch over its key names), Google's .npz (einsums
over Flax's kernels, NHWC), torchvision's (a module with its key names, of torch's own layers).
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from vitrine.models.published.errors import ImportSettingError, MismatchError, UnsupportedNetworkError, WeightsError
from vitrine.models.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("forward_only")

State = dict[str, Tensor]
Import, Agree, Randomise = Callable[..., Checkpoint], Callable[..., None], Callable[..., nn.Module]
Save, HuggingFace = Callable[..., Path], Callable[..., Any]
DIM, HEADS, HIDDEN, DEPTH, PATCH, CLASSES = 16, 2, 24, 3, 4, 5

transformers.logging.set_verbosity_error()


def images(height: int = 8, width: int | None = None, count: int = 4) -> Tensor:
    """[B, 3, H, W], each with a different mean: a network that averages cannot distinguish plain noise."""
    return torch.randn(count, 3, height, width or height) + torch.randn(count, 3, 1, 1)


def dense(rows: int, columns: int) -> Tensor:
    """A kernel that preserves the variance."""
    return torch.randn(rows, columns) / math.sqrt(columns)


# timm -----------------------------------------------------------------------------------------------------------------


def timm_state(grid: tuple[int, int] = (2, 2), slots: int = 1, token: bool = True, representation: int = 0) -> State:
    """Random weights; `slots` is the number of positions for the class token."""
    state: State = {
        "pos_embed": torch.randn(1, slots + grid[0] * grid[1], DIM) * 0.01,
        "patch_embed.proj.weight": dense(DIM, 3 * PATCH**2).reshape(DIM, 3, PATCH, PATCH) * 0.01,
        "patch_embed.proj.bias": torch.randn(DIM) * 0.01,
    }
    if token:
        state["cls_token"] = torch.randn(1, 1, DIM) * 0.01
    layers = {f"blocks.{i}.attn.qkv": (3 * DIM, DIM) for i in range(DEPTH)}
    layers |= {f"blocks.{i}.attn.proj": (DIM, DIM) for i in range(DEPTH)}
    layers |= {f"blocks.{i}.mlp.fc1": (HIDDEN, DIM) for i in range(DEPTH)}
    layers |= {f"blocks.{i}.mlp.fc2": (DIM, HIDDEN) for i in range(DEPTH)}
    layers |= {"pre_logits.fc": (representation, DIM)} if representation else {}
    layers["head"] = (CLASSES, representation or DIM)
    for name, (rows, columns) in layers.items():
        state[f"{name}.weight"] = dense(rows, columns)
        state[f"{name}.bias"] = torch.randn(rows) * 0.3
    for name in ("norm", *(f"blocks.{i}.norm{n}" for i in range(DEPTH) for n in (1, 2))):
        state[f"{name}.weight"] = torch.rand(DIM) + 0.5
        state[f"{name}.bias"] = torch.randn(DIM) * 0.3
    return state


def timm_forward(state: State, pixels: Tensor) -> Tensor:
    """Logits, as timm's VisionTransformer computes them."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    patch = state["patch_embed.proj.weight"].reshape(DIM, 3, PATCH, PATCH)
    x = F.conv2d(pixels, patch, state["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    token = state.get("cls_token")
    embed_class = state["pos_embed"].shape[1] > x.shape[1]
    if not embed_class:
        x = x + state["pos_embed"]
    if token is not None:
        x = torch.cat((token.expand(len(x), -1, -1), x), dim=1)
    if embed_class:
        x = x + state["pos_embed"]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        fused = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        query, key, value = fused.reshape(*x.shape[:2], 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        attention = (query * (DIM // HEADS) ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        x = x + linear((attention @ value).transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    x = norm(x, "norm")
    x = x[:, 0] if token is not None else x.mean(dim=1)
    if "pre_logits.fc.weight" in state:
        x = linear(x, "pre_logits.fc").tanh()
    return linear(x, "head")


def loud(state: State) -> State:
    """Scale patches and positions up, so that the norms' epsilon does not hide them."""
    return {
        key: tensor * 100 if key.startswith(("pos_embed", "patch_embed")) else tensor for key, tensor in state.items()
    }


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def flat_patches(state: State) -> State:
    return {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}


TIMM: dict[str, tuple[dict[str, Any], Callable[[State], dict[str, Any]], str]] = {
    "safetensors": ({}, dict, "safetensors"),
    "pth": ({}, dict, "pth"),
    "in model": ({}, lambda state: {"model": state, "epoch": 3}, "pth"),
    "in state_dict": ({}, lambda state: {"state_dict": state, "arch": "vit"}, "pth"),
    "behind module.": ({}, lambda state: behind("module.", state), "safetensors"),
    "behind module. in state_dict": ({}, lambda state: {"state_dict": behind("module.", state)}, "pth"),
    "pre_logits": ({"representation": 12}, dict, "safetensors"),
    "2-D patches": ({}, flat_patches, "pth"),
    "no_embed_class": ({"slots": 0}, dict, "safetensors"),
    "average pool": ({"slots": 0, "token": False}, dict, "safetensors"),
    "float16": ({}, lambda state: {key: tensor.half() for key, tensor in state.items()}, "safetensors"),
}


@pytest.mark.parametrize("variant", TIMM)
def test_timm_vit(variant: str, import_file: Import, agree: Agree) -> None:
    shape, published, form = TIMM[variant]
    state = timm_state(**shape)
    if variant == "float16":
        state = {key: tensor.half().float() for key, tensor in state.items()}
    run = import_file(published(state), CLASSES, form=form, changes=["num_heads=2"])
    pixels = images()
    agree(f"timm ViT, {variant}", run.build()(pixels), timm_forward(state, pixels))


def test_timm_vit_of_unknown_width_asks_for_the_number_of_heads(import_file: Import) -> None:
    with pytest.raises(ImportSettingError, match="num_heads: cannot be inferred from the file; pass num_heads=VALUE"):
        import_file(timm_state(), CLASSES)


def test_timm_config_tells_the_number_of_heads(import_file: Import, agree: Agree) -> None:
    config = {"architecture": "vit_base_patch16_224", "num_classes": CLASSES, "model_args": {"num_heads": HEADS}}
    state, pixels = timm_state(), images()
    run = import_file(state, CLASSES, config=config)
    agree("timm ViT, heads from config.json", run.build()(pixels), timm_forward(state, pixels))


def test_timm_vit_of_a_published_width_knows_its_number_of_heads(import_file: Import) -> None:
    shapes = {"qkv": (576, 192), "proj": (192, 192), "fc1": (768, 192), "fc2": (192, 768)}
    state = {"cls_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 5, 192)}
    state |= {"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16), "patch_embed.proj.bias": torch.zeros(192)}
    for name, shape in shapes.items():
        part = "attn" if name in ("qkv", "proj") else "mlp"
        state[f"blocks.0.{part}.{name}.weight"] = torch.zeros(shape)
        state[f"blocks.0.{part}.{name}.bias"] = torch.zeros(shape[0])
    for name in ("norm", "blocks.0.norm1", "blocks.0.norm2"):
        state |= {f"{name}.weight": torch.ones(192), f"{name}.bias": torch.zeros(192)}
    state |= {"head.weight": torch.zeros(CLASSES, 192), "head.bias": torch.zeros(CLASSES)}
    run = import_file(state, CLASSES)
    assert run.settings == {
        "image_size": 32,
        "patch_size": 16,
        "embed_dim": 192,
        "depth": 1,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "global_pool": "token",
    }


def test_imported_labels_and_weights_are_in_the_run(import_file: Import) -> None:
    state = timm_state()
    run = import_file(state, CLASSES, changes=["num_heads=2"])
    assert run.labels == [f"thing {i}" for i in range(CLASSES)]
    assert run.origin is not None
    assert run.origin.untrained == []
    assert run.origin.arguments[0] == "num_heads=2"
    torch.testing.assert_close(run.weights["head.weight"], state["head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "network"),
    [
        ("dist_token", "a distilled DeiT"),
        ("blocks.0.ls1.gamma", "layer scale"),
        ("fc_norm.weight", "averages its patches"),
        ("reg_token", "register tokens"),
        ("attn_pool.latent", "attention pooling"),
    ],
)
def test_neighbours_of_timm_vit_are_refused(key: str, network: str, import_file: Import) -> None:
    with pytest.raises(UnsupportedNetworkError, match=network):
        import_file({**timm_state(), key: torch.zeros(DIM)}, CLASSES, changes=["num_heads=2"])


# Another resolution ---------------------------------------------------------------------------------------------------


def resized(positions: Tensor, slots: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize learned positions like timm: bicubic, with antialiasing."""
    grid = positions[:, slots:].reshape(1, *old, DIM).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat((positions[:, :slots], grid.permute(0, 2, 3, 1).reshape(1, -1, DIM)), dim=1)


@pytest.mark.parametrize("slots", [0, 1])
@pytest.mark.parametrize(("change", "size"), [("16", (16, 16)), ("[16,24]", (16, 24))])
def test_image_size_brings_a_vit_to_another_resolution(
    slots: int, change: str, size: tuple[int, int], import_file: Import, agree: Agree
) -> None:
    state = loud(timm_state(slots=slots))
    run = import_file(state, CLASSES, changes=["num_heads=2", f"image_size={change}"])
    new = {**state, "pos_embed": resized(state["pos_embed"], slots, (2, 2), (size[0] // PATCH, size[1] // PATCH))}
    pixels = images(*size)
    agree(f"timm ViT, 8x8 to {size[0]}x{size[1]}", run.build()(pixels), timm_forward(new, pixels))
    assert run.preprocessing["input_size"] == list(size)


def test_the_class_slot_keeps_its_position_at_another_resolution(import_file: Import) -> None:
    state = timm_state()
    run = import_file(state, CLASSES, changes=["num_heads=2", "image_size=16"])
    positions = run.weights["pos_embed.embedding"]
    assert positions.shape == (1, 1 + 16, DIM)
    torch.testing.assert_close(positions[:, 0], state["pos_embed"][:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize("slots", [0, 1])
def test_a_square_grid_has_positions_with_and_without_a_class_slot(
    slots: int, side: int, import_file: Import, agree: Agree
) -> None:
    state, pixels = loud(timm_state(grid=(side, side), slots=slots)), images(side * PATCH)
    run = import_file(state, CLASSES, changes=["num_heads=2"])
    assert run.weights["pos_embed.embedding"].shape == (1, 1 + side * side, DIM)
    agree(f"timm ViT, {side * side} patches, {slots} class slots", run.build()(pixels), timm_forward(state, pixels))


def test_a_grid_that_is_not_square_needs_its_image_size(import_file: Import, agree: Agree) -> None:
    state, pixels = timm_state(grid=(2, 3)), images(8, 12)
    with pytest.raises(ImportSettingError, match="image_size: cannot be inferred from the file"):
        import_file(state, CLASSES, changes=["num_heads=2"])
    run = import_file(state, CLASSES, changes=["num_heads=2", "image_size=[8,12]"])
    agree("timm ViT, 8x12", run.build()(pixels), timm_forward(state, pixels))


@pytest.mark.parametrize("grid", [(2, 4), (1, 3)])
def test_a_grid_one_short_of_a_square_is_not_taken_for_the_square(
    grid: tuple[int, int], import_file: Import, agree: Agree
) -> None:
    height, width = (edge * PATCH for edge in grid)
    state, pixels = loud(timm_state(grid=grid)), images(height, width)
    run = import_file(state, CLASSES, changes=["num_heads=2", f"image_size=[{height},{width}]"])
    agree(f"timm ViT, {height}x{width}", run.build()(pixels), timm_forward(state, pixels))


# Google ---------------------------------------------------------------------------------------------------------------


def google_arrays(
    slots: int = 1, token: bool = True, representation: int = 0, patch: int = PATCH, grid: int = 2
) -> State:
    """Random parameters under the names of the ViT paper's code, with the positions at the top level."""
    size = DIM // HEADS
    arrays: State = {
        "embedding/kernel": torch.randn(patch, patch, 3, DIM) / (patch * math.sqrt(3)),
        "embedding/bias": torch.randn(DIM) * 0.01,
        "pos_embedding": torch.randn(1, slots + grid * grid, DIM) * 0.01,
        "Transformer/encoder_norm/scale": torch.rand(DIM) + 0.5,
        "Transformer/encoder_norm/bias": torch.randn(DIM) * 0.3,
    }
    if token:
        arrays["embedding/kernel"] *= 0.01
        arrays["cls"] = torch.randn(1, 1, DIM) * 0.01
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"):
            arrays |= {f"{norm}/scale": torch.rand(DIM) + 0.5, f"{norm}/bias": torch.randn(DIM) * 0.3}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = torch.randn(DIM, HEADS, size) / math.sqrt(DIM)
            arrays[f"{attention}/{part}/bias"] = torch.randn(HEADS, size) * 0.3
        arrays[f"{attention}/out/kernel"] = torch.randn(HEADS, size, DIM) / math.sqrt(DIM)
        arrays[f"{attention}/out/bias"] = torch.randn(DIM) * 0.3
        arrays |= google_dense(f"{block}/MlpBlock_3/Dense_0", DIM, HIDDEN)
        arrays |= google_dense(f"{block}/MlpBlock_3/Dense_1", HIDDEN, DIM)
    if representation:
        arrays |= google_dense("pre_logits", DIM, representation)
    return arrays | google_dense("head", representation or DIM, CLASSES)


def google_dense(name: str, inputs: int, outputs: int) -> State:
    kernel = torch.randn(inputs, outputs) / math.sqrt(inputs)
    return {f"{name}/kernel": kernel, f"{name}/bias": torch.randn(outputs) * 0.3}


def google_forward(arrays: State, pixels: Tensor) -> Tensor:
    """Logits, as Google's Flax modules compute them from images [B, H, W, 3]."""

    def affine(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,io->...o", x, arrays[f"{name}/kernel"]) + arrays[f"{name}/bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    kernel = arrays["embedding/kernel"]
    side, batch = kernel.shape[0], len(pixels)
    cells = pixels.reshape(batch, pixels.shape[1] // side, side, pixels.shape[2] // side, side, 3)
    x = torch.einsum("nhiwjc,ijcd->nhwd", cells, kernel).flatten(1, 2) + arrays["embedding/bias"]
    positions, token = arrays["pos_embedding"], arrays.get("cls")
    before_token = positions.shape[1] == x.shape[1]  # big_vision
    if before_token:
        x = x + positions
    if token is not None:
        x = torch.cat((token.expand(batch, -1, -1), x), dim=1)
    if not before_token:
        x = x + positions
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        normed = norm(x, f"{block}/LayerNorm_0")
        query, key, value = (
            torch.einsum("bnd,dhk->bnhk", normed, arrays[f"{attention}/{part}/kernel"])
            + arrays[f"{attention}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        weights = torch.einsum("bqhk,bmhk->bhqm", query / math.sqrt(DIM // HEADS), key).softmax(dim=-1)
        heads = torch.einsum("bhqm,bmhk->bqhk", weights, value)
        out = torch.einsum("bqhk,hkd->bqd", heads, arrays[f"{attention}/out/kernel"])
        x = x + out + arrays[f"{attention}/out/bias"]
        hidden = F.gelu(affine(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3/Dense_0"), approximate="tanh")
        x = x + affine(hidden, f"{block}/MlpBlock_3/Dense_1")
    x = norm(x, "Transformer/encoder_norm")
    x = x.mean(dim=1) if token is None else x[:, 0]
    if "pre_logits/kernel" in arrays:
        x = affine(x, "pre_logits").tanh()
    return affine(x, "head")


def positions_at(name: str) -> Callable[[State], State]:
    return lambda arrays: {name if key == "pos_embedding" else key: array for key, array in arrays.items()}


def big_vision(arrays: State) -> State:
    """Number the layers of each kind from zero."""
    renamed = {
        "LayerNorm_2": "LayerNorm_1",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "MlpBlock_3": "MlpBlock_0",
    }
    pattern = re.compile("|".join(renamed))
    return {pattern.sub(lambda match: renamed[match[0]], key): array for key, array in arrays.items()}


def scanned(arrays: State) -> State:
    """Stack all blocks in one array along a leading axis."""
    plain = {key: array for key, array in arrays.items() if "encoderblock_" not in key}
    of_first = [key for key in arrays if "encoderblock_0/" in key]
    stacked = {
        key.replace("encoderblock_0", "encoderblock"): torch.stack(
            [arrays[key.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(DEPTH)]
        )
        for key in of_first
    }
    return plain | stacked


def in_training_checkpoint(arrays: State) -> State:
    return behind("opt/target/", arrays) | {
        "opt/state/step": torch.tensor(7),
        "opt/state/param_states/head/bias/momentum": torch.zeros(CLASSES),
        "epoch": torch.tensor(3),
    }


def in_big_vision_checkpoint(arrays: State) -> State:
    beside = {"opt/0/mu/head/bias": torch.zeros(CLASSES), "chrono/accum_train_time": torch.tensor(1.5)}
    return behind("params/", big_vision(arrays)) | beside


def in_two_towers(arrays: State) -> State:
    beside = {"params/txt/head/kernel": torch.zeros(DIM, DIM), "params/t": torch.zeros(1)}
    return behind("params/img/", big_vision(arrays)) | beside


def in_two_towers_while_training(arrays: State) -> State:
    beside = {"opt/0/mu/img/head/bias": torch.zeros(CLASSES), "chrono/accum_train_time": torch.tensor(1.5)}
    return in_two_towers(arrays) | beside


Google = tuple[dict[str, Any], Callable[[State], State]]
GOOGLE: dict[str, Google] = {
    "positions in posembed_input": ({}, positions_at("Transformer/posembed_input/pos_embedding")),
    "positions in Transformer": ({}, positions_at("Transformer/pos_embedding")),
    "positions at the top": ({}, dict),
    "pre_logits": ({"representation": 12}, positions_at("Transformer/posembed_input/pos_embedding")),
    "opt/target/": ({}, in_training_checkpoint),
    "big_vision at the top": ({"slots": 0}, big_vision),
    "big_vision at the top, positions with a class slot": ({}, big_vision),
    "big_vision in params/": ({"slots": 0}, in_big_vision_checkpoint),
    "big_vision in params/img/": ({"slots": 0}, in_two_towers),
    "big_vision in params/img/ of a training checkpoint": ({"slots": 0}, in_two_towers_while_training),
    "big_vision scanned": ({"slots": 0}, lambda arrays: scanned(big_vision(arrays))),
    "big_vision scanned in params/": ({}, lambda arrays: behind("params/", scanned(big_vision(arrays)))),
    "big_vision with pre_logits": ({"slots": 0, "representation": 12}, big_vision),
    "average pool, learned positions": ({"slots": 0, "token": False}, big_vision),
    "old numbering, average pool": ({"slots": 0, "token": False}, dict),
}


@pytest.mark.parametrize("variant", GOOGLE)
def test_google_vit(variant: str, import_file: Import, agree: Agree) -> None:
    shape, published = GOOGLE[variant]
    arrays, pixels = google_arrays(**shape), images()
    run = import_file(published(arrays), CLASSES, form="npz")
    expected = google_forward(arrays, pixels.permute(0, 2, 3, 1))
    agree(f"Google ViT, {variant}", run.build()(pixels), expected)


@pytest.mark.parametrize("published", [big_vision, lambda arrays: scanned(big_vision(arrays))])
def test_google_vit_in_bfloat16(published: Callable[[State], State], import_file: Import, agree: Agree) -> None:
    arrays, pixels = google_arrays(slots=0), images()
    run = import_file(published({key: array.bfloat16() for key, array in arrays.items()}), CLASSES, form="npz")
    rounded = {key: array.bfloat16().float() for key, array in arrays.items()}
    expected = google_forward(rounded, pixels.permute(0, 2, 3, 1))
    agree("Google ViT, bfloat16", run.build()(pixels), expected)
    assert all(weight.dtype == torch.float32 for weight in run.weights.values())


def sincos(side: int) -> Tensor:
    """big_vision's fixed positions [1, N, D]: sines and cosines of x, then of y."""
    y, x = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    omega = 1 / 10000 ** (torch.arange(DIM // 4).double() / (DIM // 4 - 1))
    x, y = torch.outer(x.flatten(), omega), torch.outer(y.flatten(), omega)
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1).float()[None]


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_google_vit_without_positions_has_fixed_ones(prefix: str, import_file: Import, agree: Agree) -> None:
    arrays, pixels = google_arrays(slots=0, token=False, patch=56), images(224)
    published = big_vision({key: array for key, array in arrays.items() if key != "pos_embedding"})
    run = import_file(behind(prefix, published), CLASSES, form="npz")
    assert run.settings["image_size"] == 224
    expected = google_forward({**arrays, "pos_embedding": sincos(4)}, pixels.permute(0, 2, 3, 1))
    agree("Google ViT, sincos2d", run.build()(pixels), expected)


def test_google_vit_with_a_map_head_is_refused(import_file: Import) -> None:
    arrays = big_vision(google_arrays(slots=0, token=False)) | {"MAPHead_0/probe": torch.zeros(1, 1, DIM)}
    with pytest.raises(UnsupportedNetworkError, match="MAP head"):
        import_file(arrays, CLASSES, form="npz")


def test_google_vit_with_a_layer_too_many_names_it(import_file: Import) -> None:
    arrays = google_arrays() | {"Transformer/encoderblock_0/LayerNorm_7/scale": torch.ones(DIM)}
    with pytest.raises(MismatchError, match="unexpected in the file: Transformer/encoderblock_0/LayerNorm_7/scale"):
        import_file(arrays, CLASSES, form="npz")


# torchvision ----------------------------------------------------------------------------------------------------------


class TorchvisionBlock(nn.Module):
    def __init__(self, first_names: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(DIM, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(DIM, eps=1e-6)
        layers = [nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, DIM), nn.Dropout(0.0)]
        names = ["linear_1", "act", "dropout_1", "linear_2", "dropout_2"] if first_names else "01234"
        self.mlp = nn.Sequential(OrderedDict(zip(names, layers, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionEncoder(nn.Module):
    def __init__(self, first_names: bool) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + 4, DIM))
        blocks = {f"encoder_layer_{i}": TorchvisionBlock(first_names) for i in range(DEPTH)}
        self.layers = nn.Sequential(OrderedDict(blocks))
        self.ln = nn.LayerNorm(DIM, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x + self.pos_embedding))


class TorchvisionViT(nn.Module):
    """Torch's own layers under torchvision's names."""

    def __init__(self, first_names: bool, representation: int | None) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, DIM))
        self.conv_proj = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.encoder = TorchvisionEncoder(first_names)
        heads: OrderedDict[str, nn.Module] = OrderedDict()
        if representation is not None:
            heads["pre_logits"] = nn.Linear(DIM, representation)
            heads["act"] = nn.Tanh()
        heads["head"] = nn.Linear(representation or DIM, CLASSES)
        self.heads = nn.Sequential(heads)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv_proj(pixels).flatten(2).permute(0, 2, 1)
        tokens = torch.cat((self.class_token.expand(len(pixels), -1, -1), patches), dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


@pytest.mark.parametrize("representation", [None, 12])
@pytest.mark.parametrize("names", ["mlp.0", "mlp.linear_1"])
def test_torchvision_vit(
    names: str, representation: int | None, randomise: Randomise, import_file: Import, agree: Agree
) -> None:
    network = randomise(TorchvisionViT(names == "mlp.linear_1", representation))
    assert f"encoder.layers.encoder_layer_0.{names}.weight" in network.state_dict()
    run = import_file(network.state_dict(), CLASSES, form="pth", changes=["num_heads=2"])
    pixels = images()
    variant = names if representation is None else f"{names}, heads.pre_logits"
    agree(f"torchvision ViT, {variant}", run.build()(pixels), network(pixels))


# Hugging Face ---------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 8,
    "patch_size": PATCH,
    "num_labels": CLASSES,
}


@pytest.fixture
def hugging_face(randomise: Randomise) -> HuggingFace:
    def make(**config: Any) -> Any:
        return randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**{**TINY, **config})))

    return make


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 1, "num_attention_heads": 4},
        {"image_size": [8, 16]},
        {"image_size": [12, 8], "patch_size": 2},
        {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 96},
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_hugging_face_vit(
    config: dict[str, Any], names: str, hugging_face: HuggingFace, import_file: Import, agree: Agree
) -> None:
    network = hugging_face(**config)
    run = import_file(network, CLASSES, names=names)
    size = network.config.image_size
    pixels = images(*(size if isinstance(size, list) else [size]))
    agree(f"Hugging Face ViT, {names} names, {config}", run.build()(pixels), network(pixels).logits)


@pytest.mark.parametrize("names", ["old", "new"])
def test_hugging_face_vit_base_at_full_size(
    names: str, randomise: Randomise, import_file: Import, agree: Agree
) -> None:
    config = transformers.ViTConfig(num_labels=1000)
    network = randomise(transformers.ViTForImageClassification(config), gain=1.5)
    run = import_file(network, names=names)
    assert run.settings["norm_eps"] == 1e-12
    assert len(run.labels) == 1000
    pixels = images(224, count=2)
    agree(f"Hugging Face ViT, base at full size, {names} names", run.build()(pixels), network(pixels).logits)


def test_hugging_face_vit_without_a_head_needs_a_new_one(
    randomise: Randomise, save_pretrained: Save, import_file: Import, agree: Agree
) -> None:
    network = randomise(transformers.ViTModel(transformers.ViTConfig(**TINY)))
    source = save_pretrained(network)
    with pytest.raises(ImportSettingError, match="it has no head: --reset-head with --labels makes a new one"):
        import_file(source, CLASSES)
    with pytest.raises(ImportSettingError, match="a new head needs --labels"):
        import_file(source, reset_head=True)
    run = import_file(source, 7, reset_head=True)
    assert run.origin is not None
    assert run.origin.untrained == ["head"]
    built, pixels = run.build(), images()
    assert built(pixels).shape == (4, 7)
    built.head = nn.Identity()
    agree("Hugging Face ViTModel, features", built(pixels), network(pixels).last_hidden_state[:, 0])


def test_reset_head_keeps_everything_but_the_head(
    hugging_face: HuggingFace, save_pretrained: Save, import_file: Import
) -> None:
    source = save_pretrained(hugging_face())
    whole, reset = import_file(source, CLASSES), import_file(source, 3, reset_head=True)
    assert reset.weights["head.weight"].shape == (3, DIM)
    same = [key for key in whole.weights if not key.startswith("head.")]
    assert all(torch.equal(whole.weights[key], reset.weights[key]) for key in same)


def test_hugging_face_labels_and_preprocessing_are_used(
    hugging_face: HuggingFace, save_pretrained: Save, import_file: Import
) -> None:
    names = ["tench", "crane", "crane", "snail", "newt"]
    network = hugging_face(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    source = save_pretrained(network)
    document = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "size": {"height": 8, "width": 8},
    }
    (source / "preprocessor_config.json").write_text(json.dumps(document))
    run = import_file(source)
    assert run.labels == ["tench", "crane (1)", "crane (2)", "snail", "newt"]
    found = {key: run.preprocessing[key] for key in ("input_size", "crop_mode", "interpolation", "mean", "std")}
    assert found == {
        "input_size": [8, 8],
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }


def test_hugging_face_vit_with_another_activation_is_refused(
    hugging_face: HuggingFace, save_pretrained: Save, import_file: Import
) -> None:
    source = save_pretrained(hugging_face(hidden_act="relu"))
    with pytest.raises(ImportSettingError, match=r"hidden_act: expected one of gelu, .* found 'relu'"):
        import_file(source, CLASSES)


def test_a_file_without_one_of_its_tensors_is_refused(import_file: Import) -> None:
    state = timm_state()
    for key in state:
        rest = {name: tensor for name, tensor in state.items() if name != key}
        with pytest.raises(WeightsError):
            import_file(rest, CLASSES, changes=["num_heads=2"])
