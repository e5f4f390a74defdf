"""Tolerances between two computations of the same answer, with their reasons.

Probabilities, scores and box coordinates all lie in 0..1, so one number serves for all of them.
"""

from vitrine.bundle.manifest import Precision

# The serving graph against torch, on the exporting machine. Another summation order in float32 moves the outputs by
# about 1e-7, at most 1e-5 in deep detectors; a wrong constant, layout or mask moves them by more than 1e-2.
PARITY = 1e-4
MIN_AGREEMENT = 0.999  # share of equal top classes; ties may fall either way
SMALLEST_RELATIVE = 0.01  # relative differences of smaller values are meaningless
CONFIDENT_SCORE = 0.05  # detections below this score are not compared by class: rounding may change it

# An intermediate value against torch's, relative to the largest value of its tensor: locates where a difference begins.
DIVERGENCE = 1e-3

# A graph against its own outputs on the exporting machine (the golden sample). Other vector units and thread counts
# change the summation order. A value close to the boundary of two 8-bit steps may then be rounded to the other one,
# which moves an output by about 0.01; weights that overflow a processor's 16-bit sums move it by more than 0.1.
GOLDEN = {
    Precision.FP32: 1e-3,
    Precision.FP16_WEIGHTS: 1e-3,
    Precision.FP16: 1e-2,
    Precision.INT8_DYNAMIC: 5e-2,
    Precision.INT8_STATIC: 5e-2,
}

# Accuracy or AP of the ONNX file against torch's: room for one different answer, after a tie, on a small data set.
METRIC = 5e-3

MAX_DROP = 0.5  # points of top-1 accuracy or AP that a variant may lose against float32 by default
