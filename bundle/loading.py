"""From a bundle's folder to a predictor that is known to answer right.

Order: schema, hashes, the graph's inputs and outputs against the manifest, golden outputs (which also warms the session
up). Any failure is a `BundleError`; there is no fallback.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bundle.errors import BundleError
from bundle.manifest import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, Manifest, Task
from bundle.predictors import Predictor, make_predictor
from bundle.runtime import OnnxNetwork

# Largest difference to the golden outputs, which were made by ONNX Runtime on the exporting machine: other vector
# units and thread counts sum in another order. Probabilities, scores and boxes are all in 0..1.
GOLDEN_TOLERANCE = 1e-3
CONFIDENT_SCORE = 0.05  # classes of detections are compared from this score on


@dataclass(frozen=True)
class Bundle:
    """A bundle that has passed all checks."""

    manifest: Manifest
    predictor: Predictor
    path: Path


def find_bundles(root: Path) -> list[Path]:
    """The folders `<root>/<name>/<version>` that hold a manifest, by name and ascending version.

    Raises:
        BundleError: `root` is no folder.
    """
    if not root.is_dir():
        raise BundleError(root, "bundles", expected="a folder of <name>/<version>", found="no such folder")
    paths = [manifest.parent for manifest in root.glob(f"*/*/{MANIFEST_FILE}")]
    return sorted(paths, key=lambda path: (path.parent.name, len(path.name), path.name))


def read_manifest(path: Path) -> Manifest:
    """Read and validate `manifest.json` of the bundle at `path`, which must lie in `<name>/<version>`.

    Raises:
        BundleError: it is missing, does not follow the schema, or names another bundle than its folder.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BundleError(file, "file", expected="a readable manifest", found=error.strerror) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise BundleError(file, field, expected=first["msg"], found=repr(first["input"])[:200]) from error
    place = path.resolve()
    if (manifest.name, manifest.version) != (place.parent.name, place.name):
        found = f"folder {place.parent.name}/{place.name}"
        raise BundleError(file, "name, version", expected=f"folder {manifest.name}/{manifest.version}", found=found)
    return manifest


def load_bundle(path: Path, *, threads: int = 1) -> Bundle:
    """Load a bundle and prove it against its own golden sample.

    Args:
        path: folder `<name>/<version>`.
        threads: cores that one prediction uses.

    Raises:
        BundleError: anything differs from the manifest.
    """
    manifest = read_manifest(path)
    _check_files(path, manifest)
    network = OnnxNetwork(path / MODEL_FILE, threads=threads)
    if network.inputs != manifest.inputs:
        raise BundleError(path / MODEL_FILE, "inputs", expected=manifest.inputs, found=network.inputs)
    if network.outputs != manifest.outputs:
        raise BundleError(path / MODEL_FILE, "outputs", expected=manifest.outputs, found=network.outputs)
    _check_golden(path, manifest, network)
    return Bundle(manifest, make_predictor(network, manifest.preprocessing, manifest.labels), path)


def hash_file(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_files(path: Path, manifest: Manifest) -> None:
    for name, listed in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(file, "file", expected=f"{listed.size} bytes", found="no such file")
        if (size := file.stat().st_size) != listed.size:
            raise BundleError(file, "size", expected=listed.size, found=size)
        if (sha256 := hash_file(file)) != listed.sha256:
            raise BundleError(file, "sha256", expected=listed.sha256, found=sha256)


def _check_golden(path: Path, manifest: Manifest, network: OnnxNetwork) -> None:
    golden = read_golden(path, manifest)
    found = network(**{spec.name: golden[spec.name] for spec in manifest.inputs})
    for spec, output in zip(manifest.outputs, found, strict=True):
        expected = golden[spec.name]
        if spec.name == "class_ids" and output.shape == expected.shape:
            # Where no class is likely, rounding may choose another one.
            confident = np.greater_equal(golden["scores"], CONFIDENT_SCORE)
            output, expected = output[confident], expected[confident]
        if output.shape != expected.shape:
            raise BundleError(path / GOLDEN_FILE, spec.name, expected=expected.shape, found=output.shape)
        difference = float(np.abs(output.astype(np.float64) - expected.astype(np.float64)).max(initial=0))
        if not difference <= GOLDEN_TOLERANCE:
            wanted = f"the golden answer to within {GOLDEN_TOLERANCE}"
            raise BundleError(path / MODEL_FILE, spec.name, expected=wanted, found=f"a difference of {difference:.3g}")
    # The graph does not say how many classes it knows if it is a detector; the golden answers come close.
    classes = found[0].shape[-1] if manifest.task is Task.CLASSIFICATION else int(golden["class_ids"].max()) + 1
    if classes > len(manifest.labels) or (manifest.task is Task.CLASSIFICATION and classes < len(manifest.labels)):
        raise BundleError(path / MANIFEST_FILE, "labels", expected=f"{classes} labels", found=len(manifest.labels))


def read_golden(path: Path, manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """The golden sample: an array for each input and output of the graph.

    Raises:
        BundleError: the archive cannot be read or an array is missing.
    """
    file = path / GOLDEN_FILE
    names = [spec.name for spec in (*manifest.inputs, *manifest.outputs)]
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(file, "arrays", expected=", ".join(names), found=error) from error
