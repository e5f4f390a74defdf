"""Preprocessing of published weights: from the JSON files in their folder, or the family's defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vitrine.bundle.manifest import Interpolation
from vitrine.models.published.errors import ImportSettingError, validated
from vitrine.models.published.files import read_json
from vitrine.models.published.layout import Layout, Settings

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_RESAMPLE = {2: Interpolation.BILINEAR, 3: Interpolation.BICUBIC}  # Pillow's constants, as in Hugging Face's files
_FULL_CROP_ABOVE = 224  # pixels: published networks with a higher resolution use the whole image

Edge = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Published:
    """JSON files published with the weights: Hugging Face's or timm's `config.json`, Hugging Face's preprocessor."""

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


class _Size(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    height: Edge | None = None
    width: Edge | None = None
    shortest_edge: Edge | None = None
    longest_edge: Edge | None = None


class _Preprocessor(BaseModel):
    """The supported values of Hugging Face's `preprocessor_config.json`, in its formats since 2020."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    do_resize: Literal[True] = True
    do_normalize: Literal[True] = True
    do_rescale: Literal[True] = True
    rescale_factor: Annotated[float, Field(gt=0.9999 / 255, lt=1.0001 / 255)] = 1 / 255
    resample: Literal[2, 3] = 2
    image_mean: Channels | None = Field(None, strict=False)
    image_std: Channels | None = Field(None, strict=False)
    size: Edge | _Size
    max_size: Edge = 1333  # in the first detectors' format
    do_center_crop: bool | None = None
    crop_size: Edge | _Size | None = None


class _Timm(BaseModel):
    """The supported values of timm's `pretrained_cfg`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    input_size: tuple[Literal[3], Edge, Edge]
    mean: Channels
    std: Channels
    interpolation: Interpolation = Interpolation.BICUBIC
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `ClassificationPreprocessing`."""
        return {**self.model_dump(exclude_none=True, exclude={"input_size"}), "input_size": self.input_size[1:]}


def read_published(folder: Path, layout: Layout) -> tuple[Published, list[str]]:
    """Read the JSON files in the folder of the weights; also return notes for the user.

    A `config.json` of another model does not belong to these weights: neither it nor the preprocessor is used.
    """
    config, preprocessor = read_json(folder / _CONFIG), read_json(folder / _PREPROCESSOR)
    if not config:
        return Published({}, preprocessor if layout.model_type is not None else {}), []
    hugging_face = layout.model_type is not None and config.get("model_type") == layout.model_type
    timm = bool(layout.timm_names) and str(config.get("architecture")).startswith(layout.timm_names)
    if not hugging_face and not timm:
        return Published({}, {}), [f"{folder / _CONFIG} is not of {layout.name}: not used"]
    return Published(config, preprocessor if hugging_face else {}), []


def find_preprocessing(layout: Layout, published: Published, settings: Settings) -> tuple[dict[str, Any], str]:
    """Return the fields of a `bundle.manifest.Preprocessing`, and a description of their source.

    Raises:
        ImportSettingError: the published preprocessing is not supported.
    """
    if published.preprocessor:
        config = validated(_Preprocessor, published.preprocessor, _PREPROCESSOR)
        return _hugging_face(config, layout), f"that of {_PREPROCESSOR}"
    timm = published.config.get("pretrained_cfg", published.config)  # older files have its fields at the top level
    if layout.timm_names and (timm is not published.config or "mean" in timm):
        return validated(_Timm, timm, _CONFIG).fields(), f"that of {_CONFIG}"
    fields = dict(layout.preprocessing)
    if layout.architecture != "detr":
        fields["input_size"] = input_size(settings)
        if layout.crop_border is not None:
            edge = min(fields["input_size"])
            fields["crop_pct"] = edge / (edge + layout.crop_border)
        elif max(fields["input_size"]) > _FULL_CROP_ABOVE:
            fields["crop_pct"] = 1.0
    return fields, f"the published default of {layout.name}, because the file has none"


def input_size(settings: Settings) -> tuple[int, int]:
    """Height and width of the network's input."""
    size = settings["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _hugging_face(config: _Preprocessor, layout: Layout) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "interpolation": _RESAMPLE[config.resample],
        "mean": config.image_mean or layout.preprocessing["mean"],
        "std": config.image_std or layout.preprocessing["std"],
    }
    if layout.architecture == "detr":
        return {"task": "object-detection", **_detector_edges(config), **fields}
    crop = _height_and_width(config.crop_size) if config.do_center_crop else None
    edges = _height_and_width(config.size)
    if config.do_center_crop and crop is None:
        raise ImportSettingError(f"{_PREPROCESSOR}: crop_size: expected height and width, found {config.crop_size}")
    if edges is not None:
        if crop not in (None, edges):
            raise ImportSettingError(f"{_PREPROCESSOR}: crop_size: expected that of size, {edges}, found {crop}")
        return {"input_size": edges, "crop_mode": "squash", **fields}
    shortest = config.size.shortest_edge if isinstance(config.size, _Size) else None
    if crop is None or shortest is None or shortest < max(crop):
        raise ImportSettingError(
            f"{_PREPROCESSOR}: size: expected height and width, or shortest_edge and a centre crop within it, "
            f"found {_plain(config.size)} and crop {crop}"
        )
    return {"input_size": crop, "crop_pct": min(crop) / shortest, **fields}


def _detector_edges(config: _Preprocessor) -> dict[str, int]:
    size = config.size
    if isinstance(size, int):
        return {"shortest_edge": size, "longest_edge": config.max_size}
    if size.shortest_edge is None or size.longest_edge is None:
        raise ImportSettingError(
            f"{_PREPROCESSOR}: size: expected shortest_edge and longest_edge, found {_plain(size)}"
        )
    return {"shortest_edge": size.shortest_edge, "longest_edge": size.longest_edge}


def _height_and_width(size: int | _Size | None) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return None if size is None or size.height is None or size.width is None else (size.height, size.width)


def _plain(size: int | _Size) -> object:
    return size.model_dump(exclude_none=True) if isinstance(size, _Size) else size
