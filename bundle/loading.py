"""Load a bundle and verify it.

The checks, in order: schema, file hashes, the graph's inputs and outputs against the manifest, golden outputs (which
also warms up the session). Any failure raises `BundleError`; there is no fallback.
"""

import errno
import hashlib
import importlib.util
import io
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from vitrine.bundle.errors import BundleError
from vitrine.bundle.exhaustion import naming_exhaustion
from vitrine.bundle.files import hash_file, open_file, read_file
from vitrine.bundle.manifest import (
    EXPLAIN_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    Identity,
    Manifest,
    Precision,
    Task,
    TensorSpec,
)
from vitrine.bundle.predictors import Predictor, make_predictor
from vitrine.bundle.profile import ExecutionProfile
from vitrine.bundle.runtime import CPU, OnnxNetwork
from vitrine.bundle.tolerances import CONFIDENT_SCORE, GOLDEN

_MAX_MANIFEST_BYTES = 2**24
_MAX_GOLDEN_BYTES = 2**28  # of the archive, and of each array
_BAD_ARCHIVE = zipfile.BadZipFile, zlib.error
_MODEL_FOLDER = re.compile("[a-z0-9][a-z0-9._-]{0,63}")  # as in the manifest
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Bundle:
    """A loaded network that has passed all checks."""

    manifest: Identity  # a `Manifest`, unless loaded from a single ONNX file
    predictor: Predictor
    path: Path
    variant: Precision | None = None  # None if loaded from a single ONNX file
    profile: ExecutionProfile | None = None  # None if not measured
    samples: int = 0  # images of `read_samples`; none if loaded from a single ONNX file

    @property
    def file(self) -> Path:
        """The ONNX file of the graph."""
        return self.path if self.variant is None else self.path / self.variant.file


def default_root() -> Path:
    """Return the folder of bundles to use when none is named.

    It is `bundles` in the working directory, else that of the checkout, else that of the package `vitrine_bundles`.
    """
    here, checkout = Path("bundles"), Path(__file__).resolve().parent.parent / "bundles"
    installed = importlib.util.find_spec("vitrine_bundles")
    roots = [here, checkout, *map(Path, (installed and installed.submodule_search_locations) or ())]
    return next((root for root in roots if root.is_dir()), here)


def find_bundles(root: Path) -> list[Path]:
    """Return the folders `<root>/<name>/<version>` with a manifest, by name and ascending version.

    What vanishes meanwhile is not there. A folder that cannot be listed is passed over if no model can have its name.

    Raises:
        BundleError: `root` is not a folder, or it or a model's folder in it cannot be listed.
    """
    paths = []
    for name in _list_folder(root, found_missing="no such folder"):
        try:
            versions = _list_folder(root / name)
        except BundleError:
            if _MODEL_FOLDER.fullmatch(name):
                raise
            continue  # such as lost+found
        paths += [root / name / version for version in versions if not version.startswith(".")]  # hidden: unfinished
    paths = [path for path in paths if _exists(path / MANIFEST_FILE)]
    return sorted(paths, key=lambda path: (path.parent.name, len(path.name), path.name))


def _list_folder(folder: Path, *, found_missing: str | None = None) -> list[str]:
    """Return the names in a folder; none if there is no folder, unless `found_missing` is the complaint about that."""
    try:
        return os.listdir(folder)
    except OSError as error:
        found = found_missing if error.errno in _MISSING else error.strerror
        if found is None:
            return []
        raise BundleError(folder, "bundles", expected="a folder of <name>/<version>", found=found) from error


def _exists(file: Path) -> bool:
    """Whether there is a file; also true if that cannot be told, which reading it will report."""
    try:
        file.lstat()
    except OSError as error:
        return error.errno not in _MISSING
    return True


def read_manifest(path: Path) -> Manifest:
    """Read and validate `manifest.json` of the bundle at `path`, which must lie in `<name>/<version>`.

    Raises:
        BundleError: the manifest is missing, violates the schema, or does not match the folder's name and version.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(read_file(file, _MAX_MANIFEST_BYTES, "manifest"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise BundleError(file, field, expected=first["msg"], found=repr(first["input"])[:200]) from error
    folder = path.resolve()
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        found = f"folder {folder.parent.name}/{folder.name}"
        raise BundleError(file, "name, version", expected=f"folder {manifest.name}/{manifest.version}", found=found)
    return manifest


def load_bundle(
    path: Path,
    *,
    variant: Precision | None = None,
    threads: int = 1,
    providers: Sequence[str] = CPU,
    cache: Path | None = None,
) -> Bundle:
    """Load a bundle and verify it against its golden sample.

    Args:
        path: folder `<name>/<version>`.
        variant: graph to load; the manifest's default variant if None.
        threads: cores per call.
        providers, cache: see `OnnxNetwork`.

    Raises:
        BundleError: anything differs from the manifest.
        ResourceError, ProviderError: see `OnnxNetwork`.
    """
    with naming_exhaustion(path):
        manifest = read_manifest(path)
        precision = manifest.default_variant if variant is None else variant
        if precision not in manifest.variants:
            listed = ", ".join(manifest.variants)
            raise BundleError(path / MANIFEST_FILE, "variants", expected=f"one of {listed}", found=precision.value)
        _check_files(path, manifest)
        file = path / precision.file
        network = OnnxNetwork(file, threads=threads, providers=providers, cache=cache, hashes=manifest.hashes)
        _check_tensors(file, manifest, network, manifest.outputs)
        samples = _check_golden(path, manifest, network, precision)
    predictor = make_predictor(network, manifest.preprocessing, manifest.labels)
    return Bundle(manifest, predictor, path, precision, samples=samples)


def load_explain_network(
    path: Path, *, threads: int = 1, providers: Sequence[str] = CPU, cache: Path | None = None
) -> OnnxNetwork | None:
    """Load a bundle's explain graph and verify its scores; return None if the bundle has none.

    Raises:
        BundleError: anything differs from the manifest.
        ResourceError, ProviderError: see `OnnxNetwork`.
    """
    with naming_exhaustion(path):
        manifest = read_manifest(path)
        if not manifest.has_explain_graph or manifest.explanation is None:
            return None
        _check_files(path, manifest)
        file, hashes = path / EXPLAIN_FILE, manifest.hashes
        network = OnnxNetwork(file, threads=threads, providers=providers, cache=cache, hashes=hashes)
        _check_tensors(file, manifest, network, manifest.explanation.outputs)
        _check_golden(path, manifest, network, Precision.FP32, EXPLAIN_FILE)
        return network


def load_file(file: Path, *, threads: int = 1, providers: Sequence[str] = CPU, cache: Path | None = None) -> Bundle:
    """Load a single ONNX file of a bundle by its embedded metadata. Its answers are not verified.

    Raises:
        BundleError: the file is not part of a bundle, or its graph differs from its metadata.
        ResourceError, ProviderError: see `OnnxNetwork`.
    """
    with naming_exhaustion(file):
        hashes = {file.name: hash_file(file)}
    network = OnnxNetwork(file, threads=threads, providers=providers, cache=cache, hashes=hashes)
    try:
        identity = Identity.model_validate_json(network.metadata.get(METADATA_KEY, ""))
    except ValidationError as error:
        raise BundleError(
            file, f"metadata {METADATA_KEY}", expected="that of a bundle's file", found=error.errors()[0]["msg"]
        ) from error
    _check_tensors(file, identity, network, identity.outputs)
    if identity.task is Task.CLASSIFICATION and identity.outputs[0].shape[-1] != len(identity.labels):
        raise BundleError(
            file, "labels", expected=f"{identity.outputs[0].shape[-1]} labels", found=len(identity.labels)
        )
    return Bundle(identity, make_predictor(network, identity.preprocessing, identity.labels), file)


def golden_name(output: str, precision: Precision) -> str:
    """Return the name of an output's array in the golden sample."""
    return output if precision is Precision.FP32 else f"{precision.value}.{output}"


def _check_files(path: Path, manifest: Manifest) -> None:
    for name, listed in manifest.files.items():
        file = path / name
        if not os.path.lexists(file):
            raise BundleError(file, "file", expected=f"{listed.size} bytes", found="no such file")
        with open_file(file) as stream:
            if (size := os.fstat(stream.fileno()).st_size) != listed.size:
                raise BundleError(file, "size", expected=listed.size, found=size)
            if (sha256 := hashlib.file_digest(stream, "sha256").hexdigest()) != listed.sha256:
                raise BundleError(file, "sha256", expected=listed.sha256, found=sha256)


def _check_tensors(file: Path, identity: Identity, network: OnnxNetwork, outputs: tuple[TensorSpec, ...]) -> None:
    if network.inputs != identity.inputs:
        raise BundleError(file, "inputs", expected=identity.inputs, found=network.inputs)
    if network.outputs != outputs:
        raise BundleError(file, "outputs", expected=outputs, found=network.outputs)


def _check_golden(
    path: Path, manifest: Manifest, network: OnnxNetwork, precision: Precision, name: str | None = None
) -> int:
    """Compare a graph's outputs with the golden sample, and return its number of images."""
    file = path / (name or precision.file)
    golden = read_golden(path, manifest)
    try:
        outputs = network(**{spec.name: golden[spec.name] for spec in manifest.inputs})
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        found = str(error).partition("\n")[0]
        raise BundleError(path / GOLDEN_FILE, "arrays", expected="inputs of the graph", found=found) from error
    for spec, output in zip(manifest.outputs, outputs, strict=False):  # an explain graph has further outputs
        expected = golden[golden_name(spec.name, precision)]
        if spec.name == "class_ids" and output.shape == expected.shape:
            confident = np.greater_equal(golden[golden_name("scores", precision)], CONFIDENT_SCORE)
            output, expected = output[confident], expected[confident]
        if output.shape != expected.shape:
            raise BundleError(path / GOLDEN_FILE, spec.name, expected=expected.shape, found=output.shape)
        difference = float(np.abs(output.astype(np.float64) - expected.astype(np.float64)).max(initial=0))
        if not difference <= GOLDEN[precision]:
            expected_answer = f"the golden answer to within {GOLDEN[precision]}"
            raise BundleError(file, spec.name, expected=expected_answer, found=f"a difference of {difference:.3g}")
    # A detector's graph does not tell its number of classes; the golden answers give a lower bound.
    classes = outputs[0].shape[-1] if manifest.task is Task.CLASSIFICATION else int(golden["class_ids"].max()) + 1
    if classes > len(manifest.labels) or (manifest.task is Task.CLASSIFICATION and classes < len(manifest.labels)):
        raise BundleError(path / MANIFEST_FILE, "labels", expected=f"{classes} labels", found=len(manifest.labels))
    return len(golden["pixels"])


def read_samples(bundle: Bundle) -> list[Image.Image]:
    """Return the images of a bundle's golden sample, RGB, resized as the network sees them.

    Raises:
        BundleError: the sample has changed since the bundle was loaded.
    """
    if not isinstance(bundle.manifest, Manifest):
        return []
    golden = read_golden(bundle.path, bundle.manifest)
    pixels = golden["pixels"]
    sizes = golden.get("sizes", np.tile(pixels.shape[1:3], (len(pixels), 1)))  # a detector's are padded
    return [Image.fromarray(image[:height, :width]) for image, (height, width) in zip(pixels, sizes, strict=True)]


def read_golden(path: Path, manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """Read the golden sample: an array for each input of the graph and for each output of every variant.

    Raises:
        BundleError: the archive cannot be read or an array is missing.
    """
    file = path / GOLDEN_FILE
    names = [spec.name for spec in manifest.inputs]
    names += [golden_name(spec.name, precision) for precision in manifest.variants for spec in manifest.outputs]
    content = read_file(file, _MAX_GOLDEN_BYTES)
    if (sha256 := hashlib.sha256(content).hexdigest()) != manifest.files[GOLDEN_FILE].sha256:
        raise BundleError(file, "sha256", expected=manifest.files[GOLDEN_FILE].sha256, found=sha256)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: _read_array(archive, name) for name in names}
    except (*_BAD_ARCHIVE, KeyError, EOFError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise BundleError(file, "arrays", expected=", ".join(names), found=error) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > _MAX_GOLDEN_BYTES:
        raise ValueError(f"{name}: expected at most {_MAX_GOLDEN_BYTES} bytes, found {member.file_size}")
    with archive.open(member) as stream:
        content = stream.read(member.file_size)  # no more, whatever the archive unpacks to
    array: NDArray[np.generic] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, found {array.dtype}")
    return array
