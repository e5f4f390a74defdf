"""How far two computations of the same answer may be apart, and why.

Probabilities, scores and corners of boxes all lie in 0..1, so that one number serves for all of them.
"""

from vitrine.bundle.manifest import Precision

# The serving graph against torch, on the exporting machine. Float32 sums taken in another order move the answers by
# some 1e-7, at most 1e-5 in deep detectors; a wrong constant, layout or mask moves them by more than 1e-2.
PARITY = 1e-4
MIN_AGREEMENT = 0.999  # of the chosen classes: a tie between two may fall either way
SMALLEST_RELATIVE = 0.01  # relative differences of smaller values say nothing
CONFIDENT_SCORE = 0.05  # classes of detections are compared from this score on: below it, rounding may choose another

# An inner value against torch's, as a share of the largest value beside it: to find where a difference begins.
DIVERGENCE = 1e-3

# A graph against its own answers on the exporting machine (the golden sample). Other vector units and thread counts
# sum in another order. A value next to the edge between two 8-bit steps may then be rounded to the other one, which
# moves an answer by about a hundredth; weights that overflow a processor's 16-bit sums move it by more than a tenth.
GOLDEN = {
    Precision.FP32: 1e-3,
    Precision.FP16_WEIGHTS: 1e-3,
    Precision.FP16: 1e-2,
    Precision.INT8_DYNAMIC: 5e-2,
    Precision.INT8_STATIC: 5e-2,
}

# Accuracy or AP of the ONNX file against torch's: of a small data set, one answer that a tie decides otherwise.
METRIC = 5e-3

MAX_DROP = 0.5  # points of top-1 accuracy or AP that a variant may lose against float32, unless its exporter says more
