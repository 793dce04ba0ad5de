"""The command line: what it answers, what it leaves behind, and what it does the second time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from clpeft import cli, experiment
from clpeft.catalogue import catalogue
from clpeft.strategies.ewc import EWC
from clpeft.training.checkpoint import Checkpoints
from tests.settings import TINY_MODELS

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "wandb", "matplotlib")


class Answer:
    """What a command answered."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def clpeft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs a command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["clpeft", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Answer(end.value.code or 0, *capsys.readouterr())

    return command


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def single(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


# Starting up.


def imported_by(*arguments: str) -> set[str]:
    """The heavy packages that a command line imports."""
    program = (
        "import sys, io, contextlib\n"
        f"sys.argv = ['clpeft', *{list(arguments)!r}]\n"
        "from clpeft.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


# Wall time is measured elsewhere; what takes it is imports.
@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "strategy"], ["export", "--help"]]
)
def test_help_and_list_import_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments) == set()


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["optimizer.lrr=1"], ["strategy=ewcc"]])
def test_composition_imports_no_model_library(arguments: list[str]) -> None:
    # strategies are torch code, and their settings stand beside them
    assert imported_by(*arguments) <= {"torch"}


def test_three_ways_to_say_it(clpeft: Callable[..., Answer], tmp_path: Path) -> None:
    overrides = ["--cfg", "job", "strategy=ewc", "seed=3"]
    short = clpeft(*overrides)
    long = clpeft("run", *overrides)
    module = subprocess.run(
        [sys.executable, "-m", "clpeft", *overrides],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )

    assert short.code == long.code == 0
    assert "lambda_:" in short.out
    assert short.out == long.out == module.stdout
    (script,) = entry_points(group="console_scripts", name="clpeft")
    assert script.value == "clpeft.cli:main"


def test_help_of_a_run_shows_groups_and_keys(clpeft: Callable[..., Answer]) -> None:
    told = clpeft("run", "--help").out

    assert "strategy: agem, cumulative, " in told
    assert "gradient_accumulation: 1" in told


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.lrr=1"], "The key 'optimizer.lrr' does not exist."),
        (["training.epochs=few"], "training.epochs=few is of the wrong type"),
        (["strategy=ewcc"], "strategy=ewcc does not exist. Did you mean 'ewc'?"),
        (["strategies.ewc.lambda_=1"], "although the strategy 'ewc' was not chosen"),
        (["strategy=olora", "peft=full"], "'olora' does not work with peft=full"),
        (["stream=standard_cl", "paths.data_dir=/no/such"], "which does not exist"),
        (["stream.tasks=[ashfort]"], "Did you mean 'ashford'"),
        (["training.epochs=0"], "training.epochs=0 is too small"),
        (["training.max_grad_norm=0"], "max_grad_norm=0.0 is too small; it must be more than 0."),
        (["peft.alpha=0"], "peft.alpha=0.0 is too small; it must be more than 0."),
        (["strategy=replay", "strategies.replay.ratio=0"], "ratio=0.0 is too small"),
        (["reprot", "outputs"], "'reprot' is neither a command"),
        (["seed=0,1"], "to sweep over them put -m before the overrides"),
        (["strategy=ewc,replay"], "at once write strategy=[ewc,replay]"),
        (["stream.tasks=ashford"], "write stream.tasks=[ashford]"),
        (["paths.output_dir=/dev/null/x"], "the run directory cannot be made (Not a directory"),
        (["peft.target=null"], "peft.target=None names no modules"),
        (["peft.target=[]"], "peft.target=[] names no modules"),
        (["peft=any"], "peft.type has no value yet and needs one."),
        (
            ["peft=any", "peft.type=LORA"],
            "peft.type=LORA has settings of its own: choose peft=lora",
        ),
        (["evaluation.mode=guess"], "choose one of rank, generate"),
        (["model.path=/no/such"], "model.path=/no/such is not a folder"),
    ],
)
def test_mistake_costs_one_sentence_and_leaves_nothing(
    clpeft: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model would be loaded")

    monkeypatch.setattr(experiment, "run_experiment", refuse)
    answer = clpeft(*arguments)

    assert answer.code == 1
    assert answer.err.startswith("clpeft: ")
    assert told in answer.err
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []


def test_mistake_leaves_other_runs_alone(clpeft: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "outputs" / "toy" / "another").mkdir(parents=True)

    assert clpeft("training.epochs=0").code == 1
    assert [path.name for path in (tmp_path / "outputs" / "toy").iterdir()] == ["another"]


def test_mistake_keeps_the_directory_that_was_named(
    clpeft: Callable[..., Answer], tmp_path: Path
) -> None:
    assert clpeft("training.epochs=0", "hydra.run.dir=mine").code == 1
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_resume_of_what_is_no_run(clpeft: Callable[..., Answer], tmp_path: Path) -> None:
    answer = clpeft("resume", str(tmp_path))

    assert answer.code == 1
    assert (
        answer.err == f"clpeft: {tmp_path} holds no config.yaml, so it is not a run's directory.\n"
    )


# Runs.


def test_directory_of_another_run_is_refused(
    clpeft: Callable[..., Answer], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    one = (*tiny("finetune", "stream.num_tasks=2"), "hydra.run.dir=mine")
    assert clpeft(*one).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}

    for other in ("seed=5", "force=true"):
        answer = clpeft(*tiny("replay", "stream.num_tasks=2"), "hydra.run.dir=mine", other)
        assert answer.code == 1
        assert "mine holds another run (finetune-s0-" in answer.err
        assert "strategies.replay.ratio is not set there and 0.45 here" in answer.err
        assert answer.err.count("\n") == 1
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    assert {path: left[path] for path in before} == before


def test_force_removes_what_a_run_left_and_nothing_else(
    clpeft: Callable[..., Answer], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    command = (*tiny("finetune", "stream.num_tasks=2"), "hydra.run.dir=mine")
    assert clpeft(*command).code == 0
    assert clpeft(*command, "force=true").code == 0

    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    events = (tmp_path / "mine" / "history.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "end" for line in events) == 1


def test_the_same_command_twice(
    clpeft: Callable[..., Answer],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tiny("finetune", "stream.num_tasks=2")
    first = clpeft(*command)
    folder = single(tmp_path, "outputs/toy/finetune-s0-*")
    status, results = read(folder / "status.json"), (folder / "results.json").read_bytes()

    assert first.code == 0
    assert status["status"] == "completed"
    assert status["ended"] >= status["started"]
    assert {"torch", "transformers", "peft", "python"} <= status["versions"].keys()

    def refuse(*_: Any) -> None:
        raise AssertionError("it trains again")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run_experiment", refuse)
        second = clpeft(*command, "tracking.log_every=5", "tracking.console=true")
        other = clpeft("resume", str(folder))
    assert second.code == other.code == 0
    assert "is completed; force=true starts it afresh" in second.out
    assert "ashford" in second.out
    assert (folder / "results.json").read_bytes() == results
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    again = clpeft(*command, "force=true")
    assert again.code == 0
    assert read(folder / "status.json")["started"] > status["ended"]
    assert read(folder / "results.json")["matrix"] == json.loads(results)["matrix"]


def test_resume_goes_on_even_where_force_began(
    clpeft: Callable[..., Answer],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Checkpoints.save

    def stop(self: Checkpoints, loop: Any) -> None:
        save(self, loop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        stopped = clpeft(*tiny("ewc", "stream.num_tasks=2", "force=true"))
    folder = single(tmp_path, "outputs/toy/ewc-s0-*")
    assert stopped.code == 130
    assert read(folder / "status.json")["status"] == "preempted"
    began = json.loads((folder / "history.jsonl").read_text().splitlines()[0])["time"]

    resumed = clpeft("resume", str(folder))
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert resumed.code == 0
    assert read(folder / "status.json")["status"] == "completed"
    assert lines[0]["time"] == began
    assert [line["task"] for line in lines if line["event"] == "task_start"] == [0, 1]


def test_in_a_sweep_the_others_go_on(
    clpeft: Callable[..., Answer],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = [o for o in tiny("finetune", "stream.num_tasks=2") if not o.startswith("strategy=")]
    sweep = ["-m", "strategy=ewc,finetune,[finetune,replay]", *shared]

    def fail(self: EWC, run: Any) -> None:
        raise RuntimeError("no memory for this")

    with monkeypatch.context() as patch:
        patch.setattr(EWC, "setup", fail)
        answer = clpeft(*sweep)
    runs = tmp_path / "outputs" / "toy"
    ewc, finetune = single(runs, "ewc-s0-*"), single(runs, "finetune-s0-*")
    status = read(ewc / "status.json")

    assert answer.code == 1
    assert status["status"] == "failed"
    assert status["exception"] == "RuntimeError: no memory for this"
    assert 'raise RuntimeError("no memory for this")' in status["traceback"]
    assert read(finetune / "status.json")["status"] == "completed"
    assert not list(runs.glob("finetune+replay-*"))
    summary = answer.err[answer.err.index("clpeft: sweep of") :].splitlines()
    assert summary[0] == "clpeft: sweep of 3 runs: 1 completed, 2 failed"
    assert summary[1] == f"  failed       outputs/toy/{ewc.name}: RuntimeError: no memory for this"
    assert summary[2].startswith("  failed       outputs/toy/finetune+replay-s0-")
    assert "'finetune' is a reference" in summary[2]

    done = read(finetune / "status.json")
    again = clpeft("-m", "strategy=ewc,finetune", *shared)
    assert again.code == 0
    assert read(ewc / "status.json")["status"] == "completed"
    assert read(finetune / "status.json") == done


def test_failed_run_tells_why_and_can_be_repeated(
    clpeft: Callable[..., Answer],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    answer = clpeft(*tiny("finetune", "peft.target=[q_prj]"))
    folder = single(tmp_path, "outputs/toy/finetune-s0-*")
    status = read(folder / "status.json")

    # known only once the model is there, so the run exists; it is told in one sentence all the same
    assert answer.code == 1
    assert "clpeft: peft.target names 'q_prj'" in answer.err
    assert "Did you mean 'q_proj'" in answer.err
    assert "Traceback" not in answer.err
    assert status["status"] == "failed"
    assert status["exception"].startswith("ConfigError: peft.target names")


def test_ctrl_c_is_written_down(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [
        *[o for o in tiny("finetune") if not o.startswith("tracking.wandb")],
        "tracking.wandb.mode=offline",
        "training.epochs=100000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_API_KEY", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "clpeft", *command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not _steps(tmp_path):
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # to the whole group, W&B's own process included, as a terminal does
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    folder = single(tmp_path, "outputs/toy/finetune-s0-*")
    status = read(folder / "status.json")
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])

    assert process.returncode == 130
    assert "Traceback" not in told
    assert status["status"] == "preempted"
    assert status["reason"] == (
        "stopped by Ctrl-C; the same command, or clpeft resume, continues it"
    )
    assert (last["event"], last["exit_code"]) == ("end", 1)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def _steps(folder: Path) -> list[str]:
    written = [path.read_text() for path in folder.glob("outputs/toy/*/history.jsonl")]
    return [line for text in written for line in text.splitlines() if '"event": "step"' in line]


# Presets.


@pytest.fixture(scope="module")
def small_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few made-up rows in the layout of the public data, under the names of its tasks."""
    root = tmp_path_factory.mktemp("data")
    for task in ("dbpedia", "amazon", "yahoo", "agnews"):
        folder = root / "cl_benchmark" / task
        folder.mkdir(parents=True)
        for split, count in (("train", 16), ("validation", 8), ("test", 8)):
            texts = [f"{task} {split} letter number {i} about {i % 2}" for i in range(count)]
            labels = pyarrow.array([i % 2 for i in range(count)], pyarrow.int64())
            table = pyarrow.table({"text": texts, "label": labels})
            parquet.write_table(table, folder / f"{split}.parquet")
        about = {
            "task": task,
            "label_names": ["even", "odd"],
            "num_labels": 2,
            "instruction": "What is the number?",
            "input_template": "{text}",
            "answer_words": ["even", "odd"],
        }
        (folder / "labels.json").write_text(json.dumps(about))
    return root


@pytest.mark.parametrize("name", [option.name for option in catalogue().get("experiment", [])])
def test_every_preset_runs(
    clpeft: Callable[..., Answer],
    tmp_path: Path,
    cache_dir: Path,
    bases: Callable[[str], Path],
    small_benchmark: Path,
    name: str,
) -> None:
    clpeft(f"experiment={name}", "--cfg", "job")
    composed = clpeft(f"experiment={name}", "--cfg", "job").out
    kind = "tiny_bert" if "task_type: sequence_classification" in composed else "tiny_llama"
    answer = clpeft(
        f"experiment={name}",
        "debug=fast",
        f"model.path={bases(kind)}",  # in the place of whatever is large
        f"paths.data_dir={small_benchmark}",
        f"paths.cache_dir={cache_dir}",
        "paths.output_dir=outputs",
        "tracking.console=false",
    )
    results = read(single(tmp_path, "outputs/*/*/results.json"))

    assert answer.code == 0
    assert results["cost"]["steps"] == 3 * len(results["tasks"])
    assert all(len(row) == len(results["tasks"]) for row in results["matrix"])


def test_models_that_are_built_here_are_named_in_the_tests() -> None:
    # a family more, a tiny architecture more in tests/settings.py
    built = {option.name for option in catalogue()["model"] if option.name.startswith("tiny_")}

    assert built == {name for name in TINY_MODELS if name.startswith("tiny_")}
