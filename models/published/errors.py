"""Errors of importing published weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vitrine.bundle.errors import VitrineError


class WeightsError(VitrineError):
    """A file of weights cannot be imported."""

    code = "invalid_weights"


class UnreadableFileError(WeightsError):
    """The file is broken, or no file of weights."""

    def __init__(self, file: object, reason: object) -> None:
        super().__init__(f"{file}: cannot be read: {reason}")


class UnknownLayoutError(WeightsError):
    """The file's keys are those of no layout that Vitrine knows."""

    def __init__(self, file: object, *, keys: Sequence[str], nearest: str, missing: Sequence[str]) -> None:
        super().__init__(
            f"{file}: unknown layout: its {len(keys)} keys begin with {', '.join(keys[:3])}; the nearest known layout, "
            f"{nearest}, would have {', '.join(missing)} as well"
        )


class OtherNetworkError(WeightsError):
    """The file is of a neighbouring network that Vitrine does not have."""

    def __init__(self, file: object, *, network: str, key: str) -> None:
        super().__init__(f"{file}: it holds {network}, which Vitrine has not (it has the key {key})")


class MismatchError(WeightsError):
    """The file's tensors are not those of the network."""

    def __init__(
        self,
        file: object,
        *,
        layout: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        shapes: Mapping[str, tuple[object, object]],
    ) -> None:
        lines = [f"{file}: its tensors are not those of {layout} with these settings"]
        lines += [f"missing in the file: {', '.join(missing)}"] if missing else []
        lines += [f"unexpected in the file: {', '.join(unexpected)}"] if unexpected else []
        lines += [f"{key}: expected shape {expected}, found {found}" for key, (expected, found) in shapes.items()]
        super().__init__("\n  ".join(lines))


class ImportSettingError(WeightsError):
    """What the user asked for does not fit the file, or the file does not tell what is needed."""


def validated(kind: Any, value: object, what: str) -> Any:
    """`value` as pydantic makes a `kind` of it.

    Raises:
        ImportSettingError: naming the first field that is not as expected, in `what`.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ImportSettingError(f"{what}: {place}: {first['msg']}, found {str(first['input'])[:200]!r}") from error
