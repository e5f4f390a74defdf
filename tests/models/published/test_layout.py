"""Conversion is strict: all mismatches are reported at once, and matching tensors are converted exactly."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.published.errors import MismatchError, WeightsError
from vitrine.models.published.files import LazyTensor
from vitrine.models.published.layout import Layout, Rule, convert, count, rule, rules

OTHER: dict[str, Any] = {"architecture": "none", "settings": lambda tensors, context: {}, "preprocessing": {}}
LAYOUT = Layout(
    name="a test's",
    signature=("first.weight", "units.1.fused"),
    aliases=((r"^begin\.", "first."),),
    ignored=(r".*\.num_batches_tracked",),
    rules=(
        *rules("stem", "first"),
        rule("blocks.{i}.left", "units.{i1}.fused", transform=lambda fused: fused.chunk(2)[0]),
        rule("blocks.{i}.right", "units.{i1}.fused", transform=lambda fused: fused.chunk(2)[1]),
        rule("blocks.{i}.joined", "units.{i1}.a", "units.{i1}.b", transform=lambda a, b: torch.cat((a, b))),
        rule("blocks.{i}.cells.{j}", "units.{i1}.cell{j1:02d}", transform=lambda x: x.permute(2, 0, 1)),
    ),
    **OTHER,
)
NETWORK = {
    "stem.weight": (4, 3),
    "stem.bias": (4,),
    **{f"blocks.{i}.left": (2, 3) for i in range(2)},
    **{f"blocks.{i}.right": (2, 3) for i in range(2)},
    **{f"blocks.{i}.joined": (5,) for i in range(2)},
    **{f"blocks.{i}.cells.{j}": (4, 2, 3) for i in range(2) for j in range(2)},
}
FILE = {
    "first.weight": (4, 3),
    "first.bias": (4,),
    **{f"units.{i}.fused": (4, 3) for i in (1, 2)},
    **{f"units.{i}.a": (2,) for i in (1, 2)},
    **{f"units.{i}.b": (3,) for i in (1, 2)},
    **{f"units.{i}.cell{j:02d}": (2, 3, 4) for i in (1, 2) for j in (1, 2)},
}


def lazy(content: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    return {key: LazyTensor(tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in content.items()}


def content(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: torch.randn(shape).to(dtype) for key, shape in FILE.items()}


def network() -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in NETWORK.items()}


def run(found: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return convert(LAYOUT, lazy(found), network(), file="weights.pth", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_tensor_of_the_network_comes_from_the_file(dtype: torch.dtype) -> None:
    found = content(dtype)
    weights = run(found)
    assert {key: tuple(weight.shape) for key, weight in weights.items()} == NETWORK
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    expected = {
        "stem.weight": found["first.weight"],
        "blocks.1.left": found["units.2.fused"][:2],
        "blocks.1.right": found["units.2.fused"][2:],
        "blocks.0.joined": torch.cat((found["units.1.a"], found["units.1.b"])),
        "blocks.1.cells.0": torch.stack([found["units.2.cell01"][..., k] for k in range(4)]),
        "blocks.0.cells.1": torch.stack([found["units.1.cell02"][..., k] for k in range(4)]),
    }
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor.float(), rtol=0, atol=0)


def test_a_weight_is_saved_without_its_base_storage() -> None:
    for weight in run(content()).values():
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_weights_do_not_share_memory_with_one_another() -> None:
    weights = list(run(content()).values())
    assert len({weight.data_ptr() for weight in weights}) == len(weights)


subset = st.sets(st.sampled_from(sorted(FILE)))


@settings(deadline=None)
@given(missing=subset, unexpected=st.sets(st.from_regex(r"further\.[a-z]{1,5}", fullmatch=True)), odd=subset)
def test_all_that_does_not_fit_is_listed_at_once(missing: set[str], unexpected: set[str], odd: set[str]) -> None:
    odd = odd - missing
    found = {key: torch.zeros((7, 7, 7) if key in odd else shape) for key, shape in FILE.items() if key not in missing}
    found |= {key: torch.zeros(1) for key in unexpected}
    if not missing and not unexpected and not odd:
        assert run(found).keys() == NETWORK.keys()
        return
    with pytest.raises(MismatchError) as caught:
        run(found)
    lines = str(caught.value).split("\n  ")

    def listed(label: str) -> set[str]:
        line = next((line for line in lines if line.startswith(label)), label)
        return set(line.removeprefix(label).split(", ")) - {""}

    assert listed("missing in the file: ") == missing
    assert listed("unexpected in the file: ") == unexpected
    of_shapes = [line.split(": expected shape ")[0].split(", ") for line in lines if ": expected shape " in line]
    named = {key for keys in of_shapes for key in keys}
    assert odd & named == {key for key in odd if partner(key) not in missing}
    assert not named & missing
    assert "weights.pth" in lines[0]
    assert "a test's" in lines[0]


def partner(key: str) -> str:
    """The other source of the same tensor: without it, the shape is unknown."""
    if key.endswith((".a", ".b")):
        return key[:-1] + ("b" if key.endswith("a") else "a")
    return key


def test_shape_mismatches_report_expected_and_found() -> None:
    found = content() | {"first.weight": torch.zeros(5, 3), "units.1.cell01": torch.zeros(2, 3)}
    with pytest.raises(MismatchError) as caught:
        run(found)
    message = str(caught.value)
    assert "first.weight: expected shape (4, 3), found (5, 3)" in message
    assert "units.1.cell01: expected shape (4, 2, 3), found (2, 3)" in message


def test_a_part_that_the_layout_does_not_have_is_missing() -> None:
    further = network() | {"class_token": torch.empty(1, device="meta")}
    with pytest.raises(MismatchError, match=r"a source of our class_token"):
        convert(LAYOUT, lazy(content()), further, file="weights.pth")


def test_what_is_skipped_may_be_absent_misshapen_or_unknown() -> None:
    found = content()
    del found["first.bias"]
    found["first.weight"] = torch.zeros(9, 9)
    further = network() | {"class_token": torch.empty(1, device="meta")}
    skip = ["stem.weight", "stem.bias", "class_token"]
    weights = convert(LAYOUT, lazy(found), further, file="weights.pth", skip=skip)
    assert weights.keys() == further.keys() - set(skip)


def test_keys_of_no_use_are_not_unexpected() -> None:
    assert run(content() | {"units.1.num_batches_tracked": torch.tensor(3)}).keys() == NETWORK.keys()


def test_a_skipped_half_does_not_hide_that_the_other_half_is_missing() -> None:
    found = content()
    del found["units.1.fused"]
    with pytest.raises(MismatchError, match=r"missing in the file: units\.1\.fused$"):
        run(found, skip=["blocks.0.left"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["first.bias", "units.2.fused"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: float) -> None:
    found = content()
    found[key].view(-1)[0] = value
    with pytest.raises(WeightsError, match=f"weights.pth: {key}: expected finite numbers"):
        run(found)


def test_half_precision_that_overflowed_is_refused() -> None:
    found = content(torch.float16)
    found["first.weight"] = (torch.ones(4, 3) * 1e5).half()
    with pytest.raises(WeightsError, match=r"first\.weight: expected finite numbers"):
        run(found)


@settings(deadline=None)
@given(prefix=st.sampled_from(["", "module.", "_orig_mod.", "model."]), alias=st.booleans())
def test_a_prefix_before_every_key_is_found_and_taken_away(prefix: str, alias: bool) -> None:
    plain = content()
    keys = {key: key.replace("first.", "begin.") if alias else key for key in plain}
    tensors = lazy({f"{prefix}{keys[key]}": tensor for key, tensor in plain.items()})
    assert LAYOUT.find_prefix(tensors) == prefix
    assert LAYOUT.canonical(tensors, prefix).keys() == plain.keys()


def test_a_file_without_the_signature_is_not_of_the_layout() -> None:
    found = content()
    del found["units.1.fused"]
    assert LAYOUT.find_prefix(lazy(found)) is None


@pytest.mark.parametrize("key", ["first.weight", "begin.weight", "further.weight"])
def test_a_key_outside_the_prefix_is_unexpected(key: str) -> None:
    tensors = lazy({f"module.{key}": tensor for key, tensor in content().items()} | {key: torch.zeros(4, 3)})
    assert LAYOUT.find_prefix(tensors) == "module."
    with pytest.raises(MismatchError, match="unexpected in the file: "):
        convert(LAYOUT, LAYOUT.canonical(tensors, "module."), network(), file="weights.pth")


def test_two_names_of_one_tensor_are_not_both_taken() -> None:
    tensors = LAYOUT.canonical(lazy(content() | {"begin.weight": torch.zeros(4, 3)}), "")
    with pytest.raises(MismatchError, match=r"unexpected in the file: begin\.weight"):
        convert(LAYOUT, tensors, network(), file="weights.pth")


@settings(deadline=None)
@given(i=st.integers(0, 120), j=st.integers(0, 120))
def test_indices_count_from_zero_in_our_names_and_from_either_in_theirs(i: int, j: int) -> None:
    made = Rule("blocks.{i}.{j}.weight", ("block{i1}/unit{j1:02d}/kernel", "{i}.{j}"), lambda x: x)
    assert made.source_names(f"blocks.{i}.{j}.weight") == [f"block{i + 1}/unit{j + 1:02d}/kernel", f"{i}.{j}"]
    assert made.source_names(f"blocks.{i}.{j}.weights") is None
    assert made.source_names(f"blocks.{i}.weight") is None
    assert made.source_names(f"blocksX{i}.{j}.weight") is None


@settings(deadline=None)
@given(number=st.integers(0, 30), start=st.sampled_from(["n", "n1"]))
def test_tensors_are_counted_up_to_the_first_that_is_missing(number: int, start: str) -> None:
    template = "stage{s}.unit{" + start + "}.weight"
    names = [template.format(s=2, n=i, n1=i + 1) for i in range(number)]
    beyond = template.format(s=2, n=number + 1, n1=number + 2)
    tensors = lazy({name: torch.zeros(1) for name in [*names, beyond]})
    assert count(tensors, template, s=2) == number


def test_known_share_distinguishes_near_from_far_files() -> None:
    far = {f"somewhere.{i}": torch.zeros(1) for i in range(5)}
    half = content() | {f"somewhere.{i}": torch.zeros(1) for i in range(len(FILE))}
    assert LAYOUT.known_share(lazy(content())) == 1
    assert LAYOUT.known_share(lazy(half)) == pytest.approx(0.5)
    assert LAYOUT.known_share(lazy(far)) == 0
    assert LAYOUT.known_share({}) == 0
