"""Latency of a network in several runtimes, measured in turns."""

import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from vitrine.bundle.machine import available_cores
from vitrine.bundle.manifest import MODEL_FILE, Latency, LatencyRow, Precision
from vitrine.export.errors import ExportError
from vitrine.export.graph import export_graph, fuse_transformer
from vitrine.export.inputs import Inputs
from vitrine.models.serving import ServedClassifier, ServedDetector

_BATCHES = 1, 8
_SECONDS = 2.0  # per runtime and setting
_MIN_CALLS, _MAX_CALLS = 5, 200  # per median

Call = Callable[[], object]


class Timing(StrEnum):
    """Runtimes that are timed for the model card."""

    NONE = "none"
    OWN = "own"  # torch and the exported graphs
    ALL = "all"  # torch.compile and OpenVINO as well


def time_bundle(
    module: ServedClassifier | ServedDetector,
    bundle: Path,
    precisions: Sequence[Precision],
    input_size: tuple[int, int],
    timing: Timing,
    providers: Sequence[str],
) -> Latency | None:
    """Time a bundle's variants, and its graph unoptimised and with ONNX Runtime's transformer fusions."""
    if timing is Timing.NONE:
        return None
    files = {precision.file: bundle / precision.file for precision in precisions}
    with tempfile.TemporaryDirectory() as folder:
        traced, fused = Path(folder) / "traced.onnx", Path(folder) / "fused.onnx"
        export_graph(module, input_size, traced, optimised=False)
        fuse_transformer(bundle / MODEL_FILE, fused)
        files |= {
            "not optimised, as torch.onnx traces it": traced,
            "model.onnx with ONNX Runtime's transformer fusions": fused,
        }
        return measure_latency(module, files, input_size, providers=providers, others=timing is Timing.ALL)


def measure_latency(
    module: ServedClassifier | ServedDetector,
    files: Mapping[str, Path],
    input_size: tuple[int, int],
    *,
    providers: Sequence[str],
    others: bool = False,
    seconds: float = _SECONDS,
) -> Latency:
    """Time torch and the graphs at batch 1 and 8, with one thread and with all, in turns.

    Args:
        files: ONNX graphs of the module, by the name of their row.
        input_size: height and width of the images.
        others: also time torch.compile, and OpenVINO on the first of the files; compiling takes minutes.
        seconds: per runtime and setting, but at least 5 calls.

    Raises:
        ExportError: with `others`, OpenVINO is not installed or torch.compile fails.
    """
    threads = sorted({1, available_cores()})
    settings = tuple((batch, count) for count in threads for batch in _BATCHES)
    columns = []
    for batch, count in settings:
        inputs = _inputs(module, input_size, batch)
        with _torch_threads(count):
            calls = {"torch": _torch(module, inputs)}
            if others:
                calls["torch, compiled"] = _compiled(module, inputs)
                calls["OpenVINO"] = _openvino(next(iter(files.values())), inputs, count)
            calls |= {name: _onnx(file, inputs, count, providers) for name, file in files.items()}
            columns.append(in_turns(calls, seconds))
    rows = tuple(
        LatencyRow(
            name=name,
            size=files[name].stat().st_size if name in files else None,
            milliseconds=tuple(round(column[name], 3) for column in columns),
        )
        for name in columns[0]
    )
    return Latency(machine=_machine(), input_size=input_size, settings=settings, rows=rows)


def in_turns(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each call.

    The calls take turns, so that load on the machine affects all of them alike, in random order, since the caches and
    waiting threads that one call leaves behind slow down the next.
    """
    order, shuffled = list(calls), random.Random(0)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds * len(calls)
    rounds = 0
    while rounds < _MIN_CALLS or (time.monotonic() < end and rounds < _MAX_CALLS):
        shuffled.shuffle(order)
        for name in order:
            started = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: 1e3 * statistics.median(durations) for name, durations in times.items()}


def _inputs(module: ServedClassifier | ServedDetector, input_size: tuple[int, int], batch: int) -> Inputs:
    pixels = np.random.default_rng(0).integers(0, 256, (batch, *input_size, 3), dtype=np.uint8)
    if isinstance(module, ServedDetector):
        return {"pixels": pixels, "sizes": np.array([input_size] * batch, np.int64)}
    return {"pixels": pixels}


def _torch(module: Any, inputs: Inputs) -> Call:
    arguments = [torch.from_numpy(array) for array in inputs.values()]

    @torch.inference_mode()
    def call() -> object:
        return module(*arguments)

    return call


def _compiled(module: Any, inputs: Inputs) -> Call:
    call = _torch(torch.compile(module), inputs)
    try:
        call()
    except Exception as error:  # of the compiler, or of the C++ compiler that it calls
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"latency: expected torch.compile to compile the network, found {first}") from error
    return call


def _onnx(file: Path, inputs: Inputs, threads: int, providers: Sequence[str]) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # would slow down the other runtimes
    session = onnxruntime.InferenceSession(file, options, providers=list(providers))
    return lambda: session.run(None, inputs)


def _openvino(file: Path, inputs: Inputs, threads: int) -> Call:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # disables telemetry
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ExportError("latency: expected OpenVINO, found none: pip install -r requirements/parity.txt") from error
    # float32 like the others: the default is bfloat16 if the processor supports it.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda: compiled(inputs)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {available_cores()} of {os.cpu_count()} cores"
