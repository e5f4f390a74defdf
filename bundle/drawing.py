"""Draw answers: boxes over the image, a caption of classes below it, or heat maps that explain them.

Lines and text scale with the image, so that a thumbnail and a 24-megapixel photograph look alike at the same display
size. Text on a small image would be illegible, so the picture is upscaled by an integer factor: the smallest that
brings the shorter edge to `READABLE_EDGE` pixels, as long as the longer edge stays within `LARGEST_EDGE`.
Coordinates are in pixels of the picture, with the origin at the top-left corner.
"""

import colorsys
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitrine.bundle.explaining import Explained, HeatMap, Method
from vitrine.bundle.predictors import Box, Detection, Prediction

MAX_JPEG_EDGE = 65_500  # pixels; libjpeg writes no longer edge
READABLE_EDGE = 320
LARGEST_EDGE = 4096
MAX_CAPTION_ROWS = 5

_MIN_FONT_SIZE = 12  # pixels; smaller text is illegible
_EDGE_PER_FONT_SIZE = 36  # edge: sqrt(width x height); font of 15 pixels on 640 x 480, 136 on 6000 x 4000
_MAX_COVERED = 0.4  # share of a box that a tag may cover
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_SATURATION_VALUE = ((0.85, 1.0), (0.62, 0.85), (1.0, 0.72))  # HSV saturation and value, in rotation
# "inferno" of Matplotlib at 17 evenly spaced places (CC0): from cold to hot, lightness grows evenly.
_COLORMAP = np.array(
    [
        *((0, 0, 4), (11, 7, 36), (33, 12, 74), (61, 9, 101), (87, 16, 110), (113, 25, 110)),
        *((138, 34, 106), (163, 44, 97), (188, 55, 84), (210, 70, 68), (228, 90, 49), (241, 115, 29)),
        *((249, 142, 9), (252, 172, 17), (249, 203, 53), (242, 234, 105), (252, 255, 164)),
    ]
)
_DARK, _LIGHT, _DIM = (24, 24, 27), (250, 250, 250), (63, 63, 70)

Color = tuple[int, int, int]  # RGB, 0 to 255


@dataclass(frozen=True)
class _PixelBox:
    """A box in whole pixels; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def xyxy(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels."""

    font: ImageFont.FreeTypeFont
    line: int  # width of a box's outline
    padding: int  # left and right of a tag's text
    height: int  # of a tag or a caption row
    baseline: int  # of the text, from the top of the tag

    @classmethod
    def of(cls, width: int, height: int) -> "_Style":
        size = max(_MIN_FONT_SIZE, round(math.sqrt(width * height) / _EDGE_PER_FONT_SIZE))
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # all Pillow wheels include FreeType
        ascent, descent = font.getmetrics()
        return cls(font, max(2, round(size / 5.5)), round(size / 3), ascent + descent + size // 6, ascent + size // 12)


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """Draw a box and a tag (label and score) for each detection on an RGB image.

    A class has the same color in every picture (`class_color`). A tag stands on top of its box, or inside or below it
    if space is taken; it is always inside the picture. Higher scores are drawn on top.

    Returns:
        A new RGB image, upscaled if small (see the module). Deterministic.
    """
    factor = upscale_factor(*image.size)
    picture = _enlarge(image, factor)
    style = _Style.of(*picture.size)
    draw = ImageDraw.Draw(picture)
    ranked = sorted(detections, key=lambda detection: -detection.score)
    boxes = [_pixel_box(detection, factor, picture.size) for detection in ranked]
    for detection, box in reversed(list(zip(ranked, boxes, strict=True))):
        _draw_box(draw, box, class_color(detection.class_id), style)
    texts = [_tag_text(detection, picture.width, style) for detection in ranked]
    tags = _place_tags(boxes, [math.ceil(style.font.getlength(text)) for text in texts], style, picture.size)
    for detection, tag, text in reversed(list(zip(ranked, tags, texts, strict=True))):
        color = class_color(detection.class_id)
        draw.rectangle((tag.left, tag.top, tag.right - 1, tag.bottom - 1), fill=color)
        position = tag.left + style.padding, tag.top + style.baseline
        draw.text(position, text, fill=text_color(color), font=style.font, anchor="ls")
    return picture


def draw_classification(image: Image.Image, predictions: Sequence[Prediction]) -> Image.Image:
    """Draw a caption below an RGB image: the first classes, each with its probability as a bar.

    At most `MAX_CAPTION_ROWS` predictions are shown. A picture too narrow for the caption gets a margin at the right.

    Returns:
        A new RGB image, upscaled if small (see the module). Deterministic.
    """
    picture = _enlarge(image, upscale_factor(*image.size))
    style = _Style.of(*picture.size)
    shown = predictions[:MAX_CAPTION_ROWS]
    size = style.font.size
    width = max(picture.width, round(14 * size))
    caption = len(shown) * style.height + 2 * style.padding if shown else 0
    drawn = Image.new("RGB", (width, picture.height + caption), _DARK)
    drawn.paste(picture)
    draw = ImageDraw.Draw(drawn)
    for row, prediction in enumerate(shown):
        top = picture.height + style.padding + row * style.height
        left, right = style.padding, width - style.padding
        bar = round((right - left) * min(1.0, max(0.0, prediction.probability)))
        if bar:
            gap = max(1, style.line // 2)
            draw.rectangle((left, top + gap, left + bar - 1, top + style.height - 1 - gap), fill=_DIM)
        percent = f"{prediction.probability:.1%}"
        room = width - style.padding - math.ceil(style.font.getlength(percent))
        label = _truncate(_display_label(prediction), "", room - style.padding, style)
        baseline = top + style.baseline
        draw.text((left + style.padding, baseline), label, fill=_LIGHT, font=style.font, anchor="ls")
        draw.text((right - style.padding, baseline), percent, fill=_LIGHT, font=style.font, anchor="rs")
    return drawn


def draw_explanations(
    image: Image.Image, explained: Sequence[Explained], method: Method, *, opacity: float = 0.6
) -> Image.Image:
    """Draw a panel for each explanation: its heat over an RGB image, and its box; below it a caption, and a legend.

    Heat is relative to the panel's largest value; evidence against an answer (negative values) is not shown. Without an
    explanation, there is one panel, the image.

    Returns:
        A new RGB image, upscaled if the image is small (see the module), with smaller panels if there are many.
    """
    columns = math.ceil(math.sqrt(max(1, len(explained))))
    factor = float(upscale_factor(*image.size))
    factor = min(factor, max(LARGEST_EDGE, max(image.size)) / (columns * max(image.size)))
    width, height = (max(1, round(edge * factor)) for edge in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    style = _Style.of(width, height)
    panels = [_panel(resized, entry, width / image.width, height / image.height, opacity, style) for entry in explained]
    panels = panels or [resized]
    rows, gap = -(-len(panels) // columns), style.padding
    step_x, step_y = width + gap, panels[0].height + gap
    total = max(columns * step_x - gap, round(14 * style.font.size))
    drawn = Image.new("RGB", (total, rows * step_y + style.height + style.padding), _DARK)
    for index, panel in enumerate(panels):
        drawn.paste(panel, (index % columns * step_x, index // columns * step_y))
    _draw_legend(drawn, method, style)
    return drawn


def overlay(image: Image.Image, heatmap: HeatMap, *, opacity: float = 0.6) -> Image.Image:
    """Blend a heat map, relative to its largest value, over an RGB image; what is cold, or has no cell, is unchanged.

    The pixels of `heatmap.box` are those of the image.
    """
    values = heatmap.values.clip(min=0)
    if not values.max(initial=0.0) > 0:
        return image.copy()
    left, top, right, bottom = (round(edge) for edge in heatmap.box.xyxy())
    size = max(1, right - left), max(1, bottom - top)
    levels = Image.fromarray((255 * values / values.max()).round().astype(np.uint8))
    smooth = np.asarray(levels.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    strength = np.zeros((image.height, image.width), np.float32)
    part = strength[max(0, top) : bottom, max(0, left) : right]
    part[:] = smooth[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]]
    weight = opacity * np.minimum(1, 2 * strength)[..., None]
    return Image.fromarray((np.asarray(image) * (1 - weight) + heat_color(strength) * weight).round().astype(np.uint8))


def heat_color(strength: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the colors of values from 0 to 1, RGB [..., 3]."""
    places = np.linspace(0, 1, len(_COLORMAP))
    return np.stack([np.interp(strength, places, channel) for channel in _COLORMAP.T], axis=-1)


def _panel(
    image: Image.Image, entry: Explained, x_scale: float, y_scale: float, opacity: float, style: _Style
) -> Image.Image:
    """Draw one explanation over an image that was scaled."""

    def scaled(box: Box) -> Box:
        return Box(box.x_min * x_scale, box.y_min * y_scale, box.x_max * x_scale, box.y_max * y_scale)

    heated = overlay(image, HeatMap(entry.heatmap.values, scaled(entry.heatmap.box)), opacity=opacity)
    target, draw = entry.target, ImageDraw.Draw(heated)
    if isinstance(target, Detection):
        box = _pixel_box(replace(target, box=scaled(target.box)), 1, heated.size)
        _draw_box(draw, box, class_color(target.class_id), style)
        text, value = _display_label(target), f" {target.score:.1%}"
    elif isinstance(target, Prediction):
        text, value = _display_label(target), f" {target.probability:.1%}"
    else:
        x, y, radius = target.x * x_scale, target.y * y_scale, 2 * style.line
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=_LIGHT, outline=_DARK, width=style.line // 2
        )
        text, value = f"from ({target.x:g}, {target.y:g})", ""
    panel = Image.new("RGB", (heated.width, heated.height + style.height), _DARK)
    panel.paste(heated)
    position = style.padding, heated.height + style.baseline
    words = _truncate(text, value, panel.width, style)
    ImageDraw.Draw(panel).text(position, words, fill=_LIGHT, font=style.font, anchor="ls")
    return panel


def _draw_legend(drawn: Image.Image, method: Method, style: _Style) -> None:
    """Draw the method and the scale of colors along the bottom edge."""
    draw, top = ImageDraw.Draw(drawn), drawn.height - style.height - style.padding
    baseline = top + style.baseline
    right = drawn.width - style.padding
    least, most = (math.ceil(style.font.getlength(text)) for text in ("0", "max"))
    length = max(1, drawn.width // 4)
    left = right - most - style.padding - length
    scale = heat_color(np.linspace(0, 1, length, dtype=np.float32))[None].round().astype(np.uint8)
    bar = Image.fromarray(scale).resize((length, max(1, style.height // 2)), Image.Resampling.NEAREST)
    drawn.paste(bar, (left, top + style.height // 4))
    draw.text((right, baseline), "max", fill=_LIGHT, font=style.font, anchor="rs")
    draw.text((left - style.padding, baseline), "0", fill=_LIGHT, font=style.font, anchor="rs")
    name = _truncate(method.value, "", left - least - 2 * style.padding, style)
    draw.text((style.padding, baseline), name, fill=_LIGHT, font=style.font, anchor="ls")


def upscale_factor(width: int, height: int) -> int:
    """Return the integer factor, at least 1, by which an image of this size is upscaled."""
    factor = math.ceil(READABLE_EDGE / min(width, height))
    return max(1, min(factor, LARGEST_EDGE // max(width, height)))


def class_color(class_id: int) -> Color:
    """Return the color of a class by its id alone; nearby ids get clearly different colors."""
    hue = (0.58 + class_id * _GOLDEN_RATIO) % 1.0
    saturation, value = _SATURATION_VALUE[class_id // 5 % len(_SATURATION_VALUE)]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_color(background: Color) -> Color:
    """Return black or white, whichever has the higher contrast (at least 4.5:1 on any color)."""
    return max((0, 0, 0), (255, 255, 255), key=lambda color: contrast(color, background))


def contrast(a: Color, b: Color) -> float:
    """Return the contrast ratio of two colors, from 1 to 21 (WCAG 2.2, by relative luminance)."""
    lighter, darker = sorted((_relative_luminance(a), _relative_luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _relative_luminance(color: Color) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return image.copy()
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _pixel_box(detection: Detection, factor: int, size: tuple[int, int]) -> _PixelBox:
    """Return the pixels of a box inside the picture: at least one, however small or far outside the box is."""

    def clamp(low: float, high: float, length: int) -> tuple[int, int]:
        first = min(max(round(low * factor), 0), length - 1)
        return first, min(max(round(high * factor), first + 1), length)

    left, right = clamp(detection.box.x_min, detection.box.x_max, size[0])
    top, bottom = clamp(detection.box.y_min, detection.box.y_max, size[1])
    return _PixelBox(left, top, right, bottom)


def _draw_box(draw: ImageDraw.ImageDraw, box: _PixelBox, color: Color, style: _Style) -> None:
    """Draw an outline inside the box's edge, with a thin dark border that sets it off from similar pixels."""
    thin = max(1, style.line // 3)
    for inset, width, shade in ((0, thin, _DARK), (thin, style.line, color)):
        corners = box.left + inset, box.top + inset, box.right - 1 - inset, box.bottom - 1 - inset
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=shade, width=width)
        elif inset == thin:  # too small for an outline: fill it
            draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=color)


def _place_tags(
    boxes: Sequence[_PixelBox], text_widths: Sequence[int], style: _Style, size: tuple[int, int]
) -> list[_PixelBox]:
    """Place the tag of each box greedily, in order.

    A tag takes the position with the least overlap with earlier tags, then the fewest covered boxes, then the first
    in the order of `_tag_positions`.
    """
    corners = np.array([box.xyxy() for box in boxes], np.int64).reshape(-1, 4)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    placed = np.zeros((len(boxes), 4), np.int64)
    tags: list[_PixelBox] = []
    for i, (box, text_width) in enumerate(zip(boxes, text_widths, strict=True)):

        def cost(tag: _PixelBox, i: int = i) -> tuple[int, int]:
            covered = _intersections(tag, corners) > areas * _MAX_COVERED
            return int(_intersections(tag, placed[:i]).sum()), int(covered.sum())

        tags.append(min(_tag_positions(box, min(size[0], text_width + 2 * style.padding), style, size), key=cost))
        placed[i] = tags[-1].xyxy()
    return tags


def _intersections(box: _PixelBox, others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the intersection areas, int64 [n], of a box with others, int64 [n, 4] in xyxy."""
    width = np.minimum(others[:, 2], box.right) - np.maximum(others[:, 0], box.left)
    height = np.minimum(others[:, 3], box.bottom) - np.maximum(others[:, 1], box.top)
    areas: NDArray[np.int64] = width.clip(min=0) * height.clip(min=0)
    return areas


def _tag_positions(box: _PixelBox, width: int, style: _Style, size: tuple[int, int]) -> Iterator[_PixelBox]:
    """Yield the positions for a tag, best first: above the box, inside it, below it, each left- or right-aligned."""
    tops = (box.top - style.height, box.top, box.bottom, box.bottom - style.height)
    inside = [top for top in tops if 0 <= top <= size[1] - style.height]
    for top in inside or [max(0, min(box.top, size[1] - style.height))]:
        for left in (box.left, box.right - width):
            clamped = max(0, min(left, size[0] - width))
            yield _PixelBox(clamped, top, clamped + width, top + style.height)


def _tag_text(detection: Detection, width: int, style: _Style) -> str:
    percent = min(round(100 * detection.score), 99) if detection.score < 1 else 100  # 100 % only for a score of 1
    return _truncate(_display_label(detection), f" {percent}%", width, style)


def _display_label(answer: Detection | Prediction) -> str:
    """Return the label on one line and without accents, or the class id if the font lacks one of its glyphs.

    Pillow's built-in font, the only one available everywhere, has little more than ASCII.
    """
    decomposed = unicodedata.normalize("NFKD", " ".join(answer.label.split()))
    label = "".join(character for character in decomposed if not unicodedata.combining(character))
    return label if label and all(map(_has_glyph, label)) else f"#{answer.class_id}"


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Whether the font renders a character differently from a noncharacter, i.e. not as its missing-glyph box."""
    font = ImageFont.load_default(_MIN_FONT_SIZE)
    try:
        return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))
    except (UnicodeError, ValueError, OSError):  # e.g. a lone surrogate
        return False


def _truncate(label: str, suffix: str, width: int, style: _Style) -> str:
    """Return label and suffix, with the label cut by an ellipsis if both do not fit into a tag of `width` pixels."""
    available = width - 2 * style.padding
    if style.font.getlength(label + suffix) <= available:
        return label + suffix
    length = len(label)
    while length > 1 and style.font.getlength(f"{label[:length]}…{suffix}") > available:
        length -= 1
    return f"{label[:length]}…{suffix}"
