"""Errors of importing published weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vitrine.bundle.errors import VitrineError


class WeightsError(VitrineError):
    """A weights file cannot be imported."""

    code = "invalid_weights"


class UnreadableFileError(WeightsError):
    """The file is broken, or not a weights file."""

    def __init__(self, file: object, reason: object) -> None:
        super().__init__(f"{file}: cannot be read: {reason}")


class UnknownLayoutError(WeightsError):
    """The file's keys match no supported layout."""

    def __init__(self, file: object, *, keys: Sequence[str], nearest: str, missing: Sequence[str]) -> None:
        super().__init__(
            f"{file}: unknown layout: its {len(keys)} keys begin with {', '.join(keys[:3])}; the nearest known layout, "
            f"{nearest}, also has {', '.join(missing)}"
        )


class UnsupportedNetworkError(WeightsError):
    """The file holds a related but unsupported network."""

    def __init__(self, file: object, *, network: str, key: str) -> None:
        super().__init__(f"{file}: found {network}, which is not supported (key {key})")


class UnavailableWeightsError(WeightsError):
    """Published weights are not installed, cannot be downloaded, or are not those that were published."""

    code = "weights_unavailable"


class MismatchError(WeightsError):
    """The file's tensors do not match the network."""

    def __init__(
        self,
        file: object,
        *,
        layout: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        shapes: Mapping[str, tuple[object, object]],
    ) -> None:
        lines = [f"{file}: its tensors do not match {layout} with these settings"]
        lines += [f"missing in the file: {', '.join(missing)}"] if missing else []
        lines += [f"unexpected in the file: {', '.join(unexpected)}"] if unexpected else []
        lines += [f"{key}: expected shape {expected}, found {found}" for key, (expected, found) in shapes.items()]
        super().__init__("\n  ".join(lines))


class ImportSettingError(WeightsError):
    """The user's options do not fit the file, or a setting cannot be inferred from it."""


def validated(kind: Any, value: object, what: str) -> Any:
    """Validate `value` as a `kind` with pydantic.

    Raises:
        ImportSettingError: names `what` and its first invalid field.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise ImportSettingError(f"{what}: {field}: {first['msg']}, found {str(first['input'])[:200]!r}") from error
