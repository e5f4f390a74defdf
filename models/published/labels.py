"""The names of a network's classes: from the user, from what was published with the weights, or from the data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vitrine.models.labels.named import NAMED, NOT_A_CLASS, coco_by_category_id, named_labels
from vitrine.models.published.errors import ImportSettingError, validated

COCO_CLASSES = (91, 250)  # of a DETR's head, without "no object": COCO's category ids, and the panoptic network's

ClassId = Annotated[int, Field(ge=0, lt=100_000)]


@dataclass(frozen=True)
class Classes:
    """The classes of a head."""

    labels: list[str]
    named: list[int]  # the class id in the file of each label
    unused: list[int]  # class ids in the file that stand for no label


def read_labels(source: str) -> list[str]:
    """The user's choice: a name in `NAMED`, or a text file with a label on each line.

    Raises:
        ImportSettingError: it is neither, or a line is empty.
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
    """The labels in a `config.json`: Hugging Face's `id2label`, or timm's `label_names` and their descriptions.

    "LABEL_0" and so on, which Hugging Face writes where nobody gave names, are none.

    Raises:
        ImportSettingError: they are of another kind.
    """
    if "id2label" in config:
        by_id: dict[int, str] = validated(dict[ClassId, str], config["id2label"], "config.json: id2label")
        if all(label == f"LABEL_{id_}" for id_, label in by_id.items()):
            return None
        return [by_id.get(i, NOT_A_CLASS) for i in range(max(by_id) + 1)]
    if "label_names" in config:
        names: list[str] = validated(list[str], config["label_names"], "config.json: label_names")
        found = validated(dict[str, str] | None, config.get("label_descriptions"), "config.json: label_descriptions")
        return [(found or {}).get(name, name) for name in names]
    return None


def choose_labels(
    chosen: str | None, config: Mapping[str, Any], *, classes: int | None, detection: bool, file: Path
) -> tuple[Classes, str | None]:
    """The classes of a head, and what is to be said about their names.

    Args:
        chosen: by the user: a name in `NAMED` or a file.
        config: the `config.json` beside the weights.
        classes: how many the head in the file tells apart, without "no object"; None for a new head.
        detection: whether the classes are a detector's, whose lists may have holes.

    Raises:
        ImportSettingError: nothing names the classes, or there are more or fewer names than classes.
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
            note = f"labels are those of COCO, for the head has {classes} classes"
    elif not detection and classes == 1000:
        labels = read_labels("imagenet-1k")
        note = "labels are those of ImageNet-1k, for the head has 1,000 classes"
    else:
        raise ImportSettingError(
            f"{file}: no names for its {classes:,} classes: --labels {', '.join(NAMED)} or a file with one on each line"
        )
    if classes not in (None, len(labels)):
        raise ImportSettingError(
            f"labels: expected {classes:,}, one for each class of the head, found {len(labels):,}; "
            "--reset-head makes a new head, to be trained"
        )
    holes = [i for i, label in enumerate(labels) if label == NOT_A_CLASS and detection]
    named = [i for i in range(len(labels)) if i not in holes]
    return Classes(distinct([labels[i] for i in named]), named, holes), note


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels that occur twice (ImageNet has two cranes) get their class id behind them."""
    made = list(labels)
    while len(set(made)) < len(made):
        occurrences = Counter(made)
        made = [f"{label} ({i})" if occurrences[label] > 1 else label for i, label in enumerate(made)]
    return made
