"""The names of a network's classes: from the user, from what was published with the weights, or from the data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from models.published.errors import ImportSettingError

NAMED = {"imagenet-1k": "ImageNet-1k", "coco": "COCO"}  # label files that come with Vitrine
NOT_A_CLASS = "N/A"  # how DETR's lists name a class id that stands for nothing


def named_labels(name: str) -> list[tuple[str, str]]:
    """Ids and labels of a data set in `NAMED`, in the order of its classes."""
    text = resources.files("models.published").joinpath("labels", f"{name}.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [(id_, label) for id_, label in rows]


def coco_by_category_id(classes: int) -> list[str]:
    """COCO's labels at the places of their category ids, `NOT_A_CLASS` at all other places."""
    labels = [NOT_A_CLASS] * classes
    for id_, label in named_labels("coco"):
        labels[int(id_)] = label
    return labels


def read_labels(source: str) -> list[str]:
    """The user's choice: a name in `NAMED`, or a text file with a label on each line.

    Raises:
        ImportSettingError: it is neither, or a line is empty.
    """
    if source in NAMED:
        return [label for _, label in named_labels(source)]
    file = Path(source)
    if not file.is_file():
        raise ImportSettingError(f"--labels {source}: expected {', '.join(NAMED)} or a file with a label on each line")
    try:
        labels = [line.strip() for line in file.read_text().splitlines()]
    except ValueError as error:
        raise ImportSettingError(f"--labels {source}: expected a text file: {error}") from error
    if not labels or "" in labels:
        where = f"line {labels.index('') + 1} is empty" if labels else "it is empty"
        raise ImportSettingError(f"--labels {source}: expected a label on each line, but {where}")
    return labels


def published_labels(config: Mapping[str, Any]) -> list[str] | None:
    """The labels in a `config.json`: Hugging Face's `id2label`, or timm's `label_names` and their descriptions.

    "LABEL_0" and so on, which Hugging Face writes where nobody gave names, are none.
    """
    if "id2label" in config:
        by_id = {int(id_): str(label) for id_, label in config["id2label"].items()}
        if all(label == f"LABEL_{id_}" for id_, label in by_id.items()):
            return None
        return [by_id.get(i, NOT_A_CLASS) for i in range(max(by_id, default=-1) + 1)]
    if "label_names" in config:
        descriptions = config.get("label_descriptions") or {}
        return [str(descriptions.get(name, name)) for name in config["label_names"]]
    return None


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels that occur twice (ImageNet has two cranes) get their class id behind them."""
    occurrences = Counter(labels)
    return [f"{label} ({i})" if occurrences[label] > 1 else label for i, label in enumerate(labels)]
