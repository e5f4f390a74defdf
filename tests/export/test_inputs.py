"""Inputs of an export's checks: generated images, and the network's inputs made of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from vitrine.bundle.manifest import DetectionPreprocessing, Task
from vitrine.export.inputs import chosen_by, generated_images, make_inputs, trace_size
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.data.layouts import load_split


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


def test_images_that_training_chose_by_are_known(classifier_run: Path, colours: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(classifier_run)
    assert checkpoint.progress is not None
    test, val = (replace(load_split(colours, Task.CLASSIFICATION, "train"), split=split) for split in ("test", "val"))
    kept = checkpoint.progress.read_recipe().derive(keep="best", held_out=None).model_dump(mode="json")
    best = replace(checkpoint, temperature=2.0, progress=replace(checkpoint.progress, recipe=kept))
    assert chosen_by(val, best) == "the best epoch and the calibration of its scores"
    assert chosen_by(test, best) == ""
    assert chosen_by(replace(val, name="others"), best) == ""
    apart = best.progress.read_recipe().derive(held_out=0.1).model_dump(mode="json")
    assert chosen_by(val, replace(best, progress=replace(best.progress, recipe=apart))) == ""
    assert chosen_by(val, replace(best, progress=None)) == ""
