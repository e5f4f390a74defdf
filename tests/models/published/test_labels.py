"""Class labels: from Vitrine's lists, the user's files, and published files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vitrine.models.build import build_model
from vitrine.models.labels.named import NAMED
from vitrine.models.published.errors import ImportSettingError
from vitrine.models.published.importing import ImportResult, import_weights
from vitrine.models.published.labels import NOT_A_CLASS, coco_by_category_id, distinct, published_labels, read_labels

TINY = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


def import_vit(folder: Path, classes: int, labels: str | None = None, **config: Any) -> ImportResult:
    """Import a tiny timm ViT with a `config.json`."""
    state = build_model("vit", TINY, classes).state_dict()
    state["pos_embed"] = state.pop("pos_embed.embedding")
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny", **config}))
    return import_weights(folder, folder / "run", labels=labels, changes=["num_heads=2"])


@pytest.mark.parametrize(("name", "count"), [("imagenet-1k", 1000), ("coco", 80)])
def test_data_sets_by_name(name: str, count: int) -> None:
    assert name in NAMED
    assert len(read_labels(name)) == count


def test_a_file_with_a_label_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes("café\r\nгриб \nlast".encode())
    assert read_labels(str(tmp_path / "labels")) == ["café", "гриб", "last"]


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    assert read_labels(str(tmp_path / "labels")) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\n  \t\n", "line 2 is empty"),
        (b"", "it is empty"),
        (b"\n", "line 1 is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "or a text file"),
        (b"PK\x03\x04\xff\xfe", "or a text file"),
    ],
)
def test_broken_label_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_bytes(content)
    with pytest.raises(ImportSettingError) as error:
        read_labels(str(file))
    assert str(error.value).startswith(f"--labels {file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["nowhere.txt", "imagenet", "COCO", "", ".", "x" * 300])
def test_labels_from_nowhere(source: str) -> None:
    with pytest.raises(ImportSettingError, match="expected imagenet-1k, coco or a text file with a label on each line"):
        read_labels(source)


def test_a_label_file_that_cannot_be_read() -> None:
    with pytest.raises(ImportSettingError, match="--labels /proc/self/mem"):
        read_labels("/proc/self/mem")


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, ["cat", "dog"]),
        ({"id2label": {"1": "dog", "0": "cat"}}, ["cat", "dog"]),
        ({"id2label": {"0": "cat", "2": "dog"}}, ["cat", NOT_A_CLASS, "dog"]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "LABEL_0", "1": "dog"}}, ["LABEL_0", "dog"]),
        ({"id2label": {}}, None),
        ({"label_names": ["n1", "n2"]}, ["n1", "n2"]),
        ({"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}, ["cat", "dog"]),
        ({"label_names": ["n1", "n2"], "label_descriptions": {"n2": "dog"}}, ["n1", "dog"]),
        ({"label_names": ["n1", "n2"], "label_descriptions": None}, ["n1", "n2"]),
        ({}, None),
    ],
    ids=str,
)
def test_published_labels(config: dict[str, Any], labels: list[str] | None) -> None:
    assert published_labels(config) == labels


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": None},
        {"id2label": ["cat", "dog", "cow"]},
        {"id2label": {"cat": "0"}},
        {"id2label": {"-1": "cat", "0": "dog", "1": "cow", "2": "owl"}},
        {"label_names": None},
        {"label_names": "abc"},
        {"label_names": ["a", "b", "c"], "label_descriptions": ["cat", "dog", "cow"]},
    ],
    ids=str,
)
def test_other_published_labels_are_reported_or_ignored(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError) as error:
        import_vit(tmp_path, 3, **config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "made"),
    [
        (["crane", "owl", "crane"], ["crane (0)", "owl", "crane (2)"]),
        (["a", "b"], ["a", "b"]),
        ([], []),
    ],
)
def test_labels_that_occur_twice_get_their_class_id(labels: list[str], made: list[str]) -> None:
    assert distinct(labels) == made


@pytest.mark.parametrize("labels", [["a", "a", "a (0)"], ["a (1)", "a", "a"], ["a", "a (0)", "a (0)", "a"]])
def test_distinct_labels_are_distinct(labels: list[str]) -> None:
    assert len(set(distinct(labels))) == len(labels)


def test_a_thousand_classes_are_those_of_imagenet(tmp_path: Path) -> None:
    imported = import_vit(tmp_path, 1000)
    assert imported.checkpoint.labels == read_labels("imagenet-1k")
    assert "labels are those of ImageNet-1k, because the head has 1,000 classes" in imported.notes


def test_published_labels_stand_before_those_of_imagenet(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(1000)]
    imported = import_vit(tmp_path, 1000, label_names=names)
    assert imported.checkpoint.labels == names
    assert not any("ImageNet" in note for note in imported.notes)


def test_the_users_labels_stand_before_the_published(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("blue\ngreen\nred\n")
    imported = import_vit(tmp_path, 3, str(tmp_path / "labels"), label_names=["a", "b", "c"])
    assert imported.checkpoint.labels == ["blue", "green", "red"]


def test_published_labels_that_occur_twice_get_their_class_id(tmp_path: Path) -> None:
    imported = import_vit(tmp_path, 3, id2label={"0": "crane", "1": "owl", "2": "crane"})
    assert imported.checkpoint.labels == ["crane (0)", "owl", "crane (2)"]


@pytest.mark.parametrize("classes", [1, 3, 21843])
def test_classes_without_names_ask_for_labels(classes: int, tmp_path: Path) -> None:
    with pytest.raises(
        ImportSettingError, match=f"no labels for its {classes:,} classes: --labels imagenet-1k, coco or"
    ):
        import_vit(tmp_path, classes)
    assert not (tmp_path / "run").exists()


def test_missing_names_require_labels(tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError, match="no labels for its 3 classes"):
        import_vit(tmp_path, 3, id2label={str(i): f"LABEL_{i}" for i in range(3)})


@pytest.mark.parametrize("labels", ["coco", "imagenet-1k"])
def test_labels_of_another_count_mention_the_way_out(labels: str, tmp_path: Path) -> None:
    count = f"{len(read_labels(labels)):,}"
    message = f"labels: expected 3, one for each class of the head, found {count}; --reset-head makes a new head"
    with pytest.raises(ImportSettingError, match=message):
        import_vit(tmp_path, 3, labels)
    assert not (tmp_path / "run").exists()


def test_published_labels_of_another_count(tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError, match=r"labels: expected 3, .* found 2"):
        import_vit(tmp_path, 3, label_names=["a", "b"])


def test_an_endless_class_id_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError):
        import_vit(tmp_path, 3, id2label={"0": "a", "1": "b", "1000000": "c"})


@pytest.mark.parametrize("rows", [80, 91, 100, 250])
def test_a_coco_detector_of_any_head(rows: int, tmp_path: Path) -> None:
    """The head has 80 rows in the order of the categories, or as many as there are category ids."""
    size = {"num_heads": 2, "embed_dim": 16, "feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    size |= {"num_queries": 3, "backbone_layers": [1, 1], "backbone_width": 8, "backbone_norm": "frozen"}
    state = build_model("detr", size, rows).state_dict()
    from vitrine.models.published.detr import HUGGING_FACE

    published = {
        source: weight
        for target, weight in state.items()
        for rule in HUGGING_FACE.rules
        for source in rule.source_names(target) or ()
    }
    torch.save(published, tmp_path / "m.pth")
    if rows == 100:
        with pytest.raises(ImportSettingError, match="labels: expected 100"):
            import_weights(tmp_path / "m.pth", tmp_path / "run", labels="coco", changes=["num_heads=2"])
        return
    made = import_weights(tmp_path / "m.pth", tmp_path / "run", labels="coco", changes=["num_heads=2"]).checkpoint
    assert made.labels == read_labels("coco")
    order = [i for i, label in enumerate(coco_by_category_id(rows)) if label != NOT_A_CLASS] if rows > 80 else range(80)
    assert torch.equal(made.weights["class_embed.weight"][:80], state["class_embed.weight"][list(order)])
    assert torch.equal(made.weights["class_embed.weight"][-1], state["class_embed.weight"][-1])
    assert made.weights["class_embed.weight"].shape[0] == rows + 1
