"""Latency: every runtime is timed, in turns."""

from pathlib import Path

from vitrine.bundle.machine import available_cores
from vitrine.bundle.runtime import CPU
from vitrine.export.latency import in_turns, measure_latency
from vitrine.models.serving import served
from vitrine.models.training.checkpoint import load_checkpoint


def test_calls_take_turns() -> None:
    order: list[str] = []
    medians = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert all(sorted(turn) == ["a", "b"] for turn in rounds)
    assert ["a", "b"] in rounds[1:]
    assert ["b", "a"] in rounds[1:]  # the first is not timed
    assert medians.keys() == {"a", "b"}
    assert all(value > 0 for value in medians.values())


def test_every_way_at_every_setting(classifier_run: Path, tiny_bundles: Path) -> None:
    checkpoint = load_checkpoint(classifier_run)
    module = served(checkpoint.build(), (0.5,) * 3, (0.5,) * 3).eval()
    file = tiny_bundles / "colours" / "1" / "model.onnx"
    latency = measure_latency(module, {"model.onnx": file}, (16, 16), providers=CPU, seconds=0.01)
    assert latency.settings == tuple((batch, count) for count in sorted({1, available_cores()}) for batch in (1, 8))
    assert [row.name for row in latency.rows] == ["torch", "model.onnx"]
    assert latency.rows[1].size == file.stat().st_size
    assert all(len(row.milliseconds) == len(latency.settings) for row in latency.rows)
    assert "cores" in latency.machine
