"""The matrix and its picture."""

import io
import subprocess
import sys

import numpy as np
import pytest

from clpeft.evaluation.matrix import figure_pixels, matrix_heatmap

MATRIX = [
    [0.25, 0.5, None],
    [0.875, None, None],
    [0.5, 0.75, None],
    [0.0, 0.125, 1.0],
]
TASKS = ["north", "south", "east"]


def test_every_evaluated_cell_is_written_in_percent_where_it_belongs():
    axes = matrix_heatmap(MATRIX, TASKS).axes[0]
    written = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    # position is (column = task, row = trained)
    assert written == {
        (0, 0): "25.0",
        (1, 0): "50.0",
        (0, 1): "87.5",
        (0, 2): "50.0",
        (1, 2): "75.0",
        (0, 3): "0.0",
        (1, 3): "12.5",
        (2, 3): "100.0",
    }


def test_cells_that_were_not_evaluated_are_hatched_and_the_diagonal_is_outlined():
    axes = matrix_heatmap(MATRIX, TASKS).axes[0]
    hatched = {patch.get_xy() for patch in axes.patches if patch.get_hatch()}
    assert hatched == {(1.5, -0.5), (0.5, 0.5), (1.5, 0.5), (1.5, 1.5)}
    outlined = {patch.get_xy() for patch in axes.patches if not patch.get_fill()}
    # task i in the row after i trained tasks; row 0 is the untrained model
    assert outlined == {(-0.5, 0.5), (0.5, 1.5), (1.5, 2.5)}


def test_rows_and_columns_say_what_they_are():
    figure = matrix_heatmap(MATRIX, TASKS, metric="exact match")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "untrained",
        "after 1: north",
        "after 2: south",
        "after 3: east",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == TASKS
    assert bar.get_ylabel() == "exact match (%)"


def test_the_colour_scale_is_the_same_for_every_run():
    image = matrix_heatmap([[0.4], [0.6]], ["north"]).axes[0].images[0]
    assert image.get_clim() == (0, 1)


@pytest.mark.parametrize("tasks", [1, 4, 15])
def test_it_can_be_saved_and_grows_with_the_tasks(tasks):
    figure = matrix_heatmap([[0.5] * tasks] * (tasks + 1), ["a task of long name"] * tasks)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    assert target.getvalue().startswith(b"\x89PNG")
    width, height = figure.get_size_inches()
    assert width > 0.5 * tasks
    assert height > 0.4 * tasks


def test_drawing_touches_no_window_system_and_no_random_state():
    before = np.random.get_state()[1].copy()
    matrix_heatmap(MATRIX, TASKS).savefig(io.BytesIO(), format="png")
    assert (np.random.get_state()[1] == before).all()
    # in a process of its own, because another test may have imported pyplot
    script = (
        "import sys, io; from clpeft.evaluation.matrix import matrix_heatmap\n"
        "assert 'matplotlib' not in sys.modules\n"
        "matrix_heatmap([[0.5], [1.0]], ['a']).savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pixels_are_the_figure_as_bytes():
    figure = matrix_heatmap(MATRIX, TASKS)
    pixels = figure_pixels(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.dtype == np.uint8
    assert pixels.shape == (int(height), int(width), 3)
    assert tuple(pixels[0, 0]) == (255, 255, 255)  # the margin
    # viridis from its dark end, rgb(68, 1, 84), to its bright one, rgb(253, 231, 37), in the bar
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert {(68, 1, 84), (253, 231, 37)} <= colours
