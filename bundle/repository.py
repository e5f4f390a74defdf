"""The bundles that a process serves, looked up by task and name."""

from collections.abc import Sequence
from pathlib import Path

from bundle.errors import BundleError, UnknownModelError
from bundle.loading import Bundle, find_bundles, load_bundle, load_file
from bundle.manifest import Task
from bundle.runtime import CPU


class Repository:
    """Loaded bundles, the highest version of each name."""

    def __init__(self, root: Path, *, threads: int = 1, providers: Sequence[str] = CPU) -> None:
        """Load and verify everything under `root`.

        Args:
            root: folder of `<name>/<version>`, or one ONNX file of a bundle.
            threads: cores that one prediction uses.
            providers: where to compute, see `bundle.runtime.OnnxNetwork`.

        Raises:
            BundleError: there is no bundle, or one of them is not as its manifest says.
            ProviderError: a provider is not there or did not start.
        """
        self.bundles: dict[str, Bundle]
        if root.is_file():
            alone = load_file(root, threads=threads, providers=providers)
            self.bundles = {alone.manifest.name: alone}
            return
        newest = {path.parent.name: path for path in find_bundles(root)}  # ascending versions: the last one stays
        if not newest:
            raise BundleError(root, "bundles", expected="at least one <name>/<version>/manifest.json", found="none")
        self.bundles = {name: load_bundle(path, threads=threads, providers=providers) for name, path in newest.items()}

    def get(self, task: Task, name: str | None = None) -> Bundle:
        """The bundle of that name, or the first (by name) for the task.

        Raises:
            UnknownModelError: there is none for this task.
        """
        fitting = {key: bundle for key, bundle in self.bundles.items() if bundle.manifest.task is task}
        if name is None and fitting:
            return next(iter(fitting.values()))
        if name not in fitting:
            raise UnknownModelError(name, task=task.value, available=fitting)
        return fitting[name]
