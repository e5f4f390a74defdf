import gzip
import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitrine.bundle.manifest import Task
from vitrine.models.training.data.dataset import ClassificationData
from vitrine.models.training.data.fetch import SOURCES, Archive, Source, fetch
from vitrine.models.training.data.layouts import has_split, load_split
from vitrine.models.training.errors import DataError

RANDOM = np.random.default_rng(0)


def make_source(server: Any, prepare: Callable[[Sequence[Path], Path], Path], **files: bytes) -> Source:
    """Data source with these archives; "__" in their names stands for a dot."""
    archives = []
    for key, content in files.items():
        name = key.replace("__", ".")
        server.files[f"/{name}"] = content
        archives.append(Archive(f"{server.url}/{name}", hashlib.md5(content).hexdigest()))
    return Source("toys", tuple(archives), prepare, "Ours.")


def tape(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "PNG")
    return buffer.getvalue()


FOLDERS = {f"toys/{split}/{label}/a.png": png() for split in ("train", "val") for label in ("cat", "dog")}
UNPACK = SOURCES["imagenette160"].prepare.func  # type: ignore[attr-defined]
TOYS = partial(UNPACK, root="toys")
NOISE = RANDOM.bytes(300_000)


def load(path: Path, split: str) -> ClassificationData:
    data = load_split(path, Task.CLASSIFICATION, split)
    assert isinstance(data, ClassificationData)
    return data


@pytest.mark.parametrize(("name", "content"), [("toys__tgz", tape(FOLDERS)), ("toys__zip", zipped(FOLDERS))])
def test_a_data_set_is_fetched_once(file_server: Any, tmp_path: Path, name: str, content: bytes) -> None:
    source = make_source(file_server, TOYS, **{name: content})
    assert fetch(source, tmp_path / "data" / "toys", show=False)
    assert load(tmp_path / "data" / "toys", "val").class_ids.tolist() == [0, 1]
    assert (tmp_path / "data" / "toys" / "SOURCE.txt").read_text() == source.description
    assert file_server.url in source.description
    assert os.listdir(tmp_path / "data") == ["toys"]
    assert not fetch(source, tmp_path / "data" / "toys", show=False)
    assert len(file_server.asked) == 1


def test_a_folder_with_something_else_is_left_alone(file_server: Any, tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "mine.txt").touch()
    with pytest.raises(DataError, match=r"toys: expected no such folder, or toys as it was fetched"):
        fetch(make_source(file_server, TOYS, toys__tgz=tape(FOLDERS)), tmp_path / "toys", show=False)
    assert file_server.asked == []


def keep(files: Sequence[Path], folder: Path) -> Path:
    (folder / "content").write_bytes(files[0].read_bytes())
    return folder


def test_a_broken_connection_is_resumed(file_server: Any, tmp_path: Path) -> None:
    file_server.breaks_after = 120_000
    assert fetch(make_source(file_server, keep, noise=NOISE), tmp_path / "out", show=False)
    assert (tmp_path / "out" / "content").read_bytes() == NOISE
    assert file_server.asked == [("/noise", None), ("/noise", "bytes=120000-"), ("/noise", "bytes=240000-")]


def test_a_later_attempt_resumes(file_server: Any, tmp_path: Path) -> None:
    source = make_source(file_server, keep, one=b"first", noise=NOISE)
    part = tmp_path / ".out.partial" / "noise.part"
    part.parent.mkdir()
    part.write_bytes(NOISE[:1000])
    file_server.breaks_after = 0
    with pytest.raises(DataError, match=r"/one: the connection broke; try again: the download resumes"):
        fetch(source, tmp_path / "out", show=False)
    file_server.breaks_after = None
    fetch(source, tmp_path / "out", show=False)
    assert (tmp_path / "out" / "content").read_bytes() == b"first"
    assert file_server.asked[-1] == ("/noise", "bytes=1000-")


def test_a_wrong_checksum(file_server: Any, tmp_path: Path) -> None:
    source = make_source(file_server, keep, noise=NOISE)
    file_server.files["/noise"] = NOISE[:-1] + b"x"
    with pytest.raises(DataError, match=r"noise: expected the MD5 checksum .*, found .*; the file was removed"):
        fetch(source, tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / ".out.partial") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk(file_server: Any, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "noise.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"the disk is full; make room and fetch again"):
        fetch(make_source(file_server, keep, noise=NOISE), tmp_path / "out", show=False)


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "toys/../../evil.txt"])
@pytest.mark.parametrize("pack", [tape, zipped])
def test_archives_that_write_elsewhere(
    file_server: Any, tmp_path: Path, name: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    content = {**FOLDERS, name: b"evil"}
    source = (
        make_source(file_server, TOYS, toys__zip=pack(content))
        if pack is zipped
        else make_source(file_server, TOYS, toys=pack(content))
    )
    if pack is tape and name == "/evil.txt":  # tar takes it as a name below the folder
        fetch(source, tmp_path / "a" / "out", show=False)
    else:
        with pytest.raises(
            DataError, match=r"expected its archives as they are known, found: .*outside the destination"
        ):
            fetch(source, tmp_path / "a" / "out", show=False)
        assert not (tmp_path / "a" / "out").exists()
    assert not list(tmp_path.rglob("evil.txt"))
    assert not Path("/evil.txt").exists()


@pytest.mark.parametrize("name", ["toys__tgz", "toys__zip", "toys__tar"])
def test_archives_of_another_format(file_server: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="toys: expected its archives as they are known"):
        fetch(make_source(file_server, TOYS, **{name: b"no archive"}), tmp_path / "out", show=False)


@pytest.mark.parametrize(("name", "ids"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_keeps_its_pixels(file_server: Any, tmp_path: Path, name: str, ids: int) -> None:
    settings = SOURCES[name].prepare.keywords  # type: ignore[attr-defined]
    records = RANDOM.integers(0, 256, (4, ids + 3072), np.uint8)
    records[:, :ids] = [[9] * (ids - 1) + [label] for label in (2, 0, 1, 2)]
    labels = b"cat\ndog\nhorse\n\n"
    files = {f"{settings['root']}/{part}": records.tobytes() for part in settings["train"]}
    files[f"{settings['root']}/{settings['test']}"] = records[:2].tobytes()
    files[f"{settings['root']}/{settings['labels']}"] = labels
    fetch(make_source(file_server, SOURCES[name].prepare, cifar__tar__gz=tape(files)), tmp_path / "out", show=False)
    train, test = load(tmp_path / "out", "train"), load(tmp_path / "out", "test")
    assert train.labels == ("cat", "dog", "horse")
    assert train.class_ids.tolist() == [2, 0, 1, 2] * len(settings["train"])
    assert test.class_ids.tolist() == [2, 0]
    pixels = np.asarray(test.image(1))
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1).ravel(), records[1, ids:])


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(edge.to_bytes(4, "big") for edge in values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_keeps_its_pixels(file_server: Any, tmp_path: Path, name: str) -> None:
    images, class_ids = RANDOM.integers(0, 256, (5, 28, 28)), np.array([9, 0, 3, 3, 1])
    files = {"a__gz": images, "b__gz": class_ids, "c__gz": images[:2], "d__gz": class_ids[:2]}
    source = make_source(file_server, SOURCES[name].prepare, **{key: idx(values) for key, values in files.items()})
    fetch(source, tmp_path / "out", show=False)
    train, test = load(tmp_path / "out", "train"), load(tmp_path / "out", "test")
    assert (train.class_ids.tolist(), len(test), len(train.labels)) == ([9, 0, 3, 3, 1], 2, 10)
    np.testing.assert_array_equal(np.asarray(train.image(4)), np.repeat(images[4, ..., None], 3, axis=-1))


def test_pets_get_lists(file_server: Any, tmp_path: Path) -> None:
    images = tape(
        {f"images/{name}.jpg": png() for name in ("Abyssinian_1", "american_bulldog_2", "american_bulldog_3")}
    )
    lists = {
        "annotations/trainval.txt": b"american_bulldog_2 2 2 1\nAbyssinian_1 1 1 1\n",
        "annotations/test.txt": b"american_bulldog_3 2 2 1\n",
    }
    source = make_source(file_server, SOURCES["pets"].prepare, images__tar__gz=images, lists__tar__gz=tape(lists))
    fetch(source, tmp_path / "out", show=False)
    assert load(tmp_path / "out", "train").labels == ("Abyssinian", "american bulldog")
    assert load(tmp_path / "out", "train").class_ids.tolist() == [1, 0]
    assert load(tmp_path / "out", "test").class_ids.tolist() == [1]


def test_voc_archives_are_merged(file_server: Any, tmp_path: Path) -> None:
    def part(split: str) -> bytes:
        tag = (
            "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>6</xmax><ymax>4</ymax></bndbox></object>"
        )
        root = "VOCdevkit/VOC2007"
        files = {
            f"{root}/ImageSets/Main/{split}.txt": split.encode(),
            f"{root}/JPEGImages/{split}.jpg": png(),
            f"{root}/Annotations/{split}.xml": f"<annotation>{tag}</annotation>".encode(),
        }
        return tape(files, "w")

    source = make_source(file_server, SOURCES["voc2007"].prepare, a__tar=part("train"), b__tar=part("test"))
    fetch(source, tmp_path / "out", show=False)
    assert [has_split(tmp_path / "out", split, Task.DETECTION) for split in ("train", "val", "test")] == [
        True,
        False,
        True,
    ]
    assert load_split(tmp_path / "out", Task.DETECTION, "test").labels == ("dog",)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_names_its_origin(name: str) -> None:
    source = SOURCES[name]
    assert all(re.fullmatch(r"[0-9a-f]{32}", archive.md5) for archive in source.archives)
    assert all(re.fullmatch(r"https?://[\w.-]+/\S+\.(gz|tgz|tar|zip)", archive.url) for archive in source.archives)
    assert len({archive.name for archive in source.archives}) == len(source.archives)
    assert source.name == name
    assert source.terms.endswith(".")
