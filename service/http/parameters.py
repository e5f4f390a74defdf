"""The parameters of the image routes: the one place of their names, defaults, ranges and meanings."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A query, form or JSON field."""

    name: str
    schema: dict[str, Any]  # JSON schema (2020-12)

    @property
    def default(self) -> Any:
        """Its value where it is not sent."""
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
        "description": "Graph of the model, such as `int8-dynamic`; by default the one that its manifest names.",
    },
)
LABELS = Parameter(
    "labels",
    {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "description": "Answer these classes only. Text with commas is split, unless it is a label as a whole.",
    },
)
TOP_K = Parameter(
    "top_k", {"type": "integer", "minimum": 1, "default": 5, "description": "How many classes to answer."}
)
THRESHOLD = Parameter(
    "threshold",
    {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5, "description": "Smallest score to answer."},
)
MAX_DETECTIONS = Parameter(
    "max_detections",
    {"type": "integer", "minimum": 1, "default": 100, "description": "Largest number of objects to answer."},
)

CLASSIFY_PARAMETERS = (MODEL, VARIANT, LABELS, TOP_K)
DETECT_PARAMETERS = (MODEL, VARIANT, LABELS, THRESHOLD, MAX_DETECTIONS)
