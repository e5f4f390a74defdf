"""Label lists by name."""

from importlib import resources

NAMED = {"imagenet-1k": "ImageNet-1k", "coco": "COCO"}  # label files in this folder
NOT_A_CLASS = "N/A"  # DETR's name of an unused class id


def named_labels(name: str) -> list[tuple[str, str]]:
    """Return the (id, label) pairs of a data set in `NAMED`, in the order of its classes."""
    text = resources.files("vitrine.models.labels").joinpath(f"{name}.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [(id_, label) for id_, label in rows]


def coco_by_category_id(classes: int) -> list[str]:
    """Return COCO's labels at the indices of their category ids, `NOT_A_CLASS` at all others."""
    labels = [NOT_A_CLASS] * classes
    for id_, label in named_labels("coco"):
        labels[int(id_)] = label
    return labels
