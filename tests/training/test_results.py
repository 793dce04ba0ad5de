"""Where a run takes its references from."""

from __future__ import annotations

import json
from pathlib import Path

from clpeft.training.results import find_references

ALONE = [[0.25, 0.25], [0.9, 0.3], [0.9, 0.8]]
TOGETHER = [[0.25, 0.25], [None, None], [0.7, 0.6]]


def leave(folder: Path, name: str, matrix: list, setting: str = "same") -> None:
    (folder / name).mkdir()
    content = {
        "strategies": [name.split("-")[0]],
        "digests": {"setting": setting},
        "matrix": matrix,
    }
    (folder / name / "results.json").write_text(json.dumps(content))


def test_references_of_the_same_setting_and_seed(tmp_path: Path) -> None:
    assert find_references(tmp_path, "same", 0) == {}
    leave(tmp_path, "independent-s1-a", ALONE)
    leave(tmp_path, "independent-s0-b", ALONE, setting="other")
    leave(tmp_path, "independent+ewc-s0-c", ALONE)
    (tmp_path / "independent-s0-running").mkdir()
    assert find_references(tmp_path, "same", 0) == {}

    leave(tmp_path, "independent-s0-d", ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)
    found = find_references(tmp_path, "same", 0)
    assert found == {"independent": [0.9, 0.8], "joint": [0.7, 0.6]}


def test_several_references_are_none(tmp_path: Path) -> None:
    # trained differently: which one is meant cannot be told
    for name in ("independent-s0-a", "independent-s0-b", "independent-s0-c"):
        leave(tmp_path, name, ALONE)
    leave(tmp_path, "joint-s0-e", TOGETHER)

    assert find_references(tmp_path, "same", 0) == {"joint": [0.7, 0.6]}
