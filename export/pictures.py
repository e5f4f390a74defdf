"""Pictures for the model card: test images with the served predictions, and a reliability diagram."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vitrine.bundle.manifest import ReliabilityBin
from vitrine.bundle.predictors import Classifier, Predictor
from vitrine.models.training.data.contact_sheet import Answer, DrawnBox, box_sheet, prediction_sheet
from vitrine.models.training.data.dataset import ClassificationData, Data
from vitrine.models.training.evaluation.calibration import Reliability
from vitrine.models.training.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, reliability_chart

SAMPLES_FILE = "samples.jpg"
RELIABILITY_FILE = "reliability.svg"
_CLASSIFIED, _DETECTED = 24, 3  # images on the sheet, which stays below 100 kB
_STYLE = """
text { font: 12px sans-serif; fill: #333 } .grid { stroke: #ddd } .axis { stroke: #333 }
.diagonal { stroke: #999; stroke-dasharray: 4 4 } .right { fill: #3b6ea5 } .over { fill: #d9822b; opacity: .5 }
.under { fill: #4a9d5b; opacity: .7 }
"""


def sample_sheet(predictor: Predictor, data: Data) -> Image.Image:
    """Draw evenly spaced images of the data with their predictions, regardless of whether these are correct."""
    count = min(_CLASSIFIED if isinstance(data, ClassificationData) else _DETECTED, len(data))
    indices = np.linspace(0, len(data) - 1, count).round().astype(int).tolist()
    images = [(i, data.image(i)) for i in indices]
    if isinstance(predictor, Classifier):
        assert isinstance(data, ClassificationData)
        answers = [(predictor.classify(image, top_k=1)[0], data.labels[data.class_ids[i]]) for i, image in images]
        return prediction_sheet(
            [
                (image, Answer(best.label, best.probability, true))
                for (_, image), (best, true) in zip(images, answers, strict=True)
            ]
        )
    pictures = []
    for _, image in images:
        found = predictor.detect(image)
        boxes = [(d.label, d.score, d.class_id, (d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)) for d in found]
        pictures.append((image, [DrawnBox(f"{label} {score:.0%}", own, xyxy) for label, score, own, xyxy in boxes]))
    return box_sheet(pictures)


def reliability_svg(bins: Sequence[ReliabilityBin]) -> str:
    """Draw the reliability diagram, accuracy by confidence, as an SVG on a white background."""
    columns = zip(*((entry.answers, entry.confidence, entry.accuracy) for entry in bins), strict=True)
    chart = reliability_chart("Reliability", Reliability(*map(np.array, columns)))
    parts = [f'<path class="grid" d="M{LEFT} {tick.at:.1f}H{RIGHT}"/>' for tick in chart.y_ticks]
    parts += [
        f'<text x="{LEFT - 6}" y="{tick.at + 4:.1f}" text-anchor="end">{tick.text}</text>' for tick in chart.y_ticks
    ]
    parts += [
        f'<text x="{tick.at:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick.text}</text>' for tick in chart.x_ticks
    ]
    parts += [
        f'<rect class="{bar.kind}" x="{bar.x:.1f}" y="{bar.y:.1f}" width="{bar.width:.1f}" height="{bar.height:.1f}">'
        f"<title>{bar.text}</title></rect>"
        for bar in chart.bars
    ]
    parts += [
        f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>',
        f'<path class="diagonal" d="{chart.diagonal}"/>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{chart.x_label}</text>',
        f'<text x="16" y="{BOTTOM / 2}" text-anchor="middle" transform="rotate(-90 16 {BOTTOM / 2})">'
        f"{chart.y_label}</text>",
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", background, *parts, "</svg>", ""])
