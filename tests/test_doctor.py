"""`clpeft doctor`, and what runs find of themselves: strategies that do nothing are caught."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from clpeft import cli
from clpeft.config import run_name
from clpeft.doctor import command
from clpeft.doctor.examination import distance
from clpeft.evidence import rounded
from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Evidence, Strategy, StrategyConfig
from clpeft.strategies.l2 import L2, L2Config
from clpeft.strategies.memory import Memory
from clpeft.training.checkpoint import last_parameters
from tests.running import compose_only
from tests.settings import STRATEGY_SETTINGS, in_turns

Overrides = Callable[..., list[str]]


@dataclass
class SlackConfig(L2Config):
    lambda_: float = 1.0


class Slack(L2):
    """An anchor whose penalty is multiplied by 0."""

    term = "slack"

    def _remember(self, run: Any, task: Any, parameters: Any) -> None:
        self._anchors.replace(parameters, [torch.zeros_like(p) for p in parameters])


class Unread(Strategy):
    """A memory that is filled and never read."""

    evidence: ClassVar = {"unread/examples": Evidence.MEMORY}

    def setup(self, run: Any) -> None:
        self._memory = Memory(10, run.generator_for("unread"))

    def transform_gradients(self, run: Any) -> Mapping[str, float]:
        return {"unread/examples": 0}

    def after_task(self, run: Any, task: Any) -> None:
        self._memory.add(run, task.train)


class FixedMask(Strategy):
    """Every task trains the same half of the weights: not finetune, and no masks per task."""

    evidence: ClassVar = {"mask/first_row": Evidence.MASK}

    def transform_gradients(self, run: Any) -> Mapping[str, float]:
        for gradient in run.filled_gradients():
            gradient[self._first(run) :: 2] = 0
        return {"mask/first_row": float(self._first(run))}

    def _first(self, run: Any) -> int:
        return 0


class AlternatingMask(FixedMask):
    """Each task trains the half that the one before did not."""

    def _first(self, run: Any) -> int:
        return int(run.tasks_seen % 2)


class Idle(Strategy):
    """Nothing, and no word of what should show."""


class Unlogged(Strategy):
    """Says that it logs what it does not."""

    evidence: ClassVar = {"loss/unlogged": Evidence.TERM}


DOUBTFUL: dict[str, tuple[type[Strategy], type]] = {
    "slack": (Slack, SlackConfig),
    "unread": (Unread, StrategyConfig),
    "fixed_mask": (FixedMask, StrategyConfig),
    "alternating_mask": (AlternatingMask, StrategyConfig),
    "idle": (Idle, StrategyConfig),
    "unlogged": (Unlogged, StrategyConfig),
}


@pytest.fixture(autouse=True)
def _doubtful() -> Iterator[None]:
    """The strategies above, registered for as long as a test lasts."""
    STRATEGIES.discover()
    known, store = dict(STRATEGIES._entries), ConfigStore.instance()
    for name, (target, config) in DOUBTFUL.items():
        STRATEGIES.register(name, config=config)(target)
    yield
    STRATEGIES._entries = known
    # nor does Hydra know them any longer, where a test composed anything
    for groups in (store.repo, store.repo.get("schema", {})):
        for name in DOUBTFUL:
            groups.get("strategy", {}).pop(f"{name}.yaml", None)


class Answer:
    """What a command answered."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def said(self) -> str:
        """What it printed, however it was folded."""
        return " ".join(self.out.split())


@pytest.fixture
def clpeft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs a command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["clpeft", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Answer(end.value.code or 0, *capsys.readouterr())

    return command


@pytest.fixture
def short(tiny: Overrides) -> Overrides:
    """Overrides of a run that is even shorter; strategies without a row have no settings."""

    def overrides(strategy: str, *more: str) -> list[str]:
        shared = [o for o in tiny("finetune") if not o.startswith("strategy=")]
        names = strategy.split("+")
        chosen = [
            o for n in names if n in STRATEGY_SETTINGS for o in STRATEGY_SETTINGS[n].overrides
        ]
        return [*shared, f"strategy=[{','.join(names)}]", *chosen, "training.max_steps=6", *more]

    return overrides


def single(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def warnings(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "results.json").read_text())["warnings"]


# Dead strategies.


@pytest.mark.parametrize(
    ("name", "found", "differs"),
    [
        ("slack", "slack does nothing: its penalty loss/slack stayed 0 from the second", False),
        ("unread", "unread does nothing: its memory was not read, unread/examples stayed 0", False),
        ("fixed_mask", "fixed_mask does nothing: its mask did not change, mask/first_row", True),
        ("idle", "idle does nothing: the run has the weights and scores of finetune", False),
        ("unlogged", "unlogged does nothing: loss/unlogged, which should show it, was not", False),
    ],
)
def test_strategy_that_does_nothing_is_found(
    clpeft: Callable[..., Answer],
    short: Overrides,
    tmp_path: Path,
    name: str,
    found: str,
    differs: bool,
) -> None:
    answer = clpeft("doctor", *short(name))

    assert answer.code == 1
    assert found in answer.said
    equal = f"{name} does nothing: the run has the weights and scores of finetune to the bit"
    assert (equal in answer.said) != differs
    assert (f"{name} finetune equal" in answer.said) != differs
    if name == "idle":
        assert "idle declares no evidence, so that only weights and results" in answer.said
    assert list(tmp_path.iterdir()) == []  # its runs are no results


def test_mask_that_changes_is_healthy(clpeft: Callable[..., Answer], short: Overrides) -> None:
    answer = clpeft("doctor", *short("alternating_mask"))

    assert answer.code == 0, answer.said
    row = next(line.split() for line in answer.out.splitlines() if "mask/first_row" in line)
    assert row == ["alternating_mask", "mask/first_row", "mask", "1", "0", "works"]


METHODS = [name for name in STRATEGY_SETTINGS if not STRATEGIES[name].target.is_reference]


@pytest.mark.parametrize("name", in_turns(METHODS, 0))
def test_healthy_strategies_are_found_healthy(
    clpeft: Callable[..., Answer], tiny: Overrides, name: str
) -> None:
    answer = clpeft("doctor", *tiny(name))

    assert answer.code == 0, answer.out
    for key, kind in STRATEGIES[name].target.evidence.items():
        row = next(line.split() for line in answer.out.splitlines() if f" {key} " in line)
        assert (row[0], row[1], row[2], row[-1]) == (name, key, kind, "works")
    partner = STRATEGY_SETTINGS[name].beside  # without which it could not run at all
    assert re.search(rf"{name} {partner or 'finetune'} \S+ % apart .* differs", answer.said)
    trained = [line.rpartition(" ")[2] for line in answer.err.splitlines()]
    both = [] if partner is None else [partner]
    assert trained == ["finetune", *both, "+".join([name, *both])]


def test_each_part_of_a_combination_is_judged(
    clpeft: Callable[..., Answer], short: Overrides
) -> None:
    answer = clpeft("doctor", *short("idle+replay"))

    assert answer.code == 1
    assert "idle does nothing: the run has the weights and scores of replay to the" in answer.said
    assert "finetune to the bit" not in answer.said
    beside = [line.split() for line in answer.out.splitlines() if " / " in line and " × " in line]
    assert [(row[0], row[1], row[-1]) for row in beside] == [
        ("idle+replay", "finetune", "differs"),
        ("idle", "replay", "nothing"),
        ("replay", "idle", "differs"),
    ]
    assert [line.rpartition(" ")[2] for line in answer.err.splitlines()] == [
        *("finetune", "replay", "idle", "idle+replay")
    ]


def test_strength_of_0_is_found_with_what_to_try(
    clpeft: Callable[..., Answer], short: Overrides
) -> None:
    answer = clpeft("doctor", *short("ewc", "strategies.ewc.lambda_=0"))

    assert answer.code == 1
    assert "its penalty loss/ewc stayed 0 from the second task on" in answer.said
    assert "strategies.ewc.lambda_ is 0: raise it." in answer.said
    assert "ewc finetune equal" in answer.said


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("ewc.lambda_=1e-09", "ewc is too weak: its penalty loss/ewc was at most"),
        ("ewc.lambda_=1000000000.0", "ewc is too strong"),
        ("lwf.lambda_=1e-09", "lwf is too weak: its penalty loss/lwf was at most"),
        ("lwf.lambda_=1000000000.0", "lwf is too strong"),
        ("der.alpha=1e-09", "der is too weak: its penalty loss/der was at most"),
    ],
)
def test_strength_that_is_wrong_is_told_and_is_no_failure(
    clpeft: Callable[..., Answer], short: Overrides, setting: str, found: str
) -> None:
    strategy, _, _ = setting.partition(".")
    answer = clpeft("doctor", *short(strategy, f"strategies.{setting}"))

    assert answer.code == 0
    assert found in answer.said
    assert f"strategies.{setting}" in answer.said


def test_third_party_strategy_is_examined(
    short: Overrides, tmp_path: Path, cache_dir: Path
) -> None:
    package = tmp_path / "package"
    metadata = package / "sleeper-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / "sleeper.py").write_text(
        "from clpeft.registry import STRATEGIES\n"
        "from clpeft.strategies.base import Strategy, StrategyConfig\n\n"
        "@STRATEGIES.register('sleeper', config=StrategyConfig)\n"
        "class Sleeper(Strategy):\n"
        "    def after_step(self, run):\n"
        "        self._last = run.step\n"
    )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sleeper\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clpeft.strategies]\nsleeper = sleeper\n")
    done = subprocess.run(
        [sys.executable, "-m", "clpeft", "doctor", *short("sleeper")],
        env=os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "sleeper declares no evidence" in done.stdout
    assert "sleeper does nothing: the run has the weights and scores of finetune" in done.stdout
    assert "Traceback" not in done.stderr


# At the end of every run.


def test_run_says_at_its_end_what_it_found(
    clpeft: Callable[..., Answer], short: Overrides, tmp_path: Path
) -> None:
    assert clpeft(*short("finetune")).code == 0
    answer = clpeft(*short("slack"))
    folder = single(tmp_path, "outputs/toy/slack-s0-*")
    finetune = single(tmp_path, "outputs/toy/finetune-s0-*")

    assert answer.code == 0
    told = [line for line in answer.out.splitlines() if line.startswith("WARNING: ")]
    assert len(told) == 2
    assert "slack does nothing: its penalty loss/slack stayed 0" in told[0]
    assert f"has the weights and scores of finetune to the bit ({finetune.name})" in told[1]
    assert (folder / "run.log").read_text().count("slack does nothing") == 2
    found = warnings(folder)
    assert [(w["strategy"], w["verdict"], w["what"]) for w in found] == [
        ("slack", "does nothing", "loss/slack"),
        ("slack", "does nothing", "weights"),
    ]
    assert found[0]["tasks"] == ["birchford", "coleford"]
    assert warnings(finetune) == []

    # and again, where the result of the completed run is only shown
    again = clpeft(*short("slack"))
    assert again.out.count("WARNING: slack does nothing") == 2

    reported = clpeft("report", "outputs")
    assert reported.code == 0
    assert "slack ‡" in reported.out
    assert "‡ slack, seed 0: slack does nothing: its penalty" in reported.said
    page = (tmp_path / "outputs" / "report" / "report.html").read_text()
    assert "<h3>Doubts</h3>" in page
    assert "<b>slack</b>, seed 0: slack does nothing: its penalty loss/slack stayed 0" in page


def test_healthy_run_warns_of_nothing(
    clpeft: Callable[..., Answer], tiny: Overrides, tmp_path: Path
) -> None:
    sweep = [o for o in tiny("replay") if not o.startswith("strategy=")]
    shared = [o for o in sweep if not o.startswith("strategies.")]
    assert clpeft("-m", "strategy=finetune", *shared).code == 0
    answer = clpeft("-m", "strategy=replay", *sweep)

    assert answer.code == 0
    assert "WARNING" not in answer.out
    assert warnings(single(tmp_path, "outputs/toy/replay-s0-*")) == []
    report = clpeft("report", "outputs")
    assert "‡" not in report.out
    assert "Doubts" not in (tmp_path / "outputs" / "report" / "report.html").read_text()


def test_order_of_a_sweep_does_not_hide_equal_runs(
    clpeft: Callable[..., Answer], short: Overrides, tmp_path: Path
) -> None:
    shared = [o for o in short("idle") if not o.startswith("strategy=")]
    answer = clpeft("-m", "strategy=idle,[idle,replay],replay,finetune", *shared)
    runs = tmp_path / "outputs" / "toy"

    assert answer.code == 0
    # each knew of those before it only
    assert warnings(single(runs, "idle-s0-*")) == []
    assert warnings(single(runs, "idle+replay-s0-*")) == []
    # the report knows all
    told = clpeft("report", "outputs").said
    assert "‡ idle, seed 0: idle does nothing: the run has the weights and scores of fine" in told
    assert "‡ idle+replay, seed 0: idle does nothing: the run has the weights and scores" in told
    assert "‡ replay," not in told
    # and so does whoever looks at the run later
    later = clpeft("doctor", str(single(runs, "idle-s0-*")))
    assert later.code == 1
    assert "idle does nothing: the run has the weights and scores of finetune" in later.said


def test_first_task_alone_makes_nothing_doubtful(
    clpeft: Callable[..., Answer], short: Overrides, tmp_path: Path
) -> None:
    for name in ("finetune", "ewc"):
        assert clpeft(*short(name, "stream.num_tasks=1")).code == 0
    folder = single(tmp_path, "outputs/toy/ewc-s0-*")
    finetune = single(tmp_path, "outputs/toy/finetune-s0-*")
    digests = [json.loads((f / "results.json").read_text())["digests"] for f in (folder, finetune)]

    assert digests[0]["weights"] == digests[1]["weights"]
    assert warnings(folder) == []
    assert "‡" not in clpeft("report", "outputs").out
    answer = clpeft("doctor", str(folder))
    assert answer.code == 0
    assert "Fewer than two tasks were trained" in answer.said


# A run that exists.


def test_run_directory_is_examined_from_its_files(
    clpeft: Callable[..., Answer],
    short: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("finetune", "ewc+replay"):
        assert clpeft(*short(name)).code == 0
    folder = single(tmp_path, "outputs/toy/ewc+replay-s0-*")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")}

    def refuse(*_: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(command, "launch", refuse)
    answer = clpeft("doctor", str(folder))

    assert answer.code == 0, answer.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")} == before
    assert "ewc+replay on toy, tiny_llama: 3 tasks, 18 steps, seed 0" in answer.said
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in answer.out.splitlines()}
    # six steps of eight new examples and .45 × 8 old ones: 21, and the rest of a half later
    assert rows["replay", "replay/examples", "memory"] == ["21", "22", "works"]
    assert rows["ewc", "loss/ewc", "penalty"][-1] == "works"
    assert re.search(r"ewc\+replay finetune .* differs", answer.said)
    for other in ("replay", "ewc"):
        wanted = f"not compared with those of {other}: there is no completed run of the same"
        assert wanted in answer.said

    # as last: the newest checkpoint has what was trained
    parts = [last_parameters(f) for f in (folder, single(tmp_path, "outputs/toy/finetune-s0-*"))]
    apart = distance(*parts)
    assert apart is not None
    assert f" {rounded(100 * apart, 2)} % apart " in answer.said


def test_run_that_is_not_completed_is_examined_as_far_as_it_went(
    clpeft: Callable[..., Answer], short: Overrides, tmp_path: Path
) -> None:
    assert clpeft(*short("slack")).code == 0
    folder = single(tmp_path, "outputs/toy/slack-s0-*")
    (folder / "results.json").unlink()
    (folder / "status.json").write_text(json.dumps({"status": "failed"}))
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    within = next(i for i, line in enumerate(lines) if '"name": "coleford"' in line)
    # a crash may leave half a line
    (folder / "history.jsonl").write_text("".join(lines[: within + 1]) + '{"event": "st')

    answer = clpeft("doctor", str(folder))
    assert answer.code == 1
    assert "stayed 0 from the second task on (5 logged steps of 6)" in answer.said
    assert "The run is not completed, so its weights and scores are not compared." in answer.said


def test_strategy_that_is_not_installed_any_more(
    clpeft: Callable[..., Answer], short: Overrides, tmp_path: Path
) -> None:
    assert clpeft(*short("unread")).code == 0
    folder = single(tmp_path, "outputs/toy/unread-s0-*")
    del STRATEGIES._entries["unread"]
    answer = clpeft("doctor", str(folder))

    assert answer.code == 0
    assert "unread declares no evidence" in answer.said
    assert "not compared with those of finetune: there is no completed run" in answer.said


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "needs to be told what to examine: overrides, as in clpeft doctor strategy=ewc"),
        (["seed=1"], "'finetune' is a reference that other strategies are compared with"),
        (["strategy=joint"], "'joint' is a reference that other strategies are compared with"),
        (["-m", "strategy=ewc,replay"], "one run at a time: leave -m out"),
        (["strategy=ewc", "--multirun"], "one run at a time: leave -m out"),
        (["strategy=ewc,replay"], "stand for 2 runs (ewc and replay), and clpeft doctor"),
        (["seed=1,2,3", "strategy=ewc"], "stand for 3 runs (ewc and ewc, ...)"),
        (["strategy=ewcc"], "strategy=ewcc does not exist. Did you mean 'ewc'?"),
        (["strategy=ewc", "optimizer.lrr=1"], "The key 'optimizer.lrr' does not exist."),
        (["ewc"], "'ewc' is neither KEY=VALUE nor the directory of a run"),
        (["--cfg", "job"], "'--cfg' is neither KEY=VALUE nor the directory of a run"),
        (["empty"], "empty holds no config.yaml, so it is not a run's directory."),
        (["empty", "strategy=ewc"], "either overrides or one run's directory, not empty with 1"),
        (["strategy=ewc", "stream.num_tasks=1"], "The stream 'toy' has one task (ashford)"),
        (["strategy=olora", "peft=full"], "'olora' does not work with peft=full"),
        (["strategy=[ewc,olora]"], "'ewc' and 'olora' cannot be combined"),
        (["strategy=ewc", "stream=standard_cl", "paths.data_dir=/no/such"], "does not exist"),
        (["strategy=ewc", "model.path=/no/such"], "model.path=/no/such is not a folder"),
    ],
)
def test_mistake_costs_one_sentence(
    clpeft: Callable[..., Answer], tmp_path: Path, arguments: list[str], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    answer = clpeft("doctor", *arguments)

    assert answer.code == 1
    assert answer.err.startswith("clpeft: ")
    assert told in answer.err
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_directory_of_a_run_that_has_not_begun(
    clpeft: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "queued").mkdir()
    OmegaConf.save(compose_only(["strategy=ewc"]), tmp_path / "queued" / "config.yaml")

    answer = clpeft("doctor", "queued")
    assert answer.code == 1
    assert "queued holds no history.jsonl: the run has not begun" in answer.err


def test_run_directory_of_a_reference(clpeft: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    OmegaConf.save(compose_only([]), tmp_path / "plain" / "config.yaml")

    assert "'finetune' is a reference" in clpeft("doctor", "plain").err


def test_several_processes_are_refused(
    clpeft: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = clpeft("doctor", "strategy=ewc")
    assert (
        answer.err == "clpeft: clpeft doctor works in one process; start it without a launcher.\n"
    )


def test_help_lists_it(clpeft: Callable[..., Answer]) -> None:
    assert "doctor" in clpeft("--help").out
    assert "KEY=VALUE...|RUN_DIR" in clpeft("doctor", "--help").said


# Its short runs.


def test_short_runs_keep_the_model_and_cut_the_rest(
    clpeft: Callable[..., Answer],
    tiny: Overrides,
    cache_dir: Path,
    bases: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base model is that of the whole stream, which a cut one would not give."""
    given = [o for o in tiny("replay") if not o.startswith(("model.path=", "stream.num_tasks="))]
    given += ["stream.num_tasks=5", "optimizer.lr=0.02", "stream.max_test=9"]
    launched: list[Any] = []
    built: list[list[int]] = []

    def note(composed: Any, directory: Path) -> None:
        launched.append((composed, directory))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "launch", note)

    def base(config: Any, stream: Any, cache: Path) -> Path:
        built.append([len(stream.tasks), len(stream.tasks[0].train), len(stream.tasks[0].test)])
        return bases("tiny_llama")

    monkeypatch.setattr("clpeft.models.load.generated_base", base)
    answer = clpeft("doctor", *given)

    assert answer.code == 130
    ((composed, directory),) = launched
    assert built == [[5, 32, 9]]
    assert composed.model.path == str(bases("tiny_llama"))
    assert composed.stream.tasks == ["ashford", "birchford", "coleford"]
    assert (composed.stream.max_train, composed.stream.max_test) == (256, 9)
    assert (composed.training.max_steps, composed.tracking.log_every) == (24, 1)
    assert composed.optimizer.lr == 0.02
    assert list(composed.strategies) == ["finetune"]
    assert directory.name == run_name(composed)
    assert not directory.parent.exists()  # nothing is left, stopped or not


def test_a_preset_of_the_users_own_takes_the_place_of_ours(
    clpeft: Callable[..., Answer], tiny: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Any] = []

    def note(composed: Any, directory: Path) -> None:
        launched.append(composed)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "launch", note)
    clpeft("doctor", *tiny("replay"), "debug=fast", "training.max_steps=5")
    assert launched[0].training.max_steps == 5
    assert launched[0].stream.max_train == 48
