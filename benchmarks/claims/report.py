"""Draw the plots of `docs/claims/` and fill the tables of `docs/claims.md` from `results.jsonl`."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.claims import trials
from benchmarks.claims.cost import IMAGE_SIZES, costs
from benchmarks.claims.measure import Outcome
from benchmarks.claims.trials import Trial

RESULTS = Path(__file__).with_name("results.jsonl")
DOCS = Path(__file__).parents[2] / "docs"
TEST_IMAGES = 10_000
STUCK = 0.2  # accuracy below which a network has not learned (ten classes)
NAMES = {"vit": "ViT", "mixer": "MLP-Mixer", "bit": "BiT", "pre": "pre-norm", "post": "post-norm"}
COLORS = {"vit": "#0072b2", "mixer": "#e69f00", "bit": "#009e73", "pre": "#0072b2", "post": "#d55e00"}
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00")

Results = dict[Trial, Outcome]
Factors = dict[str, trials.Factor]
Rows = list[tuple[Factors, Outcome]]


def read_results() -> Results:
    """Return the outcomes of the current trials; rows of removed trials are ignored."""
    outcomes = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        row = json.loads(line)
        fields = {name: row[name] for name in ("claim", "measure", "recipe", "data")}
        trial = Trial(**fields, factors=tuple(row["factors"].items()), settings=tuple(row["settings"]))
        outcomes[trial] = row["outcome"]
    return {trial: outcomes[trial] for trial in trials.trials() if trial in outcomes}


def write_report(results: Results) -> None:
    """Draw every plot and fill every table."""
    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "vitrine", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
    plt.rcParams.update(
        {"grid.alpha": 0.3, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    )
    page = (DOCS / "claims.md").read_text()
    for claim, (draw, table) in CLAIMS.items():
        rows = [(dict(trial.factors), outcome) for trial, outcome in results.items() if trial.claim == claim]
        if draw is not None:
            figure = draw(rows)
            figure.savefig(DOCS / "claims" / f"{claim}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
        page = _fill_table(page, claim, table(rows))
    (DOCS / "claims.md").write_text(page)


def _fill_table(page: str, claim: str, table: str) -> str:
    block = f"<!-- {claim} -->\n{table}<!-- end -->"
    page, count = re.subn(rf"<!-- {claim} -->\n.*?<!-- end -->", lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCS / 'claims.md'}: expected one block <!-- {claim} --> ... <!-- end -->, found {count}")
    return page


def interval(values: Sequence[float], images: int = TEST_IMAGES) -> tuple[float, float]:
    """Return the mean of accuracies and the half width of its 95 % confidence interval.

    With several seeds, Student's t interval of the mean over all seeds (weights, images, order). With one, the binomial
    interval of the accuracy over all images of the kind, which is narrower.
    """
    mean = fmean(values)
    if len(values) > 1:
        return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, 1.96 * math.sqrt(mean * (1 - mean) / images)


def learning_rate_table(rows: Rows) -> str:
    """Held-out accuracy by network and learning rate."""
    rates = sorted({factors["lr"] for factors, _ in rows})
    lines = [
        (NAMES[architecture], *(_percent(_values(rows, "top1", architecture=architecture, lr=lr)) for lr in rates))
        for architecture in trials.ARCHITECTURES
    ]
    return _table(("", *(f"lr {lr:g}" for lr in rates)), lines)


def draw_little_data(rows: Rows) -> Figure:
    """Accuracy by fraction of the training images, a panel for each augmentation."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True)
    for axes, augmentation in zip(panels, ("none", "strong"), strict=True):
        for architecture in trials.ARCHITECTURES:
            points = [
                (fraction, *interval(values))
                for fraction in trials.FRACTIONS
                if (
                    values := _values(
                        rows, "top1", fraction=fraction, augmentation=augmentation, architecture=architecture
                    )
                )
            ]
            if not points:
                continue
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                *(x, [100 * value for value in y], [100 * value for value in error]),
                **{"color": COLORS[architecture], "label": NAMES[architecture], "marker": "o", "ms": 3, "capsize": 2},
            )
        axes.set(
            xscale="log",
            title=f"augmentation: {augmentation}",
            xlabel="part of the 48,000 training images, how often each is seen",
        )
        axes.set_xticks(list(trials.FRACTIONS), [f"{f:.0%}\n{epochs} x" for f, epochs in trials.FRACTIONS.items()])
    panels[0].set_ylabel("top-1 accuracy on test, %")
    panels[0].legend()
    return figure


def little_data_table(rows: Rows) -> str:
    """Accuracy with intervals."""
    lines = [
        (
            augmentation,
            NAMES[architecture],
            *(
                _percent(
                    _values(rows, "top1", fraction=fraction, augmentation=augmentation, architecture=architecture), True
                )
                for fraction in trials.FRACTIONS
            ),
        )
        for augmentation in ("none", "strong")
        for architecture in trials.ARCHITECTURES
    ]
    return _table(("augmentation", "", *(f"{f:.0%}, {epochs} epochs" for f, epochs in trials.FRACTIONS.items())), lines)


def draw_overfitting(rows: Rows) -> Figure:
    """Losses by epoch, a panel for each width; the training loss is the mean over the epoch."""
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True)
    for axes, width in zip(panels, trials.WIDTHS, strict=True):
        for (factors, outcome), color in zip(_select(rows, width=width), SERIES, strict=False):
            if not outcome["train_loss"]:
                continue
            epochs = range(1, len(outcome["train_loss"]) + 1)
            axes.plot(epochs, outcome["train_loss"], color=color, ls="--")
            axes.plot(epochs, outcome["held_out_loss"], color=color, label=factors["regularisation"])
        axes.set(title=f"width {width}", xlabel="epoch")
    panels[0].set_ylabel("cross-entropy, nats\n(dashed: training, as augmented)")
    panels[0].legend(title="regularisation")
    return figure


def overfitting_table(rows: Rows) -> str:
    """Accuracy on training and test images, and the gap between them."""
    lines = [
        (
            factors["width"],
            f"{outcome['parameters']:,}",
            factors["regularisation"],
            _percent([outcome["train_top1"]]),
            _percent([outcome["top1"]]),
            f"{100 * (outcome['train_top1'] - outcome['top1']):.1f}",
            *_lowest_and_last(outcome["held_out_loss"]),
        )
        for factors, outcome in rows
    ]
    head = ("width", "parameters", "regularisation", "training images", "test", "gap, points")
    return _table((*head, "lowest held-out loss", "last"), lines)


def _lowest_and_last(losses: Sequence[float]) -> tuple[str, str]:
    return (f"{min(losses):.2f}", f"{losses[-1]:.2f}") if losses else ("", "")


def draw_stability(rows: Rows) -> Figure:
    """Held-out accuracy by learning rate, a panel for each depth and warm-up."""
    settings = [(depth, warmup) for depth in trials.DEPTHS for warmup in trials.WARMUPS]
    figure, panels = plt.subplots(1, len(settings), figsize=(11, 3), sharey=True)
    for axes, (depth, warmup) in zip(panels, settings, strict=True):
        for norm in trials.NORMS:
            points = [
                (factors["lr"], 100 * (outcome["top1"] or 0), outcome["diverged"])
                for factors, outcome in _select(rows, depth=depth, warmup=warmup, norm=norm)
            ]
            axes.plot(
                *_columns((lr, top1) for lr, top1, _ in points), color=COLORS[norm], marker="o", ms=4, label=NAMES[norm]
            )
            diverged_points = [(lr, top1) for lr, top1, diverged in points if diverged]
            axes.plot(*_columns(diverged_points), color=COLORS[norm], marker="x", ms=9, ls="")
        axes.axhline(100 * STUCK, color="#888888", ls=":")
        axes.set(xscale="log", title=f"{depth} blocks, warm-up {warmup} epochs", xlabel="learning rate")
        axes.set_xlim(trials.LEARNING_RATES[0] / 1.5, trials.LEARNING_RATES[-1] * 1.5)
    panels[0].set_ylabel("held-out top-1, %\n(×: diverged)")
    panels[0].legend()
    return figure


def stability_table(rows: Rows) -> str:
    """How many trainings of each kind diverged, stayed below `STUCK`, or learned."""
    lines = []
    for norm in trials.NORMS:
        for depth in trials.DEPTHS:
            outcomes = [outcome for _, outcome in _select(rows, norm=norm, depth=depth)]
            diverged = sum(outcome["diverged"] for outcome in outcomes)
            stuck = sum(not outcome["diverged"] and outcome["top1"] < STUCK for outcome in outcomes)
            best = max((outcome["top1"] or 0.0 for outcome in outcomes), default=0.0)
            lines.append(
                (NAMES[norm], depth, len(outcomes), diverged, stuck, len(outcomes) - diverged - stuck, _percent([best]))
            )
    head = ("", "blocks", "trainings", "diverged", f"below {STUCK:.0%}", "learned", "best held-out top-1")
    return _table(head, lines)


def draw_positions(rows: Rows) -> Figure:
    """Accuracy with ordered and shuffled patches."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for place, (metric, label) in enumerate((("top1", "patches in order"), ("shuffled_top1", "patches shuffled"))):
        found = [(i, _values(rows, metric, positions=kind)) for i, kind in enumerate(trials.POSITIONS)]
        points = [(i, *interval(values)) for i, values in found if values]
        axes.bar(
            [i + 0.4 * place for i, _, _ in points],
            [100 * mean for _, mean, _ in points],
            0.38,
            yerr=[100 * error for _, _, error in points],
            **{"color": SERIES[place], "label": label, "capsize": 3},
        )
    axes.set_xticks([i + 0.2 for i in range(len(trials.POSITIONS))], [_positions(kind) for kind in trials.POSITIONS])
    axes.set(xlabel="positions", ylabel="top-1 accuracy on test, %")
    axes.legend(loc="lower right")
    return figure


def positions_table(rows: Rows) -> str:
    """Accuracy by the kind of positions."""
    lines = [
        (
            _positions(kind),
            _percent(_values(rows, "top1", positions=kind), True),
            _percent(_values(rows, "shuffled_top1", positions=kind), True),
        )
        for kind in trials.POSITIONS
    ]
    return _table(("positions", "patches in order", "patches shuffled"), lines)


def draw_queries(rows: Rows) -> Figure:
    """AP and duplicate boxes by the number of queries, with and without NMS."""
    figure, (precision, duplicates) = plt.subplots(1, 2, figsize=(8, 3))
    for axes, metric, scale in ((precision, "AP", 100), (duplicates, "duplicates", 1)):
        for label, style, answers in (
            ("as answered", "-", [outcome for _, outcome in rows]),
            ("after NMS", "--", [outcome["after_nms"] for _, outcome in rows]),
        ):
            values = [scale * answer[metric] for answer in answers]
            axes.plot(
                [factors["queries"] for factors, _ in rows],
                values,
                style,
                color=SERIES[0],
                marker="o",
                ms=4,
                label=label,
            )
        axes.set(
            xlabel="queries", ylabel="AP on val, %" if metric == "AP" else "second boxes of an object", ylim=(0, None)
        )
    precision.legend()
    return figure


def queries_table(rows: Rows) -> str:
    """Objects found, missed and found twice."""
    lines = [
        (
            factors["queries"],
            *(f"{100 * outcome[name]:.1f}" for name in ("AP", "AP50")),
            *(f"{100 * outcome['after_nms'][name]:.1f}" for name in ("AP", "AP50")),
            *(outcome[name] for name in ("right", "missed", "duplicates")),
            outcome["after_nms"]["duplicates"],
        )
        for factors, outcome in rows
    ]
    head = ("queries", "AP", "AP50", "AP after NMS", "AP50 after NMS", "found", "missed", "found twice")
    return _table((*head, "found twice after NMS"), lines)


def draw_cost(_: Rows) -> Figure:
    """Parameters, compute and memory by the number of patches."""
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.2))
    tokens = [(size // 4) ** 2 for size in IMAGE_SIZES]
    for (name, series), color in zip(costs().items(), SERIES, strict=False):
        style = {"color": color, "marker": "o", "ms": 3}
        panels[0].plot(tokens, [cost.parameters / 1e6 for cost in series], label=name, **style)
        panels[1].plot(tokens, [cost.flops / 1e9 for cost in series], **style)
        panels[2].plot(tokens, [cost.saved / 1e6 for cost in series], **style)
        if name.startswith("ViT"):
            panels[2].plot(tokens, [cost.saved_fused / 1e6 for cost in series], ls="--", **style)
    for axes, label in zip(
        panels, ("million parameters", "GFLOP, forward", "MB kept for backward\n(dashed: fused attention)"), strict=True
    ):
        axes.set(xlabel="patches of 4 x 4 pixels", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.minorticks_off()
    panels[0].set(yscale="linear", ylim=(0, None))
    panels[0].legend()
    return figure


def cost_table(_: Rows) -> str:
    """The same values as a table."""
    lines = [
        (
            name,
            f"{size} x {size}",
            f"{(size // 4) ** 2:,}",
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:,.0f}",
            f"{cost.saved / 1e6:,.1f}",
            f"{cost.saved_fused / 1e6:,.1f}" if name.startswith("ViT") else "",
        )
        for name, series in costs().items()
        for size, cost in zip(IMAGE_SIZES, series, strict=True)
    ]
    head = ("", "pixels", "patches", "parameters", "MFLOP, forward", "MB kept for backward", "with fused attention")
    return _table(head, lines)


CLAIMS: dict[str, tuple[Callable[[Rows], Figure] | None, Callable[[Rows], str]]] = {
    "learning-rate": (None, learning_rate_table),
    "little-data": (draw_little_data, little_data_table),
    "overfitting": (draw_overfitting, overfitting_table),
    "stability": (draw_stability, stability_table),
    "positions": (draw_positions, positions_table),
    "queries": (draw_queries, queries_table),
    "cost": (draw_cost, cost_table),
}


def _select(rows: Rows, **factors: trials.Factor) -> Rows:
    return [(f, outcome) for f, outcome in rows if all(f[key] == value for key, value in factors.items())]


def _values(rows: Rows, metric: str, **factors: trials.Factor) -> list[float]:
    return [outcome[metric] for _, outcome in _select(rows, **factors)]


def _columns(points: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _percent(values: Sequence[float], with_interval: bool = False) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}" if with_interval else f"{100 * mean:.1f}"


def _positions(kind: str) -> str:
    return {"sine_1d": "sine, 1-D", "sine_2d": "sine, 2-D"}.get(kind, kind)


def _table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
