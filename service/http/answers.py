"""The forms of an answer that a client may ask for by `Accept`: JSON, a table, or the picture with its boxes."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple

import orjson
from starlette.responses import Response

from vitrine.service.errors import ErrorAnswer, NotAcceptableError
from vitrine.service.http.schemas import ImageClassification, ImageDetections

JSON, CSV, PNG, JPEG = "application/json", "text/csv", "image/png", "image/jpeg"
CLASSIFICATION_COLUMNS = ("label", "class_id", "probability")
DETECTION_COLUMNS = ("label", "class_id", "score", "x_min", "y_min", "x_max", "y_max")


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """The offered media type that a client likes best, the first of equals (RFC 9110, section 12.5.1).

    Raises:
        NotAcceptableError: it accepts none of them.
    """
    if not (accept or "").strip():
        return offered[0]
    assert accept is not None
    ranges = [_media_range(part) for part in accept.split(",")]
    best, best_quality = "", 0.0
    for media_type in offered:
        kind = media_type.partition("/")[0]
        fitting = [
            (specificity, quality)
            for specificity, names in enumerate((("*/*", "*"), (f"{kind}/*",), (media_type,)))
            for name, quality in ranges
            if name in names
        ]
        quality = max(fitting)[1] if fitting else 0.0  # of the most specific range
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise NotAcceptableError(offered=", ".join(offered), found=accept)
    return best


def _media_range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return name, float(value)
            except ValueError:
                return name, 0.0
    return name, 1.0


def json_response(answer: object) -> Response:
    """An answer as JSON: dataclasses, dictionaries, lists, texts and numbers, NumPy's included."""
    return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def rows(answer: ImageClassification | ImageDetections | ErrorAnswer) -> list[list[object]]:
    """The rows of one image in a table."""
    if isinstance(answer, ImageClassification):
        return [[entry.label, entry.class_id, entry.probability] for entry in answer.predictions]
    if isinstance(answer, ImageDetections):
        found = answer.detections
        return [[entry.label, entry.class_id, entry.score, *astuple(entry.box)] for entry in found]
    return []


def csv_response(
    columns: Sequence[str], answers: Sequence[ImageClassification | ImageDetections | ErrorAnswer], *, several: bool
) -> Response:
    """A table: of several images each row begins with the image's number, from 0, and ends with its error."""
    header = ["image", *columns, "error"] if several else [*columns]
    lines: list[Iterable[object]] = [header]
    for number, answer in enumerate(answers):
        if isinstance(answer, ErrorAnswer):
            lines.append([number, *("" for _ in columns), answer.error.message])
        else:
            lines += [[number, *row, ""] if several else row for row in rows(answer)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    return Response(buffer.getvalue(), media_type=f"{CSV}; charset=utf-8")
