"""`vitrine import`: convert published weights to a run. If it fails, nothing is written."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrine.bundle.errors import unknown
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Preprocessing, Task
from vitrine.models.build import ARCHITECTURES, VARIANTS, build_model, setting_names
from vitrine.models.position import interpolate_positions
from vitrine.models.published import detr
from vitrine.models.published.catalogue import find_weights
from vitrine.models.published.errors import ImportSettingError, WeightsError, validated
from vitrine.models.published.files import Tensors, is_file, open_weights, sha256
from vitrine.models.published.labels import choose_labels
from vitrine.models.published.layout import Layout, Settings, convert
from vitrine.models.published.preprocessing import find_preprocessing, input_size, read_published
from vitrine.models.published.recognition import recognise
from vitrine.models.training.checkpoint import CHECKPOINT_FILE, Checkpoint, Origin, save_checkpoint
from vitrine.models.vit import patch_grid

_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

# Number of heads of the published networks by width: it cannot be inferred from the shapes.
_PUBLISHED_HEADS = {
    (architecture, settings["embed_dim"]): settings["num_heads"]
    for architecture, settings in VARIANTS.values()
    if "num_heads" in settings and "image_size" not in settings
} | {("detr", 256): 8}


@dataclass(frozen=True)
class ImportResult:
    """The imported checkpoint, with notes for the user."""

    checkpoint: Checkpoint
    parameters: int
    notes: list[str]  # assumptions, and files that were not used


def import_by_name(name: str, runs: Path) -> Path:
    """Return the run with published weights, `runs`/`name`; import it if it is not there.

    Raises:
        WeightsError: as `find_weights` and `import_weights`.
    """
    run = runs / name
    if not is_file(run / CHECKPOINT_FILE):
        found = find_weights(name)
        import_weights(found.path, run, variant=found.variant)
    return run


def import_weights(
    source: Path,
    run: Path,
    *,
    variant: str | None = None,
    labels: str | None = None,
    reset_head: bool = False,
    changes: Sequence[str] = (),
) -> ImportResult:
    """Write a run with published weights.

    Args:
        source: the file, or a folder with `model.safetensors` or `pytorch_model.bin`.
        variant: key of `models.build.VARIANTS`, for settings that the shapes in the file do not determine.
        labels: "imagenet-1k", "coco" or a file with a label on each line.
        reset_head: initialise the last layer randomly, for other labels than the file's.
        changes: `key=value` of the architecture's settings or of `preprocessing`, overriding the inferred values.

    Raises:
        WeightsError: the file or the options cannot be used; nothing is written.
    """
    if is_file(run / CHECKPOINT_FILE):
        raise ImportSettingError(f"{run}: a run is already there; choose another --out")
    file = _file_in(source)
    weights_file = open_weights(file)
    layout, tensors = recognise(weights_file.tensors, file)
    published, notes = read_published(file.parent, layout)
    settings_changes, preprocessing_changes = _parse(changes, layout)

    context = {**settings_changes, **weights_file.arguments, **published.config}
    tensors, settings, size_in_file = _settings(layout, tensors, context, variant, settings_changes, file, notes)
    fields, origin = find_preprocessing(layout, published, settings)
    if layout.architecture != "detr" and "image_size" in settings_changes:
        fields["input_size"] = input_size(settings)
    fields = {"task": Task.CLASSIFICATION, **fields, **preprocessing_changes}
    preprocessing = validated(Preprocessing, fields, "preprocessing")
    if isinstance(preprocessing, ClassificationPreprocessing):
        settings = _match_image_size(layout, settings, preprocessing)
    values = preprocessing.model_dump(mode="json", exclude={"task"}).items()
    notes.append(f"preprocessing is {origin}: {', '.join(f'{key}={json.dumps(value)}' for key, value in values)}")
    if layout is detr.FACEBOOK and variant is None and "dilation" not in {**context, **settings}:
        notes.append("assumed not to be a DC5, which no tensor shows; dilation=true makes it one")

    head = [key for key in layout.head if reset_head or layout is detr.RESNET]
    rows = None if head else _classes_in_file(layout, tensors, file)
    detection = layout.architecture == "detr"
    classes, note = choose_labels(labels, published.config, classes=rows, detection=detection, file=file)
    notes += [note] if note else []
    if detection:
        settings["unused_classes"] = len(classes.unused)
    in_file = settings if size_in_file is None else {**settings, "image_size": size_in_file}
    weights, untrained = _weights(layout, tensors, in_file, classes.labels, file, head)
    if not head:
        order = [*classes.named, *classes.unused, *([-1] if detection else [])]  # "no object" stays last
        weights |= {key: weights[key][order] for key in layout.head}
    if size_in_file is not None:
        weights |= _resized(weights, size_in_file, settings)

    checkpoint = Checkpoint(
        architecture=layout.architecture,
        settings=json.loads(json.dumps(settings)),
        preprocessing=preprocessing.model_dump(mode="json"),
        labels=classes.labels,
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
    return ImportResult(checkpoint, parameters, notes)


def _file_in(source: Path) -> Path:
    try:
        if not source.is_dir():
            return source
    except OSError:  # an invalid name
        return source
    for name in _FOLDER_FILES:
        if (source / name).is_file():
            return source / name
    raise ImportSettingError(f"{source}: expected {' or '.join(_FOLDER_FILES)} in this folder, found neither")


def _parse(changes: Sequence[str], layout: Layout) -> tuple[Settings, dict[str, Any]]:
    """Parse `key=value` into the architecture's settings and the preprocessing's fields."""
    fields = (DetectionPreprocessing if layout.architecture == "detr" else ClassificationPreprocessing).model_fields
    network_keys = setting_names(layout.architecture)
    preprocessing_keys = [f"preprocessing.{name}" for name in fields if name not in ("task", "input_size")]
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
        if key in network_keys:
            settings[key] = value
        elif key in preprocessing_keys:
            preprocessing[key.removeprefix("preprocessing.")] = value
        else:
            raise ImportSettingError(unknown(key, network_keys + preprocessing_keys))
    return settings, preprocessing


def _settings(
    layout: Layout,
    tensors: Tensors,
    context: Mapping[str, Any],
    variant: str | None,
    changes: Settings,
    file: Path,
    notes: list[str],
) -> tuple[Tensors, Settings, Any]:
    """Return the tensors that the layout's rules refer to, the network's settings, and a ViT's image size in the file.

    Settings come from the shapes, then the variant, then the user's changes. Assumptions are appended to `notes`.
    """
    try:
        tensors = layout.prepare(tensors, context)
        settings = layout.settings(tensors, context)
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: its keys match {layout.name}, but its shapes do not: {error}") from error
    if variant is not None:
        variants = [name for name, (architecture, _) in VARIANTS.items() if architecture == layout.architecture]
        if variant not in variants:
            raise ImportSettingError(f"--variant: {unknown(variant, variants)}")
        settings |= VARIANTS[variant][1]
    # A ViT's positions are resized after reading; a Mixer's weights cannot be.
    size_in_file = settings.get("image_size", changes.get("image_size")) if layout.architecture == "vit" else None
    settings |= changes
    published = (layout.architecture, settings.get("embed_dim"))
    if "num_heads" not in settings and published in _PUBLISHED_HEADS:
        settings["num_heads"] = _PUBLISHED_HEADS[published]
        notes.append(f"num_heads={settings['num_heads']} is that of the published network of this width")
    for key in ("num_heads", "image_size"):
        if key not in settings and key in setting_names(layout.architecture):
            options = f"{key}=VALUE or --variant NAME"
            raise ImportSettingError(f"{file}: {key}: cannot be inferred from the file; pass {options}")
    for key, value in settings.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ImportSettingError(f"settings: {key}: expected a number from 0, found {value}")
    config = validated(ARCHITECTURES[layout.architecture][1], {"num_classes": 1, **settings}, "settings")
    settings = {key: getattr(config, key) for key in settings}
    _build(layout, settings, 1)
    return tensors, settings, size_in_file


def _match_image_size(layout: Layout, settings: Settings, preprocessing: ClassificationPreprocessing) -> Settings:
    """Return the settings with the image size of the preprocessing."""
    found = preprocessing.input_size
    if input_size(settings) == found:
        return settings
    if layout.architecture in ("efficientnet", "resnetv2"):  # accept any size: use the published one
        return {**settings, "image_size": found[0] if found[0] == found[1] else found}
    raise ImportSettingError(
        f"preprocessing: input_size: expected the network's {input_size(settings)}, found {found}; "
        "image_size=VALUE brings the network to another resolution"
    )


def _classes_in_file(layout: Layout, tensors: Tensors, file: Path) -> int:
    """Number of classes of the file's head, without "no object"."""
    rule = next(rule for rule in layout.rules if rule.target == layout.head[1])
    bias = tensors.get(rule.sources[0])
    if bias is None:
        raise ImportSettingError(f"{file}: it has no head: --reset-head with --labels makes a new one, to be trained")
    return math.prod(bias.shape) - (layout.architecture == "detr")


def _weights(
    layout: Layout, tensors: Tensors, settings: Settings, labels: list[str], file: Path, new: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return all weights of the network, and the names of its parts that are not in the file."""
    state = _build(layout, settings, len(labels)).state_dict()
    if layout is detr.RESNET:
        new = [name for name in state if not name.startswith("backbone.")]
    counters = {name: torch.zeros((), dtype=torch.int64) for name in state if name.endswith("num_batches_tracked")}
    weights = convert(layout, tensors, state, file=file, skip=[*new, *counters]) | counters
    if new:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # importing is reproducible
            fresh = build_model(layout.architecture, settings, len(labels)).state_dict()
        weights |= {name: fresh[name] for name in new}
    return {name: weights[name] for name in state}, sorted({name.split(".")[0] for name in new})


def _build(layout: Layout, settings: Settings, classes: int) -> nn.Module:
    """Build the network on "meta", without its weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors without elements
            return build_model(layout.architecture, settings, classes)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ImportSettingError(f"settings: {error}") from error


def _resized(weights: Mapping[str, Tensor], size_in_file: Any, settings: Settings) -> dict[str, Tensor]:
    """Return a ViT's positions, resized to the image size in the settings."""
    name = "pos_embed.embedding"
    sizes = [input_size({"image_size": size}) for size in (size_in_file, settings["image_size"])]
    grids = [patch_grid(size, settings["patch_size"]) for size in sizes]
    try:
        return {name: interpolate_positions(weights[name], grids[0], grids[1])}
    except RuntimeError as error:  # out of memory
        raise ImportSettingError(f"settings: image_size: {error}") from error


def _arguments(variant: str | None, labels: str | None, reset_head: bool, changes: Sequence[str]) -> list[str]:
    arguments = list(changes)
    arguments += [] if variant is None else ["--variant", variant]
    arguments += [] if labels is None else ["--labels", labels]
    return arguments + (["--reset-head"] if reset_head else [])


def _write(checkpoint: Checkpoint, run: Path) -> None:
    created: list[Path] = []
    try:
        for folder in (*reversed(run.parents), run):
            if not folder.is_dir():
                folder.mkdir()
                created.append(folder)
        try:
            save_checkpoint(checkpoint, run)
        except BaseException:
            (run / f"{CHECKPOINT_FILE}.partial").unlink(missing_ok=True)
            raise
    except BaseException as error:
        for folder in reversed(created):
            folder.rmdir()
        if isinstance(error, OSError | RuntimeError):  # torch.save raises the latter on a full disk
            raise ImportSettingError(f"{run}: cannot be written: {error}") from error
        raise
