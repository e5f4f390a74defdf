"""Parity: a difference raises an error that says where it begins."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrine.bundle.manifest import Preprocessing
from vitrine.bundle.tolerances import PARITY
from vitrine.export.errors import ParityError
from vitrine.export.parity import check_parity
from vitrine.models.serving import ServedClassifier, ServedDetector, served
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.data.layouts import load_split

Case = tuple[ServedClassifier | ServedDetector, Path, list[Image.Image], Preprocessing]


@pytest.fixture
def make_case(
    classifier_run: Path, detector_run: Path, tiny_bundles: Path, colours: Path, squares: Path
) -> Callable[[str], Case]:
    """Return a run's torch network, its exported graph, and images, by the bundle's name."""

    def make(name: str) -> Case:
        run, data = {"colours": (classifier_run, colours), "squares": (detector_run, squares)}[name]
        checkpoint = load_checkpoint(run)
        preprocessing = checkpoint.read_preprocessing()
        module = served(checkpoint.build(), preprocessing.mean, preprocessing.std, checkpoint.temperature).eval()
        images = load_split(data, checkpoint.task, "test")
        file = tiny_bundles / name / "1" / "model.onnx"
        return module, file, [images.image(i) for i in range(8)], preprocessing

    return make


@pytest.fixture(params=["colours", "squares"])
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """Case of each tiny bundle."""
    return make_case(request.param)


def test_both_runtimes_agree(case: Case) -> None:
    module, file, images, preprocessing = case
    parity = check_parity(module, file, images, preprocessing, "toys")
    assert (parity.data, parity.images, parity.top1_agreement) == ("toys", 8, 1.0)
    names = {name for name in module.output_names if name != "class_ids"}
    assert parity.max_abs_diff.keys() == parity.max_rel_diff.keys() == names
    assert all(0 <= value <= PARITY for value in parity.max_abs_diff.values())
    assert any(value > 0 for value in parity.max_rel_diff.values())


def test_a_wrong_constant_is_found_where_it_is(case: Case) -> None:
    module, file, images, preprocessing = case
    module.normalise.shift += 0.5
    with pytest.raises(
        ParityError, match=rf"expected <= {PARITY}, found \d.*; it begins in normalise \(Normalise\), which differs by"
    ):
        check_parity(module, file, images, preprocessing, "toys")


@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        ("colours", "blocks.1.mlp.fc1", r"network\.blocks\.1\.mlp\.fc1 \(Linear\)"),
        ("squares", "decoder.1.linear2", r"network\.decoder\.1\.linear2 \(Linear\)"),
        ("squares", "backbone.stages.0.0.conv2", r"network\.backbone\.stages\.0\.0 \(BasicBlock\)"),
    ],
)
def test_the_first_diverging_part_is_named(name: str, part: str, found: str, make_case: Callable[[str], Case]) -> None:
    module, file, images, preprocessing = make_case(name)
    with torch.no_grad():
        module.network.get_submodule(part).weight.mul_(3)
    with pytest.raises(ParityError, match=f"it begins in {found}"):
        check_parity(module, file, images, preprocessing, "toys")
