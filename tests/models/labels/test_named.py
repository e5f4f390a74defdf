"""Vitrine's label lists."""

import pytest

from vitrine.models.labels.named import NOT_A_CLASS, coco_by_category_id, named_labels

HOLES = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_imagenet_has_a_thousand_labels_in_the_order_of_their_synsets() -> None:
    rows = named_labels("imagenet-1k")
    synsets, labels = [id_ for id_, _ in rows], [label for _, label in rows]
    assert len(labels) == len(set(labels)) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    assert all(len(synset) == 9 and synset[0] == "n" and synset[1:].isdigit() for synset in synsets)
    assert all(label == label.strip() != "" for label in labels)


@pytest.mark.parametrize(
    ("index", "synset", "label"),
    [
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby"),
        (388, "n02510455", "giant panda"),
        (817, "n04285008", "sports car"),
        (954, "n07753592", "banana"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_imagenet_labels_that_everyone_knows(index: int, synset: str, label: str) -> None:
    assert named_labels("imagenet-1k")[index] == (synset, label)


@pytest.mark.parametrize(("index", "word"), [(134, "crane"), (517, "crane"), (638, "maillot"), (639, "maillot")])
def test_imagenet_labels_that_share_a_word_differ(index: int, word: str) -> None:
    assert word in named_labels("imagenet-1k")[index][1]


def test_coco_has_eighty_categories_with_holes() -> None:
    rows = named_labels("coco")
    assert [int(id_) for id_, _ in rows] == [i for i in range(1, 91) if i not in HOLES]
    assert len({label for _, label in rows}) == 80


@pytest.mark.parametrize(
    ("category", "label"),
    [
        (1, "person"),
        (2, "bicycle"),
        (3, "car"),
        (17, "cat"),
        (18, "dog"),
        (44, "bottle"),
        (62, "chair"),
        (90, "toothbrush"),
    ],
)
def test_coco_labels_that_everyone_knows(category: int, label: str) -> None:
    assert dict(named_labels("coco"))[str(category)] == label
    assert coco_by_category_id(91)[category] == label


@pytest.mark.parametrize("classes", [91, 250])
def test_coco_by_category_id_fills_the_holes(classes: int) -> None:
    labels = coco_by_category_id(classes)
    assert len(labels) == classes
    unnamed = {i for i, label in enumerate(labels) if label == NOT_A_CLASS}
    assert unnamed == {0, *HOLES, *range(91, classes)}
