"""Tell what the process has run out of from what is wrong with a bundle."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vitrine.bundle.errors import ResourceError, VitrineError

_RESOURCES = {
    errno.ENOMEM: "memory",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
}
_MESSAGES = {  # of errors that have no class of their own
    "Failed to allocate memory": "memory",  # ONNX Runtime
    "bad_alloc": "memory",  # C++
    "bad allocation": "memory",
    "pthread_create failed": "threads",  # ONNX Runtime
    "can't start new thread": "threads",  # Python
}


def exhausted_resource(error: BaseException | None) -> str:
    """Return what was exhausted when an error, or one of its causes, arose: "memory", ...; "" if nothing was."""
    while error is not None:
        if isinstance(error, MemoryError):
            return "memory"
        if isinstance(error, OSError) and error.errno in _RESOURCES:
            return _RESOURCES[error.errno]
        if not isinstance(error, VitrineError):  # these quote what they found
            for message, resource in _MESSAGES.items():
                if message in str(error):
                    return resource
        error = error.__cause__
    return ""


@contextmanager
def naming_exhaustion(what: object) -> Iterator[None]:
    """Raise a `ResourceError` about `what` instead of any error in the block that is due to an exhausted resource."""
    try:
        yield
    except Exception as error:
        resource = exhausted_resource(error)
        if resource and not isinstance(error, ResourceError):
            raise ResourceError(what, resource) from error
        raise
