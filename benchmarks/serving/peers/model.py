"""The model code of all other servers: an ONNX graph with Pillow and NumPy, as their users would write it.

Environment variables: MODEL (an ONNX file), TASK, SIZE ("32", or the shortest and longest edge "240,320"),
INTERPOLATION and PORT.
"""

import io
import os

import numpy as np
import onnxruntime
from PIL import Image

SIZE = [int(edge) for edge in os.environ["SIZE"].split(",")]
IS_DETECTOR = os.environ["TASK"] == "object-detection"
PORT = int(os.environ["PORT"])
RESAMPLING = Image.Resampling[os.environ["INTERPOLATION"].upper()]


def open_session(threads: int = 0) -> onnxruntime.InferenceSession:
    """Load the graph; by default on all cores, the default of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])


def read_image(data: bytes) -> np.ndarray:
    """Decode and resize an image to uint8 [height, width, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if IS_DETECTOR:
        shortest, longest = SIZE
        scale = min(shortest / min(image.size), longest / max(image.size))
        size = round(image.width * scale), round(image.height * scale)
        return np.asarray(image.resize(size, RESAMPLING))
    edge = SIZE[0]
    scale = edge / min(image.size)
    left, top = (image.width - edge / scale) / 2, (image.height - edge / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((edge, edge), RESAMPLING, box=box))


def run(session: onnxruntime.InferenceSession, images: list) -> list:
    """Return the predictions for each image: the best five classes, or the objects that score at least 0.5."""
    feeds = {"pixels": np.stack(images)}
    if IS_DETECTOR:
        feeds["sizes"] = np.array([image.shape[:2] for image in images], np.int64)
    rows = zip(*session.run(None, feeds), strict=True)
    return [objects(*row) if IS_DETECTOR else best(*row) for row in rows]


def best(probabilities: np.ndarray) -> list:
    """Return the five most probable classes."""
    order = np.argsort(-probabilities)[:5]
    return [{"class_id": int(i), "score": float(probabilities[i])} for i in order]


def objects(scores: np.ndarray, class_ids: np.ndarray, boxes: np.ndarray) -> list:
    """Return the objects that score at least 0.5, best first."""
    order = [i for i in np.argsort(-scores) if scores[i] >= 0.5]
    return [{"class_id": int(class_ids[i]), "score": float(scores[i]), "box": boxes[i].tolist()} for i in order]
