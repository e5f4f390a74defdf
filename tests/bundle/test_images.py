import errno
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.errors import ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from vitrine.bundle.images import (
    _TRANSPOSES,
    SUPPORTED_FORMATS,
    EncodedImage,
    decode,
    decode_for,
    detection_size,
    pad_and_stack,
    to_classification_pixels,
    to_detection_pixels,
)
from vitrine.bundle.manifest import ClassificationPreprocessing, DetectionPreprocessing, Preprocessing

CHANNELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
ORIENTATION = 0x0112
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """An image of smooth gradients that differ by channel and corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / width, 255 * y / height, 127 * (x / width + 1 - y / height))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def png(width: int, height: int) -> bytes:
    """A PNG whose header states this size, without pixel data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def mean_difference(a: object, b: object) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_decodes_to_the_same_rgb(form: str) -> None:
    image = smooth(48, 32)
    decoded = decode(encode(image, form))
    assert (decoded.mode, decoded.size) == ("RGB", (48, 32))
    assert mean_difference(decoded, image) < (16 if form == "GIF" else 4)  # a GIF has 256 colours


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several_is_taken(form: str) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    decoded = decode(encode(red, form, save_all=True, append_images=[blue]))
    assert mean_difference(decoded, red) < 3


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (40, 255)), (40, 40, 40)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("1", (4, 4), 0), (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.fromarray(np.full((4, 4), 0x12FF, np.uint16)), (0x12, 0x12, 0x12)),
        (Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_modes_of_png(image: Image.Image, expected: tuple[int, int, int]) -> None:
    decoded = decode(encode(image, "PNG"))
    assert decoded.mode == "RGB"
    assert mean_difference(decoded, np.full((4, 4, 3), expected)) <= 1 / 3


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (2, 0, 4, 2))
    pixels = np.asarray(decode(encode(image, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 3].tolist() == [200, 100, 50]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form: str) -> None:
    image = smooth(32, 32)
    assert mean_difference(decode(encode(image.convert("CMYK"), form)), image) < 6


def test_floating_point_tiff_is_refused() -> None:
    with pytest.raises(UndecodableImageError, match="floating-point"):
        decode(encode(Image.new("F", (4, 4), 0.5), "TIFF"))


# How an upright image is stored under each orientation: the inverse of what a viewer does.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (255, 0), (256, 1), (0x12FF, 0x12), (65535, 255)])
def test_32_bit_pixels_in_the_range_of_16_are_scaled(value: int, grey: int) -> None:
    image = Image.fromarray(np.array([[0, value], [value, 0]], np.int32))
    assert np.asarray(decode(encode(image, "TIFF")))[..., 0].tolist() == [[0, grey], [grey, 0]]


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1, -(2**31)])
def test_32_bit_pixels_outside_the_range_of_16_are_refused(value: int) -> None:
    with pytest.raises(UndecodableImageError, match="32-bit pixels are outside 0 to 65535"):
        decode(encode(Image.fromarray(np.array([[0, value], [1, 2]], np.int32)), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, form: str) -> None:
    upright = np.asarray(smooth(48, 32))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    decoded = np.asarray(decode(encode(stored, form, exif=exif)))
    assert decoded.shape == upright.shape
    assert mean_difference(decoded, upright) < (3 if form == "JPEG" else 1e-9)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00"],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(form: str, exif: bytes) -> None:
    image = smooth(32, 24)
    assert mean_difference(decode(encode(image, form, exif=exif)), image) < 4


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert decode(encode(smooth(8, 4), "PNG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_image(form: str) -> None:
    data = encode(smooth(64, 64), form)
    with pytest.raises(UndecodableImageError):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError("broken data stream"), UndecodableImageError),
        (struct.error(), UndecodableImageError),
        (OSError("decoder error -9"), MemoryError),
        (ValueError("Out of memory"), MemoryError),
        (MemoryError(), MemoryError),
        (OSError(errno.ENOENT, "No such file"), UndecodableImageError),
        (Image.DecompressionBombError("large"), ImageTooLargeError),
    ],
)
def test_only_what_an_image_causes_is_its_error(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        decode(VALID["PNG"])
    assert type(caught.value) is expected


def test_empty() -> None:
    with pytest.raises(UndecodableImageError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"%PDF-1.7", b"\x00" * 100, b"\xff\xd8"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError) as caught:
        decode(data)
    assert all(form in str(caught.value) for form in SUPPORTED_FORMATS)


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM", b"II*\x00"]
)
def test_only_the_signature(data: bytes) -> None:
    with pytest.raises(UndecodableImageError, match="identify"):
        decode(data)


@pytest.mark.parametrize(("width", "height"), [(8_000, 8_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_header_is_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(ImageTooLargeError, match="50000000 pixels"):
        decode(png(width, height))


def test_max_pixels() -> None:
    data = encode(smooth(20, 10), "PNG")
    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageTooLargeError, match="at most 199 pixels are accepted, found 20 x 10"):
        decode(data, max_pixels=199)


def reference(data: bytes) -> Image.Image:
    """The meaning of `decode`, in a few whole-image operations."""
    image = Image.open(io.BytesIO(data))
    image.load()
    orientation = image.getexif().get(ORIENTATION, 1)
    if orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


KINDS = {
    "PNG": ("1", "L", "LA", "P", "P+", "P++", "L+", "RGB", "RGB+", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "P+"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}


def noise(mode: str, width: int, height: int, form: str, orientation: int, seed: int) -> bytes:
    """Encode noise; `+` in the mode: with a transparent colour, `++`: with a transparency for each entry."""
    random, name = np.random.default_rng(seed), mode.rstrip("+")
    channels = {"LA": 2, "La": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "RGBX": 4, "CMYK": 4}.get(name, 1)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<u2"}.get(name, "u1")
    values = random.integers(0, 256 if kind == "u1" else 65_536, (height, width, channels)).astype(kind)
    if name == "I":
        values = values.astype("<i4")
    if name == "1":
        image = Image.fromarray(values[..., 0]).convert("1")
    else:
        stored = "LA" if name == "La" else name
        image = Image.frombytes(stored, (width, height), values.tobytes())
        if name in ("P", "PA"):
            image.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    options: dict[str, object] = {"transparency": 7} if mode in ("P+", "L+") else {}
    options |= {"transparency": bytes(range(256))} if mode == "P++" else {}
    options |= {"transparency": (7, 7, 7)} if mode == "RGB+" else {}
    if form in ("PNG", "TIFF", "WEBP", "JPEG", "AVIF"):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    data = encode(image, form, **options)
    if name == "La":  # the tag ExtraSamples says that the grey is premultiplied
        place = data.index(struct.pack("<HHL", 338, 3, 1))
        data = data[: place + 8] + struct.pack("<L", 1) + data[place + 12 :]
    return data


def assert_as_before(data: bytes) -> None:
    decoded = decode(data)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(reference(data)))


@given(
    st.sampled_from([(form, mode) for form, modes in KINDS.items() for mode in modes]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 10),
)
@settings(max_examples=400, deadline=None)
def test_every_mode_and_orientation(
    kind: tuple[str, str], width: int, height: int, orientation: int, seed: int
) -> None:
    form, mode = kind
    assert_as_before(noise(mode, width, height, form, orientation, seed))


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("size", [(1_100, 1_000), (65_535, 33), (20, 60_000)], ids=str)
def test_large_images_are_converted_in_bands(size: tuple[int, int], orientation: int) -> None:
    assert_as_before(noise("LA", *size, "TIFF", orientation, 0))
    assert_as_before(noise("I;16", *size, "PNG", orientation, 0))


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, mode) for form in ("PNG", "TIFF", "GIF") for mode in KINDS[form] if mode not in ("LA", "I;16")],
)
def test_every_mode_is_converted_in_bands(form: str, mode: str) -> None:
    assert_as_before(noise(mode, 1_100, 1_000, form, 6, 0))


def test_premultiplied_grey() -> None:
    data = noise("La", 8, 8, "TIFF", 1, 0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "La"
        grey, alpha = np.moveaxis(np.frombuffer(image.tobytes(), np.uint8).reshape(8, 8, 2).astype(int), -1, 0)
    expected = np.minimum(255, np.minimum(grey, alpha) + 255 - alpha)  # grey cannot exceed what alpha lets through
    sound = grey <= alpha
    decoded = np.asarray(decode(data)).astype(int)[..., 0]
    assert np.abs(decoded - expected)[sound].max() <= 2


@pytest.mark.parametrize("values", [(0, 65_536), (-1, 0)])
def test_32_bit_pixels_out_of_range_in_the_last_band(values: tuple[int, int]) -> None:
    pixels = np.zeros((1_200, 1_000), np.int32)
    pixels[-1, -2:] = values
    with pytest.raises(UndecodableImageError, match="32-bit pixels are outside 0 to 65535"):
        decode(encode(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16"])
def test_bigtiff(mode: str, compression: str | None) -> None:
    assert_as_before(encode(Image.new(mode, (30, 20)), "TIFF", big_tiff=True, compression=compression))


def test_bigtiff_that_pillow_does_not_read_is_refused_by_name() -> None:
    with pytest.raises(UndecodableImageError, match="a BigTIFF of big-endian byte order is not supported"):
        decode(b"MM\x00+" + struct.pack(">HHQ", 8, 0, 16) + bytes(64))


def test_a_lack_of_memory_is_not_blamed_on_the_image() -> None:
    program = """
import io, resource
from PIL import Image
from vitrine.bundle.images import decode
buffer = io.BytesIO()
Image.new("RGB", (4_000, 4_000)).save(buffer, "FORM", **OPTIONS)
decode(buffer.getvalue()[:0] + SMALL)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 2**20, used + 30 * 2**20))
try:
    decode(buffer.getvalue())
except MemoryError:
    print("MemoryError")
"""
    for form, options in (("JPEG", {}), ("TIFF", {"compression": "tiff_lzw"})):
        source = program.replace("FORM", form).replace("OPTIONS", repr(options))
        source = source.replace("SMALL", repr(encode(Image.new("RGB", (8, 8)), form)))
        result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
        assert result.stdout == "MemoryError\n", (form, result.stderr)


def test_a_lack_of_file_descriptors_is_not_blamed_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        decode(VALID["PNG"])
    assert caught.value.errno == errno.EMFILE


VALID = {form: encode(smooth(24, 16), form) for form in FORMATS}


def decode_or_reject(data: bytes) -> None:
    try:
        image = decode(data, max_pixels=100_000)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert np.asarray(image).dtype == np.uint8


SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*"]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes(signature: bytes, data: bytes) -> None:
    decode_or_reject(signature + data)


@given(
    st.sampled_from(FORMATS),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow and libtiff warn about broken files
def test_any_corruption(form: str, kept: float, changes: list[tuple[float, int]]) -> None:
    data = bytearray(VALID[form])
    for place, value in changes:
        data[int(place * len(data))] = value
    decode_or_reject(bytes(data[: round(kept * len(data))]))
    decode_or_reject(bytes(data))


def test_pillow_logs_nothing_about_a_broken_image(caplog: pytest.LogCaptureFixture) -> None:
    data = encode(Image.new("RGB", (8, 8)), "TIFF")
    samples_per_pixel = struct.pack("<HHI", 277, 3, 1)
    place = data.index(samples_per_pixel) + len(samples_per_pixel)
    with pytest.raises(UndecodableImageError):
        decode(data[:place] + struct.pack("<H", 27648) + data[place + 2 :])
    assert not caplog.records


def oriented(upright: Image.Image, orientation: int, form: str, **options: object) -> bytes:
    """Encode an image as stored under an orientation."""
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(stored, form, exif=exif, **options)


def pixels_of(image: object, preprocessing: Preprocessing) -> NDArray[np.int64]:
    if isinstance(preprocessing, ClassificationPreprocessing):
        return to_classification_pixels(image, preprocessing).astype(int)
    return to_detection_pixels(image, preprocessing).astype(int)


SMALL: list[Preprocessing] = [
    ClassificationPreprocessing(input_size=(24, 16), crop_pct=0.8, **CHANNELS),
    ClassificationPreprocessing(input_size=(16, 24), interpolation="bicubic", **CHANNELS),
    ClassificationPreprocessing(input_size=(12, 24), crop_mode="squash", **CHANNELS),
    DetectionPreprocessing(shortest_edge=24, longest_edge=40, **CHANNELS),
]


@given(
    st.sampled_from(SMALL),
    st.tuples(st.integers(8, 500), st.integers(8, 500)),
    st.sampled_from(list(STORED)),
    st.sampled_from(["JPEG", "MPO"]),
    st.booleans(),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
)
@settings(max_examples=200, deadline=None)
def test_reduced_jpeg(
    preprocessing: Preprocessing,
    size: tuple[int, int],
    orientation: int,
    form: str,
    progressive: bool,
    subsampling: str,
) -> None:
    options = {"quality": 95, "progressive": progressive, "subsampling": subsampling}
    data = oriented(smooth(*size), orientation, form, **options)
    whole, reduced = decode(data), decode_for(data, preprocessing)
    assert (reduced.width, reduced.height) == whole.size == size
    full, found = pixels_of(whole, preprocessing), pixels_of(reduced, preprocessing)
    if reduced.is_whole:
        np.testing.assert_array_equal(found, full)
        return
    left, top, right, bottom = reduced.box
    assert 0 <= left < right <= reduced.image.width
    assert 0 <= top < bottom <= reduced.image.height
    assert reduced.image.width - (right - left) < 1  # at most a partial last pixel
    assert reduced.image.height - (bottom - top) < 1
    assert found.shape == full.shape
    if min(full.shape[:2]) >= 8:  # narrow stripes are all edge
        # The same region: a shift of half a pixel would differ more.
        assert np.abs(found - full).mean() < 1


@pytest.mark.parametrize("preprocessing", SMALL, ids=["crop", "bicubic", "squash", "detection"])
@pytest.mark.parametrize("orientation", STORED)
def test_reduced_jpeg_with_partial_blocks(orientation: int, preprocessing: Preprocessing) -> None:
    data = oriented(smooth(401, 601), orientation, "JPEG", quality=95)
    reduced = decode_for(data, preprocessing)
    assert not reduced.is_whole
    assert (reduced.width, reduced.height) == (401, 601)
    difference = np.abs(pixels_of(reduced, preprocessing) - pixels_of(decode(data), preprocessing))
    assert difference.mean() < 0.6
    assert difference.max() <= 4


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 100), st.integers(1, 100), st.floats(0.1, 1))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_reduced_jpeg_is_twice_as_large_as_needed(
    crop_mode: str, width: int, height: int, input_width: int, input_height: int, crop_pct: float
) -> None:
    preprocessing = ClassificationPreprocessing(
        input_size=(input_height, input_width), crop_mode=crop_mode, crop_pct=crop_pct, **CHANNELS
    )
    reduced = decode_for(encode(Image.new("RGB", (width, height), "red"), "JPEG"), preprocessing)
    assert (reduced.width, reduced.height) == (width, height)
    assert to_classification_pixels(reduced, preprocessing).shape == (input_height, input_width, 3)
    if crop_mode == "squash":
        needed = (input_width, input_height)
    else:
        scale = max(int(input_width / crop_pct) / width, int(input_height / crop_pct) / height)
        needed = (int(width * scale), int(height * scale))
    left, top, right, bottom = reduced.box
    if reduced.is_whole:
        assert min(width / needed[0], height / needed[1]) < 4 * 1.1 or min(needed) < 12  # `needed` is rounded down
    else:
        assert right - left >= 2 * needed[0]
        assert bottom - top >= 2 * needed[1]


@pytest.mark.parametrize("preprocessing", SMALL, ids=["crop", "bicubic", "squash", "detection"])
@pytest.mark.parametrize("size", [(200, 800), (800, 200), (90, 400), (400, 90)])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_reduction_is_that_of_the_upright_image(
    preprocessing: Preprocessing, size: tuple[int, int], orientation: int
) -> None:
    expected = decode_for(oriented(smooth(*size), 1, "JPEG"), preprocessing)
    assert decode_for(oriented(smooth(*size), orientation, "JPEG"), preprocessing).image.size == expected.image.size


@pytest.mark.parametrize(
    ("edge", "stored"),
    [(32, 32), (127, 127), (128, 64), (255, 128), (256, 64), (511, 128), (512, 64), (513, 65), (4096, 512)],
)
def test_jpeg_reduction(edge: int, stored: int) -> None:
    preprocessing = ClassificationPreprocessing(input_size=(32, 32), **CHANNELS)
    data = encode(Image.new("RGB", (edge, edge)), "JPEG")
    assert decode_for(data, preprocessing).image.size == (stored, stored)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_jpeg_of_other_modes(mode: str) -> None:
    data = encode(smooth(403, 301).convert(mode), "JPEG", quality=95)
    reduced = decode_for(data, SMALL[3])
    assert (reduced.image.mode, reduced.is_whole) == ("RGB", False)
    assert np.abs(pixels_of(reduced, SMALL[3]) - pixels_of(decode(data), SMALL[3])).max() <= 3


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"JPEG", "MPO"}))
@pytest.mark.parametrize("orientation", [1, 6])
def test_other_formats_are_decoded_in_full(form: str, orientation: int) -> None:
    data = oriented(smooth(300, 200), orientation, form)
    reduced, whole = decode_for(data, SMALL[0]), decode(data)
    assert (reduced.width, reduced.height) == whole.size
    np.testing.assert_array_equal(np.asarray(reduced.image), np.asarray(whole))
    np.testing.assert_array_equal(pixels_of(reduced, SMALL[0]), pixels_of(whole, SMALL[0]))


def test_noise_at_reduced_size() -> None:
    """Noise is the worst case: photographs have little of the detail that is lost."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", quality=95, subsampling="4:4:4")
    preprocessing = ClassificationPreprocessing(input_size=(32, 32), **CHANNELS)
    full, found = pixels_of(decode(data), preprocessing), pixels_of(decode_for(data, preprocessing), preprocessing)
    assert 0 < np.abs(found - full).mean() < 4


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_truncated_jpeg_at_reduced_size(kept: float) -> None:
    data = encode(smooth(400, 300), "JPEG")
    with pytest.raises(UndecodableImageError):
        decode_for(data[: int(kept * len(data))], SMALL[0])


def test_max_pixels_limits_the_original_size() -> None:
    data = encode(smooth(400, 300), "JPEG")
    assert decode_for(data, SMALL[0], max_pixels=120_000).width == 400
    with pytest.raises(ImageTooLargeError, match="at most 119999 pixels are accepted, found 400 x 300"):
        decode_for(data, SMALL[0], max_pixels=119_999)


@given(st.integers(60, 500), st.integers(60, 500), st.sampled_from([0.8, 0.875, 0.9, 0.95, 1.0]))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_centre_crop_is_resize_then_crop(interpolation: str, width: int, height: int, crop_pct: float) -> None:
    """Compare with the two steps of timm's and torchvision's transforms, with their rounding."""
    image = smooth(width, height)
    preprocessing = ClassificationPreprocessing(
        input_size=(56, 56), crop_pct=crop_pct, interpolation=interpolation, **CHANNELS
    )
    short = int(56 / crop_pct)
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((size[0] - 56) / 2), round((size[1] - 56) / 2)
    resized = image.resize(size, Image.Resampling[interpolation.upper()])
    expected = resized.crop((left, top, left + 56, top + 56))
    pixels = to_classification_pixels(image, preprocessing)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 2  # Pillow computes with single-precision edges and rounds twice
    assert difference.mean() < 0.2


def test_squash_is_a_plain_resize() -> None:
    image = smooth(90, 40)
    preprocessing = ClassificationPreprocessing(input_size=(16, 32), crop_mode="squash", **CHANNELS)
    expected = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(to_classification_pixels(image, preprocessing), expected)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_image_of_the_input_size_is_unchanged(crop_mode: str) -> None:
    image = smooth(32, 24)
    preprocessing = ClassificationPreprocessing(input_size=(24, 32), crop_mode=crop_mode, **CHANNELS)
    np.testing.assert_array_equal(to_classification_pixels(image, preprocessing), np.asarray(image))


@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.floats(0.1, 1),
)
@settings(max_examples=150, deadline=None)
def test_classification_pixels_of_any_size(size: tuple[int, int], input_size: tuple[int, int], crop_pct: float) -> None:
    preprocessing = ClassificationPreprocessing(input_size=input_size, crop_pct=crop_pct, **CHANNELS)
    assert to_classification_pixels(Image.new("RGB", size), preprocessing).shape == (*input_size, 3)


@pytest.mark.parametrize("size", [(106, 106), (106, 143), (406, 406)])
def test_rounding_does_not_push_the_crop_outside(size: tuple[int, int]) -> None:
    preprocessing = ClassificationPreprocessing(input_size=(49, 49), **CHANNELS)
    pixels = to_classification_pixels(Image.new("RGB", size, "red"), preprocessing)
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (1066, 800)),  # rounded down, as published DETR does
        ((480, 640), (800, 1066)),
        ((2000, 500), (1332, 333)),
        ((800, 800), (800, 800)),
        ((10_000, 1), (1333, 1)),
    ],
)
def test_detection_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    preprocessing = DetectionPreprocessing(shortest_edge=800, longest_edge=1333, **CHANNELS)
    assert detection_size(*size, preprocessing) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 900), st.integers(0, 900))
def test_detection_size_keeps_the_aspect_ratio_within_bounds(
    width: int, height: int, shortest: int, extra: int
) -> None:
    longest = shortest + extra
    preprocessing = DetectionPreprocessing(shortest_edge=shortest, longest_edge=longest, **CHANNELS)
    new_width, new_height = detection_size(width, height, preprocessing)
    assert 1 <= min(new_width, new_height) <= shortest
    assert max(new_width, new_height) <= longest
    scale = min(shortest / min(width, height), longest / max(width, height))
    assert abs(min(new_width, new_height) - min(width, height) * scale) <= 1
    rounded_down = int(min(new_width, new_height) * max(width, height) / min(width, height))
    assert max(new_width, new_height) == min(rounded_down, longest)


def test_detection_pixels_have_the_detection_size() -> None:
    preprocessing = DetectionPreprocessing(shortest_edge=32, longest_edge=64, **CHANNELS)
    assert to_detection_pixels(smooth(100, 80), preprocessing).shape == (32, 40, 3)
    image = smooth(64, 32)
    np.testing.assert_array_equal(to_detection_pixels(image, preprocessing), np.asarray(image))


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5))
def test_pad_and_stack(shapes: list[tuple[int, int]]) -> None:
    random = np.random.default_rng(0)
    images: list[NDArray[np.uint8]] = [random.integers(1, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    pixels, sizes = pad_and_stack(images)
    assert (pixels.dtype, sizes.dtype) == (np.uint8, np.int64)
    assert pixels.shape == (len(shapes), max(h for h, _ in shapes), max(w for _, w in shapes), 3)
    assert sizes.tolist() == [list(shape) for shape in shapes]
    for stacked, image, (height, width) in zip(pixels, images, shapes, strict=True):
        np.testing.assert_array_equal(stacked[:height, :width], image)
        assert np.count_nonzero(stacked) == image.size


def test_broken_rows_of_a_tiff_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    data, height = b"\x55" * 10_000, 500
    tags = [(256, 48), (257, height), (258, 1), (259, 4), (262, 0), (273, 8), (277, 1), (278, height), (279, len(data))]
    directory = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
    file = b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + directory + bytes(4)
    decode(file)
    assert capfd.readouterr().err == ""


def test_an_encoded_image_tells_its_size_before_it_is_decoded() -> None:
    image = Image.new("RGB", (64, 48), "red")
    png, jpeg = (EncodedImage(encode(image, form)) for form in ("PNG", "JPEG"))
    assert png.pixels == 64 * 48
    assert 0 < jpeg.decode_seconds < png.decode_seconds < 0.001
    assert png.decode().image.tobytes() == image.tobytes()


def test_the_time_for_decoding_grows_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrine.bundle.images._BASE_SECONDS", 0.1)
    size = 2_000, 1_000
    data = encode(Image.new("P", size), "BMP")
    start, header = int.from_bytes(data[10:14], "little"), bytearray(data)
    header[30] = 1  # run lengths, which Pillow decodes in Python
    body = bytes(header[:start]) + b"\1\0" * (size[0] * size[1])
    with pytest.raises(ImageTooLargeError, match=r"0\.3 seconds of decoding"):
        EncodedImage(body).decode()
