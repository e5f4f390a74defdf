"""Content negotiation and the JSON and CSV responses of the image routes."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple

import orjson
from PIL import Image
from starlette.responses import Response

from vitrine.bundle.drawing import MAX_JPEG_EDGE
from vitrine.bundle.errors import ParameterError
from vitrine.service.errors import ErrorAnswer, NotAcceptableError
from vitrine.service.http.schemas import ImageClassification, ImageDetections

JSON, CSV, PNG, JPEG = "application/json", "text/csv", "image/png", "image/jpeg"
CLASSIFICATION_COLUMNS = ("label", "class_id", "probability")
_MAX_ACCEPT = 1000  # characters
DETECTION_COLUMNS = ("label", "class_id", "score", "x_min", "y_min", "x_max", "y_max")


def negotiate(accept: str | None, offered: Sequence[str]) -> str:
    """Return the offered media type that the client prefers, the first of equals (RFC 9110, section 12.5.1).

    Raises:
        NotAcceptableError: the client accepts none of them.
        ParameterError: the header is too long.
    """
    accept = (accept or "").strip()
    if not accept:
        return offered[0]
    if len(accept) > _MAX_ACCEPT:
        raise ParameterError("Accept", expected=f"at most {_MAX_ACCEPT} characters", found=len(accept))
    ranges = [_media_range(part) for part in accept.split(",")]
    best, best_quality = "", 0.0
    for media_type in offered:
        kind = media_type.partition("/")[0]
        matches = [
            (specificity, quality)
            for specificity, names in enumerate((("*/*", "*"), (f"{kind}/*",), (media_type,)))
            for name, quality in ranges
            if name in names
        ]
        quality = max(matches)[1] if matches else 0.0  # of the most specific range
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


def json_response(content: object) -> Response:
    """Serialize dataclasses, dicts, lists, strings, numbers and NumPy arrays as JSON."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def picture_response(picture: Image.Image, media_type: str) -> Response:
    """Encode a picture.

    Raises:
        NotAcceptableError: it is too large for a JPEG.
    """
    buffer = io.BytesIO()
    if media_type == JPEG and max(picture.size) > MAX_JPEG_EDGE:
        raise NotAcceptableError(offered=f"another format than {JPEG} for so large an image", found=media_type)
    # Level 1 takes half of the time of Pillow's default, 6, for a file that is half as large again.
    options = {"compress_level": 1} if media_type == PNG else {"quality": 90}
    picture.save(buffer, "PNG" if media_type == PNG else "JPEG", **options)
    return Response(buffer.getvalue(), media_type=media_type)


def csv_response(
    columns: Sequence[str], results: Sequence[ImageClassification | ImageDetections | ErrorAnswer], *, several: bool
) -> Response:
    """Format results as CSV; with several images, each row starts with the image's index and ends with its error."""
    rows: list[Sequence[object]] = [["image", *columns, "error"] if several else columns]
    for index, result in enumerate(results):
        if isinstance(result, ErrorAnswer):
            rows.append([index, *("" for _ in columns), result.error.message])
        else:
            rows += [[index, *row, ""] if several else row for row in _rows(result)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return Response(buffer.getvalue(), media_type=f"{CSV}; charset=utf-8")


def _rows(result: ImageClassification | ImageDetections) -> list[list[object]]:
    if isinstance(result, ImageClassification):
        return [[entry.label, entry.class_id, entry.probability] for entry in result.predictions]
    return [[entry.label, entry.class_id, entry.score, *astuple(entry.box)] for entry in result.detections]
