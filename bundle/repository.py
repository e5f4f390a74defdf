"""Model repository: the bundles that a process serves, by name and version, reloadable while serving.

Lookups read a snapshot. A change first loads and verifies all new bundles, then replaces the snapshot in one step.
A request keeps the bundle that it has looked up, so that no request fails because of a change.
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

_VERSION = re.compile("[1-9][0-9]{0,8}")  # as in the manifest

Fingerprint = tuple[tuple[str, int, int], ...]  # name, size and modification time (ns) of each file


@dataclass(frozen=True)
class ModelState:
    """The state of one version of a model."""

    name: str
    version: str
    ready: bool
    reason: str = ""  # why it is not ready, or why the new content of its folder was refused


@dataclass(frozen=True)
class _LoadedBundle:
    bundle: Bundle
    fingerprint: Fingerprint
    seconds: float  # load time
    variants: dict[Precision, Bundle] = field(default_factory=dict)  # loaded so far, without the default
    loading: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _RefusedBundle:
    name: str
    version: str
    fingerprint: Fingerprint
    error: VitrineError


class Repository:
    """All versions of all bundles under one or several roots."""

    def __init__(
        self, *roots: Path, cores: int | None = None, providers: Sequence[str] = CPU, cache: Path | None = None
    ) -> None:
        """Load and verify everything.

        Args:
            roots: folders of `<name>/<version>`, or single ONNX files of a bundle.
            cores: cores that this process may use; if set, an `ExecutionProfile` is measured for each bundle.
            providers, cache: see `bundle.runtime.OnnxNetwork`.

        Raises:
            BundleError: no bundle found, one differs from its manifest, or a version exists twice.
            ProviderError: a provider is missing or did not start.
        """
        self._roots, self._cores, self._providers, self._cache = roots, cores, tuple(providers), cache
        self._lock = threading.Lock()
        self._refused: dict[Path, _RefusedBundle] = {}
        self._unloaded: dict[str, list[ModelState]] = {}
        self._names: dict[Path, str] = {}
        self._served: dict[Path, _LoadedBundle] = {}
        self._models: dict[str, dict[int, _LoadedBundle]] = {}
        found = self._scan()
        if not found:
            expected = "at least one <name>/<version>/manifest.json"
            raise BundleError(", ".join(map(str, roots)), "bundles", expected=expected, found="none")
        served: dict[Path, _LoadedBundle] = {}
        for path, fingerprint in found.items():
            served[path] = self._load(path, fingerprint, others=served)
        self._publish(served)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The highest version of each model, by name."""
        return {name: versions[max(versions)].bundle for name, versions in self._models.items()}

    def versions(self, name: str) -> list[Bundle]:
        """Return all served versions of a model, the highest last.

        Raises:
            UnknownModelError: the model is not served.
        """
        models = self._models
        if name not in models:
            raise UnknownModelError(name, available=models)
        return [models[name][version].bundle for version in sorted(models[name])]

    def load_seconds(self) -> list[tuple[Bundle, float]]:
        """Return every served bundle with the seconds that loading and verifying it took."""
        return [(served.bundle, served.seconds) for served in self._served.values()]

    def get(self, reference: str | None = None, *, task: Task | None = None) -> Bundle:
        """Return the bundle `name` (its highest version) or `name@version`; by default the first by name.

        Raises:
            UnknownModelError: there is no such bundle, or none for this task.
        """
        candidates = {
            name: versions
            for name, versions in self._models.items()
            if task is None or versions[max(versions)].bundle.manifest.task is task
        }
        if reference is None and candidates:
            name, version = next(iter(candidates)), ""
        else:
            name, _, version = (reference or "").partition("@")
        versions = candidates.get(name, {})
        is_number = _VERSION.fullmatch(version) is not None
        key = int(version) if is_number else max(versions, default=0)
        if key not in versions or (reference is not None and "@" in reference and not is_number):
            available = [f"{name}@{number}" for number in versions] if versions else candidates
            raise UnknownModelError(reference, task=task, available=available)
        return versions[key].bundle

    def variant(self, bundle: Bundle, precision: str) -> Bundle:
        """Return a bundle with another of its graphs, which is loaded and verified on first use.

        Raises:
            ParameterError: the bundle has no such variant.
            BundleError: the variant's file differs from the manifest.
        """
        manifest = bundle.manifest
        variants = tuple(manifest.variants) if isinstance(manifest, Manifest) else ()
        if precision not in variants:
            expected = f"one of {', '.join(variants)}" if variants else "none, as one ONNX file alone is served"
            raise ParameterError("variant", expected=expected, found=repr(precision[:100]))
        variant = Precision(precision)
        if variant is bundle.variant:
            return bundle
        served = self._served.get(bundle.path)
        if served is None or served.bundle is not bundle:  # replaced since the lookup
            return self._load_variant(bundle.path, variant)
        with served.loading:
            if variant not in served.variants:
                served.variants[variant] = self._load_variant(bundle.path, variant)
            return served.variants[variant]

    def index(self) -> list[ModelState]:
        """Return the state of every served, refused or unloaded version, by name and ascending version."""
        refused = dict(self._refused)
        states = {}
        for path, served in self._served.items():
            reason = f"its changed folder is refused: {refused.pop(path).error}" if path in refused else ""
            manifest = served.bundle.manifest
            states[manifest.name, int(manifest.version)] = ModelState(manifest.name, manifest.version, True, reason)
        for entry in refused.values():
            key = entry.name, int(entry.version) if _VERSION.fullmatch(entry.version) else 0
            states.setdefault(key, ModelState(entry.name, entry.version, False, str(entry.error)))
        for unloaded in self._unloaded.values():
            for state in unloaded:
                states.setdefault((state.name, int(state.version)), state)
        return [states[key] for key in sorted(states)]

    def refresh(self) -> list[str]:
        """Scan the roots again: load new and changed bundles, drop removed ones. Return the changes as log messages.

        A bundle that fails to load is refused and the one served before stays. A refusal is reported once; the bundle
        is tried again when its files change.

        Raises:
            BundleError: a root is missing; nothing changes then.
        """
        with self._lock:
            return self._refresh(self._scan(), only=None)

    def load(self, name: str) -> None:
        """Load or reload a model: all of its versions in the roots that are new or have changed.

        Raises:
            UnknownModelError: no root has the model.
            BundleError: a version fails to load. No version of the model changes then.
        """
        with self._lock:
            found = self._scan()
            if not any(self._model_name(path) == name for path in found):
                raise UnknownModelError(name, available=sorted({self._model_name(path) for path in found}))
            unloaded, refused = self._unloaded.pop(name, None), self._refused
            self._refused = {path: entry for path, entry in refused.items() if entry.name != name}  # retry this model
            try:
                self._refresh(found, only=name)
            except VitrineError:
                self._refused = refused
                if unloaded is not None:
                    self._unloaded[name] = unloaded
                raise

    def unload(self, name: str) -> None:
        """Stop serving a model until `load`, whatever its folder holds. Calls in progress finish.

        Raises:
            UnknownModelError: the model is not served.
        """
        with self._lock:
            manifests = [served.bundle.manifest for served in self._models.get(name, {}).values()]
            if not manifests:
                raise UnknownModelError(name, available=self._models)
            self._unloaded[name] = [ModelState(name, manifest.version, False, "unloaded") for manifest in manifests]
            self._publish({path: served for path, served in self._served.items() if self._model_name(path) != name})

    def _refresh(self, found: Mapping[Path, Fingerprint], *, only: str | None) -> list[str]:
        """Implement `refresh`; with `only`, for one model, raising the first error without changing anything."""
        served, refused = dict(self._served), {path: self._refused[path] for path in self._refused if path in found}
        changes = []
        for path in [path for path in served if path not in found and only in (None, self._model_name(path))]:
            manifest = served.pop(path).bundle.manifest
            changes.append(f"gone: {manifest.name}@{manifest.version}, {path}")
        for path, fingerprint in found.items():
            name = self._model_name(path)
            known = refused.get(path) or served.get(path)
            if only not in (None, name) or name in self._unloaded or (known and known.fingerprint == fingerprint):
                continue
            try:
                served[path] = self._load(path, fingerprint, others=served)
            except VitrineError as error:
                if only is not None:
                    raise
                refused[path] = _RefusedBundle(name, path.name, fingerprint, error)
                changes.append(f"refused: {error}")
            else:
                refused.pop(path, None)
                manifest = served[path].bundle.manifest
                changes.append(f"loaded: {manifest.name}@{manifest.version} in {served[path].seconds:.2f} s")
        self._refused = refused
        self._publish(served)
        return changes

    def _publish(self, served: dict[Path, _LoadedBundle]) -> None:
        models: dict[str, dict[int, _LoadedBundle]] = {}
        for entry in served.values():
            manifest = entry.bundle.manifest
            models.setdefault(manifest.name, {})[int(manifest.version)] = entry
        self._served, self._models = served, dict(sorted(models.items()))

    def _load(self, path: Path, fingerprint: Fingerprint, *, others: Mapping[Path, _LoadedBundle]) -> _LoadedBundle:
        start = time.monotonic()
        load = load_file if path.is_file() else load_bundle
        try:
            bundle = self._with_profile(load(path, providers=self._providers, cache=self._cache))
        except OSError as error:
            raise BundleError(path, "files", expected="readable files", found=error) from error
        self._names[path] = bundle.manifest.name
        for other, served in others.items():
            taken = served.bundle.manifest
            if other != path and (taken.name, taken.version) == (bundle.manifest.name, bundle.manifest.version):
                raise BundleError(path, "name, version", expected="one of each", found=f"the same in {other}")
        return _LoadedBundle(bundle, fingerprint, time.monotonic() - start)

    def _load_variant(self, path: Path, variant: Precision) -> Bundle:
        return self._with_profile(load_bundle(path, variant=variant, providers=self._providers, cache=self._cache))

    def _with_profile(self, bundle: Bundle) -> Bundle:
        if self._cores is None:
            return bundle
        all_cores = None
        if self._cores > 1 and self._providers == CPU:
            hashes = bundle.manifest.hashes if isinstance(bundle.manifest, Manifest) else None
            network = OnnxNetwork(bundle.file, threads=self._cores, cache=self._cache, hashes=hashes)
            all_cores = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
        return replace(bundle, profile=measure_profile(bundle.predictor, all_cores))

    def _scan(self) -> dict[Path, Fingerprint]:
        """Return all bundle folders and files under the roots, with their fingerprints."""
        paths = []
        for root in self._roots:
            paths += [root] if root.is_file() else find_bundles(root)
        return {path: _fingerprint(path) for path in paths}

    def _model_name(self, path: Path) -> str:
        return self._names.get(path, path.parent.name)


def _fingerprint(path: Path) -> Fingerprint:
    files = [path] if path.is_file() else sorted(path.iterdir())
    fingerprint = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:  # removed since it was listed
            continue
        fingerprint.append((file.name, stat.st_size, stat.st_mtime_ns))
    return tuple(fingerprint)
