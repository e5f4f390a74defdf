import numpy as np
from PIL import Image

from vitrine.models.training.data.contact_sheet import (
    Answer,
    DrawnBox,
    box_sheet,
    class_color,
    class_sheet,
    prediction_sheet,
)


def test_a_row_for_each_class() -> None:
    rows = [
        ("blue", [Image.new("RGB", (32, 32), "blue")] * 3),
        ("a label that is far too long to be read", [Image.new("RGB", (300, 100), "red")]),
    ]
    pixels = np.asarray(class_sheet(rows)).astype(int)
    blue, red = ((pixels == paint).all(axis=-1) for paint in ((0, 0, 255), (255, 0, 0)))
    assert blue.sum() == 3 * 96 * 96
    assert red.sum() == 96 * 32
    assert blue.nonzero()[0].max() < red.nonzero()[0].min()


def test_wrong_predictions_are_red_and_name_the_true_label() -> None:
    picture = Image.new("RGB", (32, 32), "blue")
    answers = [Answer("cat", 0.9, "cat"), Answer("dog", 0.8, "cat"), Answer("a name wider than its picture", 1.0, "")]
    reds = [red_pixels(prediction_sheet([(picture, answer)])) for answer in answers]
    assert reds[0] == 0 < reds[1] < reds[2]
    sheet = prediction_sheet([(picture, answer) for answer in answers * 4])
    assert sheet.size == (6 + 8 * 102, 6 + 2 * 134)
    assert red_pixels(sheet) == 4 * sum(reds)  # no name runs into its neighbour's


def red_pixels(sheet: Image.Image) -> int:
    red, green, blue = np.moveaxis(np.asarray(sheet).astype(int), -1, 0)
    return int(((red > 150) & (green < 100) & (blue < 100)).sum())


def test_boxes_are_drawn_at_their_positions() -> None:
    boxes = [DrawnBox("cat", 3, (50.0, 20.0, 90.0, 40.0)), DrawnBox("crowd", None, (0.0, 45.0, 5.0, 50.0))]
    pixels = np.asarray(box_sheet([(Image.new("RGB", (100, 50), "white"), boxes)]))
    rows, columns = (pixels == class_color(3)).all(axis=-1).nonzero()
    scale, gap = 320 / 100, 6
    for found, wanted in ((columns, (50, 90)), (rows, (20, 40))):
        assert abs(found.min() - gap - wanted[0] * scale) <= 2
        assert abs(found.max() - gap - wanted[1] * scale) <= 2
    assert (pixels == (150, 150, 150)).all(axis=-1).any()


def test_boxes_outside_and_inside_out_are_drawn_too() -> None:
    boxes = [DrawnBox("x", 0, (90.0, 40.0, 10.0, 10.0)), DrawnBox("y", 1, (-50.0, -50.0, 500.0, 500.0))]
    sheet = box_sheet([(Image.new("RGB", (100, 50)), boxes)] * 5)
    assert sheet.size == (6 + 4 * 326, 6 + 2 * 166)


def test_an_empty_sheet() -> None:
    assert class_sheet([]).width > 0
    assert box_sheet([]).height > 0
    assert prediction_sheet([]).height > 0


def test_each_class_has_its_own_color() -> None:
    assert len({class_color(i) for i in range(80)}) == 80
