"""The bundles that a process serves: found in folders, looked up by name and version, replaced while they answer.

What is looked up is a snapshot: a change loads and proves everything new first and then replaces the snapshot at once.
A request keeps the bundle that it has got, so that no request ever fails because of a change.
"""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitrine.bundle.errors import BundleError, ParameterError, UnknownModelError, VitrineError
from vitrine.bundle.loading import Bundle, find_bundles, load_bundle, load_file
from vitrine.bundle.manifest import Manifest, Precision, Task
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.profile import measure_profile
from vitrine.bundle.runtime import CPU, OnnxNetwork

_VERSION = re.compile("[1-9][0-9]{0,8}")  # as the manifest has it

Fingerprint = tuple[tuple[str, int, int], ...]  # name, size, time of change of each file


@dataclass(frozen=True)
class Entry:
    """The state of one version of a model."""

    name: str
    version: str
    ready: bool
    reason: str = ""  # why it is not ready, or why its folder's new content was refused


@dataclass(frozen=True)
class _Served:
    bundle: Bundle
    fingerprint: Fingerprint
    seconds: float  # that loading took
    variants: dict[Precision, Bundle] = field(default_factory=dict)  # those asked for so far
    loading: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Refused:
    name: str
    version: str
    fingerprint: Fingerprint
    error: VitrineError


class Repository:
    """The bundles under one or several roots, every version of each name."""

    def __init__(
        self, *roots: Path, cores: int | None = None, providers: Sequence[str] = CPU, cache: Path | None = None
    ) -> None:
        """Load and verify everything.

        Args:
            roots: folders of `<name>/<version>`, or single ONNX files of a bundle.
            cores: that this process may use; given, each bundle gets the `ExecutionProfile` that it has there.
            providers, cache: where to compute, and how to share weights, see `bundle.runtime.OnnxNetwork`.

        Raises:
            BundleError: there is no bundle, or one of them is not as its manifest says, or is there twice.
            ProviderError: a provider is not there or did not start.
        """
        self._roots, self._cores, self._providers, self._cache = roots, cores, tuple(providers), cache
        self._changing = threading.Lock()
        self._refused: dict[Path, _Refused] = {}
        self._unloaded: dict[str, list[Entry]] = {}
        self._names: dict[Path, str] = {}
        self._served: dict[Path, _Served] = {}
        self._models: dict[str, dict[int, _Served]] = {}
        found = self._find()
        if not found:
            places = ", ".join(map(str, roots))
            raise BundleError(places, "bundles", expected="at least one <name>/<version>/manifest.json", found="none")
        served: dict[Path, _Served] = {}
        for path, fingerprint in found.items():
            served[path] = self._load(path, fingerprint, beside=served)
        self._replace(served)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The highest version of each model, by name."""
        return {name: versions[max(versions)].bundle for name, versions in self._models.items()}

    def versions(self, name: str) -> list[Bundle]:
        """Every served version of a model, the highest last.

        Raises:
            UnknownModelError: there is none.
        """
        models = self._models
        if name not in models:
            raise UnknownModelError(name, available=models)
        return [models[name][version].bundle for version in sorted(models[name])]

    def load_seconds(self) -> list[tuple[Bundle, float]]:
        """Every served bundle, and how long it took to load and verify."""
        return [(served.bundle, served.seconds) for served in self._served.values()]

    def get(self, reference: str | None = None, *, task: Task | None = None) -> Bundle:
        """The bundle `name` (its highest version) or `name@version`; without a reference the first (by name).

        Raises:
            UnknownModelError: there is none, or none for this task.
        """
        fitting = {
            name: versions
            for name, versions in self._models.items()
            if task is None or versions[max(versions)].bundle.manifest.task is task
        }
        if reference is None and fitting:
            name, version = next(iter(fitting)), ""
        else:
            name, _, version = (reference or "").partition("@")
        versions = fitting.get(name, {})
        numbered = _VERSION.fullmatch(version) is not None
        key = int(version) if numbered else max(versions, default=0)
        if key not in versions or (reference is not None and "@" in reference and not numbered):
            available = [f"{name}@{number}" for number in versions] if versions else fitting
            raise UnknownModelError(reference, task=task, available=available)
        return versions[key].bundle

    def variant(self, bundle: Bundle, precision: str) -> Bundle:
        """Another graph of a bundle; it is loaded and verified when it is asked for the first time.

        Raises:
            ParameterError: the bundle has no such variant.
            BundleError: it has, but the file is not as the manifest says.
        """
        manifest = bundle.manifest
        known = tuple(manifest.variants) if isinstance(manifest, Manifest) else ()
        if precision not in known:
            expected = f"one of {', '.join(known)}" if known else "none, as one ONNX file alone is served"
            raise ParameterError("variant", expected=expected, found=repr(precision[:100]))
        chosen = Precision(precision)
        if chosen is bundle.variant:
            return bundle
        served = self._served.get(bundle.path)
        if served is None or served.bundle is not bundle:  # replaced since it was looked up
            return self._load_variant(bundle.path, chosen)
        with served.loading:
            if chosen not in served.variants:
                served.variants[chosen] = self._load_variant(bundle.path, chosen)
            return served.variants[chosen]

    def index(self) -> list[Entry]:
        """Every version that is served, was refused or was unloaded, by name and ascending version."""
        refused = dict(self._refused)
        entries = {}
        for path, served in self._served.items():
            reason = f"its changed folder is refused: {refused.pop(path).error}" if path in refused else ""
            manifest = served.bundle.manifest
            entries[manifest.name, int(manifest.version)] = Entry(manifest.name, manifest.version, True, reason)
        for entry in refused.values():
            key = entry.name, int(entry.version) if _VERSION.fullmatch(entry.version) else 0
            entries.setdefault(key, Entry(entry.name, entry.version, False, str(entry.error)))
        for gone in self._unloaded.values():
            for state in gone:
                entries.setdefault((state.name, int(state.version)), state)
        return [entries[key] for key in sorted(entries)]

    def refresh(self) -> list[str]:
        """Look at the roots again: load what is new or changed, drop what is gone. Returns what changed, as sentences.

        A bundle that cannot be loaded is refused: its place keeps what it served before. A refusal is reported once,
        and the bundle is tried again when its files have changed.

        Raises:
            BundleError: a root is not there; everything stays as it is.
        """
        with self._changing:
            return self._refresh(self._find(), only=None)

    def load(self, name: str) -> None:
        """Load a model, or load it again: every version of it in the roots that is new or changed.

        Raises:
            UnknownModelError: no root has it.
            BundleError: a version of it cannot be loaded. Nothing of the model changes then.
        """
        with self._changing:
            found = self._find()
            if not any(self._name(path) == name for path in found):
                raise UnknownModelError(name, available=sorted({self._name(path) for path in found}))
            gone, refused = self._unloaded.pop(name, None), self._refused
            self._refused = {path: entry for path, entry in refused.items() if entry.name != name}  # try them again
            try:
                self._refresh(found, only=name)
            except VitrineError:
                self._refused = refused
                if gone is not None:
                    self._unloaded[name] = gone
                raise

    def unload(self, name: str) -> None:
        """Serve a model no more, whatever its folder holds, until `load`. Who computes with it goes on to the end.

        Raises:
            UnknownModelError: it is not served.
        """
        with self._changing:
            leaving = [served.bundle.manifest for served in self._models.get(name, {}).values()]
            if not leaving:
                raise UnknownModelError(name, available=self._models)
            self._unloaded[name] = [Entry(name, manifest.version, False, "unloaded") for manifest in leaving]
            self._replace({path: served for path, served in self._served.items() if self._name(path) != name})

    def _refresh(self, found: Mapping[Path, Fingerprint], *, only: str | None) -> list[str]:
        """As `refresh`; of one model alone (`only`), an error is raised and nothing changes."""
        served, refused = dict(self._served), {path: self._refused[path] for path in self._refused if path in found}
        changes = []
        for path in [path for path in served if path not in found and only in (None, self._name(path))]:
            manifest = served.pop(path).bundle.manifest
            changes.append(f"gone: {manifest.name}@{manifest.version}, {path}")
        for path, fingerprint in found.items():
            name = self._name(path)
            known = refused.get(path) or served.get(path)
            if only not in (None, name) or name in self._unloaded or (known and known.fingerprint == fingerprint):
                continue
            try:
                served[path] = self._load(path, fingerprint, beside=served)
            except VitrineError as error:
                if only is not None:
                    raise
                refused[path] = _Refused(name, path.name, fingerprint, error)
                changes.append(f"refused: {error}")
            else:
                refused.pop(path, None)
                manifest = served[path].bundle.manifest
                changes.append(f"loaded: {manifest.name}@{manifest.version} in {served[path].seconds:.2f} s")
        self._refused = refused
        self._replace(served)
        return changes

    def _replace(self, served: dict[Path, _Served]) -> None:
        models: dict[str, dict[int, _Served]] = {}
        for entry in served.values():
            manifest = entry.bundle.manifest
            models.setdefault(manifest.name, {})[int(manifest.version)] = entry
        self._served, self._models = served, dict(sorted(models.items()))

    def _load(self, path: Path, fingerprint: Fingerprint, *, beside: Mapping[Path, _Served]) -> _Served:
        start = time.monotonic()
        load = load_file if path.is_file() else load_bundle
        try:
            bundle = self._paced(load(path, providers=self._providers, cache=self._cache))
        except OSError as error:
            raise BundleError(path, "files", expected="readable files", found=error) from error
        self._names[path] = bundle.manifest.name
        for other, served in beside.items():
            same = served.bundle.manifest
            if other != path and (same.name, same.version) == (bundle.manifest.name, bundle.manifest.version):
                raise BundleError(path, "name, version", expected="one of each", found=f"the same in {other}")
        return _Served(bundle, fingerprint, time.monotonic() - start)

    def _load_variant(self, path: Path, variant: Precision) -> Bundle:
        return self._paced(load_bundle(path, variant=variant, providers=self._providers, cache=self._cache))

    def _paced(self, bundle: Bundle) -> Bundle:
        if self._cores is None:
            return bundle
        all_cores = None
        if self._cores > 1 and self._providers == CPU:
            network = OnnxNetwork(bundle.file, threads=self._cores, cache=self._cache)
            all_cores = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
        return replace(bundle, profile=measure_profile(bundle.predictor, all_cores))

    def _find(self) -> dict[Path, Fingerprint]:
        """Everything that could be served, with what tells whether it has changed."""
        paths = []
        for root in self._roots:
            paths += [root] if root.is_file() else find_bundles(root)
        return {path: _fingerprint(path) for path in paths}

    def _name(self, path: Path) -> str:
        return self._names.get(path, path.parent.name)


def _fingerprint(path: Path) -> Fingerprint:
    files = [path] if path.is_file() else sorted(path.iterdir())
    found = []
    for file in files:
        try:
            state = file.stat()
        except OSError:  # removed since it was listed
            continue
        found.append((file.name, state.st_size, state.st_mtime_ns))
    return tuple(found)
