"""From a bundle's folder to a predictor that is known to answer right.

Order: schema, hashes, the graph's inputs and outputs against the manifest, golden outputs (which also warms the session
up). Any failure is a `BundleError`; there is no fallback.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vitrine.bundle.errors import BundleError
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


@dataclass(frozen=True)
class Bundle:
    """A network that has passed all checks."""

    manifest: Identity  # a `Manifest`, unless an ONNX file was loaded alone
    predictor: Predictor
    path: Path
    variant: Precision | None = None  # which of its graphs; None for an ONNX file alone
    profile: ExecutionProfile | None = None  # how it is best run here, if that has been measured

    @property
    def file(self) -> Path:
        """The graph that is run."""
        return self.path if self.variant is None else self.path / self.variant.file


def find_bundles(root: Path) -> list[Path]:
    """The folders `<root>/<name>/<version>` that hold a manifest, by name and ascending version.

    Raises:
        BundleError: `root` is no folder.
    """
    if not root.is_dir():
        raise BundleError(root, "bundles", expected="a folder of <name>/<version>", found="no such folder")
    found = (manifest.parent for manifest in root.glob(f"*/*/{MANIFEST_FILE}"))
    paths = [path for path in found if not path.name.startswith(".")]  # an unfinished export is hidden
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


def load_bundle(
    path: Path,
    *,
    variant: Precision | None = None,
    threads: int = 1,
    providers: Sequence[str] = CPU,
    cache: Path | None = None,
) -> Bundle:
    """Load a bundle and prove it against its own golden sample.

    Args:
        path: folder `<name>/<version>`.
        variant: which of its graphs; by default the one that the manifest names.
        threads: cores that one prediction uses.
        providers, cache: where to compute, and how to share weights, see `OnnxNetwork`.

    Raises:
        BundleError: anything differs from the manifest.
        ProviderError: a provider is not there or did not start.
    """
    manifest = read_manifest(path)
    precision = manifest.default_variant if variant is None else variant
    if precision not in manifest.variants:
        listed = ", ".join(manifest.variants)
        raise BundleError(path / MANIFEST_FILE, "variants", expected=f"one of {listed}", found=precision.value)
    _check_files(path, manifest)
    file = path / precision.file
    network = OnnxNetwork(file, threads=threads, providers=providers, cache=cache)
    _check_tensors(file, manifest, network, manifest.outputs)
    _check_golden(path, manifest, network, precision)
    return Bundle(manifest, make_predictor(network, manifest.preprocessing, manifest.labels), path, precision)


def load_explain_network(path: Path, *, threads: int = 1, providers: Sequence[str] = CPU) -> OnnxNetwork | None:
    """The graph that shows where a bundle's network looks, proved by its scores; None where the bundle has none.

    Raises:
        BundleError: anything differs from the manifest.
        ProviderError: a provider is not there or did not start.
    """
    manifest = read_manifest(path)
    if EXPLAIN_FILE not in manifest.files or manifest.explanation is None:
        return None
    _check_files(path, manifest)
    network = OnnxNetwork(path / EXPLAIN_FILE, threads=threads, providers=providers)
    _check_tensors(path / EXPLAIN_FILE, manifest, network, manifest.explanation.outputs)
    _check_golden(path, manifest, network, Precision.FP32, EXPLAIN_FILE)
    return network


def load_file(file: Path, *, threads: int = 1, providers: Sequence[str] = CPU, cache: Path | None = None) -> Bundle:
    """Load one ONNX file of a bundle alone, by what it says about itself. Nothing proves its answers.

    Raises:
        BundleError: it is no file of a bundle, or its graph is not as it says.
        ProviderError: a provider is not there or did not start.
    """
    network = OnnxNetwork(file, threads=threads, providers=providers, cache=cache)
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
    """The name of an output's array in the golden sample."""
    return output if precision is Precision.FP32 else f"{precision.value}.{output}"


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


def _check_tensors(file: Path, identity: Identity, network: OnnxNetwork, outputs: tuple[TensorSpec, ...]) -> None:
    if network.inputs != identity.inputs:
        raise BundleError(file, "inputs", expected=identity.inputs, found=network.inputs)
    if network.outputs != outputs:
        raise BundleError(file, "outputs", expected=outputs, found=network.outputs)


def _check_golden(
    path: Path, manifest: Manifest, network: OnnxNetwork, precision: Precision, name: str | None = None
) -> None:
    file = path / (name or precision.file)
    golden = read_golden(path, manifest)
    found = network(**{spec.name: golden[spec.name] for spec in manifest.inputs})
    for spec, output in zip(manifest.outputs, found, strict=False):  # an explain graph answers more behind them
        expected = golden[golden_name(spec.name, precision)]
        if spec.name == "class_ids" and output.shape == expected.shape:
            confident = np.greater_equal(golden[golden_name("scores", precision)], CONFIDENT_SCORE)
            output, expected = output[confident], expected[confident]
        if output.shape != expected.shape:
            raise BundleError(path / GOLDEN_FILE, spec.name, expected=expected.shape, found=output.shape)
        difference = float(np.abs(output.astype(np.float64) - expected.astype(np.float64)).max(initial=0))
        if not difference <= GOLDEN[precision]:
            wanted = f"the golden answer to within {GOLDEN[precision]}"
            raise BundleError(file, spec.name, expected=wanted, found=f"a difference of {difference:.3g}")
    # The graph does not say how many classes it knows if it is a detector; the golden answers come close.
    classes = found[0].shape[-1] if manifest.task is Task.CLASSIFICATION else int(golden["class_ids"].max()) + 1
    if classes > len(manifest.labels) or (manifest.task is Task.CLASSIFICATION and classes < len(manifest.labels)):
        raise BundleError(path / MANIFEST_FILE, "labels", expected=f"{classes} labels", found=len(manifest.labels))


def read_golden(path: Path, manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """The golden sample: an array for each input of the graph, and for each output of every variant.

    Raises:
        BundleError: the archive cannot be read or an array is missing.
    """
    file = path / GOLDEN_FILE
    names = [spec.name for spec in manifest.inputs]
    names += [golden_name(spec.name, precision) for precision in manifest.variants for spec in manifest.outputs]
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(file, "arrays", expected=", ".join(names), found=error) from error
