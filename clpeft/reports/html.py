"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from clpeft import __version__
from clpeft.config import flatten
from clpeft.evaluation.metrics import LOWER_IS_BETTER
from clpeft.reports.aggregate import DPI, RANKED_BY, Leaderboard
from clpeft.reports.doubts import MARK, doubts_of
from clpeft.reports.naming import differing_keys, settings
from clpeft.reports.runs import Collection, Run
from clpeft.reports.wording import cell_text, how_to_cite, human_bytes, human_seconds, seeds_text

TEMPLATE = "report.html.jinja"
NAMES = {
    "average_accuracy": "average accuracy",
    "average_accuracy_micro": "average accuracy, micro",
    "average_anytime_accuracy": "anytime accuracy",
    "average_anytime_accuracy_micro": "anytime accuracy, micro",
    "learning_accuracy": "learning accuracy",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "intransigence": "intransigence",
    "retained_learning": "retained learning",
}
CSS_DPI = 96
COMPARED = ("average_accuracy", "learning_accuracy", "forgetting")


@dataclass(frozen=True)
class Picture:
    """A figure inside the page."""

    caption: str
    source: str  # a data URI
    width: int  # CSS pixels at which its text is as large as the page's


def render_html(
    collection: Collection,
    boards: Sequence[Leaderboard],
    figures: Mapping[str, Sequence[tuple[str, Path]]],
) -> str:
    """Makes the page.

    Args:
        collection: Everything that was found.
        boards: The leaderboards made of it.
        figures: Captions and PNG files of each leaderboard, by its slug.

    Returns:
        HTML with its pictures inside; everything that was read is escaped.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=human_bytes, seconds=human_seconds, clock=clock)
    template = environment.from_string(
        (resources.files("clpeft.reports") / TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        version=__version__,
        made=clock(time.time()),
        collection=collection,
        boards=boards,
        pictures={slug: [_picture(*pair) for pair in pairs] for slug, pairs in figures.items()},
        names=NAMES,
        compared=COMPARED,
        ranked_by=RANKED_BY,
        lower_is_better=LOWER_IS_BETTER,
        cell=cell_text,
        own_settings=own_settings,
        telling_metrics=telling_metrics,
        how_to_cite=how_to_cite,
        doubts={board.slug: doubts_of(board) for board in boards},
        mark=MARK,
        seeds_text=seeds_text,
        environment=environment_table([run for board in boards for run in _runs(board)]),
    )


def telling_metrics(board: Leaderboard) -> list[str]:
    """The metrics worth a column: not the micro averages where all test sets are of one size."""
    sizes = board.rows[0].runs[0].test_sizes
    same = sizes is not None and len({*sizes}) == 1
    return [name for name in board.metrics if not (same and name.endswith("_micro"))]


def own_settings(board: Leaderboard) -> dict[str, str]:
    """Per family what its config has that another family's has not, as overrides."""
    configs = {row.label: settings(row.runs[0]) for row in board.rows}
    keys = differing_keys(list(configs.values()))
    return {
        label: " ".join(f"{key}={config[key]}" for key in keys if key in config)
        for label, config in configs.items()
    }


def environment_table(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Versions, hosts and commits of all runs; where they differ, with how many have which."""
    facts: dict[str, Counter[str]] = {}
    for run in runs:
        known = {"host": run.status.get("host"), **run.environment}
        told = {key: value for key, value in known.items() if value is not None}
        for key, value in flatten(told).items():
            facts.setdefault(key, Counter())[value] += 1
    return [
        (
            key,
            next(iter(values))
            if values.most_common(1)[0][1] == len(runs)
            else ", ".join(f"{value} (runs: {count})" for value, count in values.most_common()),
        )
        for key, values in sorted(facts.items())
    ]


def clock(seconds: float) -> str:
    """A time since 1970 as a date, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _runs(board: Leaderboard) -> list[Run]:
    return [run for row in board.rows for run in row.runs]


def _picture(caption: str, path: Path) -> Picture:
    content = path.read_bytes()
    pixels = int.from_bytes(content[16:20], "big")  # the width in a PNG's header
    encoded = base64.b64encode(content).decode("ascii")
    return Picture(caption, f"data:image/png;base64,{encoded}", pixels * CSS_DPI // DPI)
