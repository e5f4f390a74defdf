"""Cost of masking, which makes padded batches give the results of single images (`docs/decisions/0005-...`).

    python benchmarks/padding.py [VARIANT ...]

For each DETR (random weights; by default `detr_small` and `detr_resnet50`), compares the serving graph, which zeroes
the padded area before every spatial convolution, with the same graph without masks; then four images of different
sizes as one padded batch, and one after the other without masks. ONNX Runtime, one thread, medians of calls in turns.
"""

import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from vitrine.bundle.images import pad_and_stack
from vitrine.export.graph import export_graph
from vitrine.export.latency import in_turns
from vitrine.models.build import VARIANTS, build_model
from vitrine.models.serving import ServedDetector

SIZE = 480, 640
SIZES = (480, 640), (480, 600), (450, 640), (400, 560)


class Unmasked(ServedDetector):
    """A detector that ignores padding."""

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.network(self.normalise(pixels), None)
        scores, class_ids = torch.softmax(output["pred_logits"], dim=-1)[..., :-1].max(dim=-1)
        # Keep `sizes` an input of the graph.
        return scores + 0 * sizes.sum(), class_ids, output["pred_boxes"]


def run_batches(session: onnxruntime.InferenceSession, batches: list[list[np.ndarray]]) -> None:
    """Run the batches one after the other."""
    for images in batches:
        pixels, sizes = pad_and_stack(images)
        session.run(None, {"pixels": pixels, "sizes": sizes})


def main() -> None:
    """Print a table."""
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or ("detr_small", "detr_resnet50"):
        torch.manual_seed(0)
        architecture, settings = VARIANTS[name]
        network = build_model(architecture, settings, 91).eval()
        with tempfile.TemporaryDirectory() as folder:
            sessions = {}
            for kind, module in (("masked", ServedDetector), ("unmasked", Unmasked)):
                file = Path(folder) / f"{kind}.onnx"
                export_graph(module(network, (0.5,) * 3, (0.5,) * 3), SIZE, file)
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                sessions[kind] = onnxruntime.InferenceSession(file, options)
            random = np.random.default_rng(0)
            images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
            cases = {
                "one image, masked": ("masked", [images[:1]]),
                "one image, unmasked": ("unmasked", [images[:1]]),
                "four sizes, padded and masked": ("masked", [images]),
                "four sizes, one after the other, unmasked": ("unmasked", [[image] for image in images]),
            }
            calls = {label: partial(run_batches, sessions[kind], batches) for label, (kind, batches) in cases.items()}
            timings = in_turns(calls, seconds=8.0)
        for label, milliseconds in timings.items():
            print(f"{name:<16}{label:<44}{milliseconds:9.1f} ms")


if __name__ == "__main__":
    main()
