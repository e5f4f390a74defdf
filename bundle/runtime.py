"""ONNX Runtime sessions as the `Network` of `bundle.predictors`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default; read when onnxruntime is imported

import onnxruntime

from vitrine.bundle.errors import BundleError, ProviderError
from vitrine.bundle.manifest import TensorSpec

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
        self, file: Path, *, threads: int = 1, providers: Sequence[str] = CPU, cache: Path | None = None
    ) -> None:
        """Load a graph.

        Args:
            threads: cores per call. Single-threaded calls side by side have the higher throughput, one call on all
                cores the lower latency.
            providers: execution providers by ONNX Runtime's names, in order of preference; all must work.
            cache: folder for `mapped_graph` (CPU only). Networks and processes with the same folder share weights.

        Raises:
            BundleError: the file is not an ONNX graph that this runtime can run.
            ProviderError: a provider is missing or did not start. (ONNX Runtime would fall back to the CPU.)
        """
        self._file = file
        options = _session_options(threads)
        try:
            graph = file
            if cache is not None and tuple(providers) == CPU:
                graph = mapped_graph(file, cache) or file
            if graph is not file:  # already optimised
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise BundleError(file, "graph", expected="an ONNX graph", found=str(error).splitlines()[0]) from error
        started = self._session.get_providers()
        for provider in providers:
            if provider not in started:
                raise ProviderError(provider, expected=started, found="one that did not start")

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        outputs: Sequence[NDArray[np.generic]] = self._session.run(None, inputs)
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


def mapped_graph(file: Path, cache: Path) -> Path | None:
    """Return a copy of a graph that ONNX Runtime maps into memory instead of reading it.

    The copy is optimised and its weights are packed for this processor. Sessions and processes that load it share one
    copy of the weights and start sooner. It is written to `cache` once; None if that fails, e.g. for lack of space.
    """
    state = _file_state(file)
    folder = _mapped_folder(cache, state)
    if folder.is_dir():
        return folder / _MAPPED_GRAPH
    _remove_stale(cache)
    if shutil.disk_usage(cache).free < _MAPPED_SPACE * file.stat().st_size:
        return None
    temporary = Path(tempfile.mkdtemp(dir=cache))
    options = _session_options(threads=1)
    options.optimized_model_filepath = str(temporary / _MAPPED_GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _MAPPED_WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        (temporary / _MAPPED_SOURCE).write_bytes(os.fsencode(state))
        onnxruntime.InferenceSession(str(file), options, providers=list(CPU))
        temporary.rename(folder)
    except Exception:  # disk full, another process was faster, or not a graph, which loading reports
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / _MAPPED_GRAPH if folder.is_dir() else None


def _file_state(file: Path) -> str:
    """Inode, size, modification time and path: what identifies the content of a file."""
    stat = file.stat()
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {file.resolve()}"


def _mapped_folder(cache: Path, state: str) -> Path:
    return cache / hashlib.sha256(os.fsencode(state)).hexdigest()[:32]


def _remove_stale(cache: Path) -> None:
    """Remove mapped graphs whose source has changed or is gone; processes that have mapped one keep it."""
    for note in cache.glob(f"*/{_MAPPED_SOURCE}"):
        with contextlib.suppress(OSError):
            state = os.fsdecode(note.read_bytes())
            if note.parent != _mapped_folder(cache, state):  # being written
                continue
            source = Path(state.split(" ", 3)[3])
            if not source.exists() or _file_state(source) != state:
                shutil.rmtree(note.parent, ignore_errors=True)


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return options
