"""ONNX Runtime behind the `Network` call of `bundle.predictors`."""

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
