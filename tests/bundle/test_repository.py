import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.errors import BundleError, ParameterError, UnknownModelError
from vitrine.bundle.manifest import Precision, Task
from vitrine.bundle.repository import Repository


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


def test_get_returns_the_highest_version_by_name_and_task(root: Path) -> None:
    repository = Repository(root)
    assert repository.get(task=Task.CLASSIFICATION).manifest.name == "colours"
    assert repository.get("colours", task=Task.CLASSIFICATION).manifest.version == "2"
    assert repository.get("other", task=Task.CLASSIFICATION).manifest.name == "other"
    assert repository.get(task=Task.DETECTION).manifest.name == "squares"


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (Task.CLASSIFICATION, "cats", "no image-classification model named 'cats' here; available: colours, other"),
        (Task.DETECTION, "colours", "no object-detection model named 'colours' here; available: squares"),
    ],
)
def test_unknown_models(task: Task, name: str, message: str, root: Path) -> None:
    with pytest.raises(UnknownModelError) as caught:
        Repository(root).get(name, task=task)
    assert str(caught.value) == message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected at least one <name>/<version>/manifest\.json, found none"):
        Repository(tmp_path)


def test_one_broken_bundle_is_refused(root: Path) -> None:
    (root / "other" / "1" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"other/1/model\.onnx"):
        Repository(root)


def test_single_file(root: Path) -> None:
    repository = Repository(root / "squares" / "1" / "model.onnx")
    assert list(repository.bundles) == ["squares"]
    assert repository.get(task=Task.DETECTION).manifest.metrics is None
    with pytest.raises(BundleError, match=r"golden\.npz: graph: expected an ONNX graph"):
        Repository(root / "squares" / "1" / "golden.npz")


def names(repository: Repository) -> list[str]:
    return [f"{entry.name}@{entry.version}" for entry in repository.index() if entry.ready]


def copy_version(source: Path, version: str) -> Path:
    hidden, target = source.parent / f".{version}", source.parent / version
    shutil.copytree(source, hidden)
    manifest = json.loads((hidden / "manifest.json").read_text())
    (hidden / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
    hidden.rename(target)
    return target


def corrupt(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")


def test_every_version_is_served(root: Path) -> None:
    repository = Repository(root)
    assert names(repository) == ["colours@1", "colours@2", "other@1", "squares@1"]
    assert repository.get("colours").manifest.version == "2"
    assert repository.get("colours@1").manifest.version == "1"
    assert [bundle.manifest.version for bundle in repository.versions("colours")] == ["1", "2"]
    for reference in (
        "colours@3",
        "colours@",
        "colours@one",
        "@1",
        "",
        "colours@1@1",
        "colours@0",
        "colours@٢",
        "colours@" + "1" * 5000,
    ):
        with pytest.raises(UnknownModelError):
            repository.get(reference)


def test_several_roots(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    copied = Path(shutil.copytree(root / "colours" / "1", elsewhere / "colours" / "1"))
    copy_version(copied, "7")
    shutil.rmtree(copied)
    assert Repository(root, elsewhere).get("colours").manifest.version == "7"
    shutil.copytree(root / "colours" / "1", copied)
    with pytest.raises(BundleError, match="name, version: expected one of each, found the same in"):
        Repository(root, elsewhere)


def test_variants_are_loaded_on_first_use(root: Path) -> None:
    repository = Repository(root)
    bundle = repository.get("colours")
    first = repository.variant(bundle, "int8-dynamic")
    assert first.variant is Precision.INT8_DYNAMIC
    assert repository.variant(bundle, "int8-dynamic") is first
    assert repository.variant(bundle, "fp32") is bundle
    with pytest.raises(ParameterError, match="variant: expected one of fp32, fp16-weights, int8-dynamic, found 'int4'"):
        repository.variant(bundle, "int4")
    (root / "colours" / "2" / "model.fp16-weights.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"model\.fp16-weights\.onnx: size"):
        repository.variant(bundle, "fp16-weights")


def test_refresh_loads_new_and_drops_removed_versions(root: Path) -> None:
    repository = Repository(root)
    assert repository.refresh() == []
    copy_version(root / "colours" / "2", "3")
    shutil.rmtree(root / "other")
    changes = repository.refresh()
    assert [change.split(" in ")[0] for change in changes] == [
        f"gone: other@1, {root / 'other' / '1'}",
        "loaded: colours@3",
    ]
    assert names(repository) == ["colours@1", "colours@2", "colours@3", "squares@1"]


def test_a_broken_new_version_is_refused_once_and_the_old_one_stays(root: Path) -> None:
    repository = Repository(root)
    corrupt(copy_version(root / "colours" / "2", "3"))
    (refused,) = repository.refresh()
    assert refused.startswith(f"refused: {root / 'colours' / '3' / 'model.onnx'}: size: expected")
    assert repository.refresh() == []
    assert repository.get("colours").manifest.version == "2"
    (entry,) = [entry for entry in repository.index() if not entry.ready]
    assert (entry.name, entry.version) == ("colours", "3")
    assert "size: expected" in entry.reason
    shutil.copy(root / "colours" / "2" / "model.onnx", root / "colours" / "3" / "model.onnx")  # repaired
    (loaded,) = repository.refresh()
    assert loaded.startswith("loaded: colours@3")
    assert all(entry.ready for entry in repository.index())


def test_a_bundle_overwritten_by_a_broken_one_stays_loaded(root: Path) -> None:
    repository = Repository(root)
    before = repository.get("colours")
    corrupt(root / "colours" / "2")
    (refused,) = repository.refresh()
    assert refused.startswith("refused: ")
    assert repository.get("colours") is before
    (entry,) = [entry for entry in repository.index() if entry.reason]
    assert entry.ready
    assert entry.reason.startswith("its changed folder is refused: ")


def test_a_missing_root_changes_nothing(root: Path) -> None:
    repository = Repository(root)
    root.rename(root.with_name("away"))
    with pytest.raises(BundleError, match="no such folder"):
        repository.refresh()
    assert len(names(repository)) == 4


def test_an_unloaded_model_stays_unloaded_until_load_and_calls_in_progress_finish(root: Path) -> None:
    repository = Repository(root)
    bundle = repository.get("other")
    repository.unload("other")
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    assert bundle.predictor.network(pixels=pixels)[0].shape == (1, 3)
    os.utime(root / "other" / "1" / "model.onnx")
    assert repository.refresh() == []
    with pytest.raises(UnknownModelError, match="no model named 'other' here; available: colours, squares"):
        repository.get("other")
    with pytest.raises(UnknownModelError):
        repository.unload("other")
    (entry,) = [entry for entry in repository.index() if not entry.ready]
    assert (entry.name, entry.reason) == ("other", "unloaded")
    repository.load("other")
    assert repository.get("other").manifest.name == "other"
    with pytest.raises(UnknownModelError, match="no model named 'cats' here; available: colours, other, squares"):
        repository.load("cats")


def test_load_changes_all_versions_of_one_model_or_none(root: Path) -> None:
    repository = Repository(root)
    copy_version(root / "other" / "1", "2")
    copy_version(root / "colours" / "2", "3")
    corrupt(copy_version(root / "colours" / "2", "4"))
    with pytest.raises(BundleError, match=r"colours/4/model\.onnx: size"):
        repository.load("colours")
    assert names(repository) == ["colours@1", "colours@2", "other@1", "squares@1"]
    shutil.rmtree(root / "colours" / "4")
    repository.load("colours")
    assert names(repository) == ["colours@1", "colours@2", "colours@3", "other@1", "squares@1"]


def test_a_single_file_is_unloaded_and_loaded_by_its_model_name(root: Path) -> None:
    repository = Repository(root / "squares" / "1" / "model.onnx")
    with pytest.raises(ParameterError, match="variant: expected none, as one ONNX file alone is served"):
        repository.variant(repository.get(), "fp32")
    repository.unload("squares")
    assert names(repository) == []
    repository.load("squares")
    assert names(repository) == ["squares@1"]


def test_unfinished_exports_are_ignored(root: Path) -> None:
    shutil.copytree(root / "colours" / "1", root / "colours" / ".export-abc")
    assert len(names(Repository(root))) == 4
