"""Format the measurements as Markdown tables, with the project's targets."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

CONNECTIONS = (1, 8, 32)

# At 1 connection: the limit of p50, as text and as a function of the ceiling's milliseconds.
# At 8 and 32: the minimum ratios to the ceiling's rate.
_TARGETS: dict[str, tuple[str, Callable[[float], float], float, float]] = {
    "vit-ti": ("1.10 x", lambda limit: 1.10 * limit, 0.97, 0.97),
    "vit-small-images": ("+ 0.8 ms", lambda limit: limit + 0.8, 0.92, 0.92),
    "vit-cifar10": ("+ 0.8 ms", lambda limit: limit + 0.8, 0.92, 0.92),
    "detr-bccd": ("1.10 x", lambda limit: 1.10 * limit, 0.95, 0.95),
    "tensors": ("1.05 x", lambda limit: 1.05 * limit, 0.97, 0.97),
}


def report(results: dict[str, Any]) -> str:
    """Return all tables."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in results["cells"]:
        cells[cell["model"], cell["server"]].append(cell)
    parts = [_against_ceiling(cells, results)]
    names = list(dict.fromkeys(model for model, _ in cells))
    parts += [
        _against_peers(name, {server: rounds for (model, server), rounds in cells.items() if model == name})
        for name in names
    ]
    if "vitrine" in {server for _, server in cells}:
        parts.append(_geometric_means(cells, names))
        parts.append(_overhead_table(results))
    return "\n\n".join(parts) + "\n"


def _against_ceiling(cells: dict[tuple[str, str], list[dict[str, Any]]], results: dict[str, Any]) -> str:
    lines = [
        "| | 1 connection: p50, of the ceiling's (target) | 8: of the ceiling's rate (target) | 32 (target) "
        "| p99/p50 at 8 |",
        "|---|---|---|---|---|",
    ]
    ours = {model: rounds for (model, server), rounds in cells.items() if server == "vitrine"}
    if results.get("tensors"):
        ours["tensors"] = results["tensors"]
    for model, rounds in ours.items():
        text, max_p50, rate_at_8, rate_at_32 = _TARGETS[model]
        p50 = _median(rounds, lambda cell: _window(cell, 1)["p50"])
        limit = _median(rounds, lambda cell: cell["ceiling"]["milliseconds"])
        ratios_to_limit = [_window(cell, 1)["p50"] / max_p50(cell["ceiling"]["milliseconds"]) for cell in rounds]
        first = f"{p50:.1f} ms, ceiling {limit:.1f} ({text}: {_met(statistics.median(ratios_to_limit) <= 1)})"
        ratios = []
        for connections, target in ((8, rate_at_8), (32, rate_at_32)):
            ratio = [_window(cell, connections)["rate"] / cell["ceiling"]["rate"] for cell in rounds]
            median = statistics.median(ratio)
            ratios.append(f"{median:.2f} ({min(ratio):.2f} to {max(ratio):.2f}; {target}: {_met(median >= target)})")
        spread = _median(rounds, lambda cell: _window(cell, 8)["p99"] / _window(cell, 8)["p50"])
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
            rate = _median(rounds, lambda cell, c=connections: _window(cell, c)["rate"])  # type: ignore[misc]
            ratio = _median(
                rounds,
                lambda cell, c=connections: _window(cell, c)["rate"] / cell["ceiling"]["rate"],  # type: ignore[misc]
            )
            rates.append(f"{rate:.0f}, {ratio:.2f}")
        p50 = _median(rounds, lambda cell: _window(cell, 1)["p50"])
        p99 = _median(rounds, lambda cell: _window(cell, 32)["p99"])
        memory = _median(rounds, lambda cell: cell["memory"])
        start = _median(rounds, lambda cell: cell["start"])
        lines.append(f"| {server} | {p50:.1f} | {' | '.join(rates)} | {p99:.0f} | {memory:.0f} | {start:.1f} |")
    return "\n".join(lines)


def _geometric_means(cells: dict[tuple[str, str], list[dict[str, Any]]], models: Sequence[str]) -> str:
    """Compare with each peer: the geometric mean of all speed ratios, by p50 at 1 connection and by rate at more."""
    lines = ["| | geometric mean of ours to theirs | cases in which they are ahead by more than 3 % |", "|---|---|---|"]
    for peer in dict.fromkeys(server for _, server in cells if server != "vitrine"):
        ratios = {}
        for model in models:
            for connections in CONNECTIONS:
                ours, theirs = (_ceiling_ratio(cells[model, server], connections) for server in ("vitrine", peer))
                ratios[f"{model} at {connections}"] = ours / theirs
        mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
        behind = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 0.97]
        lines.append(f"| {peer} | {mean:.2f} | {', '.join(behind) or 'none'} |")
    return "\n".join(lines)


def _ceiling_ratio(rounds: Sequence[dict[str, Any]], connections: int) -> float:
    """Return the ratio of a server's speed to its round's ceiling, as the machine's speed changes between rounds."""
    if connections == 1:
        return _median(rounds, lambda cell: cell["ceiling"]["milliseconds"] / _window(cell, 1)["p50"])
    return _median(rounds, lambda cell: _window(cell, connections)["rate"] / cell["ceiling"]["rate"])


def _overhead_table(results: dict[str, Any]) -> str:
    """Format the overhead of serving, and the results under overload."""
    lines = ["| | measured | target |", "|---|---|---|"]
    targets = {"vitrine": "5,000/s, p99 12 ms", "vitrine, multipart": "1,500/s", "no image": ""}
    for name, target in targets.items():
        rate = statistics.median(windows[name]["rate"] for windows in results["no-op"])
        p99 = statistics.median(windows[name]["p99"] for windows in results["no-op"])
        lines.append(f"| no-op at 32 connections: {name} | {rate:.0f}/s, p99 {p99:.1f} ms | {target} |")
    overloads = results["overload"]
    goodput = statistics.median(run["accepted"]["rate"] / run["peak"]["rate"] for run in overloads)
    accepted = statistics.median(run["accepted"]["p99"] for run in overloads)
    health = statistics.median(run["health_p99"] for run in overloads)
    refused = statistics.median(run["refused"] for run in overloads)
    after = statistics.median(run["after"][0] for run in overloads)
    lines += [
        f"| 256 connections: goodput, share of the peak | {goodput:.2f} ({refused:.0f} rejected/s) | 0.90 |",
        f"| 256 connections: p99 of the probe | {health:.0f} ms | 50 ms |",
        f"| 256 connections: p99 of responses | {accepted:.0f} ms | 30,000 ms |",
        f"| first request after they have disconnected | {after:.0f} ms | 500 ms |",
    ]
    return "\n".join(lines)


def _window(cell: dict[str, Any], connections: int) -> dict[str, float]:
    windows = cell["windows"]
    window: dict[str, float] = windows.get(connections) or windows[str(connections)]
    return window


def _median(rounds: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, rounds))


def _met(met: bool) -> str:
    return "met" if met else "missed"
