"""The measurements as Markdown tables, beside the bars that Vitrine sets itself."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

CONNECTIONS = (1, 8, 32)

# Of p50 at one connection: what it may be, of the ceiling's milliseconds; and the least ratios to its rate at 8 and 32.
_BARS: dict[str, tuple[str, Callable[[float], float], float, float]] = {
    "vit-ti": ("1.10 x", lambda limit: 1.10 * limit, 0.97, 0.97),
    "vit-small-images": ("+ 0.8 ms", lambda limit: limit + 0.8, 0.92, 0.92),
    "vit-cifar10": ("+ 0.8 ms", lambda limit: limit + 0.8, 0.92, 0.92),
    "detr-bccd": ("1.10 x", lambda limit: 1.10 * limit, 0.95, 0.95),
    "tensors": ("1.05 x", lambda limit: 1.05 * limit, 0.97, 0.97),
}


def report(results: dict[str, Any]) -> str:
    """All tables."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in results["cells"]:
        cells[cell["model"], cell["server"]].append(cell)
    parts = [_against_the_ceiling(cells, results)]
    names = list(dict.fromkeys(model for model, _ in cells))
    parts += [
        _against_peers(name, {server: found for (model, server), found in cells.items() if model == name})
        for name in names
    ]
    if "vitrine" in {server for _, server in cells}:
        parts.append(_geometric_means(cells, names))
        parts.append(_ways(results))
    return "\n\n".join(parts) + "\n"


def _against_the_ceiling(cells: dict[tuple[str, str], list[dict[str, Any]]], results: dict[str, Any]) -> str:
    lines = [
        "| | 1 connection: p50, of the ceiling's (target) | 8: of the ceiling's rate (target) | 32 (target) "
        "| p99/p50 at 8 |",
        "|---|---|---|---|---|",
    ]
    found = {model: rounds for (model, server), rounds in cells.items() if server == "vitrine"}
    if results.get("tensors"):
        found["tensors"] = results["tensors"]
    for model, rounds in found.items():
        text, bar, eight, many = _BARS[model]
        p50 = _medians(rounds, lambda cell: _window(cell, 1)["p50"])
        limit = _medians(rounds, lambda cell: cell["ceiling"]["milliseconds"])
        shares = [_window(cell, 1)["p50"] / bar(cell["ceiling"]["milliseconds"]) for cell in rounds]
        first = f"{p50:.1f} ms, ceiling {limit:.1f} ({text}: {_met(statistics.median(shares) <= 1)})"
        ratios = []
        for connections, least in ((8, eight), (32, many)):
            ratio = [_window(cell, connections)["rate"] / cell["ceiling"]["rate"] for cell in rounds]
            middle = statistics.median(ratio)
            ratios.append(f"{middle:.2f} ({min(ratio):.2f} to {max(ratio):.2f}; {least}: {_met(middle >= least)})")
        spread = _medians(rounds, lambda cell: _window(cell, 8)["p99"] / _window(cell, 8)["p50"])
        lines.append(f"| {model} | {first} | {' | '.join(ratios)} | {spread:.2f} (1.6: {_met(spread <= 1.6)}) |")
    return "\n".join(lines)


def _against_peers(model: str, servers: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"`{model}`:",
        "",
        "| | 1 connection: p50 ms | 8: images/s, of the ceiling | 32: the same | p99 ms at 32 | MiB | start s |",
        "|---|---|---|---|---|---|---|",
    ]
    for server, rounds in servers.items():
        rates = []
        for connections in (8, 32):
            rate = _medians(rounds, lambda cell, c=connections: _window(cell, c)["rate"])  # type: ignore[misc]
            ratio = _medians(
                rounds,
                lambda cell, c=connections: _window(cell, c)["rate"] / cell["ceiling"]["rate"],  # type: ignore[misc]
            )
            rates.append(f"{rate:.0f}, {ratio:.2f}")
        p50 = _medians(rounds, lambda cell: _window(cell, 1)["p50"])
        p99 = _medians(rounds, lambda cell: _window(cell, 32)["p99"])
        memory, start = (_medians(rounds, lambda cell, k=key: cell[k]) for key in ("memory", "start"))  # type: ignore[misc]
        lines.append(f"| {server} | {p50:.1f} | {' | '.join(rates)} | {p99:.0f} | {memory:.0f} | {start:.1f} |")
    return "\n".join(lines)


def _geometric_means(cells: dict[tuple[str, str], list[dict[str, Any]]], models: Sequence[str]) -> str:
    """Of all cells: how many times as fast as each peer (of one connection by p50, of more by rate)."""
    lines = ["| | geometric mean of ours to theirs | cases in which they are ahead by more than 3 % |", "|---|---|---|"]
    for peer in dict.fromkeys(server for _, server in cells if server != "vitrine"):
        ratios = {}
        for model in models:
            for connections in CONNECTIONS:
                ours, theirs = (_against_ceiling(cells[model, server], connections) for server in ("vitrine", peer))
                ratios[f"{model} at {connections}"] = ours / theirs
        mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
        behind = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 0.97]
        lines.append(f"| {peer} | {mean:.2f} | {', '.join(behind) or 'none'} |")
    return "\n".join(lines)


def _against_ceiling(rounds: Sequence[dict[str, Any]], connections: int) -> float:
    """How near a server comes to the ceiling of its round: the machine's speed changes between rounds."""
    if connections == 1:
        return _medians(rounds, lambda cell: cell["ceiling"]["milliseconds"] / _window(cell, 1)["p50"])
    return _medians(rounds, lambda cell: _window(cell, connections)["rate"] / cell["ceiling"]["rate"])


def _ways(results: dict[str, Any]) -> str:
    """The cost of HTTP itself, and overload."""
    lines = ["| | measured | target |", "|---|---|---|"]
    bars = {"vitrine": "5,000/s, p99 12 ms", "vitrine, multipart": "1,500/s", "no image": ""}
    for name, bar in bars.items():
        rate = statistics.median(found[name]["rate"] for found in results["no-op"])
        p99 = statistics.median(found[name]["p99"] for found in results["no-op"])
        lines.append(f"| no-op at 32 connections: {name} | {rate:.0f}/s, p99 {p99:.1f} ms | {bar} |")
    found = results["overload"]
    goodput = statistics.median(run["accepted"]["rate"] / run["peak"]["rate"] for run in found)
    accepted = statistics.median(run["accepted"]["p99"] for run in found)
    health = statistics.median(run["health_p99"] for run in found)
    refused = statistics.median(run["refused"] for run in found)
    after = statistics.median(run["after"][0] for run in found)
    lines += [
        f"| 256 connections: goodput, share of the peak | {goodput:.2f} ({refused:.0f} rejected/s) | 0.90 |",
        f"| 256 connections: p99 of the probe | {health:.0f} ms | 50 ms |",
        f"| 256 connections: p99 of answers | {accepted:.0f} ms | 30,000 ms |",
        f"| first request after they have disconnected | {after:.0f} ms | 500 ms |",
    ]
    return "\n".join(lines)


def _window(cell: dict[str, Any], connections: int) -> dict[str, float]:
    windows = cell["windows"]
    found: dict[str, float] = windows.get(connections) or windows[str(connections)]
    return found


def _medians(rounds: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, rounds))


def _met(met: bool) -> str:
    return "met" if met else "missed"
