"""Draw the samples of the soak."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "vitrine", "svg.fonttype": "none", "font.size": 8}

from matplotlib import pyplot as plt  # noqa: E402  # after the choice of its backend

_SECONDS = 60.0  # latencies are medians over so long: a sample of a rare kind holds a few requests


def draw(rows: Sequence[dict[str, float]], file: Path) -> None:
    """Draw memory, files and threads, and the latencies by kind of request over time; the suffix is the format."""
    minutes = [row["seconds"] / 60 for row in rows]
    figure, (memory, counts, p50, p99) = plt.subplots(4, sharex=True, figsize=(8, 10), layout="constrained")
    memory.plot(minutes, [row["memory"] for row in rows], color="black", linewidth=0.8)
    memory.set_ylabel("memory (PSS), MiB")
    for name in ("files", "threads"):
        counts.plot(minutes, [row[name] for row in rows], label=name, linewidth=0.8)
    counts.set_ylabel("open files, threads")
    counts.legend()
    for axes, share in ((p50, "p50"), (p99, "p99")):
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for name in sorted({name for row in rows for name in row if name.endswith(share)}):
            axes.plot(*_by_minute(rows, name), label=name.removesuffix(share), linewidth=1)
        axes.set_yscale("log")
        axes.set_ylabel(f"{share}, ms, median of a minute")
        axes.grid(alpha=0.3)
    figure.legend(*p50.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    for axes in (memory, counts):
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    p99.set_xlabel("minutes")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _by_minute(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    times, values = [], []
    for minute in range(int(rows[-1]["seconds"] // _SECONDS) + 1):
        found = [row[name] for row in rows if name in row and row["seconds"] // _SECONDS == minute]
        if found:
            times.append((minute + 0.5) * _SECONDS / 60)
            values.append(statistics.median(found))
    return times, values
