"""Draw the packages, their floors and the imports between them: `make picture` writes docs/floors.svg.

Boxes are packages with their floors inside, top to bottom: a module is imported from above only. Arrows are imports
between packages.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from html import escape
from pathlib import Path
from typing import NamedTuple

import grimp

FILE = Path(__file__).with_name("floors.svg")
ROOT = "vitrine"
DETAILED = ["models.training"]  # a package inside another one, drawn with its own floors and without arrows
LEFT_OUT = {"__main__"}
MARGIN, GAP, LINE, PAD = 20, 56, 19, 12  # pixels
STYLE = (
    "rect{fill:#f6f8fa;stroke:#57606a}text{font:13px ui-monospace,monospace;fill:#24292f;text-anchor:middle}"
    ".title{font-weight:bold}.arrow{stroke:#8250df;stroke-width:1.2}"
)
TIP = (
    '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0 0l8 4l-8 4z" fill="#8250df"/></marker></defs>'
)
BACKGROUND = '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>'

Imports = Set[tuple[str, str]]


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def centre(self) -> float:
        """The x of its middle."""
        return self.left + self.width / 2


def find_imports(graph: grimp.ImportGraph, package: str, *, but: Iterable[str] = ()) -> tuple[set[str], Imports]:
    """Return the names in a package, and which of them import which."""
    names = {child.rpartition(".")[2] for child in graph.find_children(package)} - set(but)
    depth = package.count(".") + 1
    found: set[tuple[str, str]] = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if all(name.startswith(f"{package}.") for name in (module, imported)):
                pair = module.split(".")[depth], imported.split(".")[depth]
                if pair[0] != pair[1] and set(pair) <= names:
                    found.add(pair)
    return names, found


def floors(names: set[str], imports: Imports) -> list[list[str]]:
    """Return the names by floor, the highest first; each is one floor below its lowest importer.

    Raises:
        ValueError: names import each other in a circle.
    """
    levels: dict[str, int] = {}
    while len(levels) < len(names):
        importers = {name: {source for source, target in imports if target == name} for name in names - levels.keys()}
        ready = {name: found for name, found in importers.items() if found <= levels.keys()}
        if not ready:
            raise ValueError(f"circle of imports among {', '.join(sorted(importers))}")
        levels |= {name: 1 + max((levels[source] for source in found), default=-1) for name, found in ready.items()}
    return [sorted(name for name in names if levels[name] == level) for level in range(1 + max(levels.values()))]


def draw() -> str:
    """Return the picture as SVG."""
    graph = grimp.build_graph(ROOT)
    names, imports = find_imports(graph, ROOT, but=LEFT_OUT)
    rows = floors(names, imports)
    rows[-1] += DETAILED
    inside = {name: _lines(graph, name) for row in rows for name in row}
    widths = {name: 8.2 * max(20, *map(len, [name, *lines])) for name, lines in inside.items()}
    width = 2 * MARGIN + max(sum(widths[name] for name in row) + GAP * (len(row) - 1) for row in rows)
    boxes: dict[str, Box] = {}
    top = float(MARGIN)
    for row in rows:
        height = 2 * PAD + LINE * (1 + max(len(inside[name]) for name in row))
        left = (width - sum(widths[name] for name in row) - GAP * (len(row) - 1)) / 2
        for name in row:
            boxes[name] = Box(left, top, widths[name], height)
            left += widths[name] + GAP
        top += height + GAP
    parts = list(_arrows(boxes, imports))
    for name, box in boxes.items():
        parts.append(
            f'<rect x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6"/>'
        )
        for number, line in enumerate([name.replace(".", "/"), *inside[name]]):
            kind = "" if number else "title"
            parts.append(_text(box.centre, box.top + PAD + 13 + LINE * number, line, kind))
    size = f"{width:.0f} {top - GAP + MARGIN:.0f}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
    return "\n".join((head, f"<style>{STYLE}</style>", TIP, BACKGROUND, *parts, "</svg>", ""))


def _lines(graph: grimp.ImportGraph, name: str) -> list[str]:
    package = f"{ROOT}.{name}"
    if not graph.find_children(package):
        return []
    return [" · ".join(floor) for floor in floors(*find_imports(graph, package))]


def _arrows(boxes: Mapping[str, Box], imports: Imports) -> Iterator[str]:
    def place(box: Box, pairs: list[tuple[str, str]], pair: tuple[str, str]) -> float:
        """Spread the ends of arrows over a box's edge, in the order of their other ends."""
        return box.left + box.width * (pairs.index(pair) + 1) / (len(pairs) + 1)

    for pair in sorted(imports):
        source, target = (boxes[name] for name in pair)
        outgoing = sorted((p for p in imports if p[0] == pair[0]), key=lambda p: (boxes[p[1]].centre, p))
        incoming = sorted((p for p in imports if p[1] == pair[1]), key=lambda p: (boxes[p[0]].centre, p))
        x1, x2 = place(source, outgoing, pair), place(target, incoming, pair)
        y1, y2 = source.top + source.height, target.top - 1
        yield f'<path class="arrow" marker-end="url(#tip)" d="M{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


if __name__ == "__main__":
    FILE.write_text(draw())
    sys.stdout.write(f"{FILE}\n")
