"""Weights files of every format, valid, broken and malicious: what is read, and that no code runs."""

import argparse
import io
import os
import pickle
import signal
import struct
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from vitrine.models.build import build_model
from vitrine.models.published.errors import UnreadableFileError, WeightsError
from vitrine.models.published.files import open_weights, read_json
from vitrine.models.published.importing import ImportResult, import_weights

Arrays = dict[str, np.ndarray[Any, Any]]
LABELS = "blue\ngreen\nred\n"
TINY = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def timm_vit() -> dict[str, Tensor]:
    """A tiny ViT with three classes under timm's names."""
    names = build_model("vit", TINY, 3).state_dict()
    names["pos_embed"] = names.pop("pos_embed.embedding")
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(weight.shape, generator=random) for name, weight in names.items()}


def google_vit() -> Arrays:
    """The same network under the names of Google's `.npz` files, with other weights."""
    block, dim, hidden, heads = "Transformer/encoderblock_0", 8, 32, (2, 4)
    attention = f"{block}/MultiHeadDotProductAttention_1"
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, dim),
        "embedding/kernel": (4, 4, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, 5, dim),
        **{f"{block}/LayerNorm_{n}/{part}": (dim,) for n in (0, 2) for part in ("scale", "bias")},
        **{f"{attention}/{part}/kernel": (dim, *heads) for part in ("query", "key", "value")},
        **{f"{attention}/{part}/bias": heads for part in ("query", "key", "value")},
        f"{attention}/out/kernel": (*heads, dim),
        f"{attention}/out/bias": (dim,),
        f"{block}/MlpBlock_3/Dense_0/kernel": (dim, hidden),
        f"{block}/MlpBlock_3/Dense_0/bias": (hidden,),
        f"{block}/MlpBlock_3/Dense_1/kernel": (hidden, dim),
        f"{block}/MlpBlock_3/Dense_1/bias": (dim,),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, 3),
        "head/bias": (3,),
    }
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_npz(file: Path, arrays: Arrays, *, compressed: bool = False) -> None:
    with file.open("wb") as stream:  # for a path, NumPy would add a suffix
        (np.savez_compressed if compressed else np.savez)(stream, **arrays)  # type: ignore[arg-type]


def write(kind: str, file: Path) -> None:
    """A valid file of a tiny ViT."""
    if kind == "safetensors":
        save_file(timm_vit(), file)
    elif kind.startswith("npz"):
        write_npz(file, google_vit(), compressed=kind == "npz-compressed")
    else:
        torch.save(timm_vit(), file, _use_new_zipfile_serialization=kind == "torch")


KINDS = ("safetensors", "torch", "torch-before-1.6", "npz", "npz-compressed")


@cache
def whole(kind: str, folder: Path) -> bytes:
    file = folder / f"whole-{kind}"
    write(kind, file)
    return file.read_bytes()


def import_file(file: Path, **options: Any) -> ImportResult:
    """Import a tiny ViT into a folder two levels below the file's."""
    labels = file.parent / "labels.txt"
    labels.write_text(LABELS)
    changes = ["num_heads=2"]
    return import_weights(file, file.parent / "deep" / "run", labels=str(labels), changes=changes, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn warnings into errors: they would clutter the error message on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in caught if warning.category is not ResourceWarning] == []


def refused(file: Path, **options: Any) -> str:
    """Return the message with which a file is rejected, after checking that nothing was written."""
    with quiet(), pytest.raises(WeightsError) as error:
        import_file(file, **options)
    assert not (file.parent / "deep").exists()
    message = str(error.value)
    assert str(file) in message
    assert "\n" not in message
    assert "weights_only" not in message, "torch's advice is to run the file's code"
    return message


def imported_or_refused(file: Path) -> None:
    with quiet():
        try:
            import_file(file)
        except WeightsError:
            assert not (file.parent / "deep").exists()
        else:
            (file.parent / "deep" / "run" / "checkpoint.pt").unlink()
            (file.parent / "deep" / "run").rmdir()
            (file.parent / "deep").rmdir()


@pytest.fixture
def time_limit() -> Iterator[None]:
    def stop(_: int, __: types.FrameType | None) -> None:
        pytest.fail("it never ends")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m.npz", "m.txt", "m"])
@pytest.mark.parametrize("kind", KINDS)
def test_format_is_recognised_by_the_bytes_not_the_name(kind: str, name: str, tmp_path: Path) -> None:
    write(kind, tmp_path / name)
    expected = {key: torch.from_numpy(a) for key, a in google_vit().items()} if "npz" in kind else timm_vit()
    with quiet():
        opened = open_weights(tmp_path / name)
        assert {key: tensor.shape for key, tensor in opened.tensors.items()} == {
            key: tuple(tensor.shape) for key, tensor in expected.items()
        }
        assert all(torch.equal(opened.tensors[key].read(), tensor) for key, tensor in expected.items())
    assert opened.arguments == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_imports(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path / "weights")
    with quiet():
        imported = import_file(tmp_path / "weights")
    assert imported.checkpoint.labels == ["blue", "green", "red"]


def test_shapes_are_known_without_the_data(tmp_path: Path) -> None:
    write("npz", tmp_path / "m.npz")
    opened = open_weights(tmp_path / "m.npz")
    (tmp_path / "m.npz").unlink()
    assert opened.tensors["head/kernel"].shape == (8, 3)
    with pytest.raises(UnreadableFileError, match="No such file"):
        opened.tensors["head/kernel"].read()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model": {"state_dict": {"model": state}}},
        lambda state: {"model": "vit_base", "state_dict": state},
        lambda state: {"model": {"name": "vit", "depth": 12}, "state_dict": state},
    ],
    ids=["model", "state_dict", "model_state_dict", "nested", "thrice", "model-name-beside", "model-settings-beside"],
)
@pytest.mark.parametrize("archive", [True, False])
def test_networks_are_found_in_training_checkpoints(
    wrap: Callable[[dict[str, Tensor]], object], archive: bool, tmp_path: Path
) -> None:
    torch.save(wrap(timm_vit()), tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    assert open_weights(tmp_path / "m.pth").tensors.keys() == timm_vit().keys()


@pytest.mark.usefixtures("time_limit")
def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "m.pth")
    assert "expected named tensors" in refused(tmp_path / "m.pth")


@pytest.mark.parametrize("archive", [True, False])
def test_arguments_of_the_training_script_are_read(tmp_path: Path, archive: bool) -> None:
    content = {"model": timm_vit(), "args": argparse.Namespace(nheads=8, dilation=True, lr=1e-4)}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    assert open_weights(tmp_path / "m.pth").arguments == {"nheads": 8, "dilation": True, "lr": 1e-4}


def test_arguments_may_be_a_dict(tmp_path: Path) -> None:
    torch.save({"model": timm_vit(), "args": {"nheads": 8}}, tmp_path / "m.pth")
    assert open_weights(tmp_path / "m.pth").arguments == {"nheads": 8}


@pytest.mark.parametrize("arguments", [None, "--lr 3", ["--lr", "3"], 3, torch.zeros(2)], ids=str)
def test_arguments_of_another_kind_are_none(arguments: object, tmp_path: Path) -> None:
    torch.save({"model": timm_vit(), "args": arguments}, tmp_path / "m.pth")
    with quiet():
        import_file(tmp_path / "m.pth")


def test_values_that_are_no_tensors_are_ignored(tmp_path: Path) -> None:
    extra = {"epoch": 3, "name": "vit", "lr": 0.1, "shape": (1, 2), "done": None, "names": ["a"], 7: "seven"}
    torch.save({**timm_vit(), **extra}, tmp_path / "m.pth")
    assert open_weights(tmp_path / "m.pth").tensors.keys() == timm_vit().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch-before-1.6"])
def test_other_precisions_become_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: tensor.to(dtype) for key, tensor in timm_vit().items()}
    file = tmp_path / "m"
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "torch")
    with quiet():
        weights = import_file(file).checkpoint.weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["head.weight"], state["head.weight"].float())


def test_numpy_files_of_half_precision_become_float32(tmp_path: Path) -> None:
    arrays = {key: array.astype(np.float16) for key, array in google_vit().items()}
    write_npz(tmp_path / "m.npz", arrays)
    weights = import_file(tmp_path / "m.npz").checkpoint.weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert np.array_equal(weights["head.weight"].numpy(), arrays["head/kernel"].T.astype(np.float32))


def test_bfloat16_in_numpy_files_is_two_bytes_without_a_meaning(tmp_path: Path) -> None:
    tensors = {key: torch.from_numpy(array).bfloat16() for key, array in google_vit().items()}
    write_npz(tmp_path / "m.npz", {key: t.view(torch.int16).numpy().view("V2") for key, t in tensors.items()})
    weights = import_file(tmp_path / "m.npz").checkpoint.weights
    assert torch.equal(weights["head.weight"], tensors["head/kernel"].float().T)
    assert torch.equal(weights["cls_token"], tensors["cls"].float())


def test_fortran_order_and_big_endian_are_read_right_or_refused(tmp_path: Path) -> None:
    arrays = google_vit()
    write_npz(tmp_path / "m.npz", {**arrays, "head/kernel": np.asfortranarray(arrays["head/kernel"])})
    weights = import_file(tmp_path / "m.npz").checkpoint.weights
    assert np.array_equal(weights["head.weight"].numpy(), arrays["head/kernel"].T)
    other = tmp_path / "other"
    other.mkdir()
    write_npz(other / "m.npz", {**arrays, "head/kernel": arrays["head/kernel"].astype(">f4")})
    imported_or_refused(other / "m.npz")


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 3), None, dtype=object),
        np.full((8, 3), "abc"),
        np.full((8, 3), b"abc"),
        np.zeros((8, 3), "M8[s]"),
        np.zeros((8, 3), "V4"),
        np.zeros((8, 3), [("a", "f4")]),
        np.zeros((8, 3), np.complex64),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_that_are_no_numbers_are_refused(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", {**google_vit(), "head/kernel": array})
    refused(tmp_path / "m.npz")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 8).to_sparse(),
        torch.ones(3, 8, dtype=torch.complex64),
        torch.ones(3, 8, device="meta"),
    ],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    torch.save({**timm_vit(), "head.weight": tensor}, tmp_path / "m.pth")
    refused(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), [torch.zeros(3)], {"a": 1}, {"model": {}}, {}, "text"])
def test_something_else_saved_by_torch(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    assert "expected named tensors" in refused(tmp_path / "m.pth")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    assert "TorchScript" in refused(tmp_path / "m.pt")


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_module_is_refused_by_the_class_that_it_needs(archive: bool, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "m.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("content", [{"a": 1}, {"a": np.zeros(2)}], ids=["plain", "numpy"])
def test_a_plain_pickle_is_refused(content: object, protocol: int, tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(content, protocol))
    refused(tmp_path / "m.pkl")


DOWNLOADS = {
    "nothing": b"",
    "one byte": b"\x80",
    "JSON": b'{"error": "Entry not found"}',
    "JSON that looks like safetensors": b'{"data":{"error": "Entry not found"}}',
    "HTML": b"<!DOCTYPE html>\n<html><head><title>Google Drive - Quota exceeded</title></head></html>\n",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 346284714\n",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "empty zip": b"PK\x05\x06" + bytes(18),
    "start of a zip": b"PK",
    "zeros": bytes(100),
    "text": b"Hello, this is no file of weights.",
}


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.npz"])
@pytest.mark.parametrize("content", DOWNLOADS.values(), ids=DOWNLOADS.keys())
def test_failed_downloads_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


def test_a_zip_of_other_things_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("readme.txt", "weights follow")
    refused(tmp_path / "m.zip")


def test_missing_file(tmp_path: Path) -> None:
    assert "expected a file, found none" in refused(tmp_path / "nowhere.pth")


def test_a_file_name_longer_than_any(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert "expected model.safetensors or pytorch_model.bin" in refused(folder)


@pytest.mark.parametrize(("name", "kind"), [("model.safetensors", "safetensors"), ("pytorch_model.bin", "torch")])
def test_a_folder_with_weights(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(kind, folder / name)
    imported = import_file(folder)
    assert imported.checkpoint.origin is not None
    assert imported.checkpoint.origin.file == name


def test_a_special_file_is_refused() -> None:
    with pytest.raises(UnreadableFileError, match="expected a file, found none"):
        open_weights(Path("/dev/null"))


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.5, 0.9, 0.99, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated(kind: str, cut: float, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = whole(kind, tmp_path_factory.getbasetemp())
    (tmp_path / "m").write_bytes(data[: cut if isinstance(cut, int) else int(cut * len(data))])
    refused(tmp_path / "m")


def test_broken_compressed_data_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = bytearray(whole("npz-compressed", tmp_path_factory.getbasetemp()))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = archive.getinfo("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel.npy")
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    for value in range(0, 256, 16):
        data[middle : middle + 8] = bytes([value, 255 - value] * 4)
        (tmp_path / "m.npz").write_bytes(data)
        refused(tmp_path / "m.npz")


STARTS = (b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x04\x95", struct.pack("<Q", 30) + b"{")


@given(st.sampled_from(STARTS), st.binary(max_size=80))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, start: bytes, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_bytes"
    folder.mkdir(exist_ok=True)
    (folder / "m.pth").write_bytes(start + data)
    refused(folder / "m.pth")


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_changed_bytes(tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]]) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed_bytes"
    folder.mkdir(exist_ok=True)
    data = bytearray(whole(kind, tmp_path_factory.getbasetemp()))
    for place, value in changes:
        data[int(place * len(data))] = value
    (folder / "m").write_bytes(data)
    imported_or_refused(folder / "m")


@pytest.mark.parametrize(
    "header",
    [
        "{[]: 1}",
        "{1: 2, 'a': 3}",
        "{'descr': [('a', '<f4'",
        '"""',
        "(" * 5000,
        "-" * 9000 + "1",
        "{'descr': 'zz', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,)}",
    ],
    ids=lambda header: header[:30],
)
def test_broken_headers_of_arrays(header: str, tmp_path: Path) -> None:
    encoded = header.encode()
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("head/kernel.npy", start + encoded + bytes(96))
    refused(tmp_path / "m.npz")


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.file), os.O_CREAT)


HIDDEN: dict[str, Callable[[Malicious], object]] = {
    "alone": lambda evil: evil,
    "as the network": lambda evil: {"model": evil},
    "beside the network": lambda evil: {"model": timm_vit(), "optimizer": evil},
    "deep": lambda evil: {"model": {"state_dict": [{"x": (1, evil)}]}},
    "as a weight": lambda evil: {**timm_vit(), "head.weight": evil},
    "as arguments": lambda evil: {"model": timm_vit(), "args": evil},
    "in the arguments": lambda evil: {"model": timm_vit(), "args": argparse.Namespace(lr=evil)},
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN.keys())
def test_code_in_a_file_is_reported_and_not_run(
    hide: Callable[[Malicious], object], archive: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    torch.save(hide(Malicious(trace)), tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    assert "it names posix.open, code that loading it would run" in refused(tmp_path / "m.pth")
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_a_plain_pickle_is_not_run(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"model": Malicious(trace)}, protocol))
    refused(tmp_path / "m.bin")
    assert not trace.exists()


@pytest.mark.parametrize("where", ["head/kernel", "extra"])
def test_code_in_an_array_is_not_run(where: str, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    evil = np.full((8, 3), Malicious(trace), dtype=object)
    write_npz(tmp_path / "m.npz", {**google_vit(), where: evil})
    with quiet(), pytest.raises(WeightsError):
        import_file(tmp_path / "m.npz")
    assert not trace.exists()
    assert not (tmp_path / "deep").exists()


def test_code_in_a_head_that_is_replaced_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    write_npz(tmp_path / "m.npz", {**google_vit(), "head/kernel": np.full((8, 3), Malicious(trace), dtype=object)})
    with suppress(WeightsError):
        import_file(tmp_path / "m.npz", reset_head=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.exec", "builtins.getattr", "os.system", "subprocess.Popen", "runpy.run_path"]
)
@pytest.mark.parametrize("archive", [True, False])
def test_offending_global_is_named(name: str, archive: bool, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    argument = f"open({str(trace)!r}, 'w')".encode()
    module, _, attribute = name.rpartition(".")
    code = b"\x80\x02c%b\n%b\n" % (module.encode(), attribute.encode())
    code += b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R."
    if archive:
        with zipfile.ZipFile(tmp_path / "m.pth", "w") as made:
            made.writestr("m/data.pkl", code)
            made.writestr("m/version", "3\n")
    else:
        (tmp_path / "m.pth").write_bytes(code)
    assert f"it names {name}," in refused(tmp_path / "m.pth")
    assert not trace.exists()


def test_json_is_an_object_or_missing(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert read_json(file) == {}
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "\x00", "<html>"], ids=lambda t: t[:8]
)
def test_broken_json_is_reported(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UnreadableFileError) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file}: cannot be read: ")
    assert "\n" not in str(error.value)


def test_json_that_is_not_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UnreadableFileError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")
