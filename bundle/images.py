"""Decode and preprocess images: encoded bytes to uint8 pixels that stack to a batch.

Evaluation during training, export and the service share this module. It decodes, orients, converts to RGB, resizes,
crops and pads; all arithmetic on pixels (mean/std, layout, masks) happens in the ONNX graph.
"""

import contextlib
import ctypes
import errno
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, features

from vitrine.bundle import headers
from vitrine.bundle.errors import ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from vitrine.bundle.machine import let_others_run
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Interpolation, Preprocessing

MAX_PIXELS = 50_000_000  # 50 megapixels

# Pillow may be built without AVIF. (Its JPEG plugin also reads MPO, which many phones write.)
SUPPORTED_FORMATS = tuple(form for form in headers.FORMATS if form != "AVIF" or features.check("avif"))
# What Pillow warns and logs about a broken image is the client's affair, and Python would remember each distinct
# warning for ever.
warnings.filterwarnings("ignore", module=r"PIL\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a thread decodes an image on one core

# Seconds of CPU that decoding may take, a multiple of what any useful image of that size needs. They end what Pillow
# does in Python for these formats; for the others, and what runs in C, `headers` bounds the work
# (docs/decisions/0021-bounds-before-decoding.md).
_TIMED_FORMATS = ("PNG", "GIF", "BMP", "TIFF")
_BASE_SECONDS = 2.0
_SECONDS_PER_PIXEL = 80e-9
_UNCHECKED_BYTES, _UNCHECKED_READS = 4096, 32  # the clock is only read after so many, as that takes longer than a read
_READS_BETWEEN_TURNS = 1_024  # about a millisecond

# Seconds per pixel to decode an image for a network, on average; a JPEG is decoded at a reduced size.
_JPEG_SECONDS, _OTHER_SECONDS = 5e-9, 25e-9

_BAND_PIXELS = 2**20  # converted at a time
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)  # of this machine, not of the image

# libjpeg can decode a block to 4 x 4, 2 x 2 or 1 pixels instead of 8 x 8, which is faster. The decoded image must be at
# least twice as large as the size it is resized to: then as many answers become right as become wrong
# (docs/decisions/0016-jpeg-at-reduced-size.md).
_JPEG_FORMATS = ("JPEG", "MPO")
_JPEG_REDUCTIONS = (8, 4, 2)
_REDUCED_MARGIN = 2

# EXIF orientation (Exif 2.32, table 6), with the operation that makes the stored image upright.
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AXES_SWAPPED = (5, 6, 7, 8)  # rows become columns
_X_FLIPPED, _Y_FLIPPED = (2, 3, 6, 7), (3, 4, 7, 8)  # the upright left (top) edge is stored at the right or bottom
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # by alpha
_RESAMPLING = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class ReducedImage:
    """An image decoded for a network, possibly at 1/2, 1/4 or 1/8 of its size, with its original size."""

    image: Image.Image  # upright RGB
    width: int  # of the upright original, in pixels
    height: int
    box: tuple[float, float, float, float]  # the original within `image`: left, top, right, bottom

    @property
    def is_whole(self) -> bool:
        """Whether `image` was decoded at full size."""
        return self.image.size == (self.width, self.height)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to upright 8-bit RGB.

    EXIF orientation is applied, transparency is composited over white, 16-bit grey is scaled to 8 bits, and only the
    first frame of an animation is decoded.

    Raises:
        UnsupportedImageError: not a supported image type.
        UndecodableImageError: a supported type, but broken.
        ImageTooLargeError: more than `max_pixels` pixels, or more work or memory than any useful image of that size
            needs; all but the time is checked before pixels are decoded (see `headers`).
        MemoryError, OSError: this machine has no memory or file descriptor left.
    """
    return EncodedImage(data, max_pixels=max_pixels).decode().image


def decode_for(data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> ReducedImage:
    """Decode as `decode` does, but a JPEG only at the resolution that the preprocessing needs.

    Raises:
        ImageError: see `decode`; `max_pixels` limits the original size.
    """
    return EncodedImage(data, max_pixels=max_pixels).decode(preprocessing)


class EncodedImage:
    """An encoded image whose headers have been read and checked."""

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        """Read the headers; nothing is decoded yet.

        Raises:
            ImageError, MemoryError, OSError: see `decode`.
        """
        if not data:
            raise UndecodableImageError("it is empty")
        form = headers.identify(data)
        if form not in SUPPORTED_FORMATS:
            raise UnsupportedImageError(supported=SUPPORTED_FORMATS, found=f"bytes that begin with {data[:8]!r}")
        self._max_pixels = max_pixels
        with _image_errors(max_pixels):
            checked = headers.check(data, form, max_pixels=max_pixels)
            self._source = _TimedSource(checked) if form in _TIMED_FORMATS else io.BytesIO(checked)
            self._image = Image.open(self._source, formats=(form,))
            headers.check_size(*self._image.size, max_pixels)

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self._image.width * self._image.height

    @property
    def decode_seconds(self) -> float:
        """Expected seconds on one core to decode the image for a network; a guess from its format and size."""
        return self.pixels * (_JPEG_SECONDS if self._image.format in _JPEG_FORMATS else _OTHER_SECONDS)

    def decode(self, preprocessing: Preprocessing | None = None) -> ReducedImage:
        """Decode the image, a JPEG only at the resolution that the preprocessing needs; can be called once.

        Raises:
            ImageError, MemoryError, OSError: see `decode`.
        """
        image, size = self._image, self._image.size
        with _image_errors(self._max_pixels):
            if isinstance(self._source, _TimedSource):
                self._source.allow(_BASE_SECONDS + _SECONDS_PER_PIXEL * self.pixels)
            drafted = None if preprocessing is None else _draft(image, preprocessing)
            image.load()
            vars(image).pop("_decoder", None)  # WebP's and AVIF's hold whole pictures
            return _to_upright(image, *((image.size, image.size) if drafted is None else (size, drafted)))


@contextlib.contextmanager
def _image_errors(max_pixels: int) -> Iterator[None]:
    """Turn what Pillow raises into our errors, except for what is not the image's fault."""
    try:
        yield
    except (ImageTooLargeError, UndecodableImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(limit=max_pixels, unit="pixels", found=error) from error
    except Exception as error:  # Pillow's decoders raise almost any exception on broken data
        if isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS:
            raise
        reason = str(error).split("<")[0].strip() or type(error).__name__
        if "out of memory" in reason.lower() or reason == "decoder error -9":
            raise MemoryError(reason) from error
        raise UndecodableImageError(reason) from error


class _TimedSource(io.BytesIO):
    """An encoded image whose reading fails once its thread has used its CPU time for decoding.

    Formats that Pillow decodes in Python are read in small pieces, between which other threads may run.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0
        self.allow(_BASE_SECONDS)

    def allow(self, seconds: float) -> None:
        """Allow the current thread so many seconds of CPU time from now."""
        self._start, self._seconds = time.thread_time(), seconds

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads % _READS_BETWEEN_TURNS == 0:
            let_others_run()
        is_due = size is None or size > _UNCHECKED_BYTES or self._reads % _UNCHECKED_READS == 0
        if is_due and time.thread_time() - self._start > self._seconds:
            raise ImageTooLargeError(limit=f"{self._seconds:.1f}", unit="seconds of decoding", found="more")
        return io.BytesIO.read(self, size)


def _draft(image: Image.Image, preprocessing: Preprocessing) -> tuple[float, float] | None:
    """Set a JPEG to be decoded at the smallest size that the preprocessing allows.

    Returns:
        The fractional width and height of the reduced image; stored sizes are rounded up, so the last column and row
        may lie partly outside. None if the image is decoded in full.
    """
    if image.format not in _JPEG_FORMATS:
        return None
    width, height = image.size
    if _orientation(image) in _AXES_SWAPPED:
        target_height, target_width = _resized_size(height, width, preprocessing)
    else:
        target_width, target_height = _resized_size(width, height, preprocessing)
    max_reduction = min(width / target_width, height / target_height) / _REDUCED_MARGIN
    reduction = next((reduction for reduction in _JPEG_REDUCTIONS if reduction <= max_reduction), None)
    if reduction is None or image.draft(None, (width // reduction, height // reduction)) is None:
        return None
    return width / reduction, height / reduction


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata, valid pixels: keep the stored orientation
        return 1
    return orientation if orientation in _TRANSPOSES else 1


def _to_upright(image: Image.Image, size: tuple[int, int], reduced: tuple[float, float]) -> ReducedImage:
    """Apply the EXIF orientation to an image of original size `size`, which fills `reduced` of its stored pixels."""
    orientation = _orientation(image)
    if orientation in _AXES_SWAPPED:
        size, reduced = size[::-1], reduced[::-1]
    upright = _to_upright_rgb(image, orientation)
    left = upright.width - reduced[0] if orientation in _X_FLIPPED else 0.0
    top = upright.height - reduced[1] if orientation in _Y_FLIPPED else 0.0
    return ReducedImage(upright, *size, box=(left, top, left + reduced[0], top + reduced[1]))


def _to_upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Convert and turn an image in bands of rows, so that only one copy of it is needed."""
    if image.mode == "RGB" and orientation == 1:
        return image
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if height <= rows:
        return _turn(_to_rgb(image), orientation)
    swapped = orientation in _AXES_SWAPPED
    backwards = orientation in (_X_FLIPPED if swapped else _Y_FLIPPED)
    upright = Image.new("RGB", (height, width) if swapped else (width, height))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = _turn(_to_rgb(image.crop((0, top, width, bottom))), orientation)
        place = height - bottom if backwards else top
        upright.paste(band, (place, 0) if swapped else (0, place))
    return upright


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UndecodableImageError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise UndecodableImageError("its 32-bit pixels are outside 0 to 65535; save it with 8 or 16 bits")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_classification_pixels(
    image: Image.Image | ReducedImage, preprocessing: ClassificationPreprocessing
) -> NDArray[np.uint8]:
    """Resize an RGB image to the network's input size.

    `crop_mode` "center": resize the shortest edge to input size / `crop_pct`, rounded down, then center-crop.
    "squash": resize both edges, ignoring the aspect ratio (timm's terms and rounding).

    Returns:
        uint8 [height, width, 3].
    """
    height, width = preprocessing.input_size
    # Resize only the part of the source that the crop keeps: the same pixels for less work.
    box = classification_box(image.width, image.height, preprocessing)
    return _resize(image, (width, height), box, preprocessing)


def classification_box(
    width: int, height: int, preprocessing: ClassificationPreprocessing
) -> tuple[float, float, float, float]:
    """Return the part of an upright image that a classifier sees, in its pixels: left, top, right, bottom."""
    if preprocessing.crop_mode == "squash":
        return 0.0, 0.0, float(width), float(height)
    input_height, input_width = preprocessing.input_size
    resized = _resized_size(width, height, preprocessing)
    left, top = round((resized[0] - input_width) / 2), round((resized[1] - input_height) / 2)
    x_scale, y_scale = width / resized[0], height / resized[1]
    right, bottom = min(width, (left + input_width) * x_scale), min(height, (top + input_height) * y_scale)
    return left * x_scale, top * y_scale, right, bottom  # clamped to the image against rounding


def _resized_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the width and height that the whole image is resized to, before cropping."""
    if isinstance(preprocessing, DetectionPreprocessing):
        return detection_size(width, height, preprocessing)
    input_height, input_width = preprocessing.input_size
    if preprocessing.crop_mode == "squash":
        return input_width, input_height
    min_width, min_height = int(input_width / preprocessing.crop_pct), int(input_height / preprocessing.crop_pct)
    if width * min_height <= height * min_width:
        return min_width, int(min_width * height / width)
    return int(min_height * width / height), min_height


def _resize(
    image: Image.Image | ReducedImage,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    preprocessing: Preprocessing,
) -> NDArray[np.uint8]:
    """Resize a part of an image; `box` is in pixels of the original."""
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
    """Return the width and height after DETR's resize, with its rounding.

    The shortest edge becomes `shortest_edge`, unless the longest would then exceed `longest_edge`, which it becomes
    instead. The aspect ratio is kept.
    """
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
    """Stack images of different sizes, zero-padded at the bottom and right.

    Args:
        images: uint8 [h_i, w_i, 3] each.

    Returns:
        pixels uint8 [batch, max h, max w, 3] and sizes int64 [batch, 2], the (height, width) of each.
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    height, width = sizes.max(axis=0)
    pixels = np.zeros((len(images), height, width, 3), dtype=np.uint8)
    for target, image in zip(pixels, images, strict=True):
        target[: image.shape[0], : image.shape[1]] = image
    return pixels, sizes


def _silence_libtiff() -> None:
    """Stop libtiff from printing broken rows to the standard error, which is the server's log (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        mapped = (line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines())
        for file in {path for path in mapped if "/libtiff" in path}:
            libtiff = ctypes.CDLL(file)
            libtiff.TIFFSetErrorHandler(None)
            libtiff.TIFFSetWarningHandler(None)


_silence_libtiff()
