"""How long a call takes, in the ways that the network can be run, beside each other in one run."""

import os
import platform
import random
import statistics
import sys
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
from vitrine.bundle.manifest import Latency, LatencyRow
from vitrine.export.errors import ExportError
from vitrine.export.parity import Inputs
from vitrine.models.serving import ServedClassifier, ServedDetector

_BATCHES = 1, 8
_SECONDS = 2.0  # for each way and setting, at least _LEAST calls
_LEAST, _MOST = 5, 200  # calls that the median is of

Call = Callable[[], object]


class Timing(StrEnum):
    """Which ways to run the network are timed for the model card."""

    NONE = "none"
    OWN = "own"  # torch and the exported graphs
    ALL = "all"  # torch.compile and OpenVINO as well


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
        seconds: for each way and setting; slow ways are called a few times in any case.
        others: also torch.compile, and OpenVINO on the first of the files; compiling takes minutes.

    Raises:
        ExportError: others are wanted, and OpenVINO is not installed or torch.compile fails.
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
    """Median milliseconds of each call.

    They take turns, so that a busy moment of the machine meets all of them, and each time in another order: the caches
    and the waiting threads that one call leaves behind would otherwise always slow down the same one.
    """
    order, shuffled = list(calls), random.Random(0)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds * len(calls)
    rounds = 0
    while rounds < _LEAST or (time.monotonic() < end and rounds < _MOST):
        shuffled.shuffle(order)
        for name in order:
            started = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


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
    except Exception as error:  # the compiler's own, or one of its C++ compiler's
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"latency: expected torch.compile to compile the network, found {first}") from error
    return call


def _onnx(file: Path, inputs: Inputs, threads: int, providers: Sequence[str]) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow down whose turn it is
    session = onnxruntime.InferenceSession(file, options, providers=list(providers))
    return lambda: session.run(None, inputs)


def _openvino(file: Path, inputs: Inputs, threads: int) -> Call:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # without it, nothing is reported
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ExportError("latency: expected OpenVINO, found none: pip install -r requirements/parity.txt") from error
    # In float32 like the others: by itself, it computes in bfloat16 where the processor can.
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
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return f"{model}, {available_cores()} of {os.cpu_count()} cores"
