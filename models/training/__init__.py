"""Data, losses, matching, loop, evaluation and recipes: what turns an architecture into a run.

The names of `__all__` are for notebooks (docs/api.md); they are imported when they are used, since most need torch.
"""

import importlib
from typing import Any

_HOMES = {
    "Checkpoint": "checkpoint",
    "checkpoint_predictor": "network",
    "evaluate": "evaluation.metrics",
    "load_checkpoint": "checkpoint",
    "load_recipe": "registry",
    "load_split": "data.layouts",
    "train": "loop",
    "write_report": "evaluation.report",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
