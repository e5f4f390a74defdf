"""The parameters of the image routes: names, defaults, ranges and descriptions."""

from dataclasses import dataclass
from typing import Any

from vitrine.bundle.explaining import DEFAULT_GRID, DEFAULT_TARGETS, MAX_GRID, Method
from vitrine.bundle.explaining import MAX_TARGETS as LARGEST_TARGETS


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter, sent as query, form or JSON field."""

    name: str
    schema: dict[str, Any]  # JSON schema (2020-12)

    @property
    def default(self) -> Any:
        """The value if the client sends none."""
        return self.schema.get("default")


MODEL = Parameter(
    "model",
    {
        "type": "string",
        "description": "`name` (its highest version) or `name@version`; by default the first of `GET /models` for the "
        "task.",
    },
)
VARIANT = Parameter(
    "variant",
    {
        "type": "string",
        "description": "Variant of the model, such as `int8-dynamic`; by default the one that its manifest names.",
    },
)
LABELS = Parameter(
    "labels",
    {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "description": "Return these classes only. A string is split at commas, unless it is a label itself.",
    },
)
TOP_K = Parameter(
    "top_k", {"type": "integer", "minimum": 1, "default": 5, "description": "Number of classes to return."}
)
THRESHOLD = Parameter(
    "threshold",
    {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.5,
        "description": "Minimum score of returned objects.",
    },
)
MAX_DETECTIONS = Parameter(
    "max_detections",
    {"type": "integer", "minimum": 1, "default": 100, "description": "Maximum number of returned objects."},
)
METHOD = Parameter(
    "method",
    {
        "type": "string",
        "enum": [method.value for method in Method],
        "description": "How to explain; by default the first of the model's. All have `occlusion`.",
    },
)
TARGET = Parameter(
    "target",
    {
        "type": ["string", "integer"],
        "description": "What to explain: a label or class id, by default the best class; of a detector, the index of a "
        "detection in the answer of `/detect` to the same parameters, by default `all`.",
    },
)
MAX_TARGETS = Parameter(
    "max_targets",
    {
        "type": "integer",
        "minimum": 1,
        "maximum": LARGEST_TARGETS,
        "default": DEFAULT_TARGETS,
        "description": "Maximum number of detections that are explained.",
    },
)
X, Y = (
    Parameter(name, {"type": "number", "minimum": 0, "description": f"{name} of the point, in pixels of the image."})
    for name in ("x", "y")
)
HEADS = Parameter(
    "heads",
    {"type": "boolean", "default": False, "description": "Also the map of each head, of `class-attention`."},
)
LAYERS = Parameter(
    "layers",
    {
        "type": "boolean",
        "default": False,
        "description": "Also the classes that the state after each block of a ViT would be classified as.",
    },
)
GRID = Parameter(
    "grid",
    {
        "type": "integer",
        "minimum": 2,
        "maximum": MAX_GRID,
        "description": f"Parts that `occlusion` hides along the longer edge; by default {DEFAULT_GRID}, or the "
        "network's patches.",
    },
)
OPACITY = Parameter(
    "opacity",
    {"type": "number", "minimum": 0, "maximum": 1, "default": 0.6, "description": "Of the hottest color in a picture."},
)

CLASSIFY_PARAMETERS = (MODEL, VARIANT, LABELS, TOP_K)
DETECT_PARAMETERS = (MODEL, VARIANT, LABELS, THRESHOLD, MAX_DETECTIONS)
EXPLAIN_CLASS_PARAMETERS = (MODEL, METHOD, TARGET, HEADS, LAYERS, GRID, OPACITY)
EXPLAIN_DETECTION_PARAMETERS = (
    *(MODEL, METHOD, TARGET, MAX_TARGETS, X, Y, GRID, OPACITY),
    *(LABELS, THRESHOLD, MAX_DETECTIONS),
)
EXPLAIN_PARAMETERS = tuple(dict.fromkeys((*EXPLAIN_CLASS_PARAMETERS, *EXPLAIN_DETECTION_PARAMETERS)))
