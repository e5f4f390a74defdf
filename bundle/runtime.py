"""ONNX Runtime behind the `Network` call of `bundle.predictors`."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime sends usage data by default; read when it is imported

import onnxruntime

from bundle.errors import BundleError
from bundle.manifest import TensorSpec

_DATATYPES = {"tensor(uint8)": "UINT8", "tensor(int64)": "INT64", "tensor(float)": "FP32"}


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores that this process may use: the least of the machine's, its affinity and its cgroup's CPU quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" means no quota
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    with contextlib.suppress(OSError, ValueError):  # cgroup v1; -1 means no quota
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
        cores = min(cores, quota_us // period_us) if quota_us > 0 else cores
    return max(1, cores)


class OnnxNetwork:
    """An ONNX Runtime session; safe to call from several threads at once."""

    def __init__(self, file: Path, *, threads: int = 1) -> None:
        """Load a graph on the CPU.

        Args:
            threads: cores that one call uses. Several calls with one thread each, side by side, have the higher
                throughput; one call with all cores the lower latency.

        Raises:
            BundleError: the file is no ONNX graph that this runtime can run.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exception types share no base but Exception
            raise BundleError(file, "graph", expected="an ONNX graph", found=str(error).splitlines()[0]) from error

    def __call__(self, **inputs: NDArray[np.generic]) -> Sequence[NDArray[np.generic]]:
        outputs: Sequence[NDArray[np.generic]] = self._session.run(None, inputs)
        return outputs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs as it declares them."""
        return tuple(map(_spec, self._session.get_inputs()))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs as it declares them."""
        return tuple(map(_spec, self._session.get_outputs()))


def _spec(argument: onnxruntime.NodeArg) -> TensorSpec:
    return TensorSpec(name=argument.name, datatype=_DATATYPES[argument.type], shape=tuple(argument.shape))
