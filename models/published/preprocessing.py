"""How images were prepared for published weights: from the JSON files beside them, or the family's defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.published.errors import ImportSettingError
from models.published.files import read_json
from models.published.layout import Layout, Settings

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which Hugging Face writes
_FULL_CROP_ABOVE = 224  # pixels: published networks of higher resolution see the whole picture


@dataclass(frozen=True)
class Published:
    """What lies beside the weights: Hugging Face's or timm's `config.json`, and Hugging Face's preprocessor."""

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


def read_published(folder: Path, layout: Layout) -> tuple[Published, list[str]]:
    """The JSON files in the folder of the weights, and what is to be said about them.

    A `config.json` of another kind of model does not belong to these weights and is not used.
    """
    config = read_json(folder / "config.json")
    if not config:
        return Published({}, {}), []
    hugging_face = layout.model_type is not None and config.get("model_type") == layout.model_type
    timm = layout.name.startswith("timm") and "architecture" in config
    if not hugging_face and not timm:
        return Published({}, {}), [f"{folder / 'config.json'} is not of {layout.name}: not used"]
    return Published(config, read_json(folder / "preprocessor_config.json") if hugging_face else {}), []


def find_preprocessing(layout: Layout, published: Published, settings: Settings) -> tuple[dict[str, Any], str]:
    """The fields of a `bundle.manifest.Preprocessing`, and where they are from."""
    if published.preprocessor:
        return _hugging_face(published.preprocessor, layout), "preprocessor_config.json"
    timm = published.config.get("pretrained_cfg", published.config)
    if layout.model_type is None and "mean" in timm:
        return _timm(timm), "config.json"
    fields = dict(layout.preprocessing)
    if layout.architecture != "detr":
        fields["input_size"] = input_size(settings)
        if max(fields["input_size"]) > _FULL_CROP_ABOVE:
            fields["crop_pct"] = 1.0
    return fields, f"the published default of {layout.name}, for the file holds none"


def input_size(settings: Settings) -> tuple[int, int]:
    """Height and width that the network sees."""
    size = settings["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's `pretrained_cfg`."""
    fields: dict[str, Any] = {
        "input_size": tuple(config["input_size"][1:]),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    for key in ("crop_pct", "crop_mode", "interpolation"):
        if config.get(key):
            fields[key] = config[key]
    return fields


def _hugging_face(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Hugging Face's `preprocessor_config.json`."""
    where = "preprocessor_config.json"
    for key, needed in (("do_resize", True), ("do_normalize", True), ("do_rescale", True)):
        if config.get(key, needed) != needed:
            raise ImportSettingError(f"{where}: {key}: expected {needed}, found {config[key]}")
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ImportSettingError(f"{where}: rescale_factor: expected 1/255, found {config['rescale_factor']}")
    resample = config.get("resample", 2)
    if resample not in _RESAMPLE:
        raise ImportSettingError(
            f"{where}: resample: expected one of {', '.join(f'{n} ({name})' for n, name in _RESAMPLE.items())}, "
            f"found {resample}"
        )
    fields: dict[str, Any] = {
        "interpolation": _RESAMPLE[resample],
        "mean": tuple(config.get("image_mean", layout.preprocessing["mean"])),
        "std": tuple(config.get("image_std", layout.preprocessing["std"])),
    }
    size = config.get("size")
    if layout.architecture == "detr":
        if isinstance(size, int):  # the first files
            size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
        if not isinstance(size, Mapping) or not {"shortest_edge", "longest_edge"} <= size.keys():
            raise ImportSettingError(f"{where}: size: expected shortest_edge and longest_edge, found {size}")
        edges = {key: size[key] for key in ("shortest_edge", "longest_edge")}
        return {"task": "object-detection", **edges, **fields}
    crop = _edges(config["crop_size"], where) if config.get("do_center_crop") and "crop_size" in config else None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        if crop is None:
            raise ImportSettingError(f"{where}: size: expected height and width or a center crop, found {size}")
        return {"input_size": crop, "crop_pct": min(1.0, min(crop) / size["shortest_edge"]), **fields}
    if crop is not None and crop != _edges(size, where):
        raise ImportSettingError(f"{where}: crop_size: expected that of size, found {crop}")
    return {"input_size": _edges(size, where), "crop_mode": "squash", **fields}


def _edges(size: Any, where: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise ImportSettingError(f"{where}: size: expected height and width, found {size}")
