"""The hierarchy of the errors that Vitrine raises on purpose.

    VitrineError
    ├── BundleError             a bundle on disk cannot be served
    ├── ResourceError           memory, file descriptors, ... have run out
    ├── ProviderError           an ONNX Runtime execution provider is unavailable
    ├── ParameterError          a request parameter is outside its range
    ├── UnknownModelError       no loaded bundle matches the request
    └── ImageError              an image cannot be used
        ├── UnsupportedImageError   not a supported image type
        ├── UndecodableImageError   a supported type, but broken
        └── ImageTooLargeError      too many bytes or pixels, too much memory or work
    (TrainingError, ExportError and SettingsError are defined in the packages that raise them)

Each class formats its message from its arguments: what, where, expected, found. `code` is the stable, machine-readable
name in HTTP responses.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self


def printable(text: str) -> str:
    """Escape what could end or forge a line or write elsewhere on a terminal: controls, separators, bidirectional."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class VitrineError(Exception):
    """Base class of all errors that a user can act on; any other exception is a bug."""

    code: ClassVar[str] = "error"

    def bare(self) -> Self:
        """Return the error without traceback and causes, which keep alive what the raising code had in hand."""
        return type(self).__new__(type(self), *self.args)


class BundleError(VitrineError):
    """A bundle on disk is invalid or differs from its manifest."""

    code = "invalid_bundle"

    def __init__(self, file: object, field: str, *, expected: object, found: object) -> None:
        super().__init__(f"{file}: {field}: expected {expected}, found {found}")


class ResourceError(VitrineError):
    """The process has run out of something that loading a bundle needs; the bundle may be sound."""

    code = "unavailable"

    def __init__(self, what: object, resource: str) -> None:
        super().__init__(f"{what}: expected to load it, found the process out of {resource}")


class ProviderError(VitrineError):
    """An execution provider is missing from this installation of ONNX Runtime, or does not start."""

    code = "provider_unavailable"

    def __init__(self, name: str, *, expected: Iterable[str], found: str) -> None:
        super().__init__(f"provider {name}: expected one of {', '.join(expected)}, found {found}")


class ParameterError(VitrineError):
    """A request parameter is missing or outside its range."""

    code = "invalid_parameter"

    def __init__(self, name: str, *, expected: object, found: object) -> None:
        super().__init__(f"{name}: expected {expected}, found {found}")


class UnknownModelError(VitrineError):
    """No loaded bundle has the requested name, version and task."""

    code = "unknown_model"

    def __init__(self, name: str | None, *, task: str | None = None, available: Iterable[str]) -> None:
        kind = "model" if task is None else f"{task} model"
        missing = f"no {kind}" if name is None else f"no {kind} named {name[:100]!r}"
        super().__init__(f"{missing} here; available: {', '.join(available) or 'none'}")


class ImageError(VitrineError):
    """An image cannot be used."""


class UnsupportedImageError(ImageError):
    """The bytes are not of a supported image type."""

    code = "unsupported_image_type"

    def __init__(self, *, supported: Iterable[str], found: str) -> None:
        super().__init__(f"image: expected one of {', '.join(supported)}, found {found}")


class UndecodableImageError(ImageError):
    """The bytes start like an image but do not decode."""

    code = "undecodable_image"

    def __init__(self, reason: str) -> None:
        super().__init__(f"image: cannot be decoded: {reason}")


class ImageTooLargeError(ImageError):
    """An image exceeds a limit of bytes, pixels, memory or work."""

    code = "too_large"

    def __init__(self, *, limit: object, unit: str, found: object) -> None:
        super().__init__(f"image: at most {limit} {unit} are accepted, found {found}")


def unknown(name: str, known: Sequence[str]) -> str:
    """Return the message for an unknown name, with the closest known one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown {name!r}: did you mean {close[0]!r}? Known: {', '.join(known)}"
