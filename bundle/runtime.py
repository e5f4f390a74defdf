"""ONNX Runtime sessions as the `Network` of `bundle.predictors`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default; read when onnxruntime is imported

import onnxruntime

from vitrine.bundle.errors import BundleError, ProviderError
from vitrine.bundle.exhaustion import exhausted_resource, naming_exhaustion
from vitrine.bundle.external_data import external_files
from vitrine.bundle.files import hash_file, read_file
from vitrine.bundle.manifest import MAX_FILE_BYTES, TensorSpec

CPU = ("CPUExecutionProvider",)
_MAPPED_GRAPH, _MAPPED_WEIGHTS, _MAPPED_SOURCE = "graph.onnx", "weights.bin", "of"
_MAPPED_SPACE = 4  # times the file's size: a mapped graph holds its weights twice, plain and packed
_DATATYPES = {"tensor(uint8)": "UINT8", "tensor(int64)": "INT64", "tensor(float)": "FP32"}


def parse_providers(text: str) -> tuple[str, ...]:
    """Parse a list of execution providers by short name, in order of preference: "cuda,cpu".

    Raises:
        ProviderError: ONNX Runtime does not know a name, or this installation does not have its provider.
    """
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_all_providers()}
    available = onnxruntime.get_available_providers()
    providers: list[str] = []
    for name in (part.strip().lower() for part in text.split(",")):
        provider = known.get(name.removesuffix("executionprovider"))
        if provider is None or provider not in available:
            expected = [short for short, provider in known.items() if provider in available]
            found = "no provider of that name" if provider is None else "none in this installation of ONNX Runtime"
            raise ProviderError(name, expected=expected, found=found)
        providers.append(provider)
    return tuple(providers)


class OnnxNetwork:
    """An ONNX Runtime session; safe to call from several threads at once."""

    def __init__(
        self,
        file: Path,
        *,
        threads: int = 1,
        providers: Sequence[str] = CPU,
        cache: Path | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Load a graph.

        Args:
            threads: cores per call. Single-threaded calls side by side have the higher throughput, one call on all
                cores the lower latency.
            providers: execution providers by ONNX Runtime's names, in order of preference; all must work.
            cache: folder for `mapped_graph` (CPU only). Networks and processes with the same folder share weights.
            hashes: SHA-256 of the file, and of those beside it that it may take weights from, by name; None: no check.

        Raises:
            BundleError: the file is not an ONNX graph that this runtime can run, or a hash differs.
            ResourceError: memory, file descriptors or threads have run out.
            ProviderError: a provider is missing or did not start. (ONNX Runtime would fall back to the CPU.)
        """
        self._file = file
        session = None
        with naming_exhaustion(file):
            if cache is not None and tuple(providers) == CPU:
                session = _mapped_session(file, threads, cache, hashes)
            self._session = session or _session(file, _session_options(threads), providers, hashes)
        started = self._session.get_providers()
        for provider in providers:
            if provider not in started:
                raise ProviderError(provider, expected=started, found="one that did not start")

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        try:
            outputs: Sequence[NDArray[np.generic]] = self._session.run(None, inputs)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if exhausted_resource(error) == "memory":
                raise MemoryError(str(error).splitlines()[0]) from None
            raise
        return outputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that the graph declares."""
        return tuple(map(self._spec, self._session.get_inputs()))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that the graph declares."""
        return tuple(map(self._spec, self._session.get_outputs()))

    @property
    def metadata(self) -> dict[str, str]:
        """The custom metadata of the file."""
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return metadata

    def _spec(self, argument: onnxruntime.NodeArg) -> TensorSpec:
        if argument.type not in _DATATYPES:
            expected = f"one of {', '.join(_DATATYPES)}"
            raise BundleError(self._file, f"tensor {argument.name}", expected=expected, found=argument.type)
        shape = ("?" if edge is None else edge for edge in argument.shape)
        return TensorSpec(name=argument.name, datatype=_DATATYPES[argument.type], shape=tuple(shape))


def mapped_graph(file: Path, cache: Path, hashes: Mapping[str, str]) -> Path | None:
    """Return a copy of a graph that ONNX Runtime maps into memory instead of reading it.

    The copy is optimised and its weights are packed for this processor. Sessions and processes that load it share one
    copy of the weights and start sooner. It is made once, from content with these hashes, in a folder of `cache`; None
    if that fails, e.g. for lack of space. Processes that have mapped it keep it if it is removed.
    """
    try:
        state = _file_state(file, hashes)
        folder = _mapped_folder(cache, state)
        if not folder.is_dir():
            _remove_stale(cache)
            if shutil.disk_usage(cache).free < _MAPPED_SPACE * file.stat().st_size:
                return None
            _write_mapped_graph(file, hashes, state, folder)
    except OSError:
        return None
    return folder / _MAPPED_GRAPH if folder.is_dir() else None


def _write_mapped_graph(file: Path, hashes: Mapping[str, str], state: str, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    graph, weights = temporary / _MAPPED_GRAPH, temporary / _MAPPED_WEIGHTS
    options = _session_options(threads=1)
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _MAPPED_WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        (temporary / _MAPPED_SOURCE).write_bytes(os.fsencode(state))
        _session(file, options, CPU, hashes)
        if weights.exists():  # reading a hole in a mapped file on a full disk would kill us
            with weights.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, weights.stat().st_size)
        _session_of_mapped(graph, threads=1)  # checks that nothing is cut off
        temporary.rename(folder)
    except Exception:  # disk full, another process was faster, or not a graph, which loading reports
        shutil.rmtree(temporary, ignore_errors=True)


def _mapped_session(
    file: Path, threads: int, cache: Path, hashes: Mapping[str, str] | None
) -> onnxruntime.InferenceSession | None:
    graph = mapped_graph(file, cache, hashes or {file.name: hash_file(file)})
    if graph is not None:
        with contextlib.suppress(Exception):  # removed or damaged since: the file itself is loaded
            return _session_of_mapped(graph, threads)
    return None


def _session_of_mapped(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = _session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been optimised
    return onnxruntime.InferenceSession(str(graph), options, providers=list(CPU), enable_fallback=0)


def _session(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[str], hashes: Mapping[str, str] | None
) -> onnxruntime.InferenceSession:
    """Load a graph from the very bytes that are checked; nothing else is read."""
    model = _read(file, hashes)
    try:
        names = list(external_files(model))
    except ValueError as error:
        raise BundleError(file, "graph", expected="an ONNX graph", found=error) from error
    for name in names:
        if name != Path(name).name or (hashes is not None and name not in hashes):
            expected = "weights in the file or in one beside it that a manifest lists"
            raise BundleError(file, "external data", expected=expected, found=repr(name[:200]))
    weights = [_read(file.with_name(name), hashes) for name in names]
    options.add_external_initializers_from_files_in_memory(names, weights, list(map(len, weights)))
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        # A fallback from the CPU to the CPU would only print.
        fallback = int(tuple(providers) != CPU)
        session = onnxruntime.InferenceSession(model, options, providers=list(providers), enable_fallback=fallback)
    except Exception as error:  # as above
        raise BundleError(file, "graph", expected="an ONNX graph", found=str(error).partition("\n")[0]) from error
    session._model_bytes = None  # would be kept as long as the session
    return session


def _read(file: Path, hashes: Mapping[str, str] | None) -> bytes:
    content = read_file(file, MAX_FILE_BYTES)
    if hashes is not None and (sha256 := hashlib.sha256(content).hexdigest()) != hashes[file.name]:
        raise BundleError(file, "sha256", expected=hashes[file.name], found=sha256)
    return content


def _file_state(file: Path, hashes: Mapping[str, str]) -> str:
    """Hash of all hashes, inode, size, modification time and path: what identifies the content of a graph."""
    digest = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()
    stat = file.stat()
    return f"{digest} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {file.resolve()}"


def _mapped_folder(cache: Path, state: str) -> Path:
    return cache / hashlib.sha256(os.fsencode(state)).hexdigest()[:32]


def _remove_stale(cache: Path) -> None:
    """Remove mapped graphs whose source has changed or is gone; processes that have mapped one keep it."""
    for note in cache.glob(f"*/{_MAPPED_SOURCE}"):
        with contextlib.suppress(OSError):
            state = os.fsdecode(note.read_bytes())
            if note.parent != _mapped_folder(cache, state):  # being written
                continue
            source = Path(state.split(" ", 4)[4])
            if not source.exists() or _file_state(source, {}).split(" ", 1)[1] != state.split(" ", 1)[1]:
                shutil.rmtree(note.parent, ignore_errors=True)


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal: errors are raised
    return options
