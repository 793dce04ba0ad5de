"""The matrix of scores: `matrix[t][i]` is task i after t tasks were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"  # perceptually uniform, and readable in print and by the colour-blind
NOT_EVALUATED = "#ededed"
BRIGHT_FROM = 0.45  # where black on COLOURS begins to contrast more than white does


def matrix_heatmap(
    matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], *, metric: str = "accuracy"
) -> Figure:
    """A picture of the matrix: a row per number of trained tasks, a column per task.

    Scores are given in percent on a colour scale that always runs from 0 to 100, so that pictures
    of two runs can be compared. What was not evaluated is grey and hatched; the score of a task
    just after it was trained is outlined.

    Args:
        matrix: T + 1 rows of T scores, fractions from 0 to 1; None where not evaluated.
        tasks: T names, in the order of training.
        metric: What the scores are, for the colour bar.

    Returns:
        A figure that belongs to no window and no global state; save it with `savefig`.
    """
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    many = len(tasks) > 8
    cell = 0.55 if many else 0.8
    longest = max(len(name) for name in tasks)
    figure = Figure(
        figsize=(
            2.2 + 0.08 * longest + cell * len(tasks),
            1.2 + 0.06 * longest + cell * 0.8 * len(matrix),
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    scores = [[float("nan") if score is None else score for score in row] for row in matrix]
    image = axes.imshow(scores, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    _annotate(axes, matrix, size=8 if many else 10)
    _label(axes, tasks, size=8 if many else 10)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"], fontsize=8)
    bar.set_label(f"{metric} (%)", fontsize=9)
    bar.outline.set_visible(False)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure as an image, for loggers that would otherwise load pyplot to draw it.

    Args:
        figure: Any figure.

    Returns:
        Height × width × 3 (red, green, blue), bytes.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _annotate(axes: Axes, matrix: Sequence[Sequence[float | None]], size: int) -> None:
    from matplotlib.patches import Rectangle

    for t, row in enumerate(matrix):
        for i, score in enumerate(row):
            corner = (i - 0.5, t - 0.5)
            if score is None:
                axes.add_patch(
                    Rectangle(
                        corner,
                        1,
                        1,
                        facecolor=NOT_EVALUATED,
                        edgecolor="#c8c8c8",
                        hatch="////",
                        linewidth=0,
                    )
                )
            else:
                colour = "black" if score >= BRIGHT_FROM else "white"
                axes.text(
                    i,
                    t,
                    f"{100 * score:.1f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=size,
                )
    for i in range(len(matrix) - 1):
        axes.add_patch(
            Rectangle(
                (i - 0.5, i + 0.5),
                1,
                1,
                fill=False,
                edgecolor="#d7263d",
                clip_on=False,
                linewidth=2,
                zorder=3,
            )
        )


def _label(axes: Axes, tasks: Sequence[str], size: int) -> None:
    rows = ["untrained", *(f"after {t}: {name}" for t, name in enumerate(tasks, 1))]
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    crowded = len(tasks) > 8 or max(len(name) for name in tasks) > 9
    axes.set_xticks(
        range(len(tasks)),
        tasks,
        fontsize=size,
        rotation=40 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else None,
    )
    axes.set_xlabel("evaluated on", fontsize=size)
    # thin white lines between the cells
    axes.set_xticks([i + 0.5 for i in range(len(tasks) - 1)], minor=True)
    axes.set_yticks([t + 0.5 for t in range(len(tasks))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
