"""Triton through pytriton, with one instance per core and dynamic batching."""

import json
import os

import numpy as np
from model import PORT, open_session, read_image, run
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def make_instance() -> object:
    """Return an inference function with its own session."""
    session = open_session(threads=1)

    @batch
    def infer(image: np.ndarray) -> dict:
        answers = run(session, [read_image(data) for (data,) in image])
        return {"answer": np.array([[json.dumps(answer).encode()] for answer in answers], dtype=np.object_)}

    return infer


config = TritonConfig(http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, http_address="127.0.0.1")
with Triton(config=config) as triton:
    triton.bind(
        model_name="model",
        infer_func=[make_instance() for _ in range(os.cpu_count() or 1)],
        inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
        outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
        config=ModelConfig(max_batch_size=8),
    )
    triton.serve()
