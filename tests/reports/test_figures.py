"""Figures: what is drawn is what was measured, and names can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clpeft.reports.aggregate import DPI, Leaderboard, leaderboards
from clpeft.reports.figures import (
    save_figures,
    score_chart,
    strategy_styles,
    stream_curves,
    task_colours,
    task_curves,
    wrap,
)
from clpeft.reports.runs import collect_runs

WriteRun = Callable[..., Path]


@pytest.fixture
def board(sweep: Path) -> Leaderboard:
    (board,) = leaderboards(collect_runs([sweep]).runs)
    return board


def curves(axes: Axes, colour: str) -> list[list[tuple[float, float]]]:
    """The points of every line of one colour."""
    found = [line.get_xydata() for line in axes.get_lines() if line.get_color() == colour]
    return [[(float(x), float(y)) for x, y in points] for points in found]


def test_average_accuracy_over_the_stream(board: Leaderboard) -> None:
    styles = strategy_styles([board])
    (axes,) = stream_curves(board, styles).axes
    mean, *seeds = curves(axes, styles["finetune"].colour)
    # seed 0: .9, (.5 + .9) / 2, .6; seed 1: .8, .6, .5
    assert mean == [(1, pytest.approx(0.85)), (2, pytest.approx(0.65)), (3, pytest.approx(0.55))]
    assert seeds == [
        [(1, pytest.approx(0.9)), (2, pytest.approx(0.7)), (3, pytest.approx(0.6))],
        [(1, pytest.approx(0.8)), (2, pytest.approx(0.6)), (3, pytest.approx(0.5))],
    ]
    # joint has a last row only
    assert curves(axes, styles["joint"].colour) == [[(3, pytest.approx(0.9))]]


def test_band_over_three_seeds_is_the_interval(board: Leaderboard) -> None:
    styles = strategy_styles([board])
    (axes,) = stream_curves(board, styles).axes
    (band,) = axes.collections  # replay is the only one with three
    points = band.get_paths()[0].vertices
    last = [y for x, y in points if x == 3]
    # .75 ± 4.30265 · .05 / √3
    assert max(last) == pytest.approx(0.874207, abs=1e-5)
    assert min(last) == pytest.approx(0.625793, abs=1e-5)


def test_task_curves_begin_where_a_task_is_learned(board: Leaderboard) -> None:
    panels = [axes for axes in task_curves(board).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        "independent (reference)",
        "joint (reference)",
        "replay",
        "ewc",
        "finetune",
    ]
    second = task_colours(3)[1]
    mean, *_ = curves(panels[-1], second)
    # finetune on goods: (.9 + .8) / 2, then (.6 + .4) / 2
    assert mean == [(2, pytest.approx(0.85)), (3, pytest.approx(0.5))]
    assert curves(panels[1], second) == [[(3, pytest.approx(0.9))]]


def test_score_chart_has_a_line_per_family_and_an_interval(board: Leaderboard) -> None:
    styles = strategy_styles([board])
    figure = score_chart(board, styles)
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == ["average accuracy", "learning accuracy", "forgetting"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "independent",
        "joint",
        "replay",
        "ewc",
        "finetune",
    ]
    assert axes.yaxis_inverted()  # best on top
    (bar,) = [
        container[2][0].get_segments()[0]
        for container in axes.containers
        if container[0].get_color() == styles["replay"].colour
    ]
    assert [float(x) for x, _ in bar] == pytest.approx([0.625793, 0.874207], abs=1e-5)
    assert [text.get_text() for text in figure.axes[2].texts] == ["undefined"]  # joint


def test_styles_are_of_the_whole_report(
    board: Leaderboard, tmp_path: Path, write_run: WriteRun
) -> None:
    names = ["a", "finetune", "replay", *(f"s{i}" for i in range(9))]
    for name in names:
        write_run([name], 0, [[0.2], [0.8]], stream="other", where="other")
    (other,) = leaderboards(collect_runs([tmp_path / "other"]).runs)
    styles = strategy_styles([board, other])
    assert set(styles) == {*names, "ewc", "joint", "independent"}
    drawn = [(style.colour, style.marker, style.dash) for style in styles.values()]
    assert len({*drawn}) == len(drawn)
    greys = {styles["joint"].colour, styles["independent"].colour}
    assert not greys & {styles[name].colour for name in names}
    assert strategy_styles([other, board]) == styles


def test_files_are_pngs_of_the_stated_size(board: Leaderboard, tmp_path: Path) -> None:
    saved = save_figures(board, strategy_styles([board]), tmp_path / "figures")
    names = [path.name.removeprefix(board.slug) for _, path in saved]
    assert names == [
        "_scores.png",
        "_stream.png",
        "_tasks.png",
        "_matrix_independent.png",
        "_matrix_joint.png",
        "_matrix_replay.png",
        "_matrix_ewc.png",
        "_matrix_finetune.png",
    ]
    for _, path in saved:
        assert path.read_bytes().startswith(b"\x89PNG")
    stream = saved[1][1].read_bytes()
    assert int.from_bytes(stream[16:20], "big") == int(7.6 * DPI)
    captions = {path.name: caption for caption, path in saved}
    assert captions[f"{board.slug}_matrix_replay.png"].endswith("mean of 3 seeds.")
    assert captions[f"{board.slug}_matrix_ewc.png"].endswith("one seed.")


def test_a_single_task_has_no_curves(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(["ewc"], 0, [[0.2], [0.8]])
    (board,) = leaderboards(collect_runs([tmp_path]).runs)
    saved = save_figures(board, strategy_styles([board]), tmp_path / "figures")
    kinds = [path.stem.removeprefix(board.slug) for _, path in saved]
    assert kinds == ["_scores", "_matrix_ewc"]


def texts(figure: Figure) -> Iterator[tuple[str, object]]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        shown = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
            shown += [label for place, label in ticks if low <= place <= high]
        for text in shown:
            if axes.get_visible() and text.get_visible() and text.get_text():
                yield text.get_text(), text.get_window_extent(renderer)
    for legend in figure.legends:
        for text in legend.get_texts():
            yield text.get_text(), text.get_window_extent(renderer)


@pytest.mark.parametrize("tasks", [4, 15])
@pytest.mark.parametrize("draw", ["score_chart", "stream_curves", "task_curves"])
def test_no_text_lies_on_another_or_leaves_the_figure(
    tmp_path: Path, write_run: WriteRun, tasks: int, draw: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"quite-long-name-{i}" for i in range(tasks)]
    matrix = [[0.25] * tasks, *([[0.5] * tasks] * tasks)]
    for value in (1, 10):
        config = {"strategies": {"ewc": {"lambda_": value, "normalisation": "mean", "x": value}}}
        write_run(["ewc"], 0, matrix, tasks=names, config=config)
    for i in range(7):
        write_run([f"strategy{i}"], 0, matrix, tasks=names)
    (board,) = leaderboards(collect_runs([tmp_path]).runs)
    styles = strategy_styles([board])
    figure = {
        "score_chart": lambda: score_chart(board, styles),
        "stream_curves": lambda: stream_curves(board, styles),
        "task_curves": lambda: task_curves(board),
    }[draw]()
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).draw()
    boxes = list(texts(figure))
    assert len(boxes) > 8
    width, height = figure.get_size_inches() * DPI
    for i, (name, box) in enumerate(boxes):
        assert box.x0 >= -1, name
        assert box.y0 >= -1, name
        assert box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
        for other, other_box in boxes[:i]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (name, other)


def test_wrap() -> None:
    assert wrap("replay") == "replay"
    assert wrap("ewc (lambda_=100.0, normalisation=mean)") == (
        "ewc (lambda_=100.0,\nnormalisation=mean)"
    )
