"""Parse JSON of a request's body, at a bounded cost in memory and without holding Python's lock for long.

`orjson` holds the lock (GIL) from the first byte to the last: 20 MB of numbers would stop the event loop for a second,
even from another thread, and take 40 times their size. What makes an honest document large is taken out of it first, in
slices: long lists of numbers become arrays (`Numbers`), and long texts stay bytes (`LongText`).

Between slices others may run.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from vitrine.bundle.errors import ParameterError
from vitrine.bundle.machine import let_others_run

SMALL = 64 * 1024  # bytes; documents up to this size are parsed as a whole
_SLICE = 64 * 1024  # bytes that are parsed at once, in about a millisecond
_WINDOW = 4096  # bytes
_MAX_SKELETON = 1024 * 1024  # bytes of a document besides long lists of numbers and long texts
_MAX_DEPTH = 8  # of nested lists of numbers
_MAX_VALUES = 100_000  # of these bytes: keys, texts, numbers, lists and objects
_LIST_OF_KEY = re.compile(rb"[ \t\r\n]{0,64}:[ \t\r\n]{0,64}(?=\[)")
_BEFORE_COLON = re.compile(rb"[ \t\r\n]{0,64}:")
_WHOLE_CHARACTERS = re.compile(rb"(?:[^\\]+|\\u.{4}|\\[^u])*+", re.DOTALL)
_NOT_STRUCTURE = b"0123456789+-.eE \t\r\n"
_BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")


class NotJsonError(ValueError):
    """The bytes are not JSON."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """A long list of numbers, flat or nested with equal lengths, in row-major order."""

    array: NDArray[np.generic]  # one-dimensional
    integers: bool  # whether all of them were written as integers

    def __repr__(self) -> str:
        return f"a list of {self.array.size} numbers"


@dataclass(frozen=True, eq=False)
class LongText:
    """A long text of ASCII characters, in pieces."""

    pieces: Sequence[bytes]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __repr__(self) -> str:
        return f"a text of {len(self)} characters"


def loads(document: bytes) -> Any:
    """Parse JSON as `orjson.loads` does; long lists of numbers become `Numbers`, long texts `LongText`.

    Raises:
        NotJsonError: it is not JSON.
        ParameterError: it has too many values, or too many bytes that are neither in such a list nor in such a text.
    """
    if len(document) <= SMALL:
        return _parse(document)
    found: dict[str, Numbers | LongText] = {}
    try:
        value = [_parse(b"".join(_skeleton(document, found)))]  # in a list, so that it can be replaced
    except NotJsonError as error:
        raise NotJsonError(str(error).partition(": line")[0]) from None  # the position is that in a part
    if found:
        _put_back(value, found)
    return value[0]


def _parse(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from None


def _skeleton(document: bytes, found: dict[str, Numbers | LongText]) -> Iterator[bytes]:
    """Yield the document in parts, without its long values: they are put into `found`, by the text that replaces them.

    Texts are delimited by quotes, so that it is enough to look for these.
    """
    secret = secrets.token_hex(16)  # no client can send a text that equals a placeholder
    size = values = position = 0

    def counted(part: bytes) -> bytes:
        nonlocal size, values
        size += len(part)
        if size > _MAX_SKELETON:
            expected = f"at most {_MAX_SKELETON} bytes besides images and tensors"
            raise ParameterError("body", expected=expected, found="more")
        return part

    def placeholder(value: Numbers | LongText) -> bytes:
        name = f"{secret}{len(found)}"
        found[name] = value
        return counted(f'"{name}"'.encode())

    def count_values(number: int) -> None:
        nonlocal values
        values += number
        if values > _MAX_VALUES:
            raise ParameterError("body", expected=f"at most {_MAX_VALUES} values", found="more")

    while True:
        quote = document.find(b'"', position)
        end = len(document) if quote < 0 else quote
        if end - position > _SLICE:
            start, stop = _list_of_key(document, position, end)
            if numbers := _numbers(document, start, stop):
                yield counted(document[position:start])
                yield placeholder(numbers)
                position = stop
        gap = counted(document[position : min(end, position + _MAX_SKELETON + 1)])
        count_values(gap.count(b",") + gap.count(b"[") + gap.count(b"{") + 1)
        yield gap
        if quote < 0:
            return
        position = _end_of_text(document, quote, count_values)
        if position - quote > _SLICE and not _BEFORE_COLON.match(document, position):
            yield placeholder(_long_text(document, quote + 1, position - 1))
        else:
            yield counted(document[quote:position])


def _end_of_text(document: bytes, quote: int, count_values: Callable[[int], None]) -> int:
    """Return the position after the text that starts with a quote."""
    before = quote + 1
    while True:
        end = document.find(b'"', before)
        if end < 0:
            raise NotJsonError("a text without an end")
        count_values(1)  # an escaped quote costs as much as a value
        if document[end - 1] != ord("\\") or end == quote + 1:
            return end + 1
        if _backslashes(document, before, end) % 2 == 0:
            return end + 1
        before = end + 1


def _backslashes(document: bytes, start: int, end: int) -> int:
    """Return how many backslashes are at the end of a range."""
    count = 0
    while count < end - start:
        window = document[max(start, end - count - _WINDOW) : end - count]
        rest = len(window.rstrip(b"\\"))
        count += len(window) - rest
        if rest:
            break
    return count


def _list_of_key(document: bytes, start: int, end: int) -> tuple[int, int]:
    """Return the range of a long list, without texts and objects, after a key that ends at `start`; else (0, 0)."""
    key = _LIST_OF_KEY.match(document, start, end)
    if key is None:
        return 0, 0
    stop = min((at for at in (document.find(brace, start, end) for brace in (b"{", b"}")) if at >= 0), default=end)
    stop = document.rfind(b"]", start, stop) + 1
    start = key.end()
    if stop - start <= _SLICE or _count(document, b"[", start, stop) != _count(document, b"]", start, stop):
        return 0, 0
    return start, stop


def _count(document: bytes, byte: bytes, start: int, stop: int) -> int:
    return sum(document.count(byte, at, min(at + _MAX_SKELETON, stop)) for at in range(start, stop, _MAX_SKELETON))


def _numbers(document: bytes, start: int, stop: int) -> Numbers | None:
    """Parse a list, slice by slice; slices end at commas. None if it is no list of numbers, or not a regular one."""
    slices = (document[at : min(at + _SLICE, stop)] for at in range(start, stop, _SLICE))
    if not _is_regular(b"".join(part.translate(None, _NOT_STRUCTURE) for part in slices)):
        return None
    arrays, integers, position = [], True, start
    while position < stop:
        comma = document.find(b",", min(position + _SLICE, stop), stop)
        end = stop if comma < 0 else comma
        # Spaces for brackets: where a comma is missing or too many, two numbers or none remain.
        try:
            values = orjson.loads(b"[%b]" % document[position:end].translate(_BRACKETS_TO_SPACES))
        except ValueError:
            return None
        if not values:
            return None
        array, whole = _compact(values)
        arrays.append(array)
        integers = integers and whole
        position = end + 1
        let_others_run()
    return Numbers(np.concatenate(arrays), integers)


def _compact(values: list[int | float]) -> tuple[NDArray[np.generic], bool]:
    """Return numbers as an array of a small type that holds them, and whether all of them are integers."""
    if float in set(map(type, values)):
        return np.array(values, np.float64).astype(np.float32), False
    try:
        array = np.array(values, np.int64)
    except OverflowError:
        return np.array(values, np.float64), True
    return (array.astype(np.uint8) if array.min() >= 0 and array.max() <= 255 else array), True


def _is_regular(structure: bytes) -> bool:
    """Whether brackets and commas are those of lists that are nested with equal lengths, such as `[[,],[,]]`."""
    depth = len(structure[:_WINDOW]) - len(structure[:_WINDOW].lstrip(b"["))
    if not 1 <= depth <= _MAX_DEPTH:
        return False
    start = depth - 1
    end = structure.find(b"]", start) + 1
    block = structure[start:end]
    if block.count(b",") != len(block) - 2:
        return False
    for level in range(2, depth + 1):  # the first list of each level must consist of equal ones
        start -= 1
        end = structure.find(b"]" * level, end - 1) + level
        count, rest = divmod(end - start - 1, len(block) + 1)
        let_others_run()
        if rest or structure[start + 1 : end - 1] + b"," != (block + b",") * count:
            return False
        let_others_run()
        block = structure[start:end]
    return len(block) == len(structure)


def _long_text(document: bytes, start: int, stop: int) -> LongText:
    """Check and unescape a text, slice by slice; slices end between characters."""
    pieces = []
    while start < stop:
        end = min(start + _SLICE, stop)
        if document.find(b"\\", start, end) >= 0:
            match = _WHOLE_CHARACTERS.match(document, start, end)
            if match is None or match.end() == start:
                raise NotJsonError("an unfinished escape")
            end = match.end()
        text, start = document[start:end], end
        piece: str | None = _parse(b'"%b"' % text) if text.isascii() else None
        if piece is None or not piece.isascii():
            raise ParameterError(
                "body", expected=f"ASCII in texts of more than {_SLICE} bytes", found="other characters"
            )
        pieces.append(piece.encode())
    return LongText(pieces)


def _put_back(root: list[Any], found: dict[str, Numbers | LongText]) -> None:
    """Replace the placeholders in a document by what they stand for."""
    lists: list[list[Any] | dict[str, Any]] = [root]
    while lists:
        parent = lists.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent)
        for key, value in items:
            if isinstance(value, str):
                if value in found:
                    parent[key] = found[value]  # type: ignore[index]
            elif isinstance(value, (dict, list)):
                lists.append(value)
