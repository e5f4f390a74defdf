"""Pictures of the card: the served predictions, drawn reproducibly."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from vitrine.bundle.loading import load_bundle, read_manifest
from vitrine.bundle.manifest import ReliabilityBin
from vitrine.export.pictures import RELIABILITY_FILE, SAMPLES_FILE, reliability_svg, sample_sheet
from vitrine.models.training.data.layouts import load_split


@pytest.mark.parametrize("name", ["colours", "squares"])
def test_sheet_shows_the_served_predictions(name: str, tiny_bundles: Path, colours: Path, squares: Path) -> None:
    path = tiny_bundles / name / "1"
    bundle = load_bundle(path)
    data = load_split({"colours": colours, "squares": squares}[name], bundle.manifest.task, "test")
    first, again = sample_sheet(bundle.predictor, data), sample_sheet(bundle.predictor, data)
    assert first.tobytes() == again.tobytes()
    assert first.getextrema() != ((250, 250), (250, 250), (250, 250))
    assert (path / SAMPLES_FILE).stat().st_size < 150_000
    files = read_manifest(path).files
    assert SAMPLES_FILE in files
    assert RELIABILITY_FILE in files


def test_reliability_diagram_is_an_svg() -> None:
    bins = [ReliabilityBin(answers=n, confidence=(i + 0.5) / 4, accuracy=i / 4) for i, n in enumerate((0, 5, 10, 20))]
    root = ElementTree.fromstring(reliability_svg(bins))
    kinds = [element.get("class") for element in root.iter() if element.tag.endswith("rect")]
    assert kinds.count("right") == kinds.count("over") == 3  # the empty bin is not drawn
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert any(title is not None and title.startswith("20 answers: probability 87.5 %, right 75 %") for title in titles)
