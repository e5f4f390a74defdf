"""Read weights files lazily and safely: no code in them is executed.

Formats: safetensors; `torch.save` (archives, and the plain pickles before torch 1.6), through torch's restricted
unpickler; NumPy's `.npz`, without pickled objects. The first bytes determine the format, never the file's name.
"""

import argparse
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vitrine.models.published.errors import UnreadableFileError

# Keys of the state dict in training checkpoints (timm, DeiT, DETR, Lightning).
_WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read from its file on demand."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class WeightsFile:
    """The content of a weights file."""

    tensors: Tensors
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the training script, if it saved them


def open_weights(file: Path) -> WeightsFile:
    """Open a weights file.

    Raises:
        UnreadableFileError: it is broken, not a weights file, or loading it would run code.
    """
    if not is_file(file):
        raise UnreadableFileError(file, "expected a file, found none")
    with _read_errors(file):
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:9] == b"{":
            opened = WeightsFile(_safetensors(file))
        elif start.startswith(b"PK") and _has_member(file, ".npy"):
            opened = WeightsFile(_npz(file))
        elif start.startswith(b"PK") and _has_member(file, "constants.pkl"):
            raise UnreadableFileError(file, "expected weights, found a TorchScript program; save its state_dict()")
        elif start.startswith((b"PK", b"\x80")):
            opened = _torch(file)
        else:
            kinds = "safetensors, a file of torch.save or .npz"
            raise UnreadableFileError(file, f"expected {kinds}, found bytes that begin with {start!r}")
    if not opened.tensors:
        raise UnreadableFileError(file, "expected named tensors, found none")
    for key in opened.tensors:
        if not key.isprintable():  # keys are shown to the user
            raise UnreadableFileError(file, f"expected names of tensors, found {key[:100]!r}")
    return opened


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False for an invalid name."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """Raise an `UnreadableFileError` for any exception of a reader, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableFileError:
        raise
    except pickle.UnpicklingError as error:
        raise UnreadableFileError(file, _unpickling_reason(str(error))) from error
    except Exception as error:  # unpicklers and NumPy's header reader raise almost any type on broken bytes
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UnreadableFileError(file, reason) from error


def _has_member(file: Path, suffix: str) -> bool:
    """Whether an archive has a member whose name ends with `suffix`."""
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith(suffix) for name in archive.namelist())


def _safetensors(file: Path) -> Tensors:
    opened = safe_open(file, framework="pt")
    return {
        key: LazyTensor(tuple(opened.get_slice(key).get_shape()), partial(_read_safetensor, file, opened, key))
        for key in opened.keys()  # noqa: SIM118 (not a dict)
    }


def _read_safetensor(file: Path, opened: Any, key: str) -> Tensor:
    with _read_errors(file):
        tensor: Tensor = opened.get_tensor(key)
        return tensor


_HEADER_1, _HEADER_2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0


def _npz(file: Path) -> Tensors:
    tensors: dict[str, LazyTensor] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                shape, _, _ = (_HEADER_1 if version == (1, 0) else _HEADER_2)(stream)
            tensors[member.removesuffix(".npy")] = LazyTensor(shape, partial(_read_array, file, member))
    return tensors


def _read_array(file: Path, member: str) -> Tensor:
    with _read_errors(file), zipfile.ZipFile(file) as archive, archive.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if array.dtype == np.dtype("V2"):  # bfloat16, which NumPy lacks and stores as two raw bytes
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _torch(file: Path) -> WeightsFile:
    # DETR saves its arguments as a Namespace, which is safe: it only stores attributes.
    with torch.serialization.safe_globals([argparse.Namespace]):
        if zipfile.is_zipfile(file) and file.suffix != ".safetensors":  # torch.load trusts that suffix
            content: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:  # older files, which cannot be memory-mapped
            with file.open("rb") as stream:
                content = torch.load(stream, map_location="cpu", weights_only=True)
    arguments: object = content.get("args") if isinstance(content, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    tensors = {key: _in_memory(file, key, value) for key, value in _state_dict(content, depth=4).items()}
    return WeightsFile(tensors, arguments if isinstance(arguments, dict) else {})


def _state_dict(content: object, depth: int) -> dict[str, Tensor]:
    """Return the state dict of a training checkpoint, nested in fewer than `depth` wrappers."""
    if not isinstance(content, dict) or depth == 0:
        return {}
    for name in _WRAPPERS:
        if nested := _state_dict(content.get(name), depth - 1):
            return nested
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _in_memory(file: Path, key: str, tensor: Tensor) -> LazyTensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        raise UnreadableFileError(file, f"{key}: expected plain numbers, found {tensor.layout} of {tensor.dtype}")
    return LazyTensor(tuple(tensor.shape), tensor.detach)


def _unpickling_reason(message: str) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", message)
    if code:
        name = code[1] if "." in code[1] else f"builtins.{code[1]}"
        return f"it names {name}, code that loading it would run; only tensors and plain values are read"
    return "its pickle is broken, or holds more than tensors and plain values"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object published with the weights; empty if there is no such file.

    Raises:
        UnreadableFileError: the file is not a JSON object.
    """
    if not is_file(file):
        return {}
    try:
        document = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UnreadableFileError(file, error) from error
    if not isinstance(document, dict):
        raise UnreadableFileError(file, f"expected a JSON object, found {type(document).__name__}")
    return document


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
