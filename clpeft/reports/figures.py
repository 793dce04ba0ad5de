"""Pictures of a leaderboard: what was learned, what was kept, and where the seeds disagree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clpeft.evaluation.matrix import matrix_heatmap
from clpeft.evaluation.metrics import LOWER_IS_BETTER, confidence_interval
from clpeft.reports.aggregate import DPI, Leaderboard, Row

# Okabe & Ito 2008 without its yellow, which is too faint for a line on white: distinct to every
# kind of colour vision
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.")
BOUND_COLOURS = ("#6b6b6b", "#9a9a9a", "#484848")
GRID = "#e3e3e3"
# tasks come in an order, so their colours do too; the pale end of the map is left out
TASK_COLOURS = "plasma"
SPREAD = (
    "Lines are means over seeds, bands their 95 % interval; of two seeds, whose interval would "
    "cover the picture, the thin lines show each."
)
FEW_TASKS = 6  # up to here tasks have names beside their curves, and colours far apart
PANELS = ("average_accuracy", "learning_accuracy", "forgetting")
MARKER_SIZE = 5.5  # points
LABEL_WIDTH = 26  # characters of a family's name before it is wrapped


@dataclass(frozen=True)
class Style:
    """How one family is drawn, the same in every figure of a report."""

    colour: str
    marker: str
    dash: str


def strategy_styles(boards: Sequence[Leaderboard]) -> dict[str, Style]:
    """One style per family name; colours first, then markers and dashes tell them apart.

    References are grey, so that a colour always means a contender.
    """
    bounds = sorted({row.label for board in boards for row in board.bounds})
    contenders = sorted({row.label for board in boards for row in board.contenders})
    styles = {
        label: Style(
            PALETTE[i % len(PALETTE)],
            MARKERS[i % len(MARKERS)],
            DASHES[i // len(PALETTE) % len(DASHES)],
        )
        for i, label in enumerate(contenders)
    }
    for i, label in enumerate(bounds):
        styles[label] = Style(BOUND_COLOURS[i % len(BOUND_COLOURS)], MARKERS[i % len(MARKERS)], ":")
    return styles


def save_figures(
    board: Leaderboard, styles: dict[str, Style], directory: Path
) -> list[tuple[str, Path]]:
    """Draws every figure of a leaderboard.

    Args:
        board: The leaderboard.
        styles: From `strategy_styles`, over all leaderboards of the report.
        directory: Where the PNG files go; made if it is not there.

    Returns:
        Captions and files, in the order in which a reader should see them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, caption, figure in _figures(board, styles):
        path = directory / f"{board.slug}_{name}.png"
        figure.savefig(path, dpi=DPI, facecolor="white")
        saved.append((caption, path))
    return saved


def _figures(board: Leaderboard, styles: dict[str, Style]) -> Iterator[tuple[str, str, Figure]]:
    yield (
        "scores",
        "Where each strategy ends, with the 95 % interval over seeds (bar) and every seed (small "
        "dots below). References are hollow. A bar that reaches the edge goes on beyond it.",
        score_chart(board, styles),
    )
    if len(board.tasks) > 1:
        yield (
            "stream",
            f"Average accuracy over the tasks seen so far. {SPREAD}",
            stream_curves(board, styles),
        )
        yield (
            "tasks",
            "Each task's score from the moment it is learned (dot), one panel per strategy. "
            f"{SPREAD}",
            task_curves(board),
        )
    for row, name in zip(board.rows, _file_names(board.rows), strict=True):
        seeds = f"mean of {len(row.runs)} seeds" if len(row.runs) > 1 else "one seed"
        yield f"matrix_{name}", f"{row.label}: the matrix of scores, {seeds}.", _heatmap(board, row)


def _heatmap(board: Leaderboard, row: Row) -> Figure:
    metric = " / ".join(sorted({*row.runs[0].scorers}))
    figure = matrix_heatmap(row.mean_matrix(), board.tasks, metric=metric)
    figure.suptitle(wrap(row.label), fontsize=11)
    # what lies inside the axes needs no room around them; not to measure it saves a third
    for artist in (*figure.axes[0].texts, *figure.axes[0].patches):
        artist.set_in_layout(False)
    return figure


def score_chart(board: Leaderboard, styles: dict[str, Style]) -> Figure:
    """Final metrics as dots with intervals, a line per family, best on top.

    Args:
        board: The leaderboard.
        styles: The families' styles.

    Returns:
        One panel each for average accuracy, learning accuracy and forgetting, where any family
        has them.
    """
    metrics = [name for name in PANELS if name in board.metrics]
    rows = board.rows
    height = 1.2 + 0.34 * sum(1 + wrap(row.label).count("\n") * 0.5 for row in rows)
    figure = Figure(figsize=(2.2 + 2.7 * max(1, len(metrics)), height), layout="constrained")
    panels = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=False):
        for y, row in enumerate(rows):
            _draw_estimate(axes, y, row, metric, styles[row.label])
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axes.set_title(f"{metric.replace('_', ' ')}\n({better} is better)", fontsize=10)
        low = min((scores.get(metric, 0.0) for row in rows for scores in row.scores), default=0.0)
        axes.set_xlim(min(-0.02, low - 0.05), 1.02)
        _dress(axes, "x")
    panels[0].set_yticks(range(len(rows)), [wrap(row.label) for row in rows], fontsize=10)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for axes in panels:
        if board.bounds and board.contenders:
            axes.axhline(len(board.bounds) - 0.5, color="#999999", linewidth=0.8)
        axes.tick_params(axis="y", length=0)
    return figure


def stream_curves(board: Leaderboard, styles: dict[str, Style]) -> Figure:
    """Average accuracy over the tasks seen so far, a line per family.

    Args:
        board: The leaderboard.
        styles: The families' styles.
    """
    tasks = len(board.tasks)
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in board.rows:
        style = styles[row.label]
        _draw_curve(
            axes,
            row,
            [(t, range(t)) for t in range(1, tasks + 1)],
            style.colour,
            label=wrap(row.label),
            marker=style.marker,
            linestyle=style.dash,
            markerfacecolor="white" if row.bound else style.colour,
            linewidth=1.4 if row.bound else 1.9,
        )
    _stage_axis(axes, board.tasks, named=tasks <= FEW_TASKS)
    axes.set_xlabel("tasks trained", fontsize=10)
    axes.set_ylabel("average accuracy so far", fontsize=10)
    seen = [
        score
        for row in board.rows
        for t in range(1, tasks + 1)
        for score in _seed_means(row, t, range(t))
    ]
    # the upper part of the scale is where strategies differ
    axes.set_ylim(math.floor(10 * max(0.0, min(seen, default=0.0) - 0.05)) / 10, 1.02)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def task_curves(board: Leaderboard) -> Figure:
    """The score of each task after each stage, a panel per family, a colour per task.

    Args:
        board: The leaderboard.
    """
    tasks = board.tasks
    columns = min(4 if len(board.rows) > 6 else 3, len(board.rows))
    lines = math.ceil(len(board.rows) / columns)
    figure = Figure(figsize=(2.5 * columns + 1.6, 2.15 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    colours = task_colours(len(tasks))
    for axes, row in zip(panels, board.rows, strict=False):
        for task, (name, colour) in enumerate(zip(tasks, colours, strict=True)):
            stages = [(t, (task,)) for t in range(task + 1, len(tasks) + 1)]
            first = axes is panels[0]
            _draw_curve(axes, row, stages, colour, label=name if first else None, linewidth=1.6)
            _mark_learning(axes, row, task, colour)
        sign = " (reference)" if row.bound else ""
        axes.set_title(wrap(row.label + sign), fontsize=10)
        _stage_axis(axes, tasks, named=False)
    for axes in panels[len(board.rows) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(board.rows) - columns) : len(board.rows)]:
        axes.set_xlabel("tasks trained", fontsize=10)  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supylabel("score", fontsize=10)
    figure.legend(
        loc="outside right upper",
        frameon=False,
        fontsize=9 if len(tasks) <= FEW_TASKS else 8,
        title="task",
    )
    return figure


def task_colours(tasks: int) -> list[str]:
    """Colours in the order of the tasks, from dark to light."""
    scale = matplotlib.colormaps[TASK_COLOURS]
    return [
        matplotlib.colors.to_hex(scale(0.0 if tasks == 1 else 0.88 * i / (tasks - 1)))
        for i in range(tasks)
    ]


def wrap(label: str) -> str:
    """A family's name on several lines, broken between its words."""
    lines = [""]
    for word in label.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= LABEL_WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _file_names(rows: Sequence[Row]) -> list[str]:
    names = [re.sub(r"[^A-Za-z0-9.+-]+", "-", row.label).strip("-")[:60] for row in rows]
    return [
        name if names.count(name) == 1 else f"{name}-{row.runs[0].family}"
        for name, row in zip(names, rows, strict=True)
    ]


def _draw_estimate(axes: Axes, y: int, row: Row, metric: str, style: Style) -> None:
    estimate = row.metrics.get(metric)
    if estimate is None:
        axes.text(0.02, y, "undefined", va="center", fontsize=8, color="#767676")
        return
    seeds = [scores[metric] for scores in row.scores if metric in scores]
    if len(seeds) > 1:
        below = [y + 0.27] * len(seeds)
        axes.plot(seeds, below, ".", color=style.colour, markersize=4, alpha=0.7)
    axes.errorbar(
        estimate.mean,
        y,
        xerr=estimate.half_width,
        color=style.colour,
        marker=style.marker,
        markersize=MARKER_SIZE,
        markerfacecolor="white" if row.bound else style.colour,
        linewidth=1.5,
        capsize=3,
        zorder=3,
    )


def _draw_curve(
    axes: Axes,
    row: Row,
    stages: Iterable[tuple[int, Sequence[int]]],
    colour: str,
    **line: Any,
) -> None:
    """The mean of some tasks' scores at each stage: over seeds, and how far these are apart."""
    points = [(t, _seed_means(row, t, tasks)) for t, tasks in stages]
    points = [(t, values) for t, values in points if values]
    ts = [t for t, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    # a line through one point would not be seen, and hardly its marker among other lines
    alone = {"marker": "o", "zorder": 5} if len(points) == 1 else {"zorder": 3}
    axes.plot(ts, means, color=colour, markersize=MARKER_SIZE, **{**alone, **line})
    if len(row.runs) == 2:
        for seed in range(2):
            thin = [values[seed] if len(values) == 2 else math.nan for _, values in points]
            axes.plot(ts, thin, color=colour, linewidth=0.7, alpha=0.5)
    elif len(row.runs) > 2:
        halves = [confidence_interval(values)[1] or 0.0 for _, values in points]
        low = [max(0.0, mean - half) for mean, half in zip(means, halves, strict=True)]
        high = [min(1.0, mean + half) for mean, half in zip(means, halves, strict=True)]
        axes.fill_between(ts, low, high, color=colour, alpha=0.16, linewidth=0)


def _seed_means(row: Row, stage: int, tasks: Sequence[int]) -> list[float]:
    """Per seed, the mean score of some tasks at a stage; without the seeds that lack one."""
    means = []
    for run in row.runs:
        scores = [score for task in tasks if (score := run.matrix[stage][task]) is not None]
        if len(scores) == len(tasks):
            means.append(sum(scores) / len(scores))
    return means


def _mark_learning(axes: Axes, row: Row, task: int, colour: str) -> None:
    learned = _seed_means(row, task + 1, (task,))
    if learned:
        mean = sum(learned) / len(learned)
        axes.plot(task + 1, mean, "o", color=colour, markersize=MARKER_SIZE, zorder=4)


def _stage_axis(axes: Axes, tasks: Sequence[str], *, named: bool) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(1 - 0.06 * len(tasks), len(tasks) * 1.06)
    if named:
        labels = [f"{t}\n{task}" for t, task in enumerate(tasks, 1)]
        axes.set_xticks(range(1, len(tasks) + 1), labels)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _dress(axes, "y")


def _dress(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color="#999999")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
