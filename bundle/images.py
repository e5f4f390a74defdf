"""From encoded bytes to stackable uint8 pixels: the one preprocessing of training's evaluation, export and service.

Python makes images stackable (decode, orientation, RGB, resize, crop, pad); everything arithmetic (mean/std,
layout, masks) happens in the ONNX graph.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from vitrine.bundle.errors import ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Interpolation, Preprocessing

MAX_PIXELS = 50_000_000  # a 50-megapixel photograph; three bytes a pixel once decoded

# Formats by Pillow's name, with the bytes they begin with. (Pillow's JPEG also reads MPO, which many phones write.)
_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*"),
}
_BEGINNINGS = tuple(prefix for prefixes in _SIGNATURES.values() for prefix in prefixes)
_AVIF_BRANDS = (b"avif", b"avis")
SUPPORTED_FORMATS = (*_SIGNATURES, *(("AVIF",) if features.check("avif") else ()))  # Pillow may be built without it

# A block of a JPEG can be decoded to 4 x 4, 2 x 2 or 1 pixels instead of 8 x 8, for less work. The image has to stay
# at least twice as large as what it is resized to: then as many answers become right as become wrong
# (docs/decisions/0016-jpeg-at-reduced-size.md).
_JPEGS = ("JPEG", "MPO")
_JPEG_REDUCTIONS = (8, 4, 2)
_REDUCED_MARGIN = 2

# EXIF tag 0x0112: how the stored rows and columns lie in the upright image (Exif 2.32, table 6).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # rows become columns
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # the stored left or top edge is no longer there
_RESAMPLING = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class ReducedImage:
    """An image decoded for a network: perhaps at 1/2, 1/4 or 1/8 of its size, but with edges of the whole."""

    image: Image.Image  # upright RGB
    width: int  # of the upright image as it was sent, in pixels
    height: int
    box: tuple[float, float, float, float]  # where `image` shows it: left, top, right, bottom

    @property
    def is_whole(self) -> bool:
        """Whether `image` has all pixels that were sent."""
        return self.image.size == (self.width, self.height)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, of an
    animation the first frame is taken.

    Raises:
        UnsupportedImageError: the bytes are not of a supported type.
        UndecodableImageError: they are, but broken.
        ImageTooLargeError: more than `max_pixels` pixels; checked before the pixels are decoded.
    """
    return _decode(data, None, max_pixels).image


def decode_for(data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> ReducedImage:
    """Decode as `decode` does, but no more of a JPEG than the preprocessing needs.

    Raises:
        ImageError: as of `decode`. `max_pixels` are those that were sent.
    """
    return _decode(data, preprocessing, max_pixels)


def _decode(data: bytes, preprocessing: Preprocessing | None, max_pixels: int) -> ReducedImage:
    if not data:
        raise UndecodableImageError("it is empty")
    if not _is_known(data):
        raise UnsupportedImageError(supported=SUPPORTED_FORMATS, found=f"bytes that begin with {data[:8]!r}")
    try:
        image = Image.open(io.BytesIO(data), formats=SUPPORTED_FORMATS)
        size = image.size
        if size[0] * size[1] > max_pixels:
            raise ImageTooLargeError(limit=max_pixels, unit="pixels", found=f"{size[0]} x {size[1]}")
        shown = None if preprocessing is None else _reduce(image, preprocessing)
        image.load()
        return _upright(image, *((image.size, image.size) if shown is None else (size, shown)))
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(limit=max_pixels, unit="pixels", found=error) from error
    except (ImageTooLargeError, UndecodableImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise almost any type on broken data
        reason = str(error).split("<_io.BytesIO")[0].strip() or type(error).__name__
        raise UndecodableImageError(reason) from error


def _is_known(data: bytes) -> bool:
    if data[4:8] == b"ftyp":  # ISO media files, of which AVIF is one; its brand may stand among the compatible ones
        return "AVIF" in SUPPORTED_FORMATS and any(brand in data[8:64] for brand in _AVIF_BRANDS)
    if data.startswith(b"RIFF"):  # which also holds sound and video
        return data[8:12] == b"WEBP"
    return data.startswith(_BEGINNINGS)


def _reduce(image: Image.Image, preprocessing: Preprocessing) -> tuple[float, float] | None:
    """Have as little of a JPEG decoded as the preprocessing allows.

    Returns:
        The width and height that its pixels then have; whole ones are stored, so that some at the right and below
        may be partly outside. None if it is decoded in full.
    """
    if image.format not in _JPEGS:
        return None
    width, height = image.size
    if _orientation(image) in _TURNED:
        least_height, least_width = _resized(height, width, preprocessing)
    else:
        least_width, least_height = _resized(width, height, preprocessing)
    most = min(width / least_width, height / least_height) / _REDUCED_MARGIN
    by = next((reduction for reduction in _JPEG_REDUCTIONS if reduction <= most), None)
    if by is None or image.draft(None, (width // by, height // by)) is None:
        return None
    return width / by, height / by


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata around sound pixels: show them as they are stored
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, size: tuple[int, int], shown: tuple[float, float]) -> ReducedImage:
    """Turn an image whose size was `size`, and `shown` is now, from the top left corner of its pixels."""
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if orientation in _TURNED:
        size, shown = size[::-1], shown[::-1]
    left = image.width - shown[0] if orientation in _RIGHT_TO_LEFT else 0.0
    top = image.height - shown[1] if orientation in _BOTTOM_TO_TOP else 0.0
    return ReducedImage(_to_rgb(image), *size, box=(left, top, left + shown[0], top + shown[1]))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UndecodableImageError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise UndecodableImageError("its 32-bit pixels are outside 0 to 65535; save it with 8 or 16 bits")
        grey >>= 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_classification_pixels(
    image: Image.Image | ReducedImage, preprocessing: ClassificationPreprocessing
) -> NDArray[np.uint8]:
    """Resize an RGB image to the network's input size.

    `crop_mode` "center": the shortest edge becomes input size / `crop_pct`, rounded down, then the centre is cut out;
    "squash": both edges are resized, whatever the aspect ratio (timm's terms and rounding).

    Returns:
        uint8 [height, width, 3].
    """
    height, width = preprocessing.input_size
    if preprocessing.crop_mode == "squash":
        box = (0.0, 0.0, float(image.width), float(image.height))
    else:
        # The part of the source that the crop keeps: resizing it alone gives the same pixels for less work.
        resized = _resized(image.width, image.height, preprocessing)
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        x_scale, y_scale = image.width / resized[0], image.height / resized[1]
        right, bottom = min(image.width, (left + width) * x_scale), min(image.height, (top + height) * y_scale)
        box = (left * x_scale, top * y_scale, right, bottom)  # kept inside the image in spite of rounding
    return _resize(image, (width, height), box, preprocessing)


def _resized(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height that the whole of an image is brought to, before anything is cut off."""
    if isinstance(preprocessing, DetectionPreprocessing):
        return detection_size(width, height, preprocessing)
    input_height, input_width = preprocessing.input_size
    if preprocessing.crop_mode == "squash":
        return input_width, input_height
    least_width, least_height = int(input_width / preprocessing.crop_pct), int(input_height / preprocessing.crop_pct)
    if width * least_height <= height * least_width:
        return least_width, int(least_width * height / width)
    return int(least_height * width / height), least_height


def _resize(
    image: Image.Image | ReducedImage,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    preprocessing: Preprocessing,
) -> NDArray[np.uint8]:
    """Resize a part of an image, `box` in pixels of the image as it was sent."""
    if isinstance(image, ReducedImage):
        left, top, right, bottom = image.box
        x_scale, y_scale = (right - left) / image.width, (bottom - top) / image.height
        box = (
            left + box[0] * x_scale,
            top + box[1] * y_scale,
            min(right, left + box[2] * x_scale),
            min(bottom, top + box[3] * y_scale),
        )
        image = image.image
    if image.size == size and box == (0.0, 0.0, float(image.width), float(image.height)):
        return np.asarray(image)
    return np.asarray(image.resize(size, _RESAMPLING[preprocessing.interpolation], box=box))


def detection_size(width: int, height: int, preprocessing: DetectionPreprocessing) -> tuple[int, int]:
    """Width and height after the shortest edge is brought to `shortest_edge`, or the longest to `longest_edge` if
    that would exceed it (the rule and the rounding of DETR's transforms, aspect ratio kept)."""
    shortest, longest = min(width, height), max(width, height)
    target = preprocessing.shortest_edge
    if longest * target > preprocessing.longest_edge * shortest:
        target = max(1, round(preprocessing.longest_edge * shortest / longest))
    other = min(int(target * longest / shortest), preprocessing.longest_edge)
    return (target, other) if width <= height else (other, target)


def to_detection_pixels(image: Image.Image | ReducedImage, preprocessing: DetectionPreprocessing) -> NDArray[np.uint8]:
    """Resize an RGB image for detection, keeping its aspect ratio.

    Returns:
        uint8 [height, width, 3], sized by `detection_size`.
    """
    size = detection_size(image.width, image.height, preprocessing)
    return _resize(image, size, (0.0, 0.0, float(image.width), float(image.height)), preprocessing)


def pad_and_stack(images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Stack images of different sizes, zero-padded below and to the right.

    Args:
        images: uint8 [h_i, w_i, 3] each.

    Returns:
        pixels uint8 [batch, max h, max w, 3] and sizes int64 [batch, 2], the valid (height, width) of each.
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    height, width = sizes.max(axis=0)
    pixels = np.zeros((len(images), height, width, 3), dtype=np.uint8)
    for target, image in zip(pixels, images, strict=True):
        target[: image.shape[0], : image.shape[1]] = image
    return pixels, sizes
