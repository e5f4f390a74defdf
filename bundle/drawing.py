"""Answers as pictures: boxes over the image, or a caption of classes below it.

Lines and letters grow with the image, so that they look alike on a thumbnail and on a photograph of 24 megapixels
shown at the same size. On a small image no letter could be read: such a picture is enlarged by a whole factor, the
smallest that brings its shorter edge to `READABLE_EDGE` pixels without bringing the longer one over `LARGEST_EDGE`.
All coordinates below are in pixels of the picture, from its top-left corner.
"""

import colorsys
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitrine.bundle.predictors import Detection, Prediction

READABLE_EDGE = 320
LARGEST_EDGE = 4096
MAX_CAPTION_ROWS = 5

_MIN_FONT_SIZE = 12  # pixels; smaller letters run together
_EDGE_PER_FONT_SIZE = 36  # of the square with the picture's area: 15 pixels on 640 x 480, 136 on 6000 x 4000
_HIDDEN = 0.4  # share of a box under a tag from which on the box is lost
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_TONES = ((0.85, 1.0), (0.62, 0.85), (1.0, 0.72))  # saturation and value, in turns
_DARK, _LIGHT, _DIM = (24, 24, 27), (250, 250, 250), (63, 63, 70)

Colour = tuple[int, int, int]  # red, green, blue from 0 to 255


@dataclass(frozen=True)
class _Area:
    """Whole pixels, the right and lower edge not included."""

    left: int
    top: int
    right: int
    bottom: int

    def corners(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels."""

    font: ImageFont.FreeTypeFont
    line: int  # width of a box's outline
    padding: int  # beside the letters of a tag
    height: int  # of a tag, or of a row of a caption
    baseline: int  # of the letters, from the tag's upper edge

    @classmethod
    def of(cls, width: int, height: int) -> "_Style":
        size = max(_MIN_FONT_SIZE, round(math.sqrt(width * height) / _EDGE_PER_FONT_SIZE))
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # every wheel of Pillow has FreeType
        ascent, descent = font.getmetrics()
        return cls(font, max(2, round(size / 5.5)), round(size / 3), ascent + descent + size // 6, ascent + size // 12)


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """The picture of an RGB image with a box and a tag (label and score) for each detection.

    A class has the same colour in every picture (`class_colour`). Tags stand on their box, or in or below it where
    there is no room or another tag; they are always inside the picture. What scores best lies on top.

    Returns:
        A new RGB image, enlarged if it is small (see above). The same input gives the same pixels.
    """
    factor = enlargement(*image.size)
    picture = _enlarged(image, factor)
    style = _Style.of(*picture.size)
    draw = ImageDraw.Draw(picture)
    ranked = sorted(detections, key=lambda detection: -detection.score)
    areas = [_area(detection, factor, picture.size) for detection in ranked]
    for detection, area in reversed(list(zip(ranked, areas, strict=True))):
        _outline(draw, area, class_colour(detection.class_id), style)
    texts = [_tag_text(detection, picture.width, style) for detection in ranked]
    tags = _tags(areas, [math.ceil(style.font.getlength(text)) for text in texts], style, picture.size)
    for detection, place, text in reversed(list(zip(ranked, tags, texts, strict=True))):
        colour = class_colour(detection.class_id)
        draw.rectangle((place.left, place.top, place.right - 1, place.bottom - 1), fill=colour)
        position = place.left + style.padding, place.top + style.baseline
        draw.text(position, text, fill=text_colour(colour), font=style.font, anchor="ls")
    return picture


def draw_classification(image: Image.Image, predictions: Sequence[Prediction]) -> Image.Image:
    """The picture of an RGB image with a caption below it: the first classes, each with its probability as a bar.

    At most `MAX_CAPTION_ROWS` of the predictions are shown. A picture too narrow for the caption gets a margin at its
    right.

    Returns:
        A new RGB image, enlarged if it is small (see above). The same input gives the same pixels.
    """
    picture = _enlarged(image, enlargement(*image.size))
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
        label = _shortened(_readable(prediction), "", room - style.padding, style)
        baseline = top + style.baseline
        draw.text((left + style.padding, baseline), label, fill=_LIGHT, font=style.font, anchor="ls")
        draw.text((right - style.padding, baseline), percent, fill=_LIGHT, font=style.font, anchor="rs")
    return drawn


def enlargement(width: int, height: int) -> int:
    """The whole factor, at least 1, by which the picture of an image of this size is enlarged."""
    wanted = math.ceil(READABLE_EDGE / min(width, height))
    return max(1, min(wanted, LARGEST_EDGE // max(width, height)))


def class_colour(class_id: int) -> Colour:
    """The colour of a class, which depends on its id alone; ids near each other have colours far from each other."""
    hue = (0.58 + class_id * _GOLDEN_RATIO) % 1.0
    saturation, value = _TONES[class_id // 5 % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast, which is at least 4.5 to 1 on any colour."""
    return max((0, 0, 0), (255, 255, 255), key=lambda colour: contrast(colour, background))


def contrast(one: Colour, other: Colour) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2, by relative luminance)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Colour) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return image.copy()
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _area(detection: Detection, factor: int, size: tuple[int, int]) -> _Area:
    """The pixels of a box inside the picture: one at least, however small or far outside the box is."""

    def pixels(low: float, high: float, length: int) -> tuple[int, int]:
        first = min(max(round(low * factor), 0), length - 1)
        return first, min(max(round(high * factor), first + 1), length)

    left, right = pixels(detection.box.x_min, detection.box.x_max, size[0])
    top, bottom = pixels(detection.box.y_min, detection.box.y_max, size[1])
    return _Area(left, top, right, bottom)


def _outline(draw: ImageDraw.ImageDraw, area: _Area, colour: Colour, style: _Style) -> None:
    """A line inside the box's edge, in a thin dark one that sets it off from pixels of its own colour."""
    thin = max(1, style.line // 3)
    for inset, width, shade in ((0, thin, _DARK), (thin, style.line, colour)):
        corners = area.left + inset, area.top + inset, area.right - 1 - inset, area.bottom - 1 - inset
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=shade, width=width)
        elif inset == thin:  # too small for a ring: a dot
            draw.rectangle((area.left, area.top, area.right - 1, area.bottom - 1), fill=colour)


def _tags(areas: Sequence[_Area], widths: Sequence[int], style: _Style, size: tuple[int, int]) -> list[_Area]:
    """Where the tag of each box stands, the letters' widths given; the first ones choose before the others.

    Each takes the place that covers the least of the tags before it, hides the fewest boxes, and is nearest to where
    a tag is looked for.
    """
    boxes = np.array([area.corners() for area in areas], np.int64).reshape(-1, 4)
    pixels = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    taken = np.zeros((len(areas), 4), np.int64)
    tags: list[_Area] = []
    for number, (area, width) in enumerate(zip(areas, widths, strict=True)):

        def cost(place: _Area, number: int = number) -> tuple[int, int]:
            hidden = _overlaps(place, boxes) > pixels * _HIDDEN
            return int(_overlaps(place, taken[:number]).sum()), int(hidden.sum())

        tags.append(min(_places(area, min(size[0], width + 2 * style.padding), style, size), key=cost))
        taken[number] = tags[-1].corners()
    return tags


def _overlaps(area: _Area, others: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pixels that an area has in common with each of the others, int64 [n, 4] of `corners`, as int64 [n]."""
    width = np.minimum(others[:, 2], area.right) - np.maximum(others[:, 0], area.left)
    height = np.minimum(others[:, 3], area.bottom) - np.maximum(others[:, 1], area.top)
    common: NDArray[np.int64] = width.clip(min=0) * height.clip(min=0)
    return common


def _places(area: _Area, width: int, style: _Style, size: tuple[int, int]) -> Iterator[_Area]:
    """Where a tag may stand, the best place first: on the box, in it, below it, at its left edge or its right."""
    tops = (area.top - style.height, area.top, area.bottom, area.bottom - style.height)
    fitting = [top for top in tops if 0 <= top <= size[1] - style.height]
    for top in fitting or [max(0, min(area.top, size[1] - style.height))]:
        for left in (area.left, area.right - width):
            kept = max(0, min(left, size[0] - width))
            yield _Area(kept, top, kept + width, top + style.height)


def _tag_text(detection: Detection, width: int, style: _Style) -> str:
    percent = min(round(100 * detection.score), 99) if detection.score < 1 else 100  # nothing almost sure is sure
    return _shortened(_readable(detection), f" {percent}%", width, style)


def _readable(answer: Detection | Prediction) -> str:
    """The label on one line and without accents, or the class id if Pillow's font still lacks one of its letters.

    That font, the only one that is everywhere, knows ASCII and little more.
    """
    parts = unicodedata.normalize("NFKD", " ".join(answer.label.split()))
    label = "".join(letter for letter in parts if not unicodedata.combining(letter))
    return label if label and all(map(_has_glyph, label)) else f"#{answer.class_id}"


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    """Whether the font draws a letter otherwise than one that no font has."""
    font = ImageFont.load_default(_MIN_FONT_SIZE)
    try:
        return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))
    except (UnicodeError, ValueError, OSError):  # half a surrogate pair, for one
        return False


def _shortened(label: str, end: str, width: int, style: _Style) -> str:
    """The label and its end, the label cut with an ellipsis where both are wider than a tag of `width` pixels."""
    room = width - 2 * style.padding
    if style.font.getlength(label + end) <= room:
        return label + end
    kept = len(label)
    while kept > 1 and style.font.getlength(f"{label[:kept]}…{end}") > room:
        kept -= 1
    return f"{label[:kept]}…{end}"
