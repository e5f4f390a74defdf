"""Find the files that an ONNX file names for its weights ("external data").

ONNX Runtime would read them, unverified, from beside the file or from the working directory. Finding them takes no more
than the fields of `onnx.proto` that lead to a tensor.
"""

from collections.abc import Iterator

_PATHS = {  # message: field number of a message inside it: that message
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},  # external_data
}
_KEY, _VALUE = 1, 2  # of a StringStringEntryProto
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types


def external_files(model: bytes) -> set[str]:
    """Return the paths of all files that an ONNX file names for its weights.

    Raises:
        ValueError: it is not an ONNX file.
    """
    paths = set()
    messages = [("ModelProto", memoryview(model))]
    while messages:
        kind, content = messages.pop()
        inside = _PATHS.get(kind)
        if inside is None:
            entry = dict(_fields(content))
            if bytes(entry.get(_KEY, b"")) == b"location":
                paths.add(bytes(entry.get(_VALUE, b"")).decode(errors="replace"))
        else:
            messages += [(inside[number], value) for number, value in _fields(content) if number in inside]
    return paths


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of all strings, bytes and messages in a message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, at = _varint(message, at)
        elif wire_type == _BYTES:
            length, start = _varint(message, at)
            at = start + length
            yield tag >> 3, message[start:at]
        elif wire_type in (_FIXED_64, _FIXED_32):
            at += 8 if wire_type == _FIXED_64 else 4
        else:
            raise ValueError(f"a field of the unknown type {wire_type}")
    if at > len(message):
        raise ValueError("a field that is cut off")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where the next field begins."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("a field that is cut off")
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
    raise ValueError("a number that is too long")
