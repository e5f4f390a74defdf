"""Every error that Vitrine raises on purpose, as a tree.

    VitrineError
    ├── BundleError             a bundle on disk cannot be served
    ├── ProviderError           ONNX Runtime cannot compute where it was asked to
    ├── ParameterError          a request parameter is outside its range
    ├── UnknownModelError       no loaded bundle has the requested name
    └── ImageError              the bytes of an image cannot be used
        ├── UnsupportedImageError   not one of the image types that Vitrine reads
        ├── UndecodableImageError   the right type, but broken
        └── ImageTooLargeError      more bytes or pixels than allowed
    (TrainingError, ExportError and SettingsError are defined in the packages that raise them)

Each class takes values and writes its own sentence: what, where, expected, found. `code` is the stable,
machine-readable name that HTTP answers carry.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar


class VitrineError(Exception):
    """Base of all errors that a user can act on; anything else is a bug."""

    code: ClassVar[str] = "error"


class BundleError(VitrineError):
    """A bundle on disk is not what its manifest says, or is no bundle."""

    code = "invalid_bundle"

    def __init__(self, file: object, field: str, *, expected: object, found: object) -> None:
        super().__init__(f"{file}: {field}: expected {expected}, found {found}")


class ProviderError(VitrineError):
    """ONNX Runtime has no such execution provider here, or it does not start."""

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
        wanted = f"no {kind}" if name is None else f"no {kind} named {name[:100]!r}"
        super().__init__(f"{wanted} here; available: {', '.join(available) or 'none'}")


class ImageError(VitrineError):
    """The bytes sent as an image cannot be used."""


class UnsupportedImageError(ImageError):
    """The bytes are not of an image type that Vitrine reads."""

    code = "unsupported_image_type"

    def __init__(self, *, supported: Iterable[str], found: str) -> None:
        super().__init__(f"image: expected one of {', '.join(supported)}, found {found}")


class UndecodableImageError(ImageError):
    """The bytes start like an image, but do not decode."""

    code = "undecodable_image"

    def __init__(self, reason: str) -> None:
        super().__init__(f"image: cannot be decoded: {reason}")


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the limit."""

    code = "too_large"

    def __init__(self, *, limit: int, unit: str, found: object) -> None:
        super().__init__(f"image: at most {limit} {unit} are accepted, found {found}")


def unknown(name: str, known: Sequence[str]) -> str:
    """The sentence for a name that is none of those known, with the nearest of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown {name!r}: did you mean {close[0]!r}? Known: {', '.join(known)}"
