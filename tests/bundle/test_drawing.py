"""Drawn answers: positions and colors of boxes and tags, for any image size and any label."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.drawing import (
    LARGEST_EDGE,
    MAX_CAPTION_ROWS,
    READABLE_EDGE,
    class_color,
    contrast,
    draw_classification,
    draw_detections,
    draw_explanations,
    heat_color,
    overlay,
    text_color,
    upscale_factor,
)
from vitrine.bundle.explaining import Explained, HeatMap, Method, Point
from vitrine.bundle.images import decode
from vitrine.bundle.predictors import Box, Detection, Prediction

GREY = (127, 127, 127)
STRANGE_LABELS = [
    "狗",
    "Übergröße",
    "кошка",
    "🐸",
    "two\nlines",
    "",
    " ",
    "\u0000",
    "\ud800",
    "x" * 500,
    "e\u0301",
    "العربية",
]


def detection(class_id: int, box: tuple[float, float, float, float], score: float = 0.9, label: str = "") -> Detection:
    return Detection(label or f"class {class_id}", class_id, score, Box(*box))


def pixels_of(picture: Image.Image, color: tuple[int, int, int]) -> NDArray[np.bool_]:
    return (np.asarray(picture) == color).all(axis=-1)


@pytest.mark.parametrize(
    ("size", "factor"),
    [((80, 60), 6), ((32, 32), 10), ((319, 400), 2), ((320, 400), 1), ((6000, 4000), 1), ((1, 1), 320), ((10, 900), 4)],
)
def test_a_small_image_is_upscaled_by_an_integer_factor(size: tuple[int, int], factor: int) -> None:
    assert upscale_factor(*size) == factor
    picture = draw_detections(Image.new("RGB", size, GREY), [detection(0, (0, 0, *size))])
    assert picture.size == (size[0] * factor, size[1] * factor)
    assert min(picture.size) >= READABLE_EDGE or max(size) * (factor + 1) > LARGEST_EDGE


def test_without_detections_the_picture_is_the_image(photograph: bytes) -> None:
    image = decode(photograph)
    picture = draw_detections(image, [])
    assert picture.tobytes() == image.tobytes()
    assert picture is not image


def test_drawing_is_deterministic_and_keeps_the_image(photograph: bytes) -> None:
    image = decode(photograph)
    before = image.tobytes()
    found = [detection(i, (20 * i, 15 * i, 20 * i + 200, 15 * i + 150), 1 - i / 20) for i in range(12)]
    assert draw_detections(image, found).tobytes() == draw_detections(image, found).tobytes()
    assert image.tobytes() == before


@pytest.mark.parametrize("size", [(80, 60), (640, 480), (1500, 1000)])
def test_a_box_is_drawn_at_its_coordinates(size: tuple[int, int]) -> None:
    """The outermost colored pixels are at the box's edges, within a line width; its interior shows the image."""
    width, height = size
    box = (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)
    picture = draw_detections(Image.new("RGB", size, GREY), [detection(3, box)])
    colored = pixels_of(picture, class_color(3))
    factor = picture.width / width
    rows, columns = np.nonzero(colored[:, : picture.width // 2])[0].max(), np.nonzero(colored.any(axis=0))[0]
    slack = max(4.0, picture.width / 150)
    assert columns.min() == pytest.approx(box[0] * factor, abs=slack)
    assert columns.max() == pytest.approx(box[2] * factor, abs=slack)
    assert rows == pytest.approx(box[3] * factor, abs=slack)
    assert picture.getpixel((picture.width // 2, picture.height // 2)) == GREY
    assert picture.getpixel((2, picture.height - 3)) == GREY


def test_lines_and_text_scale_with_the_image() -> None:
    shares = []
    for size in ((640, 480), (6000, 4500)):
        box = (0.3 * size[0], 0.3 * size[1], 0.6 * size[0], 0.6 * size[1])
        picture = draw_detections(Image.new("RGB", size, GREY), [detection(0, box)])
        shares.append(float((np.asarray(picture) != GREY).any(axis=-1).mean()))
    assert shares[0] == pytest.approx(shares[1], rel=0.2)


@pytest.mark.parametrize(
    "box", [(0, 0, 640, 480), (600, 440, 640, 480), (-500, -500, -400, -400), (639.9, 0, 900, 2), (0, 470, 2, 480)]
)
def test_a_tag_stays_inside_the_picture(box: tuple[float, float, float, float]) -> None:
    """A tag at any edge, or of a box outside, shows as many text pixels as one in the middle."""
    letters = []
    for where in (box, (300, 200, 400, 300)):
        picture = draw_detections(Image.new("RGB", (640, 480), GREY), [detection(1, where)])
        letters.append(pixels_of(picture, text_color(class_color(1))).sum())
    assert letters[0] == letters[1] > 40


def test_the_best_score_is_on_top() -> None:
    """In any input order: of two equal boxes, the better one's color is visible and its tag comes first."""
    image = Image.new("RGB", (640, 480), GREY)
    box = (200.0, 150.0, 400.0, 300.0)
    best, other = detection(0, box, 0.9), detection(1, box, 0.6)
    pictures = [draw_detections(image, order) for order in ([best, other], [other, best])]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].getpixel((202, 250)) == class_color(0)
    assert pictures[0].getpixel((202, 145)) == class_color(0)  # its tag is above the box ...
    assert pixels_of(pictures[0], class_color(1)).sum() > 500  # ... and the other's is still visible


def test_tags_do_not_overlap() -> None:
    """Four boxes with a common corner: no text is covered."""
    image = Image.new("RGB", (800, 600), GREY)
    found = [detection(i, (300, 200, 420 + 30 * i, 300 + 40 * i), 0.9 - 0.1 * i) for i in range(4)]

    def letters(detections: list[Detection]) -> int:
        picture = draw_detections(image, detections)
        return int(pixels_of(picture, (0, 0, 0)).sum() + pixels_of(picture, (255, 255, 255)).sum())

    assert letters(found) == sum(letters([one]) for one in found)


def test_classes_have_distinct_colors_with_readable_text() -> None:
    colors = [class_color(class_id) for class_id in range(1000)]
    assert len(set(colors[:200])) == 200
    for one, other in itertools.combinations(np.array(colors[:10]), 2):
        assert np.abs(one - other).sum() > 90
    assert all(contrast(text_color(color), color) >= 4.5 for color in colors)
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


@pytest.mark.parametrize("label", STRANGE_LABELS)
def test_any_label_can_be_drawn(label: str) -> None:
    image = Image.new("RGB", (100, 80), GREY)
    assert draw_detections(image, [Detection(label, 2, 0.5, Box(10, 10, 60, 60))]).size == (400, 320)
    draw_classification(image, [Prediction(label, 2, 0.5)])


def test_a_label_without_glyphs_is_shown_as_its_class_id() -> None:
    image = Image.new("RGB", (400, 400), GREY)
    drawn = {
        label: draw_detections(image, [Detection(label, 7, 0.5, Box(50, 50, 300, 300))]).tobytes()
        for label in ("狗", "#7", "Käse", "Kase")
    }
    assert drawn["狗"] == drawn["#7"]
    assert drawn["Käse"] == drawn["Kase"]
    assert drawn["#7"] != drawn["Kase"]


def test_only_a_score_of_one_is_100_percent() -> None:
    image = Image.new("RGB", (400, 400), GREY)
    drawn = [draw_detections(image, [detection(0, (50, 50, 300, 300), score)]).tobytes() for score in (0.99, 0.999, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 3), (4001, 4001)])
def test_any_size_can_be_drawn(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, GREY)
    boxes = [(0, 0, *size), (0, 0, 0.1, 0.1), (-5.0, -5.0, 2.0 * size[0], 2.0 * size[1])]
    draw_detections(image, [detection(i, box, label="a label of some length") for i, box in enumerate(boxes)])
    draw_classification(image, [Prediction("a label of some length", 0, 0.7)])


@pytest.mark.parametrize("count", [0, 1, 3, 5, 50])
def test_the_caption_lists_the_first_classes_below_the_image(count: int) -> None:
    image = Image.new("RGB", (640, 480), GREY)
    predictions = [Prediction(f"class {i}", i, 1 / (i + 2)) for i in range(count)]
    picture = draw_classification(image, predictions)
    assert picture.crop((0, 0, 640, 480)).tobytes() == image.tobytes()
    assert picture.width == 640
    rows = min(count, MAX_CAPTION_ROWS)
    assert (picture.height - 480) == (rows * 21 + 10 if rows else 0)
    assert picture.tobytes() == draw_classification(image, predictions[:MAX_CAPTION_ROWS]).tobytes()


def test_bar_length_is_the_probability() -> None:
    image = Image.new("RGB", (640, 480), GREY)
    bars = [
        pixels_of(draw_classification(image, [Prediction("", 0, probability)]), (63, 63, 70)).any(axis=0).sum()
        for probability in (0.0, 0.25, 0.5, 1.0)
    ]
    assert bars == pytest.approx([0, 157, 315, 630], abs=2)


def test_a_narrow_image_gets_a_margin() -> None:
    picture = draw_classification(Image.new("RGB", (20, 3000), GREY), [Prediction("a", 0, 0.5)])
    assert picture.width > 20
    assert picture.getpixel((19, 2999)) == GREY
    assert picture.getpixel((20, 0)) != GREY


PLACE = Box(0.0, 0.0, 40.0, 40.0)


def heat(*rows: list[float], box: Box = PLACE) -> HeatMap:
    return HeatMap(np.array(rows, np.float32), box)


def changed(before: Image.Image, after: Image.Image) -> NDArray[np.bool_]:
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def test_cold_regions_and_evidence_against_are_unchanged() -> None:
    image = Image.new("RGB", (40, 40), (0, 128, 255))
    for nothing in (heat([0, 0], [0, 0]), heat([-1, -2], [0, -3])):
        assert overlay(image, nothing).tobytes() == image.tobytes()
    hot = overlay(image, heat([3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, -9]))
    assert not changed(image, hot)[:, 24:].any()
    assert not changed(image, hot)[24:].any()
    assert hot.getpixel((2, 2))[0] > 100  # type: ignore[index]


@pytest.mark.parametrize("box", [(10, 5, 30, 35), (-10, -5, 20, 25), (25, 30, 60, 70), (0, 0, 43, 47)])
def test_heat_lies_in_the_box_of_its_map(box: tuple[float, float, float, float]) -> None:
    image = Image.new("RGB", (40, 40))
    found = changed(image, overlay(image, heat([1, 1], [1, 1], box=Box(*box)), opacity=1))
    rows, columns = np.nonzero(found)
    left, top, right, bottom = (min(max(edge, 0), 40) for edge in box)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
    assert found[int(top) : int(bottom), int(left) : int(right)].all()


def test_opacity_is_that_of_the_hottest_color() -> None:
    image = Image.new("RGB", (40, 40), "white")
    whole = heat([1, 1], [1, 1])
    assert overlay(image, whole, opacity=0).tobytes() == image.tobytes()
    assert overlay(image, whole, opacity=1).getpixel((20, 20)) == (252, 255, 164)


def test_hotter_is_lighter_by_even_steps() -> None:
    linear = heat_color(np.linspace(0, 1, 65, dtype=np.float32)) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    lightness = np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)  # CIE L*
    steps = np.diff(lightness)
    assert lightness[0] < 2
    assert lightness[-1] > 97
    assert (steps > 0).all()
    assert np.abs(lightness - np.linspace(lightness[0], lightness[-1], 65)).max() < 6


@pytest.mark.parametrize(("count", "columns", "rows"), [(0, 1, 1), (1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2)])
def test_each_explanation_has_a_panel(count: int, columns: int, rows: int, photograph: bytes) -> None:
    image = decode(photograph)
    box = Box(100.0, 100.0, 300.0, 250.0)
    entries = [Explained(Detection("cat", i, 0.9, box), heat([0, 1], [0, 0])) for i in range(count)]
    drawn = draw_explanations(image, entries, Method.CROSS_ATTENTION)
    assert drawn.width == pytest.approx(columns * 640, abs=20 * columns)
    assert drawn.height == pytest.approx(rows * 480, abs=60 * rows)
    assert draw_explanations(image, entries, Method.CROSS_ATTENTION).tobytes() == drawn.tobytes()
    if not count:
        assert drawn.crop((0, 0, 640, 480)).tobytes() == image.tobytes()


def test_many_panels_of_a_large_image_are_smaller() -> None:
    image = Image.new("RGB", (3000, 2000))
    entries = [Explained(Prediction("cat", 0, 0.5), heat([1], box=Box(0, 0, 3000, 2000)))] * 9
    assert max(draw_explanations(image, entries, Method.OCCLUSION).size) < 4300


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5000, 3)])
def test_any_size_can_be_explained(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "grey")
    whole = Box(0.0, 0.0, float(size[0]), float(size[1]))
    long = Prediction("a label that is longer than the picture is wide", 0, 1.0)
    for target in (long, Detection("x", 3, 0.1, whole), Point(0, 0)):
        draw_explanations(image, [Explained(target, heat([1, 2], [0, 1], box=whole))], Method.ENCODER_ATTENTION)
