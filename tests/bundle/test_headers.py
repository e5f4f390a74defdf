import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from vitrine.bundle import headers
from vitrine.bundle.errors import ImageError, ImageTooLargeError, UndecodableImageError
from vitrine.bundle.images import MAX_PIXELS, decode

EXAMPLES = Path(__file__).parents[2] / "examples"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO")


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack((x % 256, y % 256, (x + y) % 256), axis=-1).astype(np.uint8))


def check(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    form = headers.identify(data)
    assert form is not None
    return headers.check(data, form, max_pixels=max_pixels)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about broken files
        yield


@pytest.mark.parametrize("form", FORMATS)
def test_formats_are_identified(form: str) -> None:
    assert headers.identify(encode(picture(), form)) == ("JPEG" if form == "MPO" else form)


@pytest.mark.parametrize("data", [b"", b"hello", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x20ftypheic", b"\xff\xd8"])
def test_other_data_is_not_identified(data: bytes) -> None:
    assert headers.identify(data) is None


def exif(*, thumbnail: bytes) -> Image.Exif:
    """EXIF with directories of its own, and a thumbnail in one of its tags."""
    result = Image.Exif()
    result[0x010F] = "maker"
    result.get_ifd(0x8769).update({0x829A: 0.5, 0x927C: thumbnail, 0xA005: {1: "R98"}})
    result.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return result


ORDINARY = {
    **{form: encode(picture(), form) for form in FORMATS},
    "one pixel": encode(picture(1, 1), "PNG"),
    "progressive JPEG": encode(picture(), "JPEG", progressive=True),
    "JPEG with 90 segments of a profile": encode(picture(), "JPEG", icc_profile=bytes(5_000_000)),
    "JPEG with restarts": encode(picture(), "JPEG", restart_marker_blocks=1),
    "JPEG of CMYK": encode(picture().convert("CMYK"), "JPEG"),
    "large JPEG": encode(Image.new("RGB", (7_000, 7_000)), "JPEG"),
    "large progressive JPEG": encode(Image.new("RGB", (6_000, 6_000)), "JPEG", progressive=True, subsampling=0),
    "JPEG as wide as may be": encode(Image.new("L", (65_500, 8)), "JPEG"),
    "animated PNG": encode(picture(), "PNG", save_all=True, append_images=[picture()] * 20),
    "animated WebP": encode(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)] * 20),
    "lossless WebP": encode(picture(), "WEBP", lossless=True),
    "WebP with alpha": encode(picture().convert("RGBA"), "WEBP"),
    "animated GIF": encode(picture(), "GIF", save_all=True, append_images=[picture().rotate(180)] * 20),
    "GIF with a comment": encode(picture(), "GIF", comment=bytes(200_000)),
    "AVIF with alpha": encode(picture().convert("RGBA"), "AVIF"),
    "AVIF of frames": encode(picture(), "AVIF", save_all=True, append_images=[picture().rotate(180)] * 20),
    "AVIF with trailing bytes": encode(picture(), "AVIF") + b"trailing bytes",
    "AVIF with EXIF": encode(picture(), "AVIF", exif=exif(thumbnail=b"")),
    "AVIF of frames with EXIF": encode(
        picture(), "AVIF", save_all=True, append_images=[picture()] * 3, exif=exif(thumbnail=b"")
    ),
    "JPEG with a thumbnail": encode(picture(), "JPEG", exif=exif(thumbnail=encode(picture(), "JPEG"))),
    "TIFF with EXIF": encode(picture(), "TIFF", exif=exif(thumbnail=b"")),
    "large AVIF": encode(Image.new("RGB", (6_000, 4_000)), "AVIF", speed=10),
    "TIFF of many strips": encode(Image.new("L", (8, 60_000)), "TIFF", tiffinfo={278: 1}),
    "TIFF of pages": encode(picture(), "TIFF", save_all=True, append_images=[picture()] * 20),
    "BigTIFF": encode(picture(), "TIFF", big_tiff=True),
    "BigTIFF, LZW": encode(picture(), "TIFF", big_tiff=True, compression="tiff_lzw"),
    **{
        f"TIFF, {compression}": encode(picture(), "TIFF", compression=compression)
        for compression in ("jpeg", "lzma", "packbits", "tiff_adobe_deflate", "tiff_lzw", "zstd")
    },
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_images_pass_unchanged(name: str) -> None:
    assert check(ORDINARY[name]) is ORDINARY[name]


@pytest.mark.parametrize("name", [name for name in ORDINARY if "arge" not in name])
def test_ordinary_images_are_decoded(name: str) -> None:
    with Image.open(io.BytesIO(ORDINARY[name])) as image:
        assert decode(ORDINARY[name]).size == image.size


@pytest.mark.parametrize("file", ["blood.jpg", "frog.jpg"])
def test_examples_pass(file: str) -> None:
    data = (EXAMPLES / file).read_bytes()
    assert check(data) is data


@pytest.mark.parametrize("name", [name for name in ORDINARY if "arge" not in name and name != "one pixel"])
def test_max_pixels_is_checked_by_the_headers(name: str) -> None:
    form = headers.identify(ORDINARY[name])
    if form != "PNG":  # Pillow allocates nothing before the size is known
        with pytest.raises(ImageTooLargeError, match="at most 200 pixels are accepted"):
            check(ORDINARY[name], max_pixels=200)
    with pytest.raises(ImageTooLargeError, match="at most 200 pixels are accepted"):
        decode(ORDINARY[name], max_pixels=200)


@pytest.mark.parametrize("size", [1_024, 8_192])
def test_png_in_small_chunks(size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1_000, 1_000, 3), dtype=np.uint8)
    plain = encode(Image.fromarray(noise), "PNG")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise), 0)
    parts = b"".join(chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size))
    data = plain[: plain.index(b"IDAT") - 4] + parts + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(decode(data)), noise)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("megabytes", [0.001, 6])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
def test_png_texts_and_profiles_of_any_size(kind: str, megabytes: float, place: str) -> None:
    text = bytes(b % 251 + 1 for b in range(1_000)) * round(megabytes * 1_000)
    content = {
        "zTXt": b"key\0\0" + zlib.compress(text),
        "iTXt": b"key\0\1\0\0\0" + zlib.compress(b"a" * len(text)),
        "iCCP": b"key\0\0" + zlib.compress(text),
        "tEXt": b"key\0" + text,
    }[kind]
    plain = encode(picture(), "PNG")
    at = plain.index(b"IDAT") - 4 if place == "before" else plain.index(b"IEND") - 4
    data = plain[:at] + chunk(kind.encode(), content) + plain[at:]
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(picture()))


def test_long_text_with_the_orientation_is_kept() -> None:
    info = PngImagePlugin.PngInfo()
    xmp = '<rdf:Description tiff:Orientation="6"/>' + "".join(f"<a{i * 7919 % 10_007}/>" for i in range(3_000))
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    assert decode(encode(picture(64, 48), "PNG", pnginfo=info)).size == (48, 64)


@pytest.mark.parametrize("edge", [65_535, 65_536])
@pytest.mark.parametrize("upright", [False, True])
def test_edges(edge: int, upright: bool) -> None:
    data = encode(Image.new("L", (8, edge) if upright else (edge, 8)), "PNG")
    if edge <= headers.MAX_EDGE:
        assert max(decode(data).size) == edge
    else:
        with pytest.raises(ImageTooLargeError, match="at most 65535 pixels per edge are accepted, found 65536"):
            decode(data)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 16), (63, 65), (300, 200)])
@pytest.mark.parametrize("sequence", [False, True])
def test_av1_frames_are_measured(width: int, height: int, sequence: bool) -> None:
    options = {"save_all": True, "append_images": [picture(width, height).rotate(180)]} if sequence else {}
    data = encode(picture(width, height), "AVIF", speed=10, **options)
    stated = struct.pack(">II", width, height)
    assert stated in data
    smaller = data.replace(stated, struct.pack(">II", 1, 1))  # the boxes lie: the frames count
    check(smaller, max_pixels=width * height)
    if width * height > 1:
        with pytest.raises(ImageTooLargeError, match="pixels are accepted"):
            check(smaller, max_pixels=width * height - 1)


def test_scans_of_images_that_follow_do_not_count() -> None:
    part = encode(picture(), "JPEG", progressive=True)
    assert check(part * 30)


def test_scans_do_not_hide_behind_a_false_end() -> None:
    data = encode(picture(), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = segment(0xFE, b"\xff\xd9") + segment(0xDA, b"\1\1\0\1\x3f\0") + b"\0"
    with pytest.raises(ImageTooLargeError, match="at most 100 scans are accepted, found 101"):
        check(data[:start] + scan * 200 + data[start:])


def test_jpeg_of_two_frame_headers() -> None:
    data = encode(picture(), "JPEG")
    start = data.index(b"\xff\xc0")
    header = data[start : start + 19]
    assert check(data[:start] + header + data[start + 19 :]) == data
    with pytest.raises(UndecodableImageError, match="it has two frame headers"):
        check(data[:start] + header + data[start:])


def test_jpeg_with_a_long_frame_header() -> None:
    data = encode(picture(), "JPEG")
    start = data.index(b"\xff\xc0") + 2
    longer = struct.pack(">H", 20) + data[start + 2 : start + 17] + b"\1\x11\0"
    with pytest.raises(UndecodableImageError, match="its frame header has a wrong length"):
        check(data[:start] + longer + data[start + 17 :])


def test_avif_of_two_tables() -> None:
    data = encode(picture(), "AVIF").replace(b"hdlr", b"idat").replace(b"pitm", b"idat")
    with pytest.raises(UndecodableImageError, match="it has two boxes b'idat'"):
        check(data)


def test_memory_is_estimated() -> None:
    canvas = b"\2\0\0\0" + (6_999).to_bytes(3, "little") * 2
    data = b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0" + canvas
    with pytest.raises(ImageTooLargeError, match="bytes of memory are accepted"):
        check(data)


SEEDS = list(ORDINARY.values())


@given(
    st.sampled_from([seed for seed in SEEDS if len(seed) < 100_000]),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
@settings(max_examples=400, deadline=None)
def test_any_corruption_is_an_image_error_at_most(
    seed: bytes, kept: float, changes: list[tuple[float, int]], near: int
) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * min(len(data), near + 12))] = value
    for damaged in (bytes(data), bytes(data[: round(kept * len(data))])):
        form = headers.identify(damaged)
        if form is None:
            continue
        try:
            headers.check(damaged, form, max_pixels=100_000)
        except ImageError:
            continue
