import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vitrine.bundle.errors import BundleError, ParameterError, ResourceError, UnknownModelError
from vitrine.bundle.manifest import Precision, Task
from vitrine.bundle.repository import Repository, RepositoryState

Unprivileged = Callable[[], AbstractContextManager[None]]


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


def truncate(bundle: Path) -> None:
    """Undo `corrupt`."""
    file = bundle / "model.onnx"
    os.truncate(file, file.stat().st_size - 1)


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


def test_explain_graphs_are_loaded_on_first_use(root: Path) -> None:
    repository = Repository(root)
    bundle = repository.get("colours")
    first = repository.explaining(bundle)
    names = [spec.name for spec in bundle.manifest.explanation.outputs]
    assert len(first.predictor.infer([np.zeros((16, 16, 3), np.uint8)])[0]) == len(names) > 1
    assert repository.explaining(bundle) is first
    assert first.manifest == bundle.manifest
    other = Repository(root)
    (bundle.path / "explain.onnx").write_bytes(b"nothing")
    assert repository.explaining(bundle) is first
    with pytest.raises(BundleError, match=r"explain\.onnx: size"):
        other.explaining(other.get("colours"))


def test_a_single_file_has_no_explain_graph(root: Path) -> None:
    repository = Repository(root / "colours" / "1" / "model.onnx")
    assert repository.explaining(repository.get()) is repository.get()


def test_a_variant_is_one_of_the_bundle_that_is_served_not_of_what_lies_in_its_place_since(root: Path) -> None:
    repository = Repository(root)
    bundle = repository.get("colours")
    manifest = root / "colours" / "2" / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "labels": [label.upper() for label in document["labels"]]}))
    with pytest.raises(BundleError, match=r"manifest\.json: expected that of the bundle that is served, found another"):
        repository.variant(bundle, "int8-dynamic")
    repository.refresh()
    renamed = repository.variant(bundle, "int8-dynamic")  # looked up before the change
    assert renamed.manifest.labels == repository.get("colours").manifest.labels != bundle.manifest.labels


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


def test_a_refused_duplicate_is_served_when_the_other_goes_away(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(root / "squares", elsewhere / "squares")
    copied = elsewhere / "squares" / "1"
    (copied / "manifest.json").rename(copied / "manifest")
    repository = Repository(root, elsewhere)
    (copied / "manifest").rename(copied / "manifest.json")
    (refused,) = repository.refresh()
    assert refused.endswith(f"name, version: expected one of each, found the same in {root / 'squares' / '1'}")
    assert repository.get("squares").path == root / "squares" / "1"
    shutil.rmtree(root / "squares")
    gone, loaded = repository.refresh()
    assert (gone.split()[0], loaded.split()[0]) == ("gone:", "loaded:")
    assert repository.get("squares").path == copied


def test_odd_files_among_the_bundles_are_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "fifo")
    os.mkfifo(root / "colours" / "fifo")
    (root / "colours" / "file").touch()
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    (root / "colours" / "loop").symlink_to("loop")
    (root / "other" / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root)  # the path may be too long for a socket
        listener.bind("socket")
        repository = Repository(root)
    assert names(repository) == ["colours@1", "colours@2", "other@1", "squares@1"]
    assert repository.refresh() == []
    with pytest.raises(BundleError, match="bundles: expected a folder of <name>/<version>, found no such folder"):
        Repository(root / "fifo")


def test_a_model_folder_that_cannot_be_listed_changes_nothing(root: Path, unprivileged: Unprivileged) -> None:
    repository = Repository(root)
    (root / "lost+found").mkdir(mode=0)  # cannot be a model's
    (root / "other").chmod(0)
    copy_version(root / "colours" / "2", "3")
    with unprivileged(), pytest.raises(BundleError, match=r"other: bundles: .*, found Permission denied"):
        repository.refresh()
    assert len(names(repository)) == 4
    (root / "other").chmod(0o755)
    with unprivileged():
        assert len(repository.refresh()) == 1
    root.chmod(0)
    with unprivileged(), pytest.raises(BundleError, match="found Permission denied"):
        repository.refresh()
    root.chmod(0o755)


@pytest.mark.parametrize("name", ["", "manifest.json", "model.onnx"])
def test_a_version_that_may_not_be_read_is_refused_until_it_may(
    name: str, root: Path, unprivileged: Unprivileged
) -> None:
    repository = Repository(root)
    file = copy_version(root / "colours" / "2", "3") / name
    mode = file.stat().st_mode
    file.chmod(0)
    with unprivileged():
        (refused,) = repository.refresh()
        assert refused.startswith(f"refused: {root / 'colours' / '3'}")
        assert "ermission denied" in refused
        assert repository.refresh() == []
        file.chmod(mode)
        (loaded,) = repository.refresh()
    assert loaded.startswith("loaded: colours@3")


def test_a_refused_bundle_is_tried_again_in_intervals(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason need not be in its files: here, it is a file elsewhere that a link names."""
    monkeypatch.setattr("vitrine.bundle.repository._FIRST_PAUSE", 0.0)
    repository = Repository(root)
    graph = copy_version(root / "colours" / "2", "3") / "model.onnx"
    hidden = graph.rename(root / "hidden")
    graph.symlink_to(hidden)
    hidden.chmod(0o644)
    content, times = hidden.read_bytes(), (hidden.stat().st_atime_ns, hidden.stat().st_mtime_ns)
    hidden.write_bytes(bytes(len(content)))
    os.utime(hidden, ns=times)
    assert len(repository.refresh()) == 1
    assert repository.refresh() == []  # the same reason
    hidden.write_bytes(content)
    os.utime(hidden, ns=times)
    (loaded,) = repository.refresh()
    assert loaded.startswith("loaded: colours@3")


def test_too_many_open_files_change_nothing(root: Path) -> None:
    repository = Repository(root)
    copy_version(root / "colours" / "2", "3")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = os.open(root, os.O_RDONLY)
    os.close(opened)  # the lowest that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, hard))
    try:
        with pytest.raises(ResourceError, match="found the process out of file descriptors"):
            repository.refresh()
        assert len(names(repository)) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(repository.refresh()) == 1


def test_another_process_follows_the_state(root: Path) -> None:
    leader, follower = Repository(root), Repository(root)
    corrupt(copy_version(root / "other" / "1", "2"))
    copy_version(root / "colours" / "2", "3")
    shutil.rmtree(root / "colours" / "1")
    leader.refresh()
    leader.unload("squares")
    changes = follower.follow(leader.state)
    assert [change.split()[0] for change in changes] == ["loaded:", "gone:", "gone:"]
    assert follower.index() == leader.index()
    assert Repository(root, state=leader.state).index() == leader.index()
    for repository in (follower, leader):
        repository.load("squares")
    assert follower.state == leader.state


def test_a_follower_keeps_what_it_serves_if_the_files_have_changed(root: Path) -> None:
    leader, follower = Repository(root), Repository(root)
    os.utime(root / "colours" / "2" / "model.onnx")
    leader.refresh()
    before = follower.get("colours")
    corrupt(root / "colours" / "2")
    assert follower.follow(leader.state) == []
    assert follower.get("colours") is before
    (error,) = follower.errors.values()
    assert (
        error == f"{root / 'colours' / '2'}: files: expected those found before, found others: they are being changed"
    )
    (entry,) = [entry for entry in follower.index() if entry.reason]
    assert (entry.ready, entry.reason) == (True, error)


def test_a_process_that_starts_with_damaged_files_says_so_instead_of_serving_another_model(root: Path) -> None:
    leader = Repository(root)
    for name, version in (("colours", "2"), ("squares", "1")):
        corrupt(root / name / version)
    late = Repository(root, state=leader.state)
    assert [f"{entry.name}@{entry.version}" for entry in late.index() if not entry.ready] == ["colours@2", "squares@1"]
    assert list(late.bundles) == list(late.models) == ["colours", "other"]
    for get in (
        partial(late.get, "colours@2"),
        partial(late.get, "squares"),
        partial(late.get, "squares@1"),
        partial(late.get, task=Task.DETECTION),
    ):
        with pytest.raises(BundleError, match="files: expected those found before, found others") as caught:
            get()
        assert caught.value.__cause__ is caught.value.__context__ is None
    assert late.get("colours").manifest.version == "1"  # the highest that this process has
    with pytest.raises(UnknownModelError, match=r"no model named 'colours@3' here; available: colours@2, colours@1"):
        late.get("colours@3")
    with pytest.raises(UnknownModelError, match="no image-classification model named 'squares'"):
        late.get("squares", task=Task.CLASSIFICATION)
    late.refresh(paths=late.errors)
    with pytest.raises(BundleError, match=r"squares/1/model\.onnx: size: expected"):
        late.get("squares")
    leader.follow(late.state)
    assert leader.get("squares").manifest.name == "squares"
    late.unload("squares")
    with pytest.raises(UnknownModelError):
        late.get("squares")
    truncate(root / "colours" / "2")
    late.refresh(paths=late.errors)
    assert late.get("colours").manifest.version == "2"
    assert not late.errors


def test_a_change_that_cannot_be_published_does_not_happen(root: Path) -> None:
    repository = Repository(root)
    copy_version(root / "colours" / "2", "3")
    before = repository.index()

    def publish(state: RepositoryState) -> None:
        assert len(state.served) == 5
        assert repository.index() == before
        raise OSError("the disk is full")

    for change in (repository.refresh, partial(repository.load, "colours")):
        with pytest.raises(OSError, match="the disk is full"):
            change(publish)
        assert repository.index() == before


def test_names_that_are_not_utf_8_are_refused_in_printable_text(root: Path) -> None:
    repository = Repository(root)
    shutil.copytree(root / "other", root / os.fsdecode(b"caf\xe9"))
    (refused,) = repository.refresh()
    assert r"caf\udce9" in refused
    assert repository.index()[0].name == r"caf\udce9"


CHURN = """
import itertools, random, shutil, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
files = sorted(source.iterdir())
for i in itertools.count():
    version = target / random.choice("23456")
    if version.exists():
        shutil.rmtree(version)
    else:
        version.mkdir()
        for file in files[: random.randint(0, len(files))]:
            shutil.copy(file, version)
"""


@pytest.mark.parametrize("refreshes", [100, pytest.param(1747, marks=pytest.mark.soak)])
def test_refreshing_beside_a_process_that_adds_and_removes_versions_never_fails(refreshes: int, root: Path) -> None:
    repository = Repository(root)
    command = [sys.executable, "-c", CHURN, str(root / "colours" / "2"), str(root / "other")]
    stopped = threading.Event()

    def read() -> int:
        count = 0
        while not stopped.is_set():
            assert {entry.version for entry in repository.index() if entry.name == "colours"} == {"1", "2"}
            assert repository.get("colours").manifest.version == "2"
            count += len(repository.models)
        return count

    with ThreadPoolExecutor(1) as pool, subprocess.Popen(command) as churn:
        reader = pool.submit(read)
        try:
            changes = [change for _ in range(refreshes) for change in repository.refresh()]
            assert churn.poll() is None
        finally:
            stopped.set()
            churn.kill()
    assert any("refused" in change for change in changes)
    assert reader.result()
    shutil.rmtree(root / "other")
    repository.refresh()
    assert names(repository) == ["colours@1", "colours@2", "squares@1"]


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [((), "colours"), (("squares",), "squares"), (("imagenet", "squares", "colours"), "squares"), (("x",), "colours")],
)
def test_default_model(defaults: tuple[str, ...], expected: str, root: Path) -> None:
    repository = Repository(root, defaults=defaults)
    assert repository.get().manifest.name == expected
    assert repository.get("colours").manifest.name == "colours"
    assert repository.get(task=Task.CLASSIFICATION).manifest.name == "colours"  # another task's default does not answer
    assert repository.defaults() == {"colours", "squares"}
