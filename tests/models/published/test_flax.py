"""Flax's kernels, converted to torch's layers, compute the same as einsum on the originals.

The einsums are those of Flax's Dense, DenseGeneral (a multi-head attention's projections) and Conv.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.models.published import flax
from vitrine.models.published.files import LazyTensor
from vitrine.models.published.layout import Layout, Rule, convert

edges = st.integers(1, 5)


def transform(rules: tuple[Rule, ...], target: str) -> Callable[..., torch.Tensor]:
    return next(rule.transform for rule in rules if rule.target == target)


@settings(deadline=None)
@given(inputs=edges, outputs=edges)
def test_a_dense_kernel_maps_inputs_to_outputs(inputs: int, outputs: int) -> None:
    kernel, x = torch.randn(inputs, outputs), torch.randn(3, inputs)
    expected = torch.einsum("bi,io->bo", x, kernel)
    torch.testing.assert_close(F.linear(x, flax.dense_kernel(kernel)), expected)


@settings(deadline=None)
@given(inputs=st.integers(2, 5), outputs=st.integers(2, 5), places=st.lists(st.integers(0, 2), max_size=3))
def test_axes_of_length_one_in_a_dense_kernel_are_of_no_meaning(inputs: int, outputs: int, places: list[int]) -> None:
    kernel = torch.randn(inputs, outputs)
    found = kernel
    for place in places:
        found = found.unsqueeze(min(place, found.ndim))
    torch.testing.assert_close(flax.dense_kernel(found), kernel.T, rtol=0, atol=0)


@settings(deadline=None)
@given(side=st.integers(1, 3), inputs=edges, outputs=edges)
def test_a_conv_kernel_is_height_width_in_out(side: int, inputs: int, outputs: int) -> None:
    kernel, x = torch.randn(side, side + 1, inputs, outputs), torch.randn(2, 5, 6, inputs)
    windows = x.unfold(1, side, 1).unfold(2, side + 1, 1)
    expected = torch.einsum("nhwcij,ijco->nohw", windows, kernel)
    found = F.conv2d(x.permute(0, 3, 1, 2), flax.conv_kernel(kernel))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(dim=edges, heads=edges, size=edges)
def test_projections_to_heads_become_one_whose_thirds_are_queries_keys_and_values(
    dim: int, heads: int, size: int
) -> None:
    x = torch.randn(2, dim)
    kernels, biases = torch.randn(3, dim, heads, size), torch.randn(3, heads, size)
    expected = torch.einsum("bd,pdhk->bphk", x, kernels) + biases
    found = F.linear(x, flax.heads_in(*kernels), flax.heads_in(*biases))
    torch.testing.assert_close(found.reshape(2, 3, heads, size), expected)


@settings(deadline=None)
@given(dim=edges, heads=edges, size=edges)
def test_projection_from_heads_concatenates_them(dim: int, heads: int, size: int) -> None:
    kernel, x = torch.randn(heads, size, dim), torch.randn(2, heads, size)
    expected = torch.einsum("bhk,hkd->bd", x, kernel)
    torch.testing.assert_close(F.linear(x.reshape(2, -1), flax.heads_out(kernel)), expected)


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (flax.dense("ours", "theirs"), {"ours.weight": "theirs/kernel", "ours.bias": "theirs/bias"}),
        (flax.conv("ours", "theirs"), {"ours.weight": "theirs/kernel", "ours.bias": "theirs/bias"}),
        (flax.norm("ours", "theirs"), {"ours.weight": "theirs/scale", "ours.bias": "theirs/bias"}),
    ],
)
def test_a_layer_has_the_names_of_flax(made: tuple[Rule, ...], names: dict[str, str]) -> None:
    assert {rule.target: rule.sources[0] for rule in made} == names


def test_a_bias_may_have_further_axes_of_length_one() -> None:
    bias = torch.randn(1, 4)
    torch.testing.assert_close(transform(flax.dense("ours", "theirs"), "ours.bias")(bias), bias[0], rtol=0, atol=0)


BESIDE = {
    "": [],
    "opt/target/": ["opt/state/step", "opt/state/param_states/head/bias/momentum", "epoch", "step"],
    "params/": ["opt/0/mu/head/bias", "opt/1/count", "step", "chrono/accum_train_time", "chrono/prev_step"],
    "params/img/": ["params/txt/head/kernel", "params/t", "params/b", "opt/0/mu/img/head/bias", "chrono/prev_step"],
}


@pytest.mark.parametrize("prefix", BESIDE)
def test_training_state_of_a_checkpoint_is_ignored(prefix: str) -> None:
    plain: Any = {"architecture": "none", "settings": lambda tensors, context: {}, "preprocessing": {}}
    layout = Layout(
        name="dense",
        signature=("head/kernel",),
        rules=flax.dense("head", "head"),
        prefixes=flax.PREFIXES,
        **plain,
    )
    kernel, bias, other = torch.randn(3, 2), torch.randn(2), torch.zeros(7)
    content = {f"{prefix}head/kernel": kernel, f"{prefix}head/bias": bias, **dict.fromkeys(BESIDE[prefix], other)}
    tensors = {key: LazyTensor(tuple(t.shape), lambda t=t: t) for key, t in content.items()}
    found = layout.find_prefix(tensors)
    assert found == prefix
    network = {"head.weight": torch.empty(2, 3), "head.bias": torch.empty(2)}
    weights = convert(layout, layout.canonical(tensors, found), network, file="file")
    torch.testing.assert_close(weights["head.weight"], kernel.T, rtol=0, atol=0)
    torch.testing.assert_close(weights["head.bias"], bias, rtol=0, atol=0)
