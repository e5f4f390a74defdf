"""The shipped bundles that attacks are run against: nothing has to be trained for them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def two_bundles(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundles/` with the shipped vit-cifar10 and detr-bccd."""
    folder = tmp_path_factory.mktemp("shipped") / "bundles"
    folder.mkdir()
    for name in ("vit-cifar10", "detr-bccd"):
        (folder / name).symlink_to(root / "bundles" / name)
    return folder


@pytest.fixture(scope="module")
def attacked(serve: Serving, two_bundles: Path) -> Iterator[Any]:
    """A server of the two bundles, whose log is JSON."""
    with serve(two_bundles, VITRINE_LOG_FORMAT="json") as server:
        yield server
