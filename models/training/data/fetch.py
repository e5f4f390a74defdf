"""Download public data sets from their authors' servers, verify them and convert them to a layout of `data.layouts`.

OUT/                the data set, created once it is complete; SOURCE.txt names its origin
.OUT.partial/       files downloaded so far; the next attempt resumes from there
"""

import csv
import errno
import gzip
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.models.download import Checksum, DownloadError, download
from vitrine.models.training.data.classification_layouts import write_packed
from vitrine.models.training.errors import DataError

_SOURCE_FILE = "SOURCE.txt"


@dataclass(frozen=True)
class Archive:
    """A file to download."""

    url: str
    md5: str  # as published by its authors or torchvision

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True)
class Source:
    """A public data set."""

    name: str
    archives: tuple[Archive, ...]
    prepare: Callable[[Sequence[Path], Path], Path]  # archives, empty folder -> folder of the data set
    terms: str

    @property
    def description(self) -> str:
        files = "\n".join(f"{archive.url}  md5 {archive.md5}" for archive in self.archives)
        return f"{self.name}\n{self.terms}\n{files}\n"


def fetch(source: Source, out: Path, *, show: bool = True) -> bool:
    """Download the data set `source` to `out`.

    Args:
        source: one of `SOURCES`.
        out: folder to create.
        show: whether to show progress.

    Returns:
        Whether anything was downloaded.

    Raises:
        DataError: it cannot be downloaded, its checksum differs, the disk is full, or `out` contains something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        note = out / _SOURCE_FILE
        if note.is_file() and note.read_text() == source.description:
            return False
        raise DataError(f"{out}: expected no such folder, or {source.name} as it was fetched; found something else")
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        files = [
            download(archive.url, work / archive.name, Checksum("md5", archive.md5), show=show)
            for archive in source.archives
        ]
        unpacked = work / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        data = source.prepare(files, unpacked)
        (data / _SOURCE_FILE).write_text(source.description)
        os.replace(data, out)
        shutil.rmtree(work)
    except DownloadError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{work}: the disk is full; make room and fetch again: the download resumes") from error
        raise DataError(f"{error.filename or work}: {error.strerror or error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise DataError(f"{source.name}: expected its archives as they are known, found: {error}") from error
    return True


def _unpack(files: Sequence[Path], folder: Path, root: str = "") -> Path:
    """Extract tar and zip archives; the data set is their folder `root`."""
    for file in files:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                        raise ValueError(f"{name!r} is outside the destination")
                archive.extractall(folder)
        else:
            with tarfile.open(file) as tape:
                tape.extractall(folder, filter="data")
    return folder / root


def _prepare_cifar(
    files: Sequence[Path], folder: Path, *, root: str, train: Sequence[str], test: str, labels: str, ids: int
) -> Path:
    """Convert CIFAR's binary version: records of `ids` class ids, of which the last is used, and 3 x 32 x 32 bytes."""
    with tarfile.open(files[0]) as archive:

        def content(name: str) -> bytes:
            member = archive.extractfile(f"{root}/{name}")
            if member is None:
                raise KeyError(name)
            return member.read()

        names = content(labels).decode().split()
        for split, parts in (("train", train), ("test", [test])):
            records = np.frombuffer(b"".join(map(content, parts)), np.uint8).reshape(-1, ids + 3072)
            pixels = records[:, ids:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            _write_pixels(folder / f"{split}.npz", pixels, records[:, ids - 1], names)
    return folder


def _prepare_mnist(files: Sequence[Path], folder: Path, *, labels: Sequence[str]) -> Path:
    """Convert MNIST's format: gzipped images and labels of train, then of test."""
    for split, (images, class_ids) in (("train", files[:2]), ("test", files[2:])):
        _write_pixels(folder / f"{split}.npz", _read_idx(images), _read_idx(class_ids), labels)
    return folder


def _read_idx(file: Path) -> NDArray[np.uint8]:
    """Read an array of bytes: 0, 0, 8 (uint8), number of axes, length of each as 32 bits, values."""
    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(content, ">i4", axes, 4))


def _write_pixels(file: Path, pixels: NDArray[np.uint8], class_ids: NDArray[np.uint8], labels: Sequence[str]) -> None:
    """Write a packed split of PNG files, which is lossless."""
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    write_packed(file, encoded, class_ids, labels)


def _prepare_pets(files: Sequence[Path], folder: Path) -> Path:
    """Write lists of the pictures by breed; the pictures are unchanged."""
    _unpack(files, folder)
    labels: dict[int, str] = {}
    for split, source in (("train", "trainval"), ("test", "test")):
        with (folder / f"{split}.csv").open("w", newline="") as target:
            rows = csv.writer(target)
            rows.writerow(["image", "label"])
            for line in (folder / "annotations" / f"{source}.txt").read_text().splitlines():
                name, class_id, _, _ = line.split()
                label = labels.setdefault(int(class_id), name.rpartition("_")[0].replace("_", " "))
                rows.writerow([f"images/{name}.jpg", label])
    (folder / "labels.txt").write_text("".join(f"{labels[i]}\n" for i in sorted(labels)))
    return folder


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_CIFAR_TERMS = "Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. No licence is stated."
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas"
_IMAGENETTE_TERMS = (
    "fast.ai, https://github.com/fastai/imagenette, Apache-2.0; the images are ImageNet's, for research and teaching."
)
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007"
_PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
_COCO = "http://images.cocodataset.org"

SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        Source(
            "cifar10",
            (Archive(f"{_CIFAR}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
            partial(
                _prepare_cifar,
                root="cifar-10-batches-bin",
                train=[f"data_batch_{i}.bin" for i in range(1, 6)],
                test="test_batch.bin",
                labels="batches.meta.txt",
                ids=1,
            ),
            _CIFAR_TERMS,
        ),
        Source(
            "cifar100",
            (Archive(f"{_CIFAR}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
            partial(
                _prepare_cifar,
                root="cifar-100-binary",
                train=["train.bin"],
                test="test.bin",
                labels="fine_label_names.txt",
                ids=2,
            ),
            _CIFAR_TERMS,
        ),
        Source(
            "mnist",
            (
                Archive(f"{_MNIST}/train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                Archive(f"{_MNIST}/train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
                Archive(f"{_MNIST}/t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
                Archive(f"{_MNIST}/t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
            partial(_prepare_mnist, labels=list("0123456789")),
            "Yann LeCun, Corinna Cortes and Christopher Burges, http://yann.lecun.com/exdb/mnist.",
        ),
        Source(
            "fashion-mnist",
            (
                Archive(f"{_FASHION}/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                Archive(f"{_FASHION}/train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
                Archive(f"{_FASHION}/t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                Archive(f"{_FASHION}/t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            partial(_prepare_mnist, labels=_CLOTHES),
            "Zalando Research, https://github.com/zalandoresearch/fashion-mnist, MIT.",
        ),
        Source(
            "imagenette160",
            (Archive(f"{_IMAGENETTE}/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),),
            partial(_unpack, root="imagenette2-160"),
            _IMAGENETTE_TERMS,
        ),
        Source(
            "imagenette320",
            (Archive(f"{_IMAGENETTE}/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),),
            partial(_unpack, root="imagenette2-320"),
            _IMAGENETTE_TERMS,
        ),
        Source(
            "pets",
            (
                Archive(f"{_PETS}/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                Archive(f"{_PETS}/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
            ),
            _prepare_pets,
            "Oxford-IIIT Pet Dataset, Parkhi and others, https://www.robots.ox.ac.uk/~vgg/data/pets, CC BY-SA 4.0.",
        ),
        Source(
            "voc2007",
            (
                Archive(f"{_VOC}/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
                Archive(f"{_VOC}/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
            ),
            partial(_unpack, root="VOCdevkit"),
            "PASCAL VOC 2007, Everingham and others; the images are Flickr's, whose terms of use hold.",
        ),
        Source(
            "coco2017",
            (
                Archive(f"{_COCO}/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
                Archive(f"{_COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
                Archive(f"{_COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
            ),
            _unpack,
            "COCO 2017, https://cocodataset.org, 20 GB; annotations CC BY 4.0, images under Flickr's terms of use.",
        ),
    )
}
