"""The tour names what is there: functions, pictures, pages and their sections."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

PAGES = ("tour.md", "tour.ko.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def tour(root: Path) -> ModuleType:
    """The script `docs/tour.py`."""
    spec = importlib.util.spec_from_file_location("tour", root / "docs" / "tour.py")
    assert spec is not None
    assert spec.loader is not None
    tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tour)
    return tour


def defined(file: Path) -> set[str]:
    """Names of the functions and classes of a module, and of the methods, with their class."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str, root: Path) -> None:
    page = root / "docs" / name
    links = LINK.findall(page.read_text())
    assert len(links) > 50
    for _, text, target in links:
        path, _, anchor = target.partition("#")
        file = page.parent / path
        assert file.is_file(), target
        if text.startswith("`"):
            assert text.strip("`") in defined(file), f"{text} in {path}"
        if anchor:
            assert anchor in anchors(file), target


def test_both_languages_say_the_same(root: Path) -> None:
    """The same sections with the same functions and pictures, in the same order."""
    english, korean = (
        [
            (image, target)
            for image, text, target in LINK.findall((root / "docs" / name).read_text())
            if ".md" not in target
        ]
        for name in PAGES
    )
    assert english == korean
    sections = [len(re.findall(r"^## ", (root / "docs" / name).read_text(), re.MULTILINE)) for name in PAGES]
    assert sections[0] == sections[1]


def test_all_pictures_are_drawn_and_used(tour: ModuleType, root: Path) -> None:
    drawn = {f"{name}.png" for name in tour.PICTURES}
    assert drawn == {file.name for file in (root / "docs" / "tour").iterdir()}
    assert drawn <= {
        target.removeprefix("tour/") for _, _, target in LINK.findall((root / "docs" / "tour.md").read_text())
    }


def test_a_picture_is_drawn_from_a_bundle(tour: ModuleType) -> None:
    """The script stops if a graph's values have other names; the classifier's logits are compared with its own."""
    for name in ("linear-classifier", "self-attention", "positions"):
        assert tour.PICTURES[name]().axes
