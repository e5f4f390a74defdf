"""Label lists by name."""

from importlib import resources

NAMED = {"imagenet-1k": "ImageNet-1k", "coco": "COCO"}  # label files that come with Vitrine
NOT_A_CLASS = "N/A"  # how DETR's lists name a class id that stands for nothing


def named_labels(name: str) -> list[tuple[str, str]]:
    """Return the (id, label) pairs of a data set in `NAMED`, in the order of its classes."""
    text = resources.files("vitrine.models.labels").joinpath(f"{name}.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return [(id_, label) for id_, label in rows]


def coco_by_category_id(classes: int) -> list[str]:
    """COCO's labels at the places of their category ids, `NOT_A_CLASS` at all other places."""
    labels = [NOT_A_CLASS] * classes
    for id_, label in named_labels("coco"):
        labels[int(id_)] = label
    return labels
