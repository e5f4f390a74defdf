"""Which version of Vitrine this is."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def server_version() -> str:
    """The installed version; "unknown" where Vitrine is not installed as a package."""
    try:
        return version("vitrine")
    except PackageNotFoundError:
        return "unknown"
