"""Bound what an encoded image costs to decode, by its headers alone: nothing is decoded here.

A small file can ask for much work: a JPEG of hundreds of scans, a PNG of a million chunks, a TIFF tile far larger than
its image. Decoders accept all of this, and a call into C cannot be interrupted. So the headers are read first, in a
bounded number of steps, and each quantity that decoding is proportional to has a limit. Whatever else is wrong with a
file is left for the decoder to say.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vitrine.bundle.errors import ImageTooLargeError, UndecodableImageError

MAX_EDGE = 65_535  # pixels; JPEG's limit. A pointer per row and buffers per column make thin images expensive
MAX_CHUNKS = 100_000  # chunks, segments, blocks, strips or tiles, at about 5 µs each; 20 MB of PNG in 1 kB have 20,000
MAX_SCANS = 100  # of a JPEG, as in libtiff; progressive ones have about 10
MAX_SCANNED_SAMPLES_PER_PIXEL = 60  # scans x samples, per pixel of `max_pixels`: 3 seconds at 50 megapixels
ARITHMETIC_COST = 5  # times that of Huffman coding: it decides about each sample anew in each scan
MAX_PADDING = 65_536  # bytes between the segments of a JPEG, which Pillow skips one by one
MAX_EXIF_BYTES = 2**20  # a JPEG's segment has 64 kB
MAX_TAGS = 1_024  # of a TIFF directory, as libtiff's time is quadratic in unknown ones; photographs have less than 200
MAX_TAG_VALUES = 2**20  # numbers in a TIFF directory, 50 ns each
MAX_TAG_FRACTIONS = 2**15  # rational numbers, 3 µs each
MAX_RUN_LENGTH_PIXELS = 2**21  # of a BMP, which Pillow decodes in Python, at up to 1.5 µs each
MAX_TILE_PIXELS = 2**22  # 2048 x 2048; of a tile that is larger than four times its image
MAX_CODED = 3  # pixels of an AVIF's frames, per pixel of `max_pixels`: colours, alpha, and the margins of tiles
MAX_BYTES_PER_PIXEL = 12  # of memory, per pixel of `max_pixels`, besides `BASE_BYTES`
BASE_BYTES = 64 * 2**20  # of memory, for an image of any size

# Bytes of memory per pixel while an image is decoded, as measured.
_IMAGE_BYTES = 4  # Pillow's image
_CONVERTED_BYTES = 8  # an image beside its conversion to RGB, or beside its rotation
_COEFFICIENT_BYTES = 2  # per sample of a JPEG with several scans
_WEBP_BYTES = 16.75  # two canvases, a copy and the image
_AVIF_BYTES = 8.5  # RGB or RGBA, its copy and the image; besides the planes of all frames

_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),  # the last two: BigTIFF
}
_AVIF_BRANDS = (b"avif", b"avis")
FORMATS = (*_SIGNATURES, "AVIF")


def identify(data: bytes) -> str | None:
    """Return which of `FORMATS` the data's signature belongs to, or None."""
    if data[4:8] == b"ftyp":  # ISO media; "avif" may be the major or a compatible brand
        return "AVIF" if any(brand in data[8:64] for brand in _AVIF_BRANDS) else None
    if data.startswith(b"RIFF"):  # also the container of WAV and AVI
        return "WEBP" if data[8:12] == b"WEBP" else None
    return next((name for name, signatures in _SIGNATURES.items() if data.startswith(signatures)), None)


def check(data: bytes, form: str, *, max_pixels: int) -> bytes:
    """Check what decoding the image will cost.

    Args:
        data: the encoded image, of the format `form` (see `identify`).

    Returns:
        The data to decode: a PNG without long compressed texts and colour profiles, which are not needed.

    Raises:
        ImageTooLargeError: a limit of this module or `max_pixels` is exceeded.
        UndecodableImageError: the structure is broken in a way that decoders would read differently or refuse, or a
            BigTIFF is big-endian.
    """
    try:
        if form == "PNG":
            return _check_png(data)
        _CHECKS[form](data, max_pixels)
    except (struct.error, IndexError):  # the decoder finds the end at the same place, or may go on
        if form in ("AVIF", "TIFF"):
            raise UndecodableImageError("its headers are broken") from None
    return data


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Check the size of an image in pixels.

    Raises:
        ImageTooLargeError: more than `max_pixels` pixels, or an edge longer than `MAX_EDGE`.
    """
    if width * height > max_pixels:
        raise ImageTooLargeError(limit=max_pixels, unit="pixels", found=f"{width} x {height}")
    _bound(max(width, height), MAX_EDGE, "pixels per edge")


def _bound(found: int, limit: int, unit: str) -> None:
    if found > limit:
        raise ImageTooLargeError(limit=limit, unit=unit, found=found)


def _check_memory(needed: float, max_pixels: int) -> None:
    _bound(int(needed), MAX_BYTES_PER_PIXEL * max_pixels + BASE_BYTES, "bytes of memory")


# JPEG -----------------------------------------------------------------------------------------------------------------

_FRAME_MARKERS = frozenset((*range(0xC0, 0xD0), 0xDE)) - {0xC4, 0xC8, 0xCC}
_LONE_MARKERS = frozenset((0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))  # without a length
_SCAN = 0xDA
_END = 0xD9
_FILL = re.compile(rb"\xff+")
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in entropy-coded data
_WINDOW = 2**20  # bytes that are searched at once: Python's lock is held meanwhile, for up to 15 ms


class _Frame(NamedTuple):
    """The frame header of a JPEG."""

    width: int
    height: int
    components: int
    samples: int  # of all components, padded to whole blocks
    progressive: bool
    arithmetic: bool

    @property
    def scan_cost(self) -> int:
        """What a scan of all components takes, in samples of Huffman coding."""
        return self.samples * (ARITHMETIC_COST if self.arithmetic else 1)


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    frame, position = None, 2
    segments = exif = padding = 0
    unpack = struct.Struct(">BBH").unpack_from
    while True:
        first, marker, length = unpack(data, position)
        if first != 0xFF or marker == 0xFF:
            limit = min(position + MAX_PADDING + 2, len(data))
            start = data.find(b"\xff", position, limit)
            found = _FILL.match(data, start, limit) if start >= 0 else None
            end = found.end() - 1 if found else limit
            padding += end - position
            _bound(padding, MAX_PADDING, "bytes between segments")
            if found is None:
                return
            position = end
            _, marker, length = unpack(data, position)
        position += 2
        is_lone = marker == 0 or marker in _LONE_MARKERS
        padding += 2 if is_lone else 0
        _bound(padding, MAX_PADDING, "bytes between segments")
        if is_lone:
            continue
        segments += 1
        if marker == _SCAN:
            break
        if segments > MAX_CHUNKS:
            _bound(segments, MAX_CHUNKS, "segments")
        if marker in _FRAME_MARKERS:
            if frame is not None:  # Pillow would collect the components of all, and libjpeg refuse the second
                raise UndecodableImageError("it has two frame headers")
            frame = _read_frame(data, marker, position)
            check_size(frame.width, frame.height, max_pixels)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", position + 2):
            exif += length
            _bound(exif, MAX_EXIF_BYTES, "bytes of EXIF")
        position += max(length, 2)
    if frame is None:
        return
    memory: float = _CONVERTED_BYTES * frame.width * frame.height
    has_several_scans = frame.progressive or data[position + 2] < frame.components
    if has_several_scans:
        coefficients = _COEFFICIENT_BYTES * frame.samples
        memory = max(memory, _IMAGE_BYTES * frame.width * frame.height + coefficients)
    _check_memory(memory, max_pixels)
    if has_several_scans:
        _check_scans(data, position - 2, len(data), frame.scan_cost, max_pixels)


def _read_frame(data: bytes, marker: int, position: int) -> _Frame:
    """Read a frame header, which begins with its length at `position`."""
    length, height, width, components = struct.unpack_from(">HxHHB", data, position)
    if length != 8 + 3 * components:  # Pillow would go on to its end, which libjpeg refuses
        raise UndecodableImageError("its frame header has a wrong length")
    across = down = 1
    blocks = 0
    for factors in data[position + 9 : position + 8 + 3 * components : 3]:  # of each component
        horizontal, vertical = factors >> 4, factors & 15
        across, down, blocks = max(across, horizontal), max(down, vertical), blocks + horizontal * vertical
    samples = -(-width // (8 * across)) * -(-height // (8 * down)) * blocks * 64
    return _Frame(width, height, components, samples, progressive=marker & 3 == 2, arithmetic=bool(marker & 8))


def _next_marker(data: bytes, start: int, end: int) -> re.Match[bytes] | None:
    for at in range(start, end, _WINDOW):
        if found := _NEXT_MARKER.search(data, at, min(at + _WINDOW + 1, end)):
            return found
    return None


def _segments(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Walk over the segments of an image, also between its scans: the marker of each, and where its length is."""
    count = 0
    while (found := _next_marker(data, start, end)) and (marker := data[found.start() + 1]) != _END:
        start = found.end()
        if marker in _LONE_MARKERS or marker == 1:
            continue
        count += 1
        _bound(count, MAX_CHUNKS, "segments")
        yield marker, start
        start += max(struct.unpack_from(">H", data, start)[0], 2)


def _check_scans(data: bytes, start: int, end: int, scan_cost: int, max_pixels: int) -> int:
    """Check the number of scans between `start` and `end`, and return it, or a larger one that is still allowed."""
    limit = min(MAX_SCANS, MAX_SCANNED_SAMPLES_PER_PIXEL * max_pixels // max(scan_cost, 1) + 1)
    most = sum(data.count(b"\xff\xda", at, min(at + _WINDOW + 1, end)) for at in range(start, end, _WINDOW))
    if most <= limit:
        return most
    scans = 0  # others may lie in thumbnails and further images: follow the markers to the end of this one
    for marker, _ in _segments(data, start, end):
        scans += marker == _SCAN
        _bound(scans, limit, "scans")
    return scans


# PNG ------------------------------------------------------------------------------------------------------------------

# Pillow inflates these, keeps them, and refuses the image if one has more than 1 MiB.
_INFLATED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION_KEYS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # of texts that may have an orientation
_MAX_INFLATED_CHUNK = 1_000  # bytes; zlib's ratio is at most 1032


def _check_png(data: bytes) -> bytes:
    kept, kept_from = [], 0
    position, end, chunks = 8, len(data), 0
    unpack = struct.Struct(">I4s").unpack_from
    while position + 8 <= end:
        length, kind = unpack(data, position)
        next_position = position + 12 + length
        if kind == b"IEND":
            break
        if kind in _INFLATED_CHUNKS:
            if length > _MAX_INFLATED_CHUNK and not data.startswith(_ORIENTATION_KEYS, position + 8):
                kept.append(data[kept_from:position])
                kept_from = next_position
        elif kind == b"eXIf":
            _bound(length, MAX_EXIF_BYTES, "bytes of EXIF")
        position = next_position
        chunks += 1
        if chunks > MAX_CHUNKS:
            _bound(chunks, MAX_CHUNKS, "chunks")
    return b"".join((*kept, data[kept_from:])) if kept else data


# WebP -----------------------------------------------------------------------------------------------------------------


def _check_webp(data: bytes, max_pixels: int) -> None:
    kind = data[12:16]
    if kind == b"VP8X":
        flags_and_size = data[24:30]
        width, height = (1 + int.from_bytes(flags_and_size[i : i + 3], "little") for i in (0, 3))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (edge & 0x3FFF for edge in struct.unpack_from("<HH", data, 26))
    check_size(width, height, max_pixels)
    _check_memory(_WEBP_BYTES * width * height, max_pixels)
    position, chunks = 12, 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        if data.startswith(b"EXIF", position):
            _bound(length, MAX_EXIF_BYTES, "bytes of EXIF")
        position += 8 + length + (length & 1)
        chunks += 1
        _bound(chunks, MAX_CHUNKS, "chunks")


# GIF ------------------------------------------------------------------------------------------------------------------


def _check_gif(data: bytes, max_pixels: int) -> None:
    """Follow the blocks to the first frame, as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while position < len(data) and data[position] != 0x3B:
        kind = data[position]
        position += 1
        blocks += 1
        if kind == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            check_size(width, height, max_pixels)
            return
        if kind == 0x21:
            position += 1
            while size := data[position]:
                position += 1 + size
                blocks += 1
                if blocks > MAX_CHUNKS:
                    break
            position += 1
        _bound(blocks, MAX_CHUNKS, "blocks before the first frame")


# BMP ------------------------------------------------------------------------------------------------------------------


_RUN_LENGTHS = (1, 2)  # compression of 8 and of 4 bits per pixel


def _check_bmp(data: bytes, max_pixels: int) -> None:
    (header_size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<ii", data, 18)
    check_size(abs(width), abs(height), max_pixels)
    if header_size > 12 and struct.unpack_from("<I", data, 30)[0] in _RUN_LENGTHS:
        _bound(abs(width * height), MAX_RUN_LENGTH_PIXELS, "run-length-encoded pixels")


# TIFF -----------------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANES = 256, 257, 258, 259, 277, 278, 284
_STRIPS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_PARTS = {_STRIPS: "strips", _STRIP_BYTES: "strips", _TILES: "tiles", _TILE_BYTES: "tiles"}
_EXIF, _GPS, _INTEROPERABILITY = 34665, 34853, 40965  # directories that Pillow reads, too; the last is within EXIF
_JPEG_COMPRESSION = 7
_NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 7: "B", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q"}  # integer types
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8}  # in bytes
_BYTE_TYPES = (1, 2, 7)  # which Pillow keeps as bytes
_FRACTION_TYPES = (5, 10)


class _Directory:
    """The tags of a TIFF's directory; of one that is cut off those before the end, as Pillow reads it."""

    def __init__(self, data: bytes, offset: int, endian: str, *, big: bool) -> None:
        self._data, self._endian = data, endian
        self._tags: dict[int, list[tuple[int, int, int]]] = {}  # type, count, and where the values begin
        position = offset + (8 if big else 2)
        if offset < 0 or position > len(data):
            return
        (count,) = struct.unpack_from(endian + ("Q" if big else "H"), data, offset)
        _bound(count, MAX_TAGS, "tags")
        entry = struct.Struct(endian + ("HHQ" if big else "HHL"))
        inline = 8 if big else 4
        numbers = fractions = 0
        for _ in range(min(count, (len(data) - position) // (entry.size + inline))):
            tag, kind, values = entry.unpack_from(data, position)
            place = position + entry.size
            if values * _SIZES.get(kind, 0) > inline:
                (place,) = struct.unpack_from(endian + ("Q" if big else "L"), data, place)
            if tag in _PARTS:
                _bound(values, MAX_CHUNKS, _PARTS[tag])
            fractions += values if kind in _FRACTION_TYPES else 0
            numbers += 0 if kind in _BYTE_TYPES else values
            _bound(fractions, MAX_TAG_FRACTIONS, "rational numbers in tags")
            _bound(numbers, MAX_TAG_VALUES, "numbers in tags")
            self._tags.setdefault(tag, []).append((kind, values, place))
            position += entry.size + inline

    def _entry(self, tag: int) -> tuple[int, int, int]:
        entries = self._tags.get(tag, [(0, 0, 0)])
        if len(entries) > 1:  # Pillow takes the first that is whole, libtiff the first
            raise UndecodableImageError(f"it has the tag {tag} twice")
        return entries[0]

    def count(self, tag: int) -> int:
        return self._entry(tag)[1]

    def values(self, tag: int) -> tuple[int, ...]:
        """Return the numbers of a tag, at most `MAX_CHUNKS`; none if it has no integers, or not all are there."""
        kind, count, place = self._entry(tag)
        if kind not in _NUMBERS or place + count * _SIZES[kind] > len(self._data):
            return ()
        return struct.unpack_from(f"{self._endian}{min(count, MAX_CHUNKS)}{_NUMBERS[kind]}", self._data, place)

    def value(self, tag: int, default: int) -> int:
        return next(iter(self.values(tag)), default)


def _check_tiff(data: bytes, max_pixels: int) -> None:
    if len(data) < 16:  # not even a header, which Pillow says
        return
    endian = "<" if data.startswith(b"II") else ">"
    big = b"+" in data[2:4]
    if big and endian == ">":
        raise UndecodableImageError("a BigTIFF of big-endian byte order is not supported; save it as TIFF")
    (offset,) = struct.unpack_from(endian + ("Q" if big else "L"), data, 8 if big else 4)
    tags = _Directory(data, offset, endian, big=big)
    nowhere = len(data)
    _Directory(data, tags.value(_GPS, nowhere), endian, big=big)
    exif = _Directory(data, tags.value(_EXIF, nowhere), endian, big=big)
    if tags.count(_INTEROPERABILITY):  # else Pillow does not look for it
        _Directory(data, exif.value(_INTEROPERABILITY, nowhere), endian, big=big)
    width, height = tags.value(_WIDTH, 0), tags.value(_HEIGHT, 0)
    check_size(width, height, max_pixels)
    if not (width and height):
        return
    samples = max(tags.value(_SAMPLES, 1), tags.count(_BITS))
    planes = samples if tags.value(_PLANES, 1) == 2 else 1
    compression = tags.value(_COMPRESSION, 1)
    if compression == 1:  # read by Pillow
        tiled = not tags.count(_STRIPS)
    else:  # by libtiff, to which the places of strips are those of tiles, too
        tiled = tags.count(_TILE_WIDTH) + tags.count(_TILE_HEIGHT) > 0
        if tags.count(_STRIPS) and tags.count(_TILES):
            raise UndecodableImageError("it has both strips and tiles")
    if tiled:
        part_width, part_height = max(tags.value(_TILE_WIDTH, width), 1), max(tags.value(_TILE_HEIGHT, height), 1)
        limit = max(MAX_TILE_PIXELS, 4 * width * height)
        if part_width * part_height > limit:
            raise ImageTooLargeError(limit=limit, unit="pixels per tile", found=f"{part_width} x {part_height}")
    else:
        part_width, part_height = width, min(max(tags.value(_ROWS_PER_STRIP, height), 1), height)
    parts = -(-width // part_width) * -(-height // part_height) * planes
    _bound(parts, MAX_CHUNKS, "tiles" if tiled else "strips")
    part = part_width * part_height * (samples // planes)  # in samples
    _bound(parts * part_width * part_height // planes, 2 * max_pixels + MAX_TILE_PIXELS, "pixels in tiles")
    loading = _IMAGE_BYTES * width * height + part * max(1, *tags.values(_BITS), 1) / 8
    _check_memory(max(_CONVERTED_BYTES * width * height, loading), max_pixels)
    if compression == _JPEG_COMPRESSION:
        places = tags.values(_STRIPS) + tags.values(_TILES)
        sizes = tags.values(_STRIP_BYTES) + tags.values(_TILE_BYTES)
        _check_jpeg_parts(data, places, sizes, part, max_pixels)


def _check_jpeg_parts(
    data: bytes, places: tuple[int, ...], sizes: tuple[int, ...], samples: int, max_pixels: int
) -> None:
    """Check the scans of a TIFF's strips or tiles, which have `samples` samples each."""
    scanned = searched = 0
    for index, place in enumerate(places):
        size = sizes[index] if index < len(sizes) else 0
        end = min(place + size, len(data)) if size else len(data)  # libtiff guesses one that is not given
        searched += max(end - place, 0)
        _bound(searched, 4 * len(data), "bytes in strips that overlap")
        if data.count(b"\xff\xda", place, end) < 2:
            continue
        frames = (_read_frame(data, *found) for found in _segments(data, place, end) if found[0] in _FRAME_MARKERS)
        cost = max((frame.scan_cost for frame in frames), default=samples)
        scans = _check_scans(data, place, end, cost, max_pixels)
        scanned += scans * cost if scans > 1 else 0
        _bound(scanned, MAX_SCANNED_SAMPLES_PER_PIXEL * max_pixels, "samples in scans")


# AVIF -----------------------------------------------------------------------------------------------------------------

_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}
_OWNERS = (b"meta", b"stbl")  # boxes that have tables of items or samples
_TABLES = (b"iloc", b"idat", b"stsz", b"stco", b"co64")  # one of each in an owner, and only one of the last two
_MAX_OWNERS = 9  # the picture's `meta`, and both of four tracks
_SAMPLES_PER_PIXEL = {0: 3, 2: 2, 3: 1.5}
_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6  # types of AV1's units (OBU)


class _Box(NamedTuple):
    """A box of ISO media: its kind, where its content lies, and where the innermost of `_OWNERS` around it begins."""

    kind: bytes
    start: int
    end: int
    owner: int


def _boxes(data: bytes) -> Iterator[_Box]:
    """Walk over the boxes, and those inside; what follows the last whole box is ignored."""
    pending, count = [(0, len(data), 0)], 0
    while pending:
        start, end, owner = pending.pop()
        while start + 8 <= end:
            size, kind = struct.unpack_from(">I4s", data, start)
            content = start + 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", data, content)
                content += 8
            following = end if size == 0 else start + size
            if not content <= following <= end:
                if end == len(data):
                    break
                raise UndecodableImageError(f"its box {kind!r} does not fit")
            count += 1
            _bound(count, MAX_CHUNKS, "boxes")
            yield _Box(kind, content, following, owner)
            inner = content if kind in _OWNERS else owner
            if kind == b"iinf":
                pending.append((content + (8 if data[content] else 6), following, inner))
            elif kind in _CONTAINERS:
                pending.append((content + _CONTAINERS[kind], following, inner))
            start = following


def _check_avif(data: bytes, max_pixels: int) -> None:
    """Bound the pixels of all frames that are decoded for the first picture, by AV1's own headers.

    The boxes may state another size than the frames that they contain, and libavif decodes those first.
    """
    pixels = 0
    sample_bytes = 0.0
    kinds: set[tuple[int, int, bytes]] = set()  # of items: their owner, number and kind
    tables: dict[int, dict[bytes, _Box]] = {}  # by owner and kind
    for box in _boxes(data):
        kind, start, _, owner = box
        if kind == b"ispe":
            width, height = struct.unpack_from(">II", data, start + 4)
            check_size(width, height, max_pixels)
            pixels = max(pixels, width * height)
        elif kind == b"infe":
            number, _, item = struct.unpack_from(">IH4s" if data[start] >= 3 else ">HH4s", data, start + 4)
            kinds.add((owner, number, item))
        elif kind == b"av1C":
            subsampling, wide = data[start + 2] >> 2 & 7, data[start + 2] >> 6 & 1  # subsampling: grey, across, down
            sample_bytes = max(sample_bytes, _SAMPLES_PER_PIXEL.get(subsampling, 1) * (1 + wide))
        elif kind in _TABLES:
            kind = b"stco" if kind == b"co64" else kind
            own = tables.setdefault(owner, {})
            if kind in own:
                raise UndecodableImageError(f"it has two boxes {kind!r} where one may be")
            own[kind] = box
    _bound(len(tables), _MAX_OWNERS, "tables of items and tracks")
    items: dict[tuple[int, int], bytes] = {}
    tracks = []
    total = 0
    for owner, own in tables.items():
        if b"stsz" in own and b"stco" in own:
            tracks.append(_first_sample(data, own[b"stsz"], own[b"stco"]))
        if b"iloc" not in own:
            continue
        inside = own[b"idat"].start if b"idat" in own else len(data)
        for number, in_idat, offset, length in _locations(data[own[b"iloc"].start : own[b"iloc"].end]):
            is_coded, is_exif = ((owner, number, kind) in kinds for kind in (b"av01", b"Exif"))
            if not (is_coded or is_exif):
                continue
            offset += inside if in_idat else 0
            content = items.get((owner, number), b"") + data[offset : offset + length if length else len(data)]
            total += len(content)
            _bound(total, 4 * len(data), "bytes in items that overlap")
            if is_exif:
                _bound(len(content), MAX_EXIF_BYTES, "bytes of EXIF")
            items[owner, number] = content
    pictures = (content for item, content in items.items() if (*item, b"av01") in kinds)
    coded = max(_coded_pixels(pictures, max_pixels), _coded_pixels(tracks, max_pixels))
    _check_memory(_AVIF_BYTES * pixels + sample_bytes * coded, max_pixels)


def _first_sample(data: bytes, sizes: _Box, places: _Box) -> bytes:
    """Return the first sample of a track, which is its first picture."""
    size, count = struct.unpack_from(">II", data, sizes.start + 4)
    _bound(count, MAX_CHUNKS, "frames")
    if not size and count:
        (size,) = struct.unpack_from(">I", data, sizes.start + 12)
    (place,) = struct.unpack_from(">Q" if places.kind == b"co64" else ">I", data, places.start + 8)
    return data[place : place + size]


def _locations(box: bytes) -> Iterator[tuple[int, bool, int, int]]:
    """Read the box `iloc`: of each part of an item its number, whether it is in `idat`, offset and length (0: all)."""
    version = box[0]
    offset_size, length_size, base_size, index_size = box[4] >> 4, box[4] & 15, box[5] >> 4, box[5] & 15
    wide = 4 if version >= 2 else 2
    position = 6

    def number(size: int) -> int:
        nonlocal position
        position += size
        if position > len(box):
            raise UndecodableImageError("its box b'iloc' ends early")
        return int.from_bytes(box[position - size : position])

    count = 0
    for _ in range(number(wide)):
        count += 1
        item = number(wide)
        in_idat = version > 0 and number(2) & 15 == 1
        number(2)  # the file
        base = number(base_size)
        for _ in range(number(2)):
            if version > 0:
                number(index_size)
            count += 1
            _bound(count, MAX_CHUNKS, "items and their parts")
            yield item, in_idat, base + number(offset_size), number(length_size)


def _coded_pixels(streams: Iterable[bytes], max_pixels: int) -> int:
    """Return the pixels of all frames in the AV1 streams.

    Raises:
        ImageTooLargeError: a frame has more than `max_pixels`, or all together much more.
    """
    coded = units = 0
    for stream in streams:
        position = width = height = 0
        while position < len(stream):
            header = stream[position]
            position += 2 if header & 4 else 1
            size = len(stream) - position
            if header & 2:
                size = shift = 0
                while True:  # 7 bits a byte, the lowest first
                    byte = stream[position]
                    position += 1
                    size |= (byte & 127) << shift
                    shift += 7
                    if byte < 128 or shift > 56:
                        break
            kind = header >> 3 & 15
            if kind == _SEQUENCE_HEADER:
                width, height = _sequence_size(stream[position : position + min(size, 512)])
                check_size(width, height, max_pixels)
            elif kind in (_FRAME_HEADER, _FRAME):
                coded += width * height
                _bound(coded, MAX_CODED * max_pixels, "pixels in frames and tiles")
            position += size
            units += 1
            _bound(units, MAX_CHUNKS, "units")
    return coded


def _sequence_size(header: bytes) -> tuple[int, int]:
    """Read the largest width and height of a frame from an AV1 sequence header (AV1 specification, 5.5.1)."""
    value, left = int.from_bytes(header), 8 * len(header)

    def bits(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise UndecodableImageError("its AV1 sequence header ends early")
        return value >> left & (1 << count) - 1

    bits(4)  # profile, still picture
    if bits(1):  # reduced header
        bits(5)
    else:
        delay_bits = 0
        if bits(1):  # timing
            bits(64)
            if bits(1):
                zeros = 0
                while not bits(1):
                    zeros += 1
                bits(zeros)
            if bits(1):  # decoder model
                delay_bits = bits(5) + 1
                bits(42)
        has_display_delay = bits(1)
        for _ in range(bits(5) + 1):  # operating points
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delay_bits and bits(1):
                bits(2 * delay_bits + 1)
            if has_display_delay and bits(1):
                bits(4)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    return bits(width_bits) + 1, bits(height_bits) + 1


_CHECKS = {
    "JPEG": _check_jpeg,
    "WEBP": _check_webp,
    "GIF": _check_gif,
    "BMP": _check_bmp,
    "TIFF": _check_tiff,
    "AVIF": _check_avif,
}
