"""Model repository: the bundles that a process serves, by name and version, reloadable while serving.

What is to be served is one value, a `RepositoryState`: one process changes it, others follow it. Lookups read an
immutable snapshot. A change first loads and verifies all new bundles, then replaces the snapshot in one step. A request
keeps the bundle that it has looked up, so that no request fails because of a change.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from vitrine.bundle.errors import BundleError, ParameterError, UnknownModelError, VitrineError
from vitrine.bundle.exhaustion import naming_exhaustion
from vitrine.bundle.loading import Bundle, find_bundles, load_bundle, load_explain_network, load_file, read_manifest
from vitrine.bundle.manifest import MANIFEST_FILE, Identity, Manifest, Precision, Task
from vitrine.bundle.predictors import make_predictor
from vitrine.bundle.profile import measure_profile
from vitrine.bundle.runtime import CPU, OnnxNetwork

_VERSION = re.compile("[1-9][0-9]{0,8}")  # as in the manifest
Value = TypeVar("Value")
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0  # seconds until a refused bundle is tried again; doubled each time


@dataclass(frozen=True)
class ModelState:
    """The state of one version of a model."""

    name: str
    version: str
    ready: bool
    reason: str = ""  # why it is not ready, or why the new content of its folder was refused


@dataclass(frozen=True)
class Version:
    """One version of a model, in a folder or file."""

    name: str
    version: str
    fingerprint: str  # of the names, sizes, times and permissions of its files
    task: str = ""  # if it is served
    reason: str = ""  # why it is refused


@dataclass(frozen=True)
class RepositoryState:
    """What a repository is to serve, by path. A path that is served is also refused while its new content is."""

    served: Mapping[Path, Version] = field(default_factory=dict)
    refused: Mapping[Path, Version] = field(default_factory=dict)
    unloaded: Mapping[Path, Version] = field(default_factory=dict)  # models of these names stay unloaded until `load`


Publish = Callable[[RepositoryState], None]
"""Receives a new state before it takes effect; if it raises, nothing changes."""


@dataclass(frozen=True)
class _LoadedBundle:
    bundle: Bundle
    fingerprint: str
    seconds: float  # load time
    variants: dict[Precision, Bundle] = field(default_factory=dict)  # loaded so far, without the default
    explaining: list[Bundle] = field(default_factory=list)  # with the explain graph, once it is loaded
    loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def task(self) -> str:
        return self.bundle.manifest.task


@dataclass(frozen=True)
class _MissingBundle:
    """A bundle that is to be served, but could not be loaded by this process."""

    task: str
    error: VitrineError


@dataclass(frozen=True)
class _Snapshot:
    state: RepositoryState
    loaded: Mapping[Path, _LoadedBundle] = field(default_factory=dict)
    errors: Mapping[Path, VitrineError] = field(default_factory=dict)  # of loading what is to be served

    @cached_property
    def problems(self) -> Mapping[Path, VitrineError]:
        """Why this process does not serve what it is to serve."""
        problems = dict(self.errors)
        for path in problems.keys() & self.state.refused.keys():
            found = f"others, which are refused: {self.state.refused[path].reason}"
            problems[path] = BundleError(path, "files", expected="those that are to be served", found=found)
        return problems

    @cached_property
    def models(self) -> dict[str, dict[int, _LoadedBundle | _MissingBundle]]:
        """The bundles that are to be served by name, in order, and version, the missing ones first."""
        models: dict[str, dict[int, _LoadedBundle | _MissingBundle]] = {}
        for path, version in sorted(self.state.served.items(), key=lambda item: int(item[1].version)):
            if path not in self.loaded:
                missing = _MissingBundle(version.task, self.problems[path])
                models.setdefault(version.name, {})[int(version.version)] = missing
        for entry in sorted(self.loaded.values(), key=lambda entry: int(entry.bundle.manifest.version)):
            manifest = entry.bundle.manifest
            models.setdefault(manifest.name, {})[int(manifest.version)] = entry
        return dict(sorted(models.items()))


class Repository:
    """All versions of all bundles under one or several roots."""

    def __init__(
        self,
        *roots: Path,
        cores: int | None = None,
        providers: Sequence[str] = CPU,
        cache: Path | None = None,
        state: RepositoryState | None = None,
        defaults: Sequence[str] = (),
    ) -> None:
        """Load and verify everything; or follow `state`, that of another process.

        Args:
            roots: folders of `<name>/<version>`, or single ONNX files of a bundle.
            cores: cores that this process may use; if set, an `ExecutionProfile` is measured for each bundle.
            providers, cache: see `bundle.runtime.OnnxNetwork`.
            state: what to serve; see `follow`.
            defaults: names of the models that `get` prefers where none is named, the first that is here.

        Raises:
            BundleError: no bundle found, one differs from its manifest, or a version exists twice. Not with `state`.
            ResourceError, ProviderError: see `bundle.runtime.OnnxNetwork`. Not with `state`.
        """
        self._roots, self._cores, self._providers, self._cache = roots, cores, tuple(providers), cache
        self._defaults = tuple(defaults)
        self._lock = threading.Lock()
        self._pauses: dict[Path, tuple[float, float]] = {}  # of refused bundles: when to try again, seconds until then
        self._snapshot = _Snapshot(RepositoryState())
        if state is not None:
            self.follow(state)
            return
        found = self._scan()
        if not found:
            expected = "at least one <name>/<version>/manifest.json"
            raise BundleError(", ".join(map(str, roots)), "bundles", expected=expected, found="none")
        self._snapshot, _ = self._update(found, strict=True)

    @property
    def state(self) -> RepositoryState:
        """What is to be served."""
        return self._snapshot.state

    @property
    def errors(self) -> Mapping[Path, str]:
        """Why this process does not serve what the state says, by path of the bundle; empty if it does."""
        return {path: _reason(problem) for path, problem in self._snapshot.problems.items()}

    @property
    def models(self) -> dict[str, list[Bundle]]:
        """All versions of each model that this process serves, the highest last, by name."""
        models: dict[str, list[Bundle]] = {}
        for name, versions in self._snapshot.models.items():
            for entry in versions.values():
                if isinstance(entry, _LoadedBundle):
                    models.setdefault(name, []).append(entry.bundle)
        return models

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The highest version of each model, by name."""
        return {name: versions[-1] for name, versions in self.models.items()}

    def versions(self, name: str) -> list[Bundle]:
        """Return all served versions of a model, the highest last.

        Raises:
            UnknownModelError: the model is not served.
        """
        models = self.models
        if name not in models:
            raise UnknownModelError(name, available=models)
        return models[name]

    def load_seconds(self) -> list[tuple[Bundle, float]]:
        """Return every served bundle with the seconds that loading and verifying it took."""
        return [(loaded.bundle, loaded.seconds) for loaded in self._snapshot.loaded.values()]

    def get(self, reference: str | None = None, *, task: Task | None = None) -> Bundle:
        """Return the bundle `name` (its highest version here) or `name@version`; by default one of `defaults`, or
        the first by name.

        Raises:
            UnknownModelError: there is no such bundle, or none for this task.
            BundleError, ResourceError: it is to be served, but this process could not load it.
        """
        candidates = self._candidates(task)
        if reference is None and candidates:
            name, version = self._default(candidates), ""
        else:
            name, _, version = (reference or "").partition("@")
        versions = candidates.get(name, {})
        is_number = _VERSION.fullmatch(version) is not None
        key = int(version) if is_number else next(reversed(versions), 0)
        if key not in versions or (reference is not None and "@" in reference and not is_number):
            available = [f"{name}@{number}" for number in versions] if versions else candidates
            raise UnknownModelError(reference, task=task, available=available)
        entry = versions[key]
        if isinstance(entry, _MissingBundle):
            raise entry.error.bare()
        return entry.bundle

    def defaults(self) -> set[str]:
        """Return the names of the models that `get` returns for a task where none is named."""
        by_task = filter(None, map(self._candidates, Task))
        return {self._default(candidates) for candidates in by_task}

    def _candidates(self, task: Task | None) -> dict[str, dict[int, _LoadedBundle | _MissingBundle]]:
        models = self._snapshot.models.items()
        return {name: entry for name, entry in models if task is None or entry[next(reversed(entry))].task == task}

    def _default(self, candidates: Collection[str]) -> str:
        return next(name for name in (*self._defaults, *candidates) if name in candidates)

    def variant(self, bundle: Bundle, precision: str) -> Bundle:
        """Return a bundle with another of its graphs, which is loaded and verified on first use.

        Raises:
            ParameterError: the bundle has no such variant.
            BundleError, ResourceError: the variant's file differs from the manifest, or see `OnnxNetwork`.
        """
        manifest = bundle.manifest
        variants = tuple(manifest.variants) if isinstance(manifest, Manifest) else ()
        if precision not in variants:
            expected = f"one of {', '.join(variants)}" if variants else "none, as one ONNX file alone is served"
            raise ParameterError("variant", expected=expected, found=repr(precision[:100]))
        variant = Precision(precision)
        if variant is bundle.variant:
            return bundle
        loaded = self._snapshot.loaded.get(bundle.path)
        if loaded is None:  # removed since the lookup
            return self._load_variant(bundle, variant)
        if loaded.bundle is not bundle:  # replaced
            return self.variant(loaded.bundle, precision)
        with loaded.loading:
            if variant not in loaded.variants:
                loaded.variants[variant] = self._load_variant(bundle, variant)
            return loaded.variants[variant]

    def explaining(self, bundle: Bundle) -> Bundle:
        """Return a bundle with its explain graph, which is loaded and verified on first use; itself if it has none.

        Raises:
            BundleError, ResourceError: the graph's file differs from the manifest, or see `OnnxNetwork`.
        """
        loaded = self._snapshot.loaded.get(bundle.path)
        if loaded is None:  # removed since the lookup
            return self._load_explaining(bundle)
        if loaded.bundle is not bundle:  # replaced
            return self.explaining(loaded.bundle)
        with loaded.loading:
            if not loaded.explaining:
                loaded.explaining.append(self._load_explaining(bundle))
            return loaded.explaining[0]

    def index(self) -> list[ModelState]:
        """Return the state of every served, refused or unloaded version, by name and ascending version."""
        snapshot = self._snapshot
        state = snapshot.state
        states: dict[tuple[str, int], ModelState] = {}

        def add(version: Version, ready: bool, reason: str) -> None:
            number = int(version.version) if _VERSION.fullmatch(version.version) else 0
            states.setdefault((version.name, number), ModelState(version.name, version.version, ready, reason))

        for path, version in state.served.items():
            reason = ""
            if path in snapshot.problems:
                reason = _reason(snapshot.problems[path])
            elif path in state.refused:
                reason = f"its changed folder is refused: {state.refused[path].reason}"
            add(version, path in snapshot.loaded, reason)
        for path, version in state.refused.items():
            if path not in state.served:
                add(version, False, version.reason)
        for version in state.unloaded.values():
            add(version, False, "unloaded")
        return [states[key] for key in sorted(states)]

    def refresh(self, publish: Publish = lambda _: None, *, paths: Container[Path] | None = None) -> list[str]:
        """Scan the roots again: load new and changed bundles, drop removed ones. Return the changes as log messages.

        A bundle that fails to load is refused and the one served before stays. A refusal is reported once. The bundle
        is tried again when its files change or another one goes away, and otherwise in ever longer intervals: the
        reason may have been a lack of memory.

        Args:
            publish: see `Publish`.
            paths: only consider these bundles.

        Raises:
            BundleError, ResourceError: a root is missing, or a folder cannot be listed; nothing changes then.
        """
        with self._lock:
            snapshot, changes = self._update(self._scan(), paths=paths)
            self._replace(snapshot, publish)
            return changes

    def load(self, name: str, publish: Publish = lambda _: None) -> list[str]:
        """Load or reload a model: all of its versions in the roots that are new or have changed.

        Args:
            publish: see `Publish`.

        Returns:
            The changes as log messages.

        Raises:
            UnknownModelError: no root has the model.
            BundleError, ResourceError: a version fails to load, or see `refresh`. No version of the model changes then.
        """
        with self._lock:
            found = self._scan()
            names = {version.name for version in found.values()}
            if name not in names:
                raise UnknownModelError(name, available=sorted(names))
            snapshot, changes = self._update(found, model=name, strict=True)
            self._replace(snapshot, publish)
            return changes

    def unload(self, name: str, publish: Publish = lambda _: None) -> list[str]:
        """Stop serving a model until `load`, whatever its folder holds. Calls in progress finish.

        Args:
            publish: see `Publish`.

        Returns:
            The change as a log message.

        Raises:
            UnknownModelError: the model is not served.
        """
        with self._lock:
            old, state = self._snapshot, self._snapshot.state
            unloaded = {path: version for path, version in state.served.items() if version.name == name}
            if not unloaded:
                raise UnknownModelError(name, available=old.models)
            new = RepositoryState(_without(unloaded, state.served), state.refused, {**state.unloaded, **unloaded})
            self._replace(_Snapshot(new, _without(unloaded, old.loaded), _without(unloaded, old.errors)), publish)
            return [f"unloaded: {name}"]

    def follow(self, state: RepositoryState) -> list[str]:
        """Serve what `state` says. Return the changes as log messages.

        What cannot be loaded, or has other files by now, is in `errors`, and what its path served before stays.
        """
        with self._lock:
            old, changes = self._snapshot, []
            loaded: dict[Path, _LoadedBundle] = {}
            errors: dict[Path, VitrineError] = {}
            for path, version in state.served.items():
                if path in old.loaded:
                    loaded[path] = old.loaded[path]
                if path not in loaded or loaded[path].fingerprint != version.fingerprint:
                    try:
                        loaded[path] = self._load(path, version)
                        changes.append(_loaded_message(loaded[path]))
                    except VitrineError as error:
                        errors[path] = error.bare()
            changes += [_gone_message(path, old.state.served[path]) for path in old.loaded if path not in loaded]
            self._snapshot = _Snapshot(state, loaded, errors)
            return changes

    def _update(
        self,
        found: Mapping[Path, Version],
        *,
        model: str | None = None,
        paths: Container[Path] | None = None,
        strict: bool = False,
    ) -> tuple[_Snapshot, list[str]]:
        """Return the snapshot after a scan, and the changes; with `strict`, raise the first error instead."""
        state, loaded, errors = self._snapshot.state, dict(self._snapshot.loaded), dict(self._snapshot.errors)
        served, refused = dict(state.served), dict(state.refused)
        unloaded = {path: version for path, version in state.unloaded.items() if version.name != model}
        unloaded_names = {version.name for version in unloaded.values()}
        changes = []

        def is_meant(path: Path, version: Version) -> bool:
            return model in (None, version.name) and (paths is None or path in paths)

        def retries(path: Path) -> bool:
            return strict or bool(gone) or time.monotonic() >= self._pauses.get(path, (0.0, 0.0))[0]

        gone = [path for path, version in (served | refused).items() if path not in found and is_meant(path, version)]
        for path in gone:
            if path in served:
                changes.append(_gone_message(path, served[path]))
            for mapping in (served, refused, loaded, errors):
                mapping.pop(path, None)
        for path, version in found.items():
            if version.name in unloaded_names or not is_meant(path, version):
                continue
            is_current = path in served and served[path].fingerprint == version.fingerprint
            if is_current:
                refused.pop(path, None)
                if path in loaded and loaded[path].fingerprint == version.fingerprint:
                    continue
            elif path in refused and refused[path].fingerprint == version.fingerprint and not retries(path):
                continue
            try:
                bundle = self._load(path, version)
                _check_unique(path, bundle.bundle, served)
            except VitrineError as error:
                if strict:
                    raise
                if is_current:  # others serve it
                    errors[path] = error.bare()
                    continue
                reason = _reason(error)
                self._pause(path)
                refusal = replace(version, reason=reason)
                if refusal != refused.get(path):
                    changes.append(f"refused: {reason}")
                refused[path] = refusal
            else:
                manifest = bundle.bundle.manifest
                loaded[path] = bundle
                served[path] = Version(manifest.name, manifest.version, version.fingerprint, manifest.task.value)
                refused.pop(path, None)
                errors.pop(path, None)
                changes.append(_loaded_message(bundle))
        self._pauses = {path: self._pauses[path] for path in self._pauses if path in refused}
        return _Snapshot(RepositoryState(served, refused, unloaded), loaded, errors), changes

    def _replace(self, snapshot: _Snapshot, publish: Publish) -> None:
        if snapshot.state != self._snapshot.state:
            publish(snapshot.state)
        self._snapshot = snapshot

    def _pause(self, path: Path) -> None:
        pause = min(2 * self._pauses.get(path, (0.0, _FIRST_PAUSE / 2))[1], _LONGEST_PAUSE)
        self._pauses[path] = time.monotonic() + pause, pause

    def _load(self, path: Path, version: Version) -> _LoadedBundle:
        start = time.monotonic()
        load = load_file if path.is_file() else load_bundle
        with _refusals(path):
            _check_fingerprint(path, version)
            bundle = self._with_profile(load(path, providers=self._providers, cache=self._cache))
            _check_fingerprint(path, version)
        return _LoadedBundle(bundle, version.fingerprint, time.monotonic() - start)

    def _load_variant(self, bundle: Bundle, variant: Precision) -> Bundle:
        path = bundle.path
        with _refusals(path):
            loaded = load_bundle(path, variant=variant, providers=self._providers, cache=self._cache)
            _check_same(loaded.manifest, bundle)
            return self._with_profile(loaded)

    def _load_explaining(self, bundle: Bundle) -> Bundle:
        path, served = bundle.path, bundle.manifest
        with _refusals(path):
            if not isinstance(served, Manifest) or not served.has_explain_graph:
                return bundle
            network = load_explain_network(path, providers=self._providers, cache=self._cache)
            _check_same(read_manifest(path), bundle)
            assert network is not None
            predictor = make_predictor(network, served.preprocessing, served.labels)
            profile = None if self._cores is None else measure_profile(predictor)
            return replace(bundle, predictor=predictor, variant=Precision.FP32, profile=profile)

    def _with_profile(self, bundle: Bundle) -> Bundle:
        if self._cores is None:
            return bundle
        all_cores = None
        if self._cores > 1 and self._providers == CPU:
            hashes = bundle.manifest.hashes if isinstance(bundle.manifest, Manifest) else None
            network = OnnxNetwork(bundle.file, threads=self._cores, cache=self._cache, hashes=hashes)
            all_cores = make_predictor(network, bundle.manifest.preprocessing, bundle.manifest.labels)
        return replace(bundle, profile=measure_profile(bundle.predictor, all_cores))

    def _scan(self) -> dict[Path, Version]:
        """Return all bundle folders and files under the roots."""
        state = self._snapshot.state
        known = {**state.unloaded, **state.refused, **state.served}
        found = {}
        for root in self._roots:
            with naming_exhaustion(root):
                for path in [root] if os.path.isfile(root) else find_bundles(root):
                    if (fingerprint := _fingerprint(path)) is None:
                        continue
                    folder = Path(os.path.realpath(path))  # named like the model in its manifest; a file need not be
                    name, version = folder.parent.name, folder.name
                    if path in known and not path.is_dir():
                        name, version = known[path].name, known[path].version
                    found[path] = Version(_printable(name), _printable(version), fingerprint)
        return found


def _fingerprint(path: Path) -> str | None:
    """Return what changes with the files of a bundle, or None if they are gone.

    Raises:
        BundleError: the folder cannot be listed. Not if that is forbidden: loading it will report that.
    """
    if not path.is_dir():
        return _digest([_file_state(path)]) if path.exists() else None
    try:
        names = sorted(os.listdir(path))
    except PermissionError:
        return "forbidden"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(path, "files", expected="a folder that can be listed", found=error.strerror) from error
    return _digest([_file_state(path / name) for name in names])


def _file_state(file: Path) -> tuple[object, ...]:
    try:
        stat = file.stat()
    except OSError as error:  # such as a dangling link
        return file.name, error.errno
    return file.name, stat.st_mode, stat.st_size, stat.st_mtime_ns


def _digest(states: Sequence[tuple[object, ...]]) -> str:
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _check_fingerprint(path: Path, version: Version) -> None:
    if path.is_dir():
        os.listdir(path)
    if _fingerprint(path) != version.fingerprint:
        raise BundleError(path, "files", expected="those found before", found="others: they are being changed")


def _check_same(manifest: Identity, bundle: Bundle) -> None:
    if manifest != bundle.manifest:
        found = "another one since; load the model again"
        raise BundleError(bundle.path, MANIFEST_FILE, expected="that of the bundle that is served", found=found)


def _check_unique(path: Path, bundle: Bundle, served: Mapping[Path, Version]) -> None:
    for other, version in served.items():
        if other != path and (version.name, version.version) == (bundle.manifest.name, bundle.manifest.version):
            raise BundleError(path, "name, version", expected="one of each", found=f"the same in {other}")


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn any failure to load a bundle into a `ResourceError` if something has run out, else into a `BundleError`."""
    with naming_exhaustion(path):
        try:
            yield
        except VitrineError:
            raise
        except Exception as error:
            found = " ".join(filter(None, (type(error).__name__, str(error))))
            raise BundleError(path, "files", expected="files that can be loaded", found=found) from error


def _without(paths: Container[Path], mapping: Mapping[Path, Value]) -> dict[Path, Value]:
    return {path: value for path, value in mapping.items() if path not in paths}


def _loaded_message(loaded: _LoadedBundle) -> str:
    manifest = loaded.bundle.manifest
    return f"loaded: {manifest.name}@{manifest.version} in {loaded.seconds:.2f} s"


def _gone_message(path: Path, version: Version) -> str:
    return f"gone: {version.name}@{version.version}, {path}"


def _reason(error: VitrineError) -> str:
    return _printable(str(error))


def _printable(text: str) -> str:
    """Escape the bytes of file names that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()
