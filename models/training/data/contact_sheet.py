"""Contact sheets: the images of a data set as a grid of thumbnails."""

import colorsys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_EDGE, _BOX_EDGE = 96, 320  # of a thumbnail, in pixels
_ANSWER_COLUMNS, _COLUMNS = 8, 4  # of a sheet of predictions, of boxes
_GAP = 6  # pixels
_TEXT = 13  # font size, pixels
_MAX_LETTERS = 22  # of a label
_BACKGROUND, _INK, _GREY, _RED = (250, 250, 250), (30, 30, 30), (150, 150, 150), (190, 30, 30)
_GOLDEN_RATIO = 0.618033988749895  # its multiples spread hues evenly, whatever their number

Color = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class Answer(NamedTuple):
    """A prediction for a picture, and its true label."""

    label: str
    probability: float
    true: str


class DrawnBox(NamedTuple):
    """A box on a picture; grey if it has no class."""

    label: str
    class_id: int | None
    xyxy: tuple[float, float, float, float]  # in pixels of the picture


def class_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Draw a row of pictures for each label."""
    font = ImageFont.load_default(_TEXT)
    names = [_short(label) for label, _ in rows]
    left = _GAP + int(max((font.getlength(name) for name in names), default=0)) + _GAP
    columns = max((len(pictures) for _, pictures in rows), default=0)
    sheet, draw = _new_sheet(left + columns * (_EDGE + _GAP), len(rows) * (_EDGE + _GAP) + _GAP)
    for row, (name, (_, pictures)) in enumerate(zip(names, rows, strict=True)):
        top = _GAP + row * (_EDGE + _GAP)
        draw.text((_GAP, top + (_EDGE - _TEXT) // 2), name, _INK, font)
        for column, picture in enumerate(pictures):
            sheet.paste(_resized(picture, _EDGE), (left + column * (_EDGE + _GAP), top))
    return sheet


def prediction_sheet(pictures: Sequence[tuple[Image.Image, Answer]]) -> Image.Image:
    """Draw a grid of pictures with predictions; wrong ones are red, with the true label below."""
    font = ImageFont.load_default(_TEXT - 2)
    column, row = _EDGE + _GAP, _EDGE + 2 * _TEXT + 2 * _GAP
    rows = -(-len(pictures) // _ANSWER_COLUMNS)
    sheet, draw = _new_sheet(_GAP + min(len(pictures), _ANSWER_COLUMNS) * column, _GAP + rows * row)
    for i, (picture, answer) in enumerate(pictures):
        left, top = _GAP + i % _ANSWER_COLUMNS * column, _GAP + i // _ANSWER_COLUMNS * row
        sheet.paste(_resized(picture, _EDGE), (left, top))
        right = answer.label == answer.true
        below = top + _EDGE + 1
        answered = _truncated(_EDGE, answer.label, f" {answer.probability:.0%}", font)
        draw.text((left, below), answered, _INK if right else _RED, font)
        if not right:
            draw.text((left, below + _TEXT), _truncated(_EDGE, f"is {answer.true}", "", font), _RED, font)
    return sheet


def box_sheet(pictures: Sequence[tuple[Image.Image, Sequence[DrawnBox]]]) -> Image.Image:
    """Draw a grid of pictures with their boxes."""
    drawn = [_draw_boxes(picture, boxes) for picture, boxes in pictures]
    rows = [drawn[i : i + _COLUMNS] for i in range(0, len(drawn), _COLUMNS)]
    heights = [max(picture.height for picture in row) + _GAP for row in rows]
    sheet, _ = _new_sheet(_GAP + min(len(drawn), _COLUMNS) * (_BOX_EDGE + _GAP), _GAP + sum(heights))
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (_GAP + column * (_BOX_EDGE + _GAP), _GAP + sum(heights[:i])))
    return sheet


def class_color(class_id: int) -> Color:
    """Return a distinct color for each class."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * _GOLDEN_RATIO % 1, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_boxes(picture: Image.Image, boxes: Iterable[DrawnBox]) -> Image.Image:
    small = _resized(picture, _BOX_EDGE)
    x_scale, y_scale = small.width / picture.width, small.height / picture.height
    draw, font = ImageDraw.Draw(small), ImageFont.load_default(_TEXT - 2)
    for label, class_id, (left, top, right, bottom) in boxes:
        corners = (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale)
        color = _GREY if class_id is None else class_color(class_id)
        draw.rectangle(
            (min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])), outline=color, width=2
        )
        name, place = _short(label), (max(0.0, corners[0]), max(0.0, corners[1]))
        draw.rectangle(draw.textbbox(place, name, font), fill=color)
        draw.text(place, name, _INK if sum(color) > 380 else _BACKGROUND, font)
    return small


def _resized(picture: Image.Image, edge: int) -> Image.Image:
    scale = edge / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _new_sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    return sheet, ImageDraw.Draw(sheet)


def _short(label: str) -> str:
    return label if len(label) <= _MAX_LETTERS else f"{label[: _MAX_LETTERS - 3]}..."


def _truncated(width: int, label: str, ending: str, font: Font) -> str:
    """Return the label and its ending, with the label truncated to fit into `width` pixels."""
    if font.getlength(label + ending) <= width:
        return label + ending
    kept = label
    while kept and font.getlength(f"{kept}...{ending}") > width:
        kept = kept[:-1]
    return f"{kept}...{ending}"
