"""ONNX Runtime behind the `Network` call of `bundle.predictors`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime sends usage data by default; read when it is imported

import onnxruntime

from vitrine.bundle.errors import BundleError, ProviderError
from vitrine.bundle.manifest import TensorSpec

CPU = ("CPUExecutionProvider",)
_MAPPED_GRAPH, _MAPPED_WEIGHTS, _MAPPED_OF = "graph.onnx", "weights.bin", "of"
_MAPPED_ROOM = 4  # times its size: a mapped graph holds its weights twice, as they are and packed
_DATATYPES = {"tensor(uint8)": "UINT8", "tensor(int64)": "INT64", "tensor(float)": "FP32"}


def parse_providers(text: str) -> tuple[str, ...]:
    """ONNX Runtime's execution providers by their short names, in order of preference: "cuda,cpu".

    Raises:
        ProviderError: a name is unknown to ONNX Runtime, or its provider is not part of this installation.
    """
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_all_providers()}
    available = onnxruntime.get_available_providers()
    chosen: list[str] = []
    for name in (part.strip().lower() for part in text.split(",")):
        provider = known.get(name.removesuffix("executionprovider"))
        if provider is None or provider not in available:
            here = [short for short, provider in known.items() if provider in available]
            found = "no provider of that name" if provider is None else "none in this installation of ONNX Runtime"
            raise ProviderError(name, expected=here, found=found)
        chosen.append(provider)
    return tuple(chosen)


class OnnxNetwork:
    """An ONNX Runtime session; safe to call from several threads at once."""

    def __init__(
        self, file: Path, *, threads: int = 1, providers: Sequence[str] = CPU, cache: Path | None = None
    ) -> None:
        """Load a graph.

        Args:
            providers: ONNX Runtime's names of where to compute, in order of preference; all of them must work.
            threads: cores that one call uses. Several calls with one thread each, side by side, have the higher
                throughput; one call with all cores the lower latency.
            cache: folder for `mapped_graph`, on the CPU: networks and processes that share it share their weights.

        Raises:
            BundleError: the file is no ONNX graph that this runtime can run.
            ProviderError: a provider is not there or did not start. (ONNX Runtime itself would go on with the CPU.)
        """
        self._file = file
        options = _options(threads)
        try:
            graph = file
            if cache is not None and tuple(providers) == CPU:
                graph = mapped_graph(file, cache) or file
            if graph is not file:  # it is optimised already
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=list(providers))
        except Exception as error:  # the runtime's own exception types share no base but Exception
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
        """The graph's inputs as it declares them."""
        return tuple(map(self._spec, self._session.get_inputs()))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs as it declares them."""
        return tuple(map(self._spec, self._session.get_outputs()))

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return metadata

    def _spec(self, argument: onnxruntime.NodeArg) -> TensorSpec:
        if argument.type not in _DATATYPES:
            expected = f"one of {', '.join(_DATATYPES)}"
            raise BundleError(self._file, f"tensor {argument.name}", expected=expected, found=argument.type)
        shape = ("?" if edge is None else edge for edge in argument.shape)
        return TensorSpec(name=argument.name, datatype=_DATATYPES[argument.type], shape=tuple(shape))


def mapped_graph(file: Path, cache: Path) -> Path | None:
    """A graph as ONNX Runtime runs it on this machine, in a file that is mapped into memory instead of read.

    It is optimised, and its weights are packed for the processor: sessions and processes that load it share one copy
    of them, and start sooner. Made once, under `cache`; None where that fails, as without room for it.
    """
    state = _state(file)
    folder = _mapped_folder(cache, state)
    if folder.is_dir():
        return folder / _MAPPED_GRAPH
    _remove_stale(cache)
    if shutil.disk_usage(cache).free < _MAPPED_ROOM * file.stat().st_size:
        return None
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    options = _options(threads=1)
    options.optimized_model_filepath = str(unfinished / _MAPPED_GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _MAPPED_WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        (unfinished / _MAPPED_OF).write_bytes(os.fsencode(state))
        onnxruntime.InferenceSession(str(file), options, providers=list(CPU))
        unfinished.rename(folder)
    except Exception:  # the disk is full, another process was faster, or it is no graph: who loads it will say so
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / _MAPPED_GRAPH if folder.is_dir() else None


def _state(file: Path) -> str:
    found = file.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {file.resolve()}"


def _mapped_folder(cache: Path, state: str) -> Path:
    return cache / hashlib.sha256(os.fsencode(state)).hexdigest()[:32]


def _remove_stale(cache: Path) -> None:
    """Remove mapped graphs of files that have changed or are gone; who has mapped one keeps it to the end."""
    for note in cache.glob(f"*/{_MAPPED_OF}"):
        with contextlib.suppress(OSError):
            state = os.fsdecode(note.read_bytes())
            if note.parent != _mapped_folder(cache, state):  # it is being made
                continue
            source = Path(state.split(" ", 3)[3])
            if not source.exists() or _state(source) != state:
                shutil.rmtree(note.parent, ignore_errors=True)


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return options
