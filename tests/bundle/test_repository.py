import json
import shutil
from pathlib import Path

import pytest

from bundle.errors import BundleError, UnknownModelError
from bundle.manifest import Task
from bundle.repository import Repository


@pytest.fixture
def root(tiny_bundles: Path, tmp_path: Path) -> Path:
    """colours/1, colours/2, other/1 (a copy of colours) and squares/1."""
    for name, version, source in (("colours", "1", "colours"), ("colours", "2", "colours"), ("other", "1", "colours")):
        target = tmp_path / name / version
        shutil.copytree(tiny_bundles / source / "1", target)
        manifest = json.loads((target / "manifest.json").read_text())
        (target / "manifest.json").write_text(json.dumps({**manifest, "name": name, "version": version}))
    shutil.copytree(tiny_bundles / "squares", tmp_path / "squares")
    return tmp_path


def test_the_highest_version_of_each_name_by_task(root: Path) -> None:
    repository = Repository(root)
    assert repository.get(Task.CLASSIFICATION).manifest.name == "colours"
    assert repository.get(Task.CLASSIFICATION, "colours").manifest.version == "2"
    assert repository.get(Task.CLASSIFICATION, "other").manifest.name == "other"
    assert repository.get(Task.DETECTION).manifest.name == "squares"


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (Task.CLASSIFICATION, "cats", "no image-classification model named 'cats' here; available: colours, other"),
        (Task.DETECTION, "colours", "no object-detection model named 'colours' here; available: squares"),
    ],
)
def test_what_is_not_there(task: Task, name: str, message: str, root: Path) -> None:
    with pytest.raises(UnknownModelError) as caught:
        Repository(root).get(task, name)
    assert str(caught.value) == message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected at least one <name>/<version>/manifest\.json, found none"):
        Repository(tmp_path)


def test_one_broken_bundle_is_refused(root: Path) -> None:
    (root / "other" / "1" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"other/1/model\.onnx"):
        Repository(root)


def test_one_file_alone(root: Path) -> None:
    repository = Repository(root / "squares" / "1" / "model.onnx")
    assert list(repository.bundles) == ["squares"]
    assert repository.get(Task.DETECTION).manifest.metrics is None
    with pytest.raises(BundleError, match=r"golden\.npz: graph: expected an ONNX graph"):
        Repository(root / "squares" / "1" / "golden.npz")
