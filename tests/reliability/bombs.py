"""Small images that ask for much work or memory: for each a name, the bytes, and what decoding must answer.

`BOMBS` maps a name to a `Bomb`. Most are written byte by byte, as no encoder makes them.
"""

import io
import json
import os
import re
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitrine.bundle.errors import ImageError
from vitrine.bundle.images import decode

TOO_LARGE = frozenset({"too_large"})
BROKEN = frozenset({"undecodable_image"})
DECODED = frozenset({"decoded"})
ENDED = TOO_LARGE | BROKEN


class Bomb(NamedTuple):
    """How to make it, and the possible outcomes: codes of errors, or `decoded` if its cost is ordinary."""

    make: Callable[[], bytes]
    outcomes: frozenset[str]
    slow: bool = False  # takes seconds, or is slow to make


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# BMP


def bmp(width: int, height: int, bits: int, compression: int, pixels: bytes) -> bytes:
    palette = b"".join(bytes((i, 255 - i, 7, 0)) for i in range(1 << bits))
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + palette + pixels


def rle(width: int, height: int, code: bytes, *, four: bool = False, count: int | None = None) -> Bomb:
    repeats = height if count is None else count
    outcomes = DECODED | ENDED if width * height <= 2**21 else TOO_LARGE
    bits, compression = (4, 2) if four else (8, 1)
    return Bomb(
        lambda: bmp(width, height, bits, compression, code * repeats + b"\0\1"), outcomes, slow=outcomes != TOO_LARGE
    )


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def jpeg_start(width: int, height: int, *, components: int = 1, marker: int = 0xC2, factors: int = 0x11) -> bytes:
    parts = b"".join(bytes((i + 1, factors if i == 0 else 0x11, 0)) for i in range(components))
    tables = segment(0xDB, bytes(1) + bytes([1] * 64))
    # One code, for "no coefficient left" (or, progressively, a run of 2^14 blocks without any).
    tables += b"".join(
        segment(0xC4, bytes((place, 1, *[0] * 15, symbol))) for place, symbol in ((0x00, 0), (0x10, 0xE0))
    )
    return b"\xff\xd8" + tables + segment(marker, struct.pack(">BHHB", 8, height, width, components) + parts)


def jpeg_scan(first: int, last: int, low: int = 0, *, components: tuple[int, ...] = (1,)) -> bytes:
    chosen = bytes([len(components)]) + b"".join(bytes((c, 0)) for c in components)
    return segment(0xDA, chosen + bytes((first, last, low))) + b"\0"


def jpeg_scans(width: int, height: int, scans: int, *, components: int = 1, hidden: bytes = b"") -> bytes:
    names = tuple(range(1, components + 1))
    body = jpeg_scan(0, 0, components=names)
    body += b"".join(hidden + jpeg_scan(1, 63, components=(1 + i % components,)) for i in range(scans - 1))
    return jpeg_start(width, height, components=components) + body + b"\xff\xd9"


def jpeg_with(extra: bytes, **options: object) -> bytes:
    plain = encode(Image.new("RGB", (64, 64), "red"), "JPEG", **options)
    return plain[:2] + extra + plain[2:]


def exif(entries: list[tuple[int, int, int, int]], *, tail: bytes = b"", following: int = 0) -> bytes:
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + body + struct.pack("<L", following) + tail


def jpeg_exif(content: bytes) -> bytes:
    return jpeg_with(segment(0xE1, b"Exif\0\0" + content[:65_000]))


def many_exif_segments() -> bytes:
    return jpeg_with(b"".join(segment(0xE1, b"Exif\0\0" + bytes(65_000)) for _ in range(250)))


def repeated_frame_headers() -> bytes:
    """Frame headers of 64 kB each."""
    return jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 64, 64, 3) + bytes((1, 0x11, 0)) * 21_800) * 300)


def arithmetic(scans: int) -> bytes:
    return jpeg_start(7_064, 7_064, marker=0xCA) + jpeg_scan(0, 0) + jpeg_scan(1, 63) * (scans - 1) + b"\xff\xd9"


def mpo(frames: int) -> bytes:
    image = Image.new("RGB", (16, 16), "red")
    return encode(image, "MPO", save_all=True, append_images=[image] * (frames - 1))


# PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    *,
    bits: int = 8,
    colour: int = 0,
    interlaced: bool = False,
    extra: bytes = b"",
    rows: int = -1,
) -> bytes:
    """A PNG of zeros, with `extra` before the pixels, of which there may be only some `rows`."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (width * bits * channels + 7) // 8
    squeeze = zlib.compressobj(9)
    pixels = squeeze.compress(b"")
    rows = height if rows < 0 else rows
    each = max(1, 2**22 // row)
    for top in range(0, rows, each):
        pixels += squeeze.compress(bytes(row * min(each, rows - top)))
    pixels += squeeze.compress(bytes(row * 8 if interlaced else 0)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(range(256))) if colour == 3 else b""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette
    return start + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb(kind: bytes, megabytes: int) -> bytes:
    squeeze = zlib.compressobj(9)
    packed = b"".join(squeeze.compress(bytes(2**20)) for _ in range(megabytes)) + squeeze.flush()
    before = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return chunk(kind, before + packed)


def many_text_bombs() -> bytes:
    """Texts of 1 MB each, below the size at which they are left out."""
    return png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(960_000), 9)) * 10_000)


def split_png(size: int) -> bytes:
    """A PNG whose pixels are in chunks of `size` bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    plain = encode(Image.fromarray(noise), "PNG")
    begin = plain.index(b"IDAT") - 4
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))
    parts = b"".join(chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size))
    return plain[:begin] + parts + chunk(b"IEND", b"")


# GIF


def gif(
    screen: tuple[int, int], frame: tuple[int, int], *, before: bytes = b"", place: tuple[int, int] = (0, 0)
) -> bytes:
    palette = bytes(range(6))
    start = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette
    picture = b"," + struct.pack("<HHHHB", *place, *frame, 0) + b"\x02\x02\x44\x01\x00"
    return start + before + picture + b";"


# WebP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(k + struct.pack("<I", len(c)) + c + bytes(len(c) & 1) for k, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas(width: int, height: int, frames: int, *, inner: bytes | None = None) -> bytes:
    """An animation of 16 x 16 frames on a canvas."""
    plain = inner or encode(Image.new("RGB", (16, 16), "red"), "WEBP")
    picture = plain[12:]
    frame = (
        (0).to_bytes(3, "little") * 2 + (15).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + picture
    )
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff((b"VP8X", b"\x02\0\0\0" + size), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * frames)


# TIFF


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes = b"", *, big: bool = False, endian: str = "<") -> bytes:
    """A TIFF whose pixels are at offset 16; a tag maps to its type and values."""
    codes = {1: "B", 2: "B", 3: "H", 4: "L", 5: "LL", 7: "B", 16: "Q"}
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
    inline = 8 if big else 4
    where = 16 + len(data) + (len(data) & 1)
    mark = b"II" if endian == "<" else b"MM"
    number = struct.pack(endian + "H", 43 if big else 42)
    start = (
        mark
        + number
        + (struct.pack(endian + "HHQ", 8, 0, where) if big else struct.pack(endian + "L", where) + bytes(8))
    )
    after = where + (8 if big else 2) + len(tags) * (20 if big else 12) + inline
    entries, values_after = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{endian}{len(values)}{codes[kind][0]}", *values)
        count = len(packed) // sizes[kind]
        if len(packed) > inline:
            place = struct.pack(endian + ("Q" if big else "L"), after + len(values_after))
            values_after += packed
        else:
            place = packed.ljust(inline, b"\0")
        entries += struct.pack(endian + ("HHQ" if big else "HHL"), tag, kind, count) + place
    directory = struct.pack(endian + ("Q" if big else "H"), len(tags)) + entries + bytes(inline)
    return start + data + bytes(len(data) & 1) + directory + values_after


def grey(
    width: int, height: int, compression: int = 1, **more: tuple[int, list[int]]
) -> dict[int, tuple[int, list[int]]]:
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [compression]), 262: (3, [1]), 277: (3, [1])}
    return tags | {int(name[1:]): value for name, value in more.items()}


def strips(count: int, *, compression: int = 1, big: bool = False) -> bytes:
    where, size = (16 if big else 4), [16] * count
    return tiff(
        grey(1, count, compression, t273=(where, size), t278=(3, [1]), t279=(4, [1] * count)), b"\0" * 16, big=big
    )


def tile(width: int, height: int, tile_width: int, tile_height: int, **more: tuple[int, list[int]]) -> bytes:
    packed = zlib.compress(bytes(min(tile_width * tile_height, 2**24)), 9)
    count = -(-width // tile_width) * -(-height // tile_height)
    return tiff(
        grey(
            width,
            height,
            8,
            t322=(4, [tile_width]),
            t323=(4, [tile_height]),
            t324=(4, [16] * count),
            t325=(4, [len(packed)] * count),
            **more,
        ),
        packed,
    )


def one_strip(width: int, height: int, packed: bytes, compression: int, **more: tuple[int, list[int]]) -> bytes:
    return tiff(
        grey(width, height, compression, t273=(4, [16]), t278=(4, [height]), t279=(4, [len(packed)]), **more), packed
    )


def hidden_tile(count: int) -> bytes:
    """Tiles that the file calls strips, all at the same place, each far larger than the image."""
    packed = zlib.compress(bytes(2**26), 9)
    places, sizes = (4, [16] * count), (4, [len(packed)] * count)
    return tiff(grey(16, 65_535, 8, t273=places, t279=sizes, t322=(4, [2**22]), t323=(4, [16])), packed)


def jpeg_strip(picture: bytes, *, sizes: dict[int, tuple[int, list[int]]]) -> bytes:
    """A TIFF of one strip, whose size `sizes` states or not."""
    return tiff(grey(7_064, 7_064, 7, t273=(4, [16]), t278=(4, [7_064])) | sizes, picture)


FRACTIONS = 2_000_000
DIRECTORIES = 8 + 8 * FRACTIONS  # where those of `fractions` begin, 200 bytes each


def fractions(*directories: list[tuple[int, int, int, int]], missing: int = 0) -> bytes:
    """A TIFF with these tags in its directories, of which the first is the image's.

    The last one has many fractions, too, and ends with the file, where tags may be missing.
    """
    plain = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    every = [[*plain, *directories[0]], *directories[1:]]
    every[-1] = [*every[-1], (282, 5, FRACTIONS, 8)]
    data = b"II*\0" + struct.pack("<L", DIRECTORIES) + struct.pack("<LL", 1, 1) * FRACTIONS
    for index, entries in enumerate(every):
        data = data.ljust(DIRECTORIES + 200 * index, b"\0") + struct.pack("<H", len(entries) + missing)
        data += b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return data


def shared_jpeg_strips(scans: int) -> bytes:
    """Strips that all are the same JPEG of many scans."""
    picture = jpeg_scans(4096, 4096, scans)
    tags = grey(4096, 8192, 7, t273=(4, [16, 16]), t278=(4, [4096]), t279=(4, [len(picture)] * 2))
    return tiff(tags, picture)


def loop() -> bytes:
    """A directory that follows itself, with EXIF that is itself, too."""
    data = tiff(
        grey(4, 4, t273=(4, [16]), t278=(3, [4]), t279=(4, [16]), t34665=(4, [32]), t34853=(4, [32])), bytes(16)
    )
    entries = data.rindex(b"", 0, len(data)) - 4
    return data[:entries] + struct.pack("<L", 32)


def compressed_tiff(compression: str) -> bytes:
    mode = "1" if compression in ("group3", "group4", "tiff_ccitt") else "RGB"
    return encode(Image.new(mode, (3_000, 2_000)), "TIFF", compression=compression)


# AVIF


def box(kind: bytes, content: bytes, version: int | None = None) -> bytes:
    full = b"" if version is None else bytes((version, 0, 0, 0))
    return struct.pack(">I", 8 + len(full) + len(content)) + kind + full + content


def bits(*fields: tuple[int, int]) -> bytes:
    """Pack (value, number of bits) fields, and a final one-bit as AV1's units have it."""
    text = "".join(f"{value:0{count}b}" for value, count in fields) + "1"
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


def av1_unit(kind: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while True:
        length += bytes([size & 127 | (128 if size > 127 else 0)])
        size >>= 7
        if not size:
            return bytes([kind << 3 | 2]) + length + content


def sequence_header(width: int, height: int) -> bytes:
    return av1_unit(
        1, bits((0, 3), (1, 1), (1, 1), (16, 5), (15, 4), (15, 4), (width - 1, 16), (height - 1, 16), (0, 20))
    )


def avif(stated: tuple[int, int], content: bytes, *, items: int = 1) -> bytes:
    """An AVIF whose box states one size, and whose item contains `content`."""
    ispe = box(b"ispe", struct.pack(">II", *stated), 0)
    av1c = box(b"av1C", b"\x81\x00\x0c\x00")
    pixi = box(b"pixi", b"\x03\x08\x08\x08", 0)
    ftyp = box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    association = b"".join(struct.pack(">HBBBB", i + 1, 3, 1, 0x82, 3) for i in range(items))
    infos = b"".join(box(b"infe", struct.pack(">HH4sB", i + 1, 0, b"av01", 0), 2) for i in range(items))

    def meta(offset: int) -> bytes:
        locations = b"".join(struct.pack(">HHHII", i + 1, 0, 1, offset, len(content)) for i in range(items))
        return box(
            b"meta",
            box(b"hdlr", bytes(4) + b"pict" + bytes(13), 0)
            + box(b"pitm", struct.pack(">H", 1), 0)
            + box(b"iloc", b"\x44\x00" + struct.pack(">H", items) + locations, 0)
            + box(b"iinf", struct.pack(">H", items) + infos, 0)
            + box(b"iprp", box(b"ipco", ispe + av1c + pixi) + box(b"ipma", struct.pack(">I", items) + association, 0)),
            0,
        )

    offset = len(ftyp) + len(meta(0)) + 8
    return ftyp + meta(offset) + box(b"mdat", content)


HUGE = sequence_header(16_384, 16_384) + av1_unit(6, bytes(20))  # a frame


def avif_exif(size: int) -> bytes:
    """An AVIF whose EXIF has `size` bytes."""
    content = exif([(271, 2, size - 26, 26)], tail=bytes(size - 26))
    return encode(Image.new("RGB", (64, 64), "red"), "AVIF", exif=content)


def avif_decoy() -> bytes:
    """An AVIF with a huge frame in `idat`, before which a harmless one lies in another `idat`."""
    location = struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(HUGE))  # number, in `idat`, file, parts; place and size
    meta = (
        box(b"iloc", b"\x44\x00" + struct.pack(">H", 1) + location, 1)
        + box(b"iinf", struct.pack(">H", 1) + box(b"infe", struct.pack(">HH4sB", 1, 0, b"av01", 0), 2), 0)
        + box(b"idat", HUGE)
    )
    decoy = box(b"moov", box(b"idat", av1_unit(2, b"") * 10))
    return box(b"ftyp", b"avif\0\0\0\0avifmif1miaf") + decoy + box(b"meta", meta, 0)


def track(*tables: bytes) -> bytes:
    return box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", b"".join(tables)))))


def avif_tracks() -> bytes:
    """An AVIF with a huge frame in a track, before another track that has a size and no place."""
    ftyp = box(b"ftyp", b"avis\0\0\0\0avis")

    def moov(place: int) -> bytes:
        sizes, places = struct.pack(">III", 0, 1, len(HUGE)), struct.pack(">II", 1, place)
        real = track(box(b"stsz", sizes, 0), box(b"stco", places, 0))
        return box(b"moov", real + track(box(b"stsz", bytes(8), 0)))

    return ftyp + moov(len(ftyp) + len(moov(0)) + 8) + box(b"mdat", HUGE)


def avif_frames(count: int) -> bytes:
    image = Image.new("RGB", (64, 64), "red")
    return encode(image, "AVIF", save_all=True, append_images=[image] * (count - 1), speed=10)


BOMBS: dict[str, Bomb] = {
    "bmp/rle8, 50M x 1": rle(50_000_000, 1, b"\0\0"),
    "bmp/rle8, 1 x 50M": rle(1, 50_000_000, b"\0\0", count=100),
    "bmp/rle8, ends of lines": rle(8_000, 6_250, b"\0\0"),
    "bmp/rle8, edges": rle(65_535, 762, b"\1\1\0\0"),
    "bmp/rle8, deltas": rle(7_000, 7_000, b"\0\2\1\0", count=1_000_000),
    "bmp/rle8, single pixels": rle(7_000, 7_000, b"\1\1", count=5_000_000),
    "bmp/rle4, runs": rle(8_000, 6_250, b"\xff\x12" * 32 + b"\0\0", four=True),
    "bmp/rle4, literals": rle(8_000, 6_250, (b"\0\xfe" + b"\x12" * 127 + b"\0") * 31, four=True, count=2_000),
    "bmp/rle8, 2 MP of single pixels": rle(1_448, 1_448, b"\1\1" * 1_448 + b"\0\0"),
    "bmp/rle8, 2 MP of deltas": rle(1_448, 1_448, b"\0\2\1\0" * 1_447 + b"\0\0"),
    "bmp/rle8, 2 MP, ends of lines": rle(32, 65_535, b"\0\0"),
    "bmp/rle4, 2 MP of literals": rle(1_448, 1_448, (b"\0\xfe" + b"\x12" * 127 + b"\0") * 6, four=True),
    "bmp/header alone": Bomb(lambda: bmp(7_000, 7_000, 8, 0, b""), BROKEN),
    "jpeg/350 scans, 50 MP": Bomb(lambda: jpeg_scans(7_064, 7_064, 350), TOO_LARGE),
    "jpeg/99 scans, 50 MP": Bomb(lambda: jpeg_scans(7_064, 7_064, 99), TOO_LARGE),
    "jpeg/60 scans, 50 MP": Bomb(lambda: jpeg_scans(7_064, 7_064, 60), DECODED, slow=True),
    "jpeg/13 scans of colours, 50 MP": Bomb(
        lambda: jpeg_scans(7_064, 7_064, 13, components=3), TOO_LARGE | DECODED, slow=True
    ),
    "jpeg/scans, CMYK, 50 MP": Bomb(lambda: jpeg_scans(7_064, 7_064, 10, components=4), DECODED | ENDED, slow=True),
    "jpeg/1000 scans, small": Bomb(lambda: jpeg_scans(64, 64, 1_000), TOO_LARGE),
    "jpeg/scans behind a false end": Bomb(
        lambda: jpeg_scans(7_064, 7_064, 350, hidden=segment(0xFE, b"\xff\xd9\xff\xd9")), TOO_LARGE
    ),
    "jpeg/scans, 65500 x 760": Bomb(lambda: jpeg_scans(65_500, 760, 300), TOO_LARGE),
    "jpeg/arithmetic coding, 50 MP": Bomb(
        lambda: jpeg_start(7_064, 7_064, marker=0xC9) + jpeg_scan(0, 63) + b"\xff\xd9", DECODED | ENDED, slow=True
    ),
    "jpeg/arithmetic coding, 350 scans": Bomb(lambda: arithmetic(351), TOO_LARGE),
    "jpeg/arithmetic coding, 14 scans": Bomb(lambda: arithmetic(14), TOO_LARGE),
    "jpeg/arithmetic coding, 13 scans": Bomb(lambda: arithmetic(13), DECODED | ENDED, slow=True),
    "jpeg/300 frame headers of 64 kB": Bomb(repeated_frame_headers, BROKEN),
    "jpeg/a frame header of 64 kB": Bomb(
        lambda: jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 64, 64, 3) + bytes(65_000))), BROKEN
    ),
    "jpeg/restarts": Bomb(
        lambda: jpeg_with(segment(0xDD, b"\0\1")) + b"".join(bytes((0xFF, 0xD0 + i % 8)) for i in range(500_000)),
        DECODED | ENDED,
    ),
    "jpeg/65535 segments": Bomb(lambda: jpeg_with(segment(0xE5, b"") * 65_535), DECODED),
    "jpeg/a million segments": Bomb(lambda: jpeg_with(segment(0xE5, b"") * 1_000_000), TOO_LARGE),
    "jpeg/fill bytes": Bomb(lambda: jpeg_with(b"\xff" * 19_000_000), TOO_LARGE),
    "jpeg/junk": Bomb(lambda: jpeg_with(segment(0xE5, b"") + b"\1" * 19_000_000), TOO_LARGE),
    "jpeg/escaped data between scans": Bomb(
        lambda: jpeg_scans(64, 64, 2, hidden=b"\xff\0" * 9_000_000 + b"\xff\xda" * 101), ENDED
    ),
    "jpeg/filled data between scans": Bomb(
        lambda: jpeg_scans(64, 64, 2, hidden=b"\xff" * 18_000_000 + b"\xff\xda" * 101), ENDED, slow=True
    ),
    "jpeg/escaped junk": Bomb(lambda: jpeg_with(b"\xff\0" * 9_000_000), TOO_LARGE),
    "jpeg/250 EXIF segments": Bomb(many_exif_segments, TOO_LARGE),
    "jpeg/EXIF of 5000 tags": Bomb(lambda: jpeg_exif(exif([(1_000 + i, 3, 1, 0) for i in range(5_000)])), DECODED),
    "jpeg/EXIF orientation of many fractions": Bomb(
        lambda: jpeg_exif(exif([(0x0112, 5, 8_000, 26)], tail=bytes(64_000))), DECODED
    ),
    "jpeg/EXIF that follows itself": Bomb(
        lambda: jpeg_exif(exif([(0x8769, 4, 1, 8), (0x0112, 3, 1, 99)], following=8)), DECODED
    ),
    "jpeg/EXIF with a huge count": Bomb(lambda: jpeg_exif(exif([(0x0112, 3, 2**32 - 1, 8)])), DECODED),
    "jpeg/XMP": Bomb(
        lambda: jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<tiff:Orientation>" * 3_600)), DECODED
    ),
    "jpeg/Photoshop blocks": Bomb(
        lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\0" + (b"8BIM\4\0\0\0" + bytes(4)) * 5_400) * 290),
        DECODED | ENDED,
        slow=True,
    ),
    "mpo/200 frames": Bomb(lambda: mpo(200), DECODED),
    "png/50M x 1": Bomb(lambda: png(50_000_000, 1, rows=0), TOO_LARGE),
    "png/1 x 50M": Bomb(lambda: png(1, 50_000_000, rows=0), TOO_LARGE),
    "png/65535 x 762": Bomb(lambda: png(65_535, 762, colour=6), DECODED, slow=True),
    "png/762 x 65535": Bomb(lambda: png(762, 65_535, bits=16), DECODED, slow=True),
    "png/interlaced, 762 x 65535": Bomb(lambda: png(762, 65_535, interlaced=True), DECODED | ENDED, slow=True),
    "png/palette with alpha": Bomb(lambda: png(7_000, 7_000, colour=3), DECODED, slow=True),
    "png/breaks at the end": Bomb(lambda: png(7_000, 7_000)[:-30], BROKEN),
    "png/a million chunks": Bomb(lambda: png(8, 8, extra=chunk(b"teSt", b"") * 1_000_000), TOO_LARGE),
    "png/a million empty IDAT": Bomb(lambda: png(8, 8, extra=chunk(b"IDAT", b"") * 1_000_000), TOO_LARGE),
    "png/90,000 chunks": Bomb(lambda: png(8, 8, extra=chunk(b"teSt", b"1234") * 90_000), DECODED, slow=True),
    "png/pixels in chunks of 8 bytes": Bomb(lambda: split_png(8), DECODED),
    "png/zTXt of 20 MB": Bomb(lambda: png(8, 8, extra=text_bomb(b"zTXt", 20)), DECODED),
    "png/iTXt of 20 MB": Bomb(lambda: png(8, 8, extra=text_bomb(b"iTXt", 20)), DECODED),
    "png/iCCP of 20 MB": Bomb(lambda: png(8, 8, extra=text_bomb(b"iCCP", 20)), DECODED),
    "png/10,000 texts of 1 MB": Bomb(many_text_bombs, ENDED),
    "png/10,000 profiles of 1 MB": Bomb(
        lambda: png(8, 8, extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(960_000), 9)) * 10_000), ENDED
    ),
    "png/eXIf of 2 MB": Bomb(lambda: png(8, 8, extra=chunk(b"eXIf", bytes(2**21))), TOO_LARGE),
    "gif/large screen, small frame": Bomb(lambda: gif((65_535, 65_535), (1, 1)), TOO_LARGE),
    "gif/small screen, large frame": Bomb(lambda: gif((1, 1), (60_000, 60_000)), TOO_LARGE),
    "gif/small screen, distant frame": Bomb(lambda: gif((1, 1), (1, 1), place=(65_535, 1)), TOO_LARGE),
    "gif/50 MP without data": Bomb(lambda: gif((7_000, 7_000), (7_000, 7_000)), DECODED | ENDED),
    "gif/a million extensions": Bomb(lambda: gif((4, 4), (4, 4), before=b"!\xfe\0" * 1_000_000), TOO_LARGE),
    "gif/a million blocks of a comment": Bomb(
        lambda: gif((4, 4), (4, 4), before=b"!\xfe" + b"\1a" * 1_000_000 + b"\0"), TOO_LARGE
    ),
    "gif/a million blocks of an application": Bomb(
        lambda: gif((4, 4), (4, 4), before=b"!\xff" + b"\1a" * 1_000_000 + b"\0"), TOO_LARGE
    ),
    "gif/junk": Bomb(lambda: gif((4, 4), (4, 4), before=b"\1" * 10_000_000), TOO_LARGE),
    "gif/10,000 frames": Bomb(
        lambda: gif((4, 4), (4, 4))[:-1] + gif((4, 4), (4, 4))[19:-1] * 10_000 + b";", DECODED | ENDED
    ),
    "webp/large canvas, small frame": Bomb(lambda: webp_canvas(16_383, 16_383, 1), TOO_LARGE),
    "webp/2^24 x 2^24": Bomb(lambda: webp_canvas(2**24, 2**24, 1), TOO_LARGE),
    "webp/50M x 1": Bomb(lambda: webp_canvas(2**24, 2, 1), TOO_LARGE),
    "webp/36 MP canvas, small frame": Bomb(lambda: webp_canvas(6_000, 6_000, 1), DECODED | ENDED, slow=True),
    "webp/50,000 frames": Bomb(lambda: webp_canvas(64, 64, 50_000), DECODED | ENDED),
    "webp/200,000 frames": Bomb(lambda: webp_canvas(64, 64, 200_000), TOO_LARGE),
    "webp/a million chunks": Bomb(
        lambda: riff((b"VP8X", b"\0\0\0\0" + bytes(6)), *[(b"teSt", b"")] * 1_000_000), TOO_LARGE
    ),
    "webp/lossless, 25 MP": Bomb(
        lambda: encode(Image.new("RGB", (5_000, 5_000)), "WEBP", lossless=True, method=0), DECODED, slow=True
    ),
    "tiff/a million strips": Bomb(lambda: strips(1_000_000), TOO_LARGE),
    "tiff/60,000 strips": Bomb(lambda: strips(60_000), DECODED | ENDED),
    "tiff/60,000 strips, packbits": Bomb(lambda: strips(60_000, compression=32_773), DECODED | ENDED),
    "tiff/a million strips, BigTIFF": Bomb(lambda: strips(1_000_000, big=True), TOO_LARGE),
    "tiff/a million strips for 4 rows": Bomb(
        lambda: tiff(grey(4, 4, t273=(4, [16] * 1_000_000), t278=(3, [1]), t279=(4, [4] * 1_000_000)), bytes(16)),
        TOO_LARGE,
    ),
    "tiff/one huge tile": Bomb(lambda: tile(16, 16, 32_768, 32_768), TOO_LARGE),
    "tiff/one long tile": Bomb(lambda: tile(16, 16, 1_048_576, 16), TOO_LARGE),
    "tiff/tiles called strips": Bomb(lambda: hidden_tile(4_096), TOO_LARGE),
    "tiff/strips and tiles": Bomb(
        lambda: one_strip(16, 16, zlib.compress(bytes(256)), 8, t324=(4, [16]), t325=(4, [9])), BROKEN
    ),
    "tiff/a million tiles": Bomb(
        lambda: tiff(
            grey(16_000, 16, 8, t322=(3, [16]), t323=(3, [16]), t324=(4, [16] * 1_000_000), t325=(4, [4] * 1_000_000))
        ),
        TOO_LARGE,
    ),
    "tiff/60,000 tags": Bomb(
        lambda: tiff(
            grey(4, 4, t273=(4, [16]), t279=(4, [16])) | {40_000 + i % 25_000: (3, [1]) for i in range(25_000)}
        ),
        TOO_LARGE,
    ),
    "tiff/1000 tags": Bomb(
        lambda: tiff(
            grey(4, 4, 8, t273=(4, [16]), t278=(3, [4]), t279=(4, [16])) | {50_900 + i: (3, [1]) for i in range(1_000)},
            zlib.compress(bytes(16)).ljust(16, b"\0"),
        ),
        DECODED | ENDED,
    ),
    "tiff/orientation of a million fractions": Bomb(
        lambda: tiff(grey(4, 4, t273=(4, [16]), t279=(4, [16]), t274=(5, [1] * 2_000_000)), bytes(16)), TOO_LARGE
    ),
    "tiff/fractions in a directory that is cut off": Bomb(lambda: fractions([], missing=1), TOO_LARGE),
    "tiff/one huge tile, and values that are cut off": Bomb(
        lambda: tile(16, 16, 32_768, 32_768, t40965=(4, [0, 0]))[:-4], TOO_LARGE
    ),
    "tiff/fractions in EXIF that is cut off": Bomb(
        lambda: fractions([(34_665, 4, 1, DIRECTORIES + 200)], [], missing=1), TOO_LARGE
    ),
    "tiff/fractions in EXIF of type IFD": Bomb(lambda: fractions([(34_665, 13, 1, DIRECTORIES + 200)], []), TOO_LARGE),
    "tiff/fractions in the interoperability of EXIF": Bomb(
        lambda: fractions(
            [(34_665, 4, 1, DIRECTORIES + 200), (40_965, 4, 1, 0)], [(40_965, 4, 1, DIRECTORIES + 400)], []
        ),
        TOO_LARGE,
    ),
    "tiff/fractions in the second of two EXIFs": Bomb(
        lambda: fractions([(34_665, 99, 1, 0), (34_665, 4, 1, DIRECTORIES + 200)], []), BROKEN
    ),
    "tiff/EXIF at the start of the file": Bomb(
        lambda: tiff(grey(4, 4, t273=(4, [16]), t279=(4, [16]), t34665=(4, [0])), bytes(16)), TOO_LARGE
    ),
    "tiff/bits of four million samples": Bomb(
        lambda: tiff(grey(4, 4, t273=(4, [16]), t279=(4, [16])) | {258: (3, [8] * 4_000_000)}, bytes(16)), TOO_LARGE
    ),
    "tiff/loops": Bomb(loop, DECODED | ENDED),
    "tiff/strip of one JPEG with 90 scans": Bomb(
        lambda: one_strip(7_000, 7_000, jpeg_scans(7_000, 7_000, 90), 7), ENDED
    ),
    "tiff/strips share a JPEG of 90 scans": Bomb(lambda: shared_jpeg_strips(90), ENDED),
    "tiff/JPEG of 90 scans without its size": Bomb(
        lambda: jpeg_strip(jpeg_scans(7_064, 7_064, 90), sizes={}), TOO_LARGE
    ),
    "tiff/JPEG of 90 scans with a size of 0": Bomb(
        lambda: jpeg_strip(jpeg_scans(7_064, 7_064, 90), sizes={279: (4, [0])}), TOO_LARGE
    ),
    "tiff/JPEG that ends within a marker": Bomb(
        lambda: jpeg_strip(jpeg_scans(7_064, 7_064, 2)[:-2], sizes={}) + b"\xff\xc4", BROKEN
    ),
    "tiff/JPEG of 14 scans in arithmetic coding": Bomb(lambda: one_strip(7_064, 7_064, arithmetic(14), 7), TOO_LARGE),
    "tiff/deflate, 762 x 65535": Bomb(
        lambda: one_strip(762, 65_535, zlib.compress(bytes(762 * 65_535), 9), 8), DECODED, slow=True
    ),
    "tiff/deflate without data, 50 MP": Bomb(lambda: one_strip(7_000, 7_000, b"\0" * 16, 8), BROKEN),
    "tiff/header alone, 50 MP": Bomb(lambda: one_strip(7_000, 7_000, b"", 1), BROKEN),
    **{
        f"tiff/{name}, 6 MP": Bomb(lambda name=name: compressed_tiff(name), DECODED | ENDED)  # type: ignore[misc]
        for name in ("group3", "group4", "jpeg", "lzma", "packbits", "tiff_adobe_deflate", "tiff_lzw", "zstd")
    },
    "avif/frame larger than stated": Bomb(
        lambda: avif((16, 16), sequence_header(16_384, 16_384) + av1_unit(6, bytes(20))), TOO_LARGE
    ),
    "avif/stated too large": Bomb(lambda: avif((16_384, 16_384), sequence_header(16, 16)), TOO_LARGE),
    "avif/a thousand frames in an item": Bomb(
        lambda: avif((7_000, 7_000), sequence_header(7_000, 7_000) + av1_unit(6, bytes(20)) * 1_000), TOO_LARGE
    ),
    "avif/a thousand items": Bomb(
        lambda: avif((7_000, 7_000), sequence_header(7_000, 7_000) + av1_unit(6, bytes(20)), items=1_000), TOO_LARGE
    ),
    "avif/a million units": Bomb(lambda: avif((16, 16), av1_unit(2, b"") * 1_000_000), TOO_LARGE),
    "avif/a million boxes": Bomb(lambda: avif((16, 16), b"") + box(b"free", b"") * 1_000_000, TOO_LARGE),
    "avif/a decoy before the data": Bomb(avif_decoy, TOO_LARGE),
    "avif/a decoy after the track": Bomb(avif_tracks, TOO_LARGE),
    "avif/EXIF of 1 MB": Bomb(lambda: avif_exif(1_000_000), DECODED),
    "avif/EXIF of 2 MB": Bomb(lambda: avif_exif(2_000_000), TOO_LARGE),
    "avif/sequence": Bomb(lambda: avif_frames(30), DECODED),
    "avif/20 MP": Bomb(lambda: encode(Image.new("RGB", (5_000, 4_000)), "AVIF", speed=10), DECODED, slow=True),
}


class Cost(NamedTuple):
    """What a bomb did."""

    name: str
    outcome: str  # an error's code, `decoded`, or the name of any other exception
    size: int  # bytes
    seconds: float  # of CPU time
    memory: int  # most bytes at a time, besides those before


def measure(name: str) -> Cost:
    """Decode a bomb in a process of its own."""
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, json.dumps(_measure(name)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        result = json.loads(answer.read() or json.dumps([name, "killed", 0, 0, 0]))
    os.wait()
    return Cost(*result)


def _measure(name: str) -> Cost:
    data = BOMBS[name].make()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of memory
    before, start = _peak(), time.process_time()
    try:
        decode(data)
        outcome = "decoded"
    except ImageError as error:
        outcome = error.code
    except BaseException as error:
        outcome = type(error).__name__
    return Cost(name, outcome, len(data), time.process_time() - start, _peak() - before)


def _peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":  # prints the cost of the named bombs, or of all
    warnings.simplefilter("ignore")  # Pillow's, about broken files
    for bomb in sys.argv[1:] or BOMBS:
        print(json.dumps(measure(bomb)), flush=True)
