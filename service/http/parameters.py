"""The parameters of the image routes: names, defaults, ranges and descriptions."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
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

CLASSIFY_PARAMETERS = (MODEL, VARIANT, LABELS, TOP_K)
DETECT_PARAMETERS = (MODEL, VARIANT, LABELS, THRESHOLD, MAX_DETECTIONS)
