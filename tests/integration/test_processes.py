"""Two processes give the results of one at the same global batch, for every strategy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import save_file

from clpeft.config import RunError
from clpeft.registry import STRATEGIES
from clpeft.training.loop import Loop
from tests.running import Outcome, run_it
from tests.settings import VARIED, base_of

SEVERAL = [name for name in VARIED if STRATEGIES[base_of(name)].target.supports_multi_process]
# dropout draws its masks by process, and Adam divides the rounding of tiny gradients up
COMPARABLE = (
    *("peft.dropout=0", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"),
    "stream.num_tasks=2",
    "evaluation.batch_size=6",  # three batches, unequally shared
)

Overrides = Callable[..., list[str]]
Finished = Callable[..., Outcome]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(
    overrides: list[str], directory: Path, processes: int = 2, *, signalled_at: int | None = None
) -> list[dict[str, Any]]:
    """Runs in so many processes at once; returns what each has in the end.

    They are forks of this one, with what torchrun would tell them: nothing is imported again.

    Args:
        overrides: Of the command line.
        directory: The run directory.
        processes: How many.
        signalled_at: The step in which the last of them gets SIGUSR1, if any.
    """
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",  # else Accelerate sets it, and warns
            }
            PartialState._reset_state()  # what this process knew of itself before the fork
            if signalled_at is not None and rank == processes - 1:
                signal_in_step(signalled_at)
            outcome = run_it(overrides, directory, interrupted=signalled_at is not None)
            plain = {n: value for n, value in outcome.after.items() if type(value) is torch.Tensor}
            weights = {name: value.contiguous() for name, value in plain.items()}
            save_file(weights, directory / f"rank{rank}.safetensors")
            states = [memory_rows(s.state_dict()) for s in outcome.run.strategies]
            (directory / f"rank{rank}.json").write_text(json.dumps(states))
            torch.distributed.destroy_process_group()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes
    from safetensors.torch import load_file

    return [
        {
            "weights": load_file(directory / f"rank{rank}.safetensors"),
            "states": json.loads((directory / f"rank{rank}.json").read_text()),
        }
        for rank in range(processes)
    ]


def signal_in_step(step: int) -> None:
    """Lets this process signal itself within a step."""
    original = Loop._backward

    def backward(self: Loop, *given: Any) -> Any:
        if self.run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *given)

    Loop._backward = backward  # type: ignore[method-assign]


def memory_rows(state: dict[str, Any]) -> list[float]:
    """What a strategy's memory holds, as bytes, its notes and its random state."""
    memory = state.get("memory")
    if memory is None or memory["arrow"] is None:
        return []
    notes = [value for note in memory["notes"].values() for value in note.flatten().tolist()]
    return [*memory["arrow"].tolist(), *memory["generator"].tolist(), *notes]


def test_two_processes_on_weights_of_torchaos(
    finished: Finished, tiny: Overrides, tmp_path: Path
) -> None:
    asked = (*COMPARABLE, "quantization=torchao_int8")
    one = finished("ewc", *asked)
    ranks = together(tiny("ewc", *asked), tmp_path)

    assert ranks[0]["weights"].keys() == ranks[1]["weights"].keys() >= one.trainable.keys()
    for parameter, value in one.trainable.items():
        first, second = (rank["weights"][parameter] for rank in ranks)
        assert torch.equal(first, second)
        # sums in another order, carried through 16 steps
        torch.testing.assert_close(first, value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(first, one.before[parameter])


@pytest.mark.parametrize(
    ("name", "peft"), [*((name, "lora") for name in SEVERAL), ("finetune", "adalora")]
)
def test_two_processes_are_one(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, peft: str
) -> None:
    one = finished(name, *COMPARABLE, peft=peft)
    ranks = together(tiny(name, *COMPARABLE, peft=peft), tmp_path)

    first, second = ranks
    assert all(torch.equal(value, second["weights"][n]) for n, value in first["weights"].items())
    assert first["states"] == second["states"]
    for parameter, value in one.after.items():
        # sums in another order, carried through 16 to 24 steps
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-3, atol=1e-5)
    results = json.loads((tmp_path / "results.json").read_text())
    for key in ("matrix", "test_sizes", "tasks"):
        assert results[key] == one.results[key]
    for key in results["digests"].keys() - {"weights"}:  # which are close, and not equal
        assert results["digests"][key] == one.results["digests"][key]
    assert [w["what"] for w in results["warnings"]] == [w["what"] for w in one.results["warnings"]]
    for key in ("steps", "examples", "state_bytes"):
        assert results["cost"][key] == one.results["cost"][key]
    # one process writes
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [event["event"] for event in history] == [event["event"] for event in one.history]
    for event, other in zip(history, one.history, strict=True):
        for key in event.keys() - {"time"}:
            if isinstance(event[key], float):
                assert event[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key
            else:
                assert event[key] == other[key]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *[("replay", model) for model in ("tiny_llama", "tiny_bert", "tiny_t5")],
        *[("generative_replay", model) for model in ("tiny_llama", "tiny_t5")],
    ],
)
def test_process_that_no_row_is_left_for(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str
) -> None:
    # 33 rows in batches of 8, over two processes: the last batch has one row, for one of them; with
    # 8 generated ones too
    odd = (*COMPARABLE, "stream.train_size=33", "training.epochs=1")
    one = finished(name, *odd, model=model)
    first, second = together(tiny(name, *odd, model=model), tmp_path)

    for parameter, value in one.after.items():
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(first["weights"][parameter], second["weights"][parameter])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cost"]["examples"] == one.results["cost"]["examples"]


@pytest.mark.parametrize(
    ("name", "model", "few"),
    [
        ("derpp", "tiny_llama", "strategies.derpp.ratio=0.125"),
        ("derpp", "tiny_bert", "strategies.derpp.ratio=0.125"),
        ("gem", "tiny_llama", "strategies.gem.reference_size=1"),
    ],
)
def test_process_that_nothing_drawn_is_left_for(
    finished: Finished, tiny: Overrides, tmp_path: Path, name: str, model: str, few: str
) -> None:
    # one example drawn with each batch, for one of two processes
    short = (*COMPARABLE, few, "training.epochs=1")
    one = finished(name, *short, model=model)
    first, second = together(tiny(name, *short, model=model), tmp_path)

    for parameter, value in one.after.items():
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(first["weights"][parameter], second["weights"][parameter])
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    for event, other in zip(map(json.loads, lines), one.history, strict=True):
        for key in {key for key in event if key.startswith("train/")}:
            assert event[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["finetune", "agem+ewc"])
def test_layers_that_take_turns(tiny: Overrides, tmp_path: Path, name: str) -> None:
    """Processes switch to the same layers, and do not wait for the gradients of the others."""
    overrides = [
        *(o for o in tiny(name, *COMPARABLE) if not o.startswith("peft.")),
        *("peft=lisa_layerwise", "peft.active_layers=1", "peft.every=3", "optimizer.lr=0.02"),
        "training.gradient_accumulation=2",
    ]
    one = run_it(overrides, tmp_path / "one")
    first, second = together(overrides, tmp_path / "two")

    for parameter, value in one.after.items():
        assert torch.equal(first["weights"][parameter], second["weights"][parameter])
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-3, atol=1e-5)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["matrix"] == one.results["matrix"]


@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_distillation_is_divided_by_the_targets_of_all_processes(
    finished: Finished, tiny: Overrides, tmp_path: Path, teacher: str
) -> None:
    """Shares with unequal numbers of answer tokens, of replayed ones, and with no row at all."""
    odd = (*COMPARABLE, "stream.train_size=33", "training.epochs=1", "stream.scenario=class")
    odd += (f"strategies.lwf.teacher={teacher}",)
    one = finished("lwf+replay", *odd)
    first, second = together(tiny("lwf+replay", *odd), tmp_path)

    for parameter, value in one.after.items():
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(first["weights"][parameter], second["weights"][parameter])
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, lines) if e["event"] == "step" and e["task"] == 1]
    assert len(steps) == 5
    for step, other in zip(steps, one.steps(1), strict=True):
        expected = other["train/loss/lwf"]
        # sums in another order
        assert step["train/loss/lwf"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert steps[-1]["train/loss/lwf"] > 1e-3


def test_writing_is_shared_by_batches(finished: Finished, tiny: Overrides, tmp_path: Path) -> None:
    """Three batches a round over two processes, and the same words come of it, in their order."""
    more = [f"strategies.generative_replay.{s}" for s in ("batch_size=3", "max_attempts=3")]
    short = (*COMPARABLE, *more, "training.epochs=1")
    one = finished("generative_replay", *short)
    together(tiny("generative_replay", *short), tmp_path)

    (alone,) = (one.directory / "generated").iterdir()
    (shared,) = (tmp_path / "generated").iterdir()
    lines = alone.read_text().splitlines()
    assert shared.read_text().splitlines() == lines
    assert len(lines) > 9
    assert len({*lines}) > 9  # not one batch's again and again


@pytest.mark.parametrize("name", ["olora", "replay"])
def test_one_process_asked_to_stop_stops_all(tiny: Overrides, tmp_path: Path, name: str) -> None:
    # with dropout, whose masks each process draws by itself
    overrides = tiny(name, "stream.num_tasks=2")
    whole = together(overrides, tmp_path / "whole")
    together(overrides, tmp_path / "run", signalled_at=11)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted"
    assert status["reason"].startswith("stopped by SIGUSR1")
    assert (tmp_path / "run" / "checkpoints" / "step-11-task-1").is_dir()
    resumed = together(overrides, tmp_path / "run")

    for rank in range(2):
        for parameter, value in whole[rank]["weights"].items():
            assert torch.equal(resumed[rank]["weights"][parameter], value)
        assert resumed[rank]["states"] == whole[rank]["states"]
    matrices = [
        json.loads((tmp_path / where / "results.json").read_text())["matrix"]
        for where in ("whole", "run")
    ]
    assert matrices[0] == matrices[1]


LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "--num_processes", "2", "--cpu"),
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_from_the_command_line(
    finished: Finished, tiny: Overrides, tmp_path: Path, launcher: str
) -> None:
    module, *flags = LAUNCHERS[launcher]
    port = (
        "--main_process_port" if launcher == "accelerate" else "--master-port",
        f"{free_port()}",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", module, *flags, *port, "-m", "clpeft", "run"),
            *tiny("ewc", *COMPARABLE),
            f"paths.output_dir={tmp_path}",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results.json")
    expected = finished("ewc", *COMPARABLE).results
    assert json.loads(results.read_text())["matrix"] == expected["matrix"]
    assert len(list(tmp_path.rglob("status.json"))) == 1


def test_processes_that_do_not_find_each_other_are_refused(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate was told of one process before; each of two would write over the other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="WORLD_SIZE says that 2 processes train together"):
        run_it(tiny("finetune"), tmp_path)
