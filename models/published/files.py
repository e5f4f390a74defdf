"""Files of weights, read safely: nothing in them is executed, and a tensor is read when it is needed.

safetensors; what `torch.save` wrote (archives, and the plain pickles before torch 1.6), through torch's restricted
unpickler; NumPy's `.npz`, without pickled objects. The kind is told by the file's first bytes, never by its name.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.published.errors import UnreadableFileError

# Where training scripts put the network among optimizer, epoch and arguments (timm, DeiT, DETR, Lightning).
_WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds."""

    tensors: Tensors
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the training script, where it saved them


def open_weights(file: Path) -> WeightsFile:
    """Open a file of weights.

    Raises:
        UnreadableFileError: it is broken, no file of weights, or would run code.
    """
    if not file.is_file():
        raise UnreadableFileError(file, "expected a file, found none")
    try:
        start = file.open("rb").read(9)
        if start[8:9] == b"{":
            return WeightsFile(_safetensors(file))
        if start.startswith(b"PK") and any(name.endswith(".npy") for name in zipfile.ZipFile(file).namelist()):
            return WeightsFile(_npz(file))
        if start.startswith((b"PK", b"\x80")):
            return _torch(file)
    except UnreadableFileError:
        raise
    except (SafetensorError, zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError) as error:
        raise UnreadableFileError(file, error) from error
    raise UnreadableFileError(
        file, f"expected safetensors, a file of torch.save or .npz, found bytes that begin with {start!r}"
    )


def _safetensors(file: Path) -> Tensors:
    opened = safe_open(file, framework="pt")
    return {
        key: LazyTensor(tuple(opened.get_slice(key).get_shape()), partial(opened.get_tensor, key))
        for key in opened.keys()  # noqa: SIM118 (it is no dict)
    }


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
    with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype == np.dtype("V2"):  # NumPy has no bfloat16 and stores it as two bytes without a meaning
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch(file: Path) -> WeightsFile:
    # DETR saves its command line. A Namespace takes any attributes and does nothing with them.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            archive = zipfile.is_zipfile(file)  # older files cannot be mapped into memory
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
        except pickle.UnpicklingError as error:
            raise UnreadableFileError(file, _unpickling_reason(str(error))) from error
        except Exception as error:  # on broken bytes the unpickler raises almost anything
            raise UnreadableFileError(file, str(error).split("\n")[0] or type(error).__name__) from error
    arguments = content.get("args", {}) if isinstance(content, dict) else {}
    while isinstance(content, dict):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    state = cast(dict[object, object], content) if isinstance(content, dict) else {}
    tensors = {str(key): _in_memory(value) for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnreadableFileError(file, f"expected named tensors, found {type(content).__name__} without any")
    return WeightsFile(tensors, vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments)


def _in_memory(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), lambda: tensor.detach())


def _unpickling_reason(message: str) -> str:
    code = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[^\n]*?([\w.]+\.[\w.]+)", message)
    if code:
        return f"it names {code[1] or code[2]}, code that loading it would run; only tensors and plain values are read"
    return f"its pickle holds more than tensors and plain values, or is broken: {message.splitlines()[0]}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that was published beside weights; empty if there is no such file.

    Raises:
        UnreadableFileError: it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UnreadableFileError(file, error) from error
    if not isinstance(document, dict):
        raise UnreadableFileError(file, f"expected a JSON object, found {type(document).__name__}")
    return document


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
