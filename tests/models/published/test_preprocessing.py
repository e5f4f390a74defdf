"""Preprocessing of published weights: JSON files of all versions, defaults, the user's changes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from vitrine.bundle.images import decode
from vitrine.bundle.predictors import Detector
from vitrine.models.build import build_model
from vitrine.models.published import detr, resnetv2, vit
from vitrine.models.published.errors import ImportSettingError, WeightsError
from vitrine.models.published.importing import ImportResult, import_weights
from vitrine.models.published.layout import Layout
from vitrine.models.published.preprocessing import Published, find_preprocessing, read_published
from vitrine.models.published.recognition import LAYOUTS
from vitrine.models.training.checkpoint import load_checkpoint
from vitrine.models.training.network import checkpoint_predictor

transformers.logging.set_verbosity_error()

VIT = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
HALF, ODD_MEAN, ODD_STD = [0.5] * 3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
NORMAL = {"do_resize": True, "do_normalize": True, "image_mean": ODD_MEAN, "image_std": ODD_STD, "resample": 2}
CROP = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
TIMM = {"input_size": [3, 16, 16], "mean": ODD_MEAN, "std": ODD_STD, "crop_pct": 0.95, "interpolation": "bicubic"}


def timm_vit(folder: Path, config: object = None, *changes: str) -> ImportResult:
    """Import a tiny timm ViT with a `config.json` (an object or a text)."""
    state = build_model("vit", VIT, 3).state_dict()
    state["pos_embed"] = state.pop("pos_embed.embedding")
    return _import(folder, state, {"config.json": config}, changes)


def hugging_face_vit(folder: Path, preprocessor: object, *changes: str) -> ImportResult:
    """Import a tiny Hugging Face ViT with a `config.json` and a `preprocessor_config.json`."""
    ours = build_model("vit", VIT, 3).state_dict()
    state = {}
    for rule in vit.HUGGING_FACE.rules:
        for target, weight in ours.items():
            if names := rule.source_names(target):
                state |= {name: part.clone() for name, part in zip(names, weight.chunk(len(names)), strict=True)}
    files = {"config.json": {"model_type": "vit", "image_size": 16}, "preprocessor_config.json": preprocessor}
    return _import(folder, state, files, changes)


def _import(folder: Path, state: dict[str, Any], files: dict[str, object], changes: tuple[str, ...]) -> ImportResult:
    save_file(state, folder / "model.safetensors")
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "labels").write_text("blue\ngreen\nred\n")
    return import_weights(folder, folder / "run", labels=str(folder / "labels"), changes=["num_heads=2", *changes])


def found(layout: Layout, preprocessor: dict[str, Any]) -> dict[str, Any]:
    fields, where = find_preprocessing(layout, Published({}, preprocessor), {"image_size": 16})
    assert where == "that of preprocessor_config.json"
    return fields


@pytest.mark.parametrize("size", [16, {"height": 16, "width": 16}])
@pytest.mark.parametrize(("resample", "interpolation"), [(2, "bilinear"), (3, "bicubic")])
def test_hugging_face_squashes_to_height_and_width(size: object, resample: int, interpolation: str) -> None:
    fields = found(vit.HUGGING_FACE, {**NORMAL, "size": size, "resample": resample})
    assert fields["input_size"] == (16, 16)
    assert fields["crop_mode"] == "squash"
    assert fields["interpolation"] == interpolation
    assert fields["mean"] == tuple(ODD_MEAN)
    assert fields["std"] == tuple(ODD_STD)


def test_hugging_face_crops_from_the_shortest_edge() -> None:
    fields = found(resnetv2.HUGGING_FACE, {**NORMAL, **CROP, "size": {"shortest_edge": 20}})
    assert fields["input_size"] == (16, 16)
    assert fields["crop_pct"] == pytest.approx(0.8)
    assert fields.get("crop_mode", "center") == "center"


def test_hugging_face_crop_that_keeps_all_is_a_squash() -> None:
    fields = found(vit.HUGGING_FACE, {**NORMAL, "do_center_crop": True, "crop_size": 16, "size": 16})
    assert fields["crop_mode"] == "squash"


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    """Hugging Face pads it with black, Vitrine does not."""
    with pytest.raises(ImportSettingError):
        found(vit.HUGGING_FACE, {**NORMAL, **CROP, "size": {"shortest_edge": 12}})


@pytest.mark.parametrize(
    ("size", "edges"),
    [
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (800, 1333)),
        ({"size": 800, "max_size": 1333}, (800, 1333)),
        ({"size": 600, "max_size": 900}, (600, 900)),
        ({"size": 800}, (800, 1333)),
    ],
    ids=str,
)
def test_hugging_face_detectors_keep_the_aspect_ratio(size: dict[str, Any], edges: tuple[int, int]) -> None:
    fields = found(detr.HUGGING_FACE, {**NORMAL, **size})
    assert (fields["shortest_edge"], fields["longest_edge"]) == edges
    assert fields["task"] == "object-detection"


@pytest.mark.parametrize("size", [{"height": 800, "width": 800}, None, "800", [800, 1333], {"shortest_edge": 800}])
def test_a_detectors_other_sizes_are_refused(size: object) -> None:
    with pytest.raises(ImportSettingError, match=r"preprocessor_config\.json: size"):
        found(detr.HUGGING_FACE, {**NORMAL, "size": size})


def test_missing_preprocessor_fields_are_the_familys() -> None:
    fields = found(vit.HUGGING_FACE, {"size": 16})
    assert fields["mean"] == fields["std"] == tuple(HALF)
    assert fields["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_normalize: Input should be True, found 'False'"),
        ({"do_resize": False}, "do_resize: Input should be True, found 'False'"),
        ({"do_rescale": False}, "do_rescale: Input should be True, found 'False'"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: Input should be less than 0.0039"),
        ({"resample": 0}, "resample: Input should be 2 or 3, found '0'"),
        ({"resample": 1}, "resample: Input should be 2 or 3"),
        ({"resample": None}, "resample: Input should be 2 or 3"),
        ({"resample": "bicubic"}, "resample: Input should be 2 or 3"),
        ({"size": None}, "size"),
        ({"size": {"height": 16}}, "size: expected height and width"),
        ({"size": {"shortest_edge": 20}}, "size: expected height and width, or shortest_edge and a centre crop"),
        ({"do_center_crop": True, "crop_size": 12}, "crop_size: expected that of size"),
    ],
    ids=str,
)
def test_unsupported_settings_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ImportSettingError, match=rf"preprocessor_config\.json: {message}"):
        found(vit.HUGGING_FACE, {**NORMAL, "size": 16, **change})


def test_a_rescale_factor_of_255_is_accepted() -> None:
    assert found(vit.HUGGING_FACE, {**NORMAL, "size": 16, "do_rescale": True, "rescale_factor": 0.00392156862745098})


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": 0.5},
        {"image_mean": [0.5]},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": [0, 0, 0]},
        {"resample": [3]},
        {"resample": {}},
        {"rescale_factor": None},
        {"rescale_factor": "1/255"},
        {"rescale_factor": float("nan")},
        {"size": True},
        {"size": {"height": "a", "width": 16}},
        {"size": {"height": -16, "width": -16}},
        {**CROP, "size": {"shortest_edge": 0}},
        {**CROP, "size": {"shortest_edge": None}},
        {**CROP, "size": {"shortest_edge": "20"}},
        {**CROP, "size": {"shortest_edge": -20}},
        {"do_center_crop": True, "crop_size": {"height": "a", "width": "b"}, "size": {"shortest_edge": 20}},
        {"do_center_crop": True, "crop_size": None},
    ],
    ids=str,
)
def test_a_preprocessor_of_wrong_types_is_refused_in_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        hugging_face_vit(tmp_path, {**NORMAL, "size": 16, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_says_that_its_preprocessing_was_published(tmp_path: Path) -> None:
    imported = hugging_face_vit(tmp_path, {**NORMAL, "size": 16, "resample": 3})
    assert any(
        note.startswith("preprocessing is that of preprocessor_config.json: input_size=[16, 16]")
        for note in imported.notes
    )
    assert imported.checkpoint.preprocessing["mean"] == ODD_MEAN
    assert imported.checkpoint.preprocessing["interpolation"] == "bicubic"


@pytest.mark.parametrize("nested", [True, False])
def test_timms_config_is_nested_or_flat(nested: bool, tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny", **({"pretrained_cfg": TIMM} if nested else TIMM)}
    imported = timm_vit(tmp_path, config)
    made = imported.checkpoint.preprocessing
    assert made == {
        "task": "image-classification",
        "input_size": [16, 16],
        "crop_mode": "center",
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": ODD_MEAN,
        "std": ODD_STD,
    }
    assert any(note.startswith("preprocessing is that of config.json: ") for note in imported.notes)


def test_timms_crop_mode(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny", "pretrained_cfg": {**TIMM, "crop_mode": "squash", "crop_pct": 1.0}}
    assert timm_vit(tmp_path, config).checkpoint.preprocessing["crop_mode"] == "squash"


@pytest.mark.parametrize(
    "cfg",
    [
        None,
        "mean",
        {"mean": HALF},
        {**TIMM, "input_size": None},
        {**TIMM, "input_size": [16]},
        {**TIMM, "input_size": 16},
        {**TIMM, "mean": None},
        {**TIMM, "mean": 0.5},
        {**TIMM, "std": [0.5]},
        {**TIMM, "crop_mode": "border"},
        {**TIMM, "crop_pct": "most"},
        {**TIMM, "crop_pct": 1.5},
        {**TIMM, "interpolation": "random"},
    ],
    ids=str,
)
def test_a_timm_config_of_wrong_types_is_refused_or_left_out(cfg: object, tmp_path: Path) -> None:
    try:
        imported = timm_vit(tmp_path, {"architecture": "vit_tiny", "pretrained_cfg": cfg})
    except WeightsError:
        assert not (tmp_path / "run").exists()
    else:
        assert any("the published default" in note for note in imported.notes)


@pytest.mark.parametrize(
    "arguments", [None, [], {"num_heads": None}, {"num_heads": "two"}, {"num_heads": "2"}], ids=str
)
def test_timms_model_args_of_wrong_types(arguments: object, tmp_path: Path) -> None:
    try:
        made = timm_vit(tmp_path, {"architecture": "vit_tiny", "model_args": arguments}).checkpoint
    except WeightsError:
        assert not (tmp_path / "run").exists()
    else:
        assert made.settings["num_heads"] == 2


@pytest.mark.parametrize("text", ["{", "", "[1]", "null", "<html>", "[" * 100_000], ids=lambda text: text[:6])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_broken_json_is_one_sentence(name: str, text: str, tmp_path: Path) -> None:
    made_by = timm_vit if name == "config.json" else hugging_face_vit
    with pytest.raises(WeightsError) as error:
        made_by(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / name}: cannot be read: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


DEFAULTS: dict[str, dict[str, Any]] = {
    "timm's ViT": {"crop_pct": 0.9, "interpolation": "bicubic", "mean": HALF},
    "Google's ViT (.npz)": {"crop_mode": "squash", "mean": HALF},
    "Hugging Face's ViT": {"crop_mode": "squash", "mean": HALF},
    "torchvision's ViT": {"crop_pct": 0.875, "mean": [0.485, 0.456, 0.406]},
    "Google's MLP-Mixer (.npz)": {"crop_mode": "squash", "mean": HALF},
    "timm's MLP-Mixer": {"crop_pct": 0.875, "interpolation": "bicubic", "mean": HALF},
    "Google's BiT (.npz)": {"crop_mode": "squash", "mean": HALF},
    "timm's BiT (resnetv2_*_bit)": {"mean": HALF},
    "Hugging Face's BiT": {"interpolation": "bicubic", "mean": HALF},
    "EfficientNet-Lite of efficientnet_lite_pytorch": {
        "crop_pct": 0.875,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    },
    "facebookresearch's DETR": {"shortest_edge": 800, "longest_edge": 1333, "mean": [0.485, 0.456, 0.406]},
    "Hugging Face's DETR": {"shortest_edge": 800, "longest_edge": 1333, "std": [0.229, 0.224, 0.225]},
    "torchvision's or timm's ResNet (the backbone of a new DETR)": {"shortest_edge": 800, "longest_edge": 1333},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_default_of_every_layout_is_reported(layout: Layout) -> None:
    fields, where = find_preprocessing(layout, Published({}, {}), {"image_size": 224})
    assert where == f"the published default of {layout.name}, because the file has none"
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    assert DEFAULTS[layout.name].items() <= said.items()
    assert fields.get("input_size", (224, 224)) == (224, 224)


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (256, 1.0), (384, 1.0)])
def test_networks_of_higher_resolution_use_the_whole_image(size: int, crop_pct: float) -> None:
    fields, _ = find_preprocessing(vit.TIMM, Published({}, {}), {"image_size": size})
    assert fields["crop_pct"] == crop_pct


def test_a_run_says_that_its_preprocessing_was_assumed(tmp_path: Path) -> None:
    imported = timm_vit(tmp_path)
    expected = "preprocessing is the published default of timm's ViT, because the file has none: input_size=[16, 16]"
    assert any(note.startswith(expected) for note in imported.notes)
    assert imported.checkpoint.preprocessing["crop_pct"] == 0.9


@pytest.mark.parametrize(
    "config", [{"model_type": "swin"}, {"model_type": "vit", **TIMM}, {"architectures": ["ViT"]}, {"mean": ODD_MEAN}]
)
def test_config_of_another_model_is_reported_and_not_used(config: dict[str, Any], tmp_path: Path) -> None:
    imported = timm_vit(tmp_path, config)
    assert f"{tmp_path / 'config.json'} is not of timm's ViT: not used" in imported.notes
    assert imported.checkpoint.preprocessing["mean"] == HALF


@pytest.mark.parametrize("architecture", ["resnet50", "mixer_b16_224", "swin_tiny_patch4_window7_224"])
def test_a_timm_config_of_another_architecture_is_not_used(architecture: str, tmp_path: Path) -> None:
    imported = timm_vit(tmp_path, {"architecture": architecture, "pretrained_cfg": TIMM})
    assert imported.checkpoint.preprocessing["mean"] == HALF


@pytest.mark.parametrize("layout", [vit.HUGGING_FACE, resnetv2.HUGGING_FACE, detr.HUGGING_FACE], ids=lambda x: x.name)
def test_configs_are_recognised_by_their_model_type(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": 16}')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": layout.model_type}))
    published, notes = read_published(tmp_path, layout)
    assert published == Published({"model_type": layout.model_type}, {"size": 16})
    assert notes == []
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "beit"}))
    published, notes = read_published(tmp_path, layout)
    assert published == Published({}, {})
    assert notes == [f"{tmp_path / 'config.json'} is not of {layout.name}: not used"]


def test_preprocessor_without_a_config_is_used_or_reported(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**NORMAL, "size": 16}))
    published, notes = read_published(tmp_path, vit.HUGGING_FACE)
    assert published.preprocessor or any("preprocessor_config.json" in note for note in notes)


def test_an_input_size_that_is_not_the_networks(tmp_path: Path) -> None:
    message = r"input_size: expected the network's \(16, 16\), found \(32, 32\); image_size=VALUE brings"
    with pytest.raises(ImportSettingError, match=message):
        timm_vit(tmp_path, {"architecture": "vit_tiny", "pretrained_cfg": {**TIMM, "input_size": [3, 32, 32]}})
    assert not (tmp_path / "run").exists()


def test_another_resolution_on_the_command_line(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny", "pretrained_cfg": {**TIMM, "input_size": [3, 32, 32]}}
    made = timm_vit(tmp_path, config, "image_size=32").checkpoint
    assert made.settings["image_size"] == 32
    assert made.preprocessing["input_size"] == [32, 32]
    assert made.weights["pos_embed.embedding"].shape == (1, 65, 8)


def test_users_preprocessing_overrides_the_published(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny", "pretrained_cfg": TIMM}
    changes = ("preprocessing.crop_pct=0.8", "preprocessing.mean=[0.7,0.7,0.7]", "preprocessing.interpolation=bilinear")
    made = timm_vit(tmp_path, config, *changes).checkpoint
    assert made.preprocessing["crop_pct"] == 0.8
    assert made.preprocessing["mean"] == [0.7] * 3
    assert made.preprocessing["interpolation"] == "bilinear"
    assert made.origin is not None
    assert made.origin.arguments[1:4] == list(changes)


def test_a_changed_preprocessor_is_no_longer_the_published(tmp_path: Path) -> None:
    made = hugging_face_vit(
        tmp_path, {**NORMAL, "size": 16}, "preprocessing.crop_mode=center", "image_size=32"
    ).checkpoint
    assert made.preprocessing["crop_mode"] == "center"
    assert made.preprocessing["input_size"] == [32, 32]


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        ("preprocessing.crop=0.9", "preprocessing.crop_"),
        ("preprocessing.men=[0,0,0]", "preprocessing.mean"),
        ("num_heds=2", "num_heads"),
        ("imagesize=16", "image_size"),
        ("preprocessing.input_size=[32,32]", ""),
        ("preprocessing.task=object-detection", ""),
        ("preprocessing.shortest_edge=800", ""),
        ("num_classes=4", "num_"),
        ("=3", ""),
    ],
)
def test_an_unknown_key_names_the_nearest(change: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError, match=rf"unknown '{change.partition('=')[0]}': did you mean '{nearest}"):
        timm_vit(tmp_path, None, change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["depth", "", "preprocessing."])
def test_a_change_without_a_value(change: str, tmp_path: Path) -> None:
    with pytest.raises(ImportSettingError, match="expected key=value"):
        timm_vit(tmp_path, None, change)


@pytest.mark.parametrize(
    "change",
    [
        "preprocessing.crop_pct=abc",
        "preprocessing.crop_pct=0",
        "preprocessing.crop_pct=1.5",
        "preprocessing.crop_pct=NaN",
        "preprocessing.crop_pct=",
        "preprocessing.mean=[0,0]",
        "preprocessing.mean=0.5",
        "preprocessing.std=[0,0,0]",
        "preprocessing.interpolation=nearest",
        "preprocessing.crop_mode=border",
        "num_heads=-1",
        "num_heads=0",
        "num_heads=3",
        "num_heads=two",
        "num_heads=null",
        "num_heads=[2]",
        "depth=2.5",
        "depth=-1",
        "depth=0",
        "depth=2",
        "patch_size=0",
        "patch_size=-4",
        "patch_size=8",
        "embed_dim=-8",
        "embed_dim=16",
        "mlp_ratio=NaN",
        "mlp_ratio=Infinity",
        "mlp_ratio=-1",
        "image_size=17",
        "image_size=2",
        "image_size=0",
        "image_size=-16",
        "image_size=true",
        "image_size=abc",
        "image_size=[16]",
        "image_size=[]",
        "image_size={}",
        "image_size=10000000",
        "gelu=relu",
        "norm=post",
        "norm_eps=small",
        "norm_eps=NaN",
        "norm_eps=-1",
        "stem=conv",
        "global_pool=avg",
        "representation_size=8",
    ],
)
def test_invalid_setting_is_reported(change: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        timm_vit(tmp_path, None, change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        'num_heads="2"',
        "num_heads=true",
        "num_heads=2.0",
        "depth=1.0",
        'depth="1"',
        "embed_dim=8.0",
        "image_size=16.0",
        'image_size="16"',
    ],
)
def test_a_number_written_otherwise_is_that_number_or_a_sentence(change: str, tmp_path: Path) -> None:
    try:
        made = timm_vit(tmp_path, None, change).checkpoint
    except WeightsError:
        assert not (tmp_path / "run").exists()
    else:
        kinds = {type(made.settings[key]) for key in ("num_heads", "depth", "embed_dim", "image_size")}
        assert kinds == {int}


# The public pipeline, from the photograph to the answer ---------------------------------------------------------------

TINY_RESNET = transformers.ResNetConfig(
    out_features=["stage4"], embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1]
)
PIPELINES: dict[str, tuple[Any, Any]] = {
    "vit": (
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
            )
        ),
        transformers.ViTImageProcessorPil(),
    ),
    "bit": (
        transformers.BitForImageClassification(
            transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1], num_labels=3)
        ),
        transformers.BitImageProcessorPil(size={"shortest_edge": 250}, crop_size={"height": 224, "width": 224}),
    ),
    "detr": (
        transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone_config=TINY_RESNET,
                backbone=None,
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                num_queries=7,
                num_labels=3,
            )
        ),
        transformers.DetrImageProcessorPil(),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_photograph_is_classified_as_by_the_public_pipeline(name: str, photograph: bytes, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network, processor = PIPELINES[name]
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=2 / parameter[0].numel() ** 0.5)
    if name == "detr":
        network.model.query_position_embeddings.weight.normal_(std=3)  # so that queries find different boxes
        network.bbox_predictor.layers[-1].weight.mul_(0.4)  # that do not all fill the image
    network.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "labels").write_text("blue\ngreen\nred\n")
    import_weights(tmp_path, tmp_path / "run", labels=str(tmp_path / "labels"))
    predictor, _ = checkpoint_predictor(load_checkpoint(tmp_path / "run"))
    image = decode(photograph)
    public = network(**processor(image, return_tensors="pt"))
    if isinstance(predictor, Detector):
        (expected,) = processor.post_process_object_detection(public, threshold=0, target_sizes=[(480, 640)])
        order = expected["scores"].argsort(descending=True, stable=True)
        detections = predictor.detect(image, threshold=0)
        assert [found.class_id for found in detections] == expected["labels"][order].tolist()
        assert [found.score for found in detections] == pytest.approx(expected["scores"][order].tolist(), abs=1e-4)
        boxes = np.array([dataclasses.astuple(found.box) for found in detections])
        inside = expected["boxes"][order].numpy().clip(0, (640, 480, 640, 480))  # as Vitrine's boxes
        assert np.ptp(inside, axis=0).max() > 5
        assert np.abs(boxes - inside).max() < 0.05  # pixels
    else:
        expected = torch.softmax(public.logits[0], dim=-1)
        assert expected.std() > 0.05
        # Pillow's two ways to compute the same crop differ by one level of 255 in some pixels.
        assert predictor.probabilities([image])[0].tolist() == pytest.approx(expected.tolist(), abs=2e-3)
