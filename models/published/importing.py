"""`vitrine import`: from a published file of weights to a run, or to an error that leaves nothing behind."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bundle.errors import unknown
from bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Preprocessing
from models.build import ARCHITECTURES, VARIANTS, build_model, setting_names
from models.position import interpolate_positions
from models.published import detr, mlp_mixer, resnetv2, vit
from models.published.errors import ImportSettingError, OtherNetworkError, UnknownLayoutError, WeightsError
from models.published.files import Tensors, open_weights, sha256
from models.published.labels import NAMED, NOT_A_CLASS, coco_by_category_id, distinct, published_labels, read_labels
from models.published.layout import Layout, Settings, convert
from models.published.preprocessing import find_preprocessing, input_size, read_published
from models.training import checkpoint as checkpoints
from models.training.checkpoint import CHECKPOINT_FILE, Checkpoint, Origin
from models.vit import patch_grid

LAYOUTS = (*vit.LAYOUTS, *mlp_mixer.LAYOUTS, *resnetv2.LAYOUTS, *detr.LAYOUTS)

# Neighbours that share most of their keys with a network that we have, but compute something else.
_OTHER_NETWORKS = (
    (r"MAPHead_\d|(^|\.)attn_pool\.", "a ViT with attention pooling (a MAP head, as SigLIP's)"),
    (r"conv_root/kernel|gn_root/", "big_vision's BiT, which normalises after each convolution (or a hybrid with it)"),
    (r"sampling_offsets", "a Deformable DETR"),
    (r"ca_qcontent_proj|ref_point_head|refpoint_embed", "a Conditional or DAB-DETR"),
    (r"transformer\.encoder\.norm\.", "a DETR trained with pre_norm"),
    (r"row_embed\.weight|row_embeddings\.weight", "a DETR with learned positions"),
    (r"dist_token|distillation_token|head_dist\.", "a distilled DeiT"),
    (r"relative_position_bias_table", "a transformer with relative positions (Swin, BEiT)"),
    (r"(^|\.)fc_norm\.", "a ViT that averages its patches beside an unused class token (as MAE's fine-tuned ones)"),
    (r"\.ls1\.|\.gamma_1$|lambda1$", "a ViT with layer scale (as DINOv2 and DeiT III)"),
    (r"register_tokens|reg_token", "a ViT with register tokens"),
    (r"(^|\.)visual\.|^vision_model\.", "the image tower of CLIP"),
    (r"(^|\.)norm_pre\.|\.q_norm\.|(^|\.)rope", "a ViT with further norms or rotary positions"),
    (r"^stages\.\d+\.blocks\.\d+\.norm1\.running_mean", "a ResNetV2 with batch norm"),
)
_COCO_CLASSES = (91, 250)  # in front of "no object": COCO's ids, and the panoptic network's
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Imported:
    """What an import found and made."""

    checkpoint: Checkpoint
    parameters: int
    notes: list[str]  # what was assumed or left out


def import_weights(
    source: Path,
    run: Path,
    *,
    variant: str | None = None,
    labels: str | None = None,
    reset_head: bool = False,
    changes: Sequence[str] = (),
) -> Imported:
    """Write a run with the weights of a published file.

    Args:
        source: the file, or a folder with `model.safetensors` or `pytorch_model.bin` in it.
        variant: a key of `models.build.VARIANTS`, for what the shapes in the file do not tell.
        labels: "imagenet-1k", "coco" or a file with a label on each line.
        reset_head: start the last layer from random weights, for other labels than the file's.
        changes: `key=value` of the architecture's settings or of `preprocessing`, against what was found.

    Raises:
        WeightsError: the file, or what was asked for, cannot be used; nothing is written.
    """
    if (run / CHECKPOINT_FILE).exists():
        raise ImportSettingError(f"{run}: a run is already there; choose another --out")
    file = _file_in(source)
    weights_file = open_weights(file)
    layout, tensors = recognise(weights_file.tensors, file)
    published, notes = read_published(file.parent, layout)
    settings_changes, preprocessing_changes = _parse(changes, layout)

    context = {**weights_file.arguments, **published.config}
    tensors = layout.prepare(tensors, context)
    in_file = _file_settings(layout, tensors, context, variant, settings_changes, file)
    settings = {**in_file, **settings_changes}
    fields, where = find_preprocessing(layout, published, settings)
    if layout.architecture != "detr" and "image_size" in settings_changes:
        fields["input_size"] = input_size(settings)
    fields = {"task": ClassificationPreprocessing.model_fields["task"].default, **fields, **preprocessing_changes}
    preprocessing = _validated(Preprocessing, fields, "preprocessing")
    if isinstance(preprocessing, ClassificationPreprocessing):
        settings, in_file = _agreeing(layout, settings, in_file, preprocessing)
    notes.append(f"preprocessing is {where}: {_said(preprocessing)}")

    head = [key for key in layout.head if reset_head or layout is detr.RESNET]
    rows = _head_rows(layout, tensors)
    names, order, note = _labels(layout, rows, labels, published.config, new_head=bool(head), file=file)
    notes += [note] if note else []
    if layout.architecture == "detr":
        settings["unused_classes"] = in_file["unused_classes"] = len(order) - len(names)
    weights, untrained = _weights(layout, tensors, in_file, names, file, head)
    if not head:
        weights |= {key: weights[key][[*order, -1] if layout.architecture == "detr" else order] for key in layout.head}
    if layout.architecture == "vit":
        grids = [patch_grid(input_size(s), s["patch_size"]) for s in (in_file, settings)]
        position = "pos_embed.embedding"
        weights[position] = interpolate_positions(weights[position], grids[0], grids[1])

    checkpoint = Checkpoint(
        architecture=layout.architecture,
        settings=json.loads(json.dumps(settings)),
        preprocessing=preprocessing.model_dump(mode="json"),
        labels=names,
        weights=weights,
        origin=Origin(
            file=file.name,
            sha256=sha256(file),
            layout=layout.name,
            arguments=_arguments(variant, labels, reset_head, changes),
            untrained=untrained,
        ),
    )
    parameters = sum(parameter.numel() for parameter in checkpoint.build().parameters())
    _write(checkpoint, run)
    return Imported(checkpoint, parameters, notes)


def recognise(tensors: Tensors, file: Path) -> tuple[Layout, Tensors]:
    """The layout of a file, by its keys, and its tensors under the names in the layout's rules.

    Raises:
        OtherNetworkError: it is of a network that we do not have.
        UnknownLayoutError: it is of no layout that we know.
    """
    for pattern, network in _OTHER_NETWORKS:
        key = next((key for key in tensors if re.search(pattern, key)), None)
        if key is not None:
            raise OtherNetworkError(file, network=network, key=key)
    for layout in LAYOUTS:
        prefix = layout.find_prefix(tensors)
        if prefix is not None:
            return layout, layout.canonical(tensors, prefix)
    nearest = max(LAYOUTS, key=lambda layout: layout.known_share(tensors))
    missing = [key for key in nearest.signature if key not in nearest.canonical(tensors, "")]
    raise UnknownLayoutError(file, keys=sorted(tensors), nearest=nearest.name, missing=missing)


def _file_in(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in _FOLDER_FILES:
        if (source / name).is_file():
            return source / name
    raise ImportSettingError(f"{source}: expected {' or '.join(_FOLDER_FILES)} in this folder, found neither")


def _parse(changes: Sequence[str], layout: Layout) -> tuple[Settings, dict[str, Any]]:
    """`key=value` of the architecture's settings, and of its preprocessing."""
    task = DetectionPreprocessing if layout.architecture == "detr" else ClassificationPreprocessing
    of_network = setting_names(layout.architecture)
    of_images = [f"preprocessing.{name}" for name in task.model_fields if name not in ("task", "input_size")]
    settings: Settings = {}
    preprocessing: dict[str, Any] = {}
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise ImportSettingError(f"{change!r}: expected key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if key in of_network:
            settings[key] = value
        elif key in of_images:
            preprocessing[key.removeprefix("preprocessing.")] = value
        else:
            raise ImportSettingError(unknown(key, of_network + of_images))
    return settings, preprocessing


def _file_settings(
    layout: Layout,
    tensors: Tensors,
    context: Mapping[str, Any],
    variant: str | None,
    changes: Settings,
    file: Path,
) -> Settings:
    """The settings of the network in the file: what its shapes tell, then the variant, then the user."""
    try:
        settings = layout.settings(tensors, context)
    except (KeyError, IndexError, ValueError) as error:  # a shape that a whole file of this layout has
        raise WeightsError(f"{file}: it is like {layout.name}, but incomplete: {error}") from error
    if variant is not None:
        known = [name for name, (architecture, _) in VARIANTS.items() if architecture == layout.architecture]
        if variant not in known:
            raise ImportSettingError(f"--variant: {unknown(variant, known)}")
        settings |= VARIANTS[variant][1]
    # A ViT's positions are brought to another resolution once they are read; a Mixer's filters cannot be.
    resized = layout.architecture == "vit" and "image_size" in settings
    settings |= {key: value for key, value in changes.items() if key != "image_size" or not resized}
    for key in ("num_heads", "image_size"):
        if key not in settings and key in setting_names(layout.architecture):
            raise ImportSettingError(f"{file}: {key}: no shape in the file tells it; say {key}=VALUE or --variant NAME")
    _validated(ARCHITECTURES[layout.architecture][1], {"num_classes": 1, **settings, **changes}, "settings")
    return settings


def _agreeing(
    layout: Layout, settings: Settings, in_file: Settings, preprocessing: ClassificationPreprocessing
) -> tuple[Settings, Settings]:
    """Settings whose image size is that of the preprocessing."""
    found = preprocessing.input_size
    if input_size(settings) == found:
        return settings, in_file
    if layout.architecture == "resnetv2":  # any size can be given: what was published is right
        size = found[0] if found[0] == found[1] else found
        return {**settings, "image_size": size}, {**in_file, "image_size": size}
    raise ImportSettingError(
        f"preprocessing: input_size: expected the network's {input_size(settings)}, found {found}; "
        "image_size=VALUE brings the network to another resolution"
    )


def _validated(kind: Any, value: Any, what: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("image-classification", "object-detection"))
        raise ImportSettingError(f"{what}: {place}: {first['msg']}, found {first['input']!r}") from error


def _head_rows(layout: Layout, tensors: Tensors) -> int | None:
    """The classes that the file's head tells apart, without "no object"; None if it has no head."""
    rule = next((rule for rule in layout.rules if rule.target == layout.head[1]), None)
    if rule is None or rule.sources[0] not in tensors:
        return None
    return tensors[rule.sources[0]].shape[-1] - (layout.architecture == "detr")


def _labels(
    layout: Layout, rows: int | None, chosen: str | None, config: Mapping[str, Any], *, new_head: bool, file: Path
) -> tuple[list[str], list[int], str | None]:
    """Labels, the head's rows in their order with rows for no label at the end, and what is to be said about them."""
    note = None
    if new_head:
        if chosen is None:
            raise ImportSettingError("a new head needs --labels: imagenet-1k, coco or a file with a label on each line")
        labels = read_labels(chosen)
    elif rows is None:
        raise ImportSettingError(f"{file}: it has no head: --reset-head with --labels makes a new one, to be trained")
    elif chosen is not None:
        labels = read_labels(chosen)
        if chosen == "coco" and layout.architecture == "detr" and rows in _COCO_CLASSES:
            labels = coco_by_category_id(rows)
    elif (found := published_labels(config)) is not None:
        labels = found
    elif layout.architecture != "detr" and rows == 1000:
        labels, note = read_labels("imagenet-1k"), "labels are those of ImageNet-1k, for the head has 1,000 classes"
    elif layout.architecture == "detr" and rows in _COCO_CLASSES:
        labels, note = coco_by_category_id(rows), f"labels are those of COCO, for the head has {rows} classes"
    else:
        raise ImportSettingError(
            f"{file}: no names for its {rows:,} classes: --labels {', '.join(NAMED)} or a file with one on each line"
        )
    if not new_head and len(labels) != rows:
        raise ImportSettingError(
            f"labels: expected {rows:,}, one for each class of the head, found {len(labels):,}; "
            "--reset-head makes a new head, to be trained"
        )
    holes = [i for i, label in enumerate(labels) if label == NOT_A_CLASS and layout.architecture == "detr"]
    order = [i for i in range(len(labels)) if i not in holes]
    names = distinct([labels[i] for i in order])
    return names, order if new_head else order + holes, note


def _weights(
    layout: Layout, tensors: Tensors, settings: Settings, labels: list[str], file: Path, new: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """All weights of the network, and which parts of it the file did not fill."""
    with torch.device("meta"):
        network = _build(layout, settings, labels)
    state = network.state_dict()
    if layout is detr.RESNET:
        new = [name for name in state if not name.startswith("backbone.")]
    weights = convert(layout, tensors, state, file=file, skip=new)
    if new:
        fresh = _build(layout, settings, labels).state_dict()
        weights |= {name: fresh[name] for name in new}
    ordered = {name: weights[name] for name in state}
    return ordered, sorted({name.split(".")[0] for name in new})


def _build(layout: Layout, settings: Settings, labels: list[str]) -> torch.nn.Module:
    try:
        return build_model(layout.architecture, settings, len(labels))
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ImportSettingError(f"settings: {error}") from error


def _said(preprocessing: ClassificationPreprocessing | DetectionPreprocessing) -> str:
    fields = preprocessing.model_dump(mode="json", exclude={"task"})
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in fields.items())


def _arguments(variant: str | None, labels: str | None, reset_head: bool, changes: Sequence[str]) -> list[str]:
    arguments = list(changes)
    arguments += [] if variant is None else ["--variant", variant]
    arguments += [] if labels is None else ["--labels", labels]
    return arguments + (["--reset-head"] if reset_head else [])


def _write(checkpoint: Checkpoint, run: Path) -> None:
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    try:
        checkpoints.save(checkpoint, run)
    except BaseException:
        (run / f"{CHECKPOINT_FILE}.partial").unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        raise
