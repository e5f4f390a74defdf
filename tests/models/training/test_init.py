"""The names for notebooks."""

import re
from pathlib import Path

import pytest

from vitrine.models import training


@pytest.mark.parametrize("name", training.__all__)
def test_every_name_is_there_and_documented(name: str, root: Path) -> None:
    assert getattr(training, name).__name__ == name
    if name != "Checkpoint":
        assert re.search(rf"\b{name}\(", (root / "docs" / "api.md").read_text())


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        training.nothing  # noqa: B018
