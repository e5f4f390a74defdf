"""Inputs of an export's checks: generated images, and the network's inputs made of them."""

from pathlib import Path

import pytest

from vitrine.bundle.manifest import DetectionPreprocessing
from vitrine.export.inputs import generated_images, make_inputs, trace_size
from vitrine.models.training.checkpoint import load_checkpoint


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_generated_images_are_reproducible_and_of_the_traced_size(
    name: str, classifier_run: Path, detector_run: Path
) -> None:
    preprocessing = load_checkpoint({"colours": classifier_run, "squares": detector_run}[name]).read_preprocessing()
    first, again = (generated_images(3, preprocessing) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert len({image.tobytes() for image in first}) == 3
    assert {image.size[::-1] for image in first} == {trace_size(preprocessing)}
    inputs = make_inputs(first, preprocessing)
    assert inputs["pixels"].shape[0] == 3
    assert ("sizes" in inputs) == isinstance(preprocessing, DetectionPreprocessing)
