"""Class labels of published weights: from the user, from the published `config.json`, or from the data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vitrine.models.labels.named import NAMED, NOT_A_CLASS, coco_by_category_id, named_labels
from vitrine.models.published.errors import ImportSettingError, validated

COCO_CLASSES = (91, 250)  # sizes of a DETR's head without "no object": COCO category ids, and of the panoptic network

ClassId = Annotated[int, Field(ge=0, lt=100_000)]


@dataclass(frozen=True)
class Classes:
    """The classes of a head."""

    labels: list[str]
    named: list[int]  # class id of each label in the file
    unused: list[int]  # class ids in the file without a label


def read_labels(source: str) -> list[str]:
    """Read the user's labels: a name in `NAMED`, or a text file with a label on each line.

    Raises:
        ImportSettingError: `source` is neither, or a line is empty.
    """
    if source in NAMED:
        return [label for _, label in named_labels(source)]
    try:
        labels = [line.strip() for line in Path(source).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ImportSettingError(
            f"--labels {source}: expected {', '.join(NAMED)} or a text file with a label on each line: {error}"
        ) from error
    if unprintable := next((label for label in labels if not label.isprintable()), None):
        raise ImportSettingError(f"--labels {source}: expected a label on each line, found {unprintable!r}")
    if not labels or "" in labels:
        where = f"line {labels.index('') + 1} is empty" if labels else "it is empty"
        raise ImportSettingError(f"--labels {source}: expected a label on each line, but {where}")
    return labels


def published_labels(config: Mapping[str, Any]) -> list[str] | None:
    """Return the labels in a `config.json`: Hugging Face's `id2label`, or timm's `label_names` and descriptions.

    None if there are none, or only Hugging Face's placeholders "LABEL_0" and so on.

    Raises:
        ImportSettingError: a field has an invalid value.
    """
    if "id2label" in config:
        by_id: dict[int, str] = validated(dict[ClassId, str], config["id2label"], "config.json: id2label")
        if all(label == f"LABEL_{id_}" for id_, label in by_id.items()):
            return None
        return [by_id.get(i, NOT_A_CLASS) for i in range(max(by_id) + 1)]
    if "label_names" in config:
        names: list[str] = validated(list[str], config["label_names"], "config.json: label_names")
        text = validated(dict[str, str] | None, config.get("label_descriptions"), "config.json: label_descriptions")
        return [(text or {}).get(name, name) for name in names]
    return None


def choose_labels(
    chosen: str | None, config: Mapping[str, Any], *, classes: int | None, detection: bool, file: Path
) -> tuple[Classes, str | None]:
    """Return the classes of a head, and a note for the user about their labels.

    Args:
        chosen: the user's choice: a name in `NAMED` or a file.
        config: the published `config.json`.
        classes: number of classes of the head in the file, without "no object"; None for a new head.
        detection: whether the network is a detector, whose class ids may have gaps.

    Raises:
        ImportSettingError: there are no labels, or not as many as classes.
    """
    note = None
    if classes is None:
        if chosen is None:
            raise ImportSettingError("a new head needs --labels: imagenet-1k, coco or a file with a label on each line")
        labels = read_labels(chosen)
    elif chosen is not None and not (chosen == "coco" and detection and classes in COCO_CLASSES):
        labels = read_labels(chosen)
    elif chosen is None and (published := published_labels(config)) is not None:
        labels = published
    elif detection and classes in COCO_CLASSES:
        labels = coco_by_category_id(classes)
        if chosen is None:
            note = f"labels are those of COCO, because the head has {classes} classes"
    elif not detection and classes == 1000:
        labels = read_labels("imagenet-1k")
        note = "labels are those of ImageNet-1k, because the head has 1,000 classes"
    else:
        raise ImportSettingError(
            f"{file}: no labels for its {classes:,} classes: "
            f"--labels {', '.join(NAMED)} or a file with one on each line"
        )
    if classes not in (None, len(labels)):
        raise ImportSettingError(
            f"labels: expected {classes:,}, one for each class of the head, found {len(labels):,}; "
            "--reset-head makes a new head, to be trained"
        )
    unused = [i for i, label in enumerate(labels) if label == NOT_A_CLASS and detection]
    named = [i for i in range(len(labels)) if i not in unused]
    return Classes(distinct([labels[i] for i in named]), named, unused), note


def distinct(labels: Sequence[str]) -> list[str]:
    """Append the class id to labels that occur more than once (ImageNet has two cranes)."""
    unique = list(labels)
    while len(set(unique)) < len(unique):
        occurrences = Counter(unique)
        unique = [f"{label} ({i})" if occurrences[label] > 1 else label for i, label in enumerate(unique)]
    return unique
