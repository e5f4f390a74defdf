"""Pictures of every format, and seeded mutations of them."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

_SIZE = (48, 40)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def make_pictures() -> dict[str, bytes]:
    """Return a small picture of each format, compression and colour mode."""
    noise = np.random.default_rng(0).normal(0, 20, (_SIZE[1], _SIZE[0], 3))
    slope = np.linspace(40, 210, _SIZE[0])[None, :, None] * np.array([1.0, 0.7, 0.4])
    image = Image.fromarray((noise + slope).clip(0, 255).astype(np.uint8))
    frames = [image.transpose(operation) for operation in (0, 1, 3)]  # type: ignore[arg-type]
    exif = Image.Exif()
    exif[0x0112] = 6
    cases: dict[str, tuple[Image.Image, str, Mapping[str, object]]] = {
        "jpeg": (image, "JPEG", {"exif": exif, "icc_profile": bytes(range(256))}),
        "jpeg-progressive": (image, "JPEG", {"progressive": True}),
        "jpeg-grey": (image.convert("L"), "JPEG", {"restart_marker_rows": 1}),
        "jpeg-cmyk": (image.convert("CMYK"), "JPEG", {}),
        "mpo": (image, "MPO", {"save_all": True, "append_images": frames}),
        "png": (image, "PNG", {"exif": exif}),
        "png-palette": (image.quantize(16), "PNG", {"transparency": 3}),
        "png-16-bit": (image.convert("L").convert("I;16"), "PNG", {}),
        "png-alpha": (image.convert("RGBA"), "PNG", {}),
        "png-animated": (image, "PNG", {"save_all": True, "append_images": frames}),
        "webp": (image, "WEBP", {"exif": exif}),
        "webp-lossless": (image.convert("RGBA"), "WEBP", {"lossless": True}),
        "webp-animated": (image, "WEBP", {"save_all": True, "append_images": frames}),
        "gif": (image.quantize(32), "GIF", {}),
        "gif-animated": (image.quantize(32), "GIF", {"save_all": True, "append_images": frames}),
        "bmp": (image, "BMP", {}),
        "bmp-palette": (image.quantize(16), "BMP", {}),
        "tiff": (image, "TIFF", {}),
        "tiff-group4": (image.convert("1"), "TIFF", {"compression": "group4"}),
        "avif": (image, "AVIF", {"exif": exif}),
        "avif-animated": (image, "AVIF", {"save_all": True, "append_images": frames}),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        cases[f"tiff-{compression}"] = (image, "TIFF", {"compression": compression})
    pictures = {}
    for name, (picture, form, options) in cases.items():
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        pictures[name] = buffer.getvalue()
    pictures["bmp-rle8"] = _rle8_bitmap()
    return pictures


def make_png(width: int, height: int, *, chunks: int = 0, empty: bool = False) -> bytes:
    """Return a grey PNG of zeros, with as many short text chunks before its data; `empty`: without data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return len(data).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = b"" if empty else zlib.compress(bytes((width + 1) * height), 9)
    parts = (chunk(b"IHDR", header), chunk(b"tEXt", b"a\0b") * chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _rle8_bitmap() -> bytes:
    """A bitmap of 16 x 8 pixels in run-length encoding, which Pillow only reads."""
    rows = b"".join(bytes((8, row, 8, 255 - row)) + b"\0\0" for row in range(8)) + b"\0\1"
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, 16, 8, 1, 8, 1, len(rows), 2835, 2835, 256, 0)
    offset = 14 + len(info) + len(palette)
    return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + info + palette + rows


class Mutator:
    """Mutations of pictures; the same seed and number always give the same bytes."""

    def __init__(self, seed: int, pictures: Mapping[str, bytes]) -> None:
        self.seed, self._pictures, self._names = seed, pictures, sorted(pictures)

    def make(self, number: int) -> tuple[str, bytes]:
        """Return the mutation of that number, and a name for it: picture and kinds of change."""
        chance = random.Random(f"{self.seed}:{number}")
        name = self._names[number % len(self._names)]
        data, kinds = self._pictures[name], []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            kind = chance.choice(list(_CHANGES))
            kinds.append(kind)
            other = self._pictures[chance.choice(self._names)]
            data = _CHANGES[kind](data, other, chance) or data[:1]
        if data.startswith(_PNG_SIGNATURE) and chance.random() < 0.7:
            data = _correct_checksums(data)
        return f"{name}: {', '.join(kinds)}", data


_Change = Callable[[bytes, bytes, random.Random], bytes]


def _flip_bits(data: bytes, other: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _set_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    length = chance.choice((1, 2, 4, 16, 64))
    filling = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80", None))
    block = chance.randbytes(length) if filling is None else filling * length
    return (data[:start] + block + data[start + length :])[: len(data)]


def _truncate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(1, len(data) + 1)]


def _splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(1, len(data) + 1)] + other[chance.randrange(len(other)) :]


def _cut(data: bytes, other: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice((1, 2, 4, 100)) :]


def _repeat(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Repeat a chunk of the format, or any block, up to a thousand times."""
    blocks = _chunks(data) or [(0, len(data))]
    start, end = chance.choice(blocks)
    if chance.random() < 0.3 or len(blocks) == 1:
        start = chance.randrange(len(data))
        end = min(len(data), start + chance.choice((1, 8, 64, 512)))
    return data[:end] + data[start:end] * chance.choice((1, 2, 10, 1000)) + data[end:]


def _swap(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Change the order of the format's chunks."""
    blocks = [data[start:end] for start, end in _chunks(data)]
    tail = data[sum(map(len, blocks)) :]
    head = blocks[:1]
    rest = blocks[1:]
    chance.shuffle(rest)
    return b"".join([*head, *rest]) + tail


def _set_number(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Write an edge of its range into a field of 2 or 4 bytes, mostly in the headers, in either byte order."""
    size = min(chance.choice((2, 4, 4)), len(data))
    limit = chance.choice((64, 512, len(data)))
    start = chance.randrange(max(1, min(limit, len(data) - size + 1)))
    number = chance.choice(_NUMBERS) & (256**size - 1)
    return data[:start] + number.to_bytes(size, chance.choice(("little", "big"))) + data[start + size :]


_CHANGES: dict[str, _Change] = {
    "bits": _flip_bits,
    "bytes": _set_bytes,
    "truncated": _truncate,
    "spliced": _splice,
    "cut": _cut,
    "repeated": _repeat,
    "swapped": _swap,
    "number": _set_number,
}


def _chunks(data: bytes) -> list[tuple[int, int]]:
    """Return where the chunks of a PNG, a JPEG or a RIFF file start and end; for other formats, none."""
    found: list[tuple[int, int]] = []
    if data.startswith(_PNG_SIGNATURE):
        start, found = 8, [(0, 8)]
        while start + 12 <= len(data):
            end = start + 12 + int.from_bytes(data[start : start + 4], "big")
            found.append((start, min(end, len(data))))
            start = end
    elif data.startswith(b"\xff\xd8"):
        start, found = 2, [(0, 2)]
        while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            found.append((start, min(end, len(data))))
            start = end
    elif data.startswith(b"RIFF"):
        start, found = 12, [(0, 12)]
        while start + 8 <= len(data):
            length = int.from_bytes(data[start + 4 : start + 8], "little")
            end = start + 8 + length + length % 2
            found.append((start, min(end, len(data))))
            start = end
    return found


def _correct_checksums(data: bytes) -> bytes:
    """Make the checksums of a PNG's chunks right, so that decoders look at what they protect."""
    changed = bytearray(data)
    for start, end in _chunks(data)[1:]:
        if end - start >= 12:
            changed[end - 4 : end] = zlib.crc32(data[start + 4 : end - 4]).to_bytes(4, "big")
    return bytes(changed)
