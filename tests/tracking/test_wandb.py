"""Weights & Biases, offline for real: what was logged is read back from the run's own file."""

import json
import logging
import random
import struct
import time
from functools import partial

import numpy as np
import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from clpeft.config import WandbConfig
from clpeft.tracking.wandb import WandbObserver, flat_config

BLOCK = 32 * 1024


@pytest.fixture(scope="module", autouse=True)
def _no_account(tmp_path_factory):
    """No key, no settings and no network of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(home / "wandb_settings"))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on `discard`
        wandb.teardown()  # settings are read once per process
        yield
    wandb.teardown()


def make_observer(directory, mode="offline", **changes):
    values = {"mode": mode, "project": "clpeft-tests", "tags": ["one", "two"], **changes}
    return WandbObserver(WandbConfig(**values), directory)


@pytest.fixture
def observer(tmp_path):
    return partial(make_observer, tmp_path)


@pytest.fixture
def set_variable(monkeypatch):
    """Sets what W&B reads when it is next started, and has it forget that afterwards."""

    def set_and_stop(name, value):
        monkeypatch.setenv(name, value)
        wandb.teardown()

    yield set_and_stop
    wandb.teardown()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, run_info, play):
    """The file of a whole run, for the tests that only read."""
    directory = tmp_path_factory.mktemp("run")
    play(make_observer(directory, entity="a-team"), run_info())
    return run_file(directory)


def run_files(directory):
    wandb.teardown()  # W&B's own process writes the files, and may still be about to
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


def run_file(directory, count=1):
    files = run_files(directory)
    assert len(files) == count
    return files[-1]


def records(path):
    """The records of a W&B file: LevelDB's log format, holding protocol buffers."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position < len(content):
        rest_of_block = BLOCK - position % BLOCK
        if rest_of_block < 7:  # too short for a header: padding
            position += rest_of_block
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:
            break
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def items(update):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}


def history(path):
    """Every logged row, without what W&B adds of its own."""
    rows = [items(record.history.item) for record in records(path) if record.HasField("history")]
    return [
        {key: value for key, value in row.items() if key not in ("_timestamp", "_runtime")}
        for row in rows
    ]


def summary(path):
    values = {}
    for record in records(path):
        if record.HasField("summary"):
            values.update(items(record.summary.update))
    return values


def the_run(path):
    return next(record.run for record in records(path) if record.HasField("run"))


def exit_code(path):
    return next(record.exit.exit_code for record in records(path) if record.HasField("exit"))


def test_every_record_has_its_axis_and_a_step_of_its_own(recorded):
    rows = history(recorded)
    assert rows[:-1] == [
        {"_step": 1, "tasks_trained": 0, "eval/north": 0.25, "eval/south": 0.5},
        {"_step": 3, "step": 2, "train/loss": 1.0, "train/lr": 0.001},
        {"_step": 4, "tasks_trained": 1, "eval/north": 0.875, "eval/south": 0.5},
        {"_step": 6, "step": 4, "train/loss": 0.5, "train/lr": 0.001},
        {"_step": 7, "tasks_trained": 2, "eval/north": 0.625, "eval/south": 1.0},
    ]
    last = rows[-1]
    assert last["_step"] == 8
    assert last["tasks_trained"] == 2
    table = json.loads((recorded.parent / "files" / last["matrix/table.path"]).read_text())
    assert table["columns"] == ["trained", "task", "score"]
    assert table["data"] == [
        [0, "north", 0.25],
        [0, "south", 0.5],
        [1, "north", 0.875],
        [1, "south", 0.5],
        [2, "north", 0.625],
        [2, "south", 1.0],
    ]
    picture = recorded.parent / "files" / last["matrix/heatmap.path"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert exit_code(recorded) == 0


def test_the_summary_has_the_metrics_and_the_cost(recorded):
    values = summary(recorded)
    assert values["metrics/average_accuracy"] == 0.8125
    assert values["metrics/forgetting"] == 0.25
    assert values["cost/train_seconds"] == 12.5
    assert "cost/state_bytes" not in values


def test_what_makes_the_result_doubtful_is_in_the_summary_and_an_alert(recorded):
    told = "ewc does nothing: its penalty stayed 0. Raise it."
    assert summary(recorded)["warnings"] == [told]
    alerts = [record.alert for record in records(recorded) if record.HasField("alert")]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [
        ("a doubtful result", told, "WARN")
    ]


def test_the_run_is_named_grouped_and_tagged_and_its_config_is_flat(recorded):
    run = the_run(recorded)
    assert run.display_name == "ewc+replay-s0-1a2b3c4d"
    assert run.run_group == "ewc+replay-5e6f7a8b"
    assert run.project == "clpeft-tests"
    assert run.entity == "a-team"
    assert list(run.tags) == ["one", "two"]
    config = items(run.config.update)
    del config["_wandb"]
    assert config == {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.001,
        "optimizer.betas": [0.9, 0.999],
        "strategies.ewc.lambda_": 10.0,
        "strategies.replay": {},
        "seed": 0,
        "strategy": "ewc+replay",
        "parameters.total": 1_234_567,
        "parameters.trainable": 12_345,
    }


def test_axes_are_defined(recorded):
    metrics = [record.metric for record in records(recorded) if record.HasField("metric")]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes == {
        "train/*": "step",
        "eval/*": "tasks_trained",
        "matrix/*": "tasks_trained",
    }
    assert {metric.name for metric in metrics if metric.options.hidden} >= {"step", "tasks_trained"}


def test_a_failed_run_finishes_with_its_exit_code_and_says_why(tmp_path, run_info, observer):
    failing = observer()
    failing.on_run_start(run_info())
    failing.on_task_start(0, "north", 2)
    failing.on_step(1, {"train/loss": 2.0})
    failing.on_error(RuntimeError("out of memory"))
    failing.close(1, None)
    path = run_file(tmp_path)
    assert exit_code(path) == 1
    assert summary(path)["error"] == "RuntimeError: out of memory"
    assert [row["train/loss"] for row in history(path) if "train/loss" in row] == [2.0]


def test_the_run_is_finished_even_if_its_results_cannot_be_recorded(tmp_path, run_info, observer):
    broken = observer()
    broken.on_run_start(run_info())
    with pytest.raises(KeyError):
        broken.close(1, {})
    assert exit_code(run_file(tmp_path)) == 1


def test_a_resumed_run_keeps_its_id_and_its_steps(tmp_path, run_info, observer):
    first = observer()
    first.on_run_start(run_info())
    first.on_evaluation(0, [0.25, None])
    first.on_task_start(0, "north", 4)
    for step in (1, 2, 3):
        first.on_step(step, {"train/loss": 1.0 / step})
    first.close(1, None)
    before = run_file(tmp_path)

    second = observer()
    second.on_run_start(
        run_info(resumed=True, resumed_at_step=2, resumed_at_task=0, resumed_task_steps=2)
    )
    second.on_task_start(0, "north", 4)
    for step in (3, 4):
        second.on_step(step, {"train/loss": 1.0 / step})
    second.close(1, None)
    after = run_file(tmp_path, count=2)
    assert the_run(after).run_id == the_run(before).run_id
    assert (tmp_path / "wandb" / "run_id.txt").read_text().strip() == the_run(before).run_id
    # step 3 comes again, at the same step of W&B's, and step 4 goes on from there
    assert [(row["_step"], row["step"]) for row in history(before)[1:]] == [(2, 1), (3, 2), (4, 3)]
    assert [(row["_step"], row["step"]) for row in history(after)] == [(4, 3), (5, 4)]


def test_a_fresh_start_is_a_new_run_at_wandb(tmp_path, run_info, observer):
    for _ in range(2):
        started = observer()
        started.on_run_start(run_info())
        started.close(1, None)
    runs = {the_run(path).run_id for path in run_files(tmp_path)}
    assert len(runs) == 2


def test_random_states_are_untouched_from_beginning_to_end(run_info, observer, play):
    def states():
        return (
            random.getstate(),
            [
                part.tolist() if isinstance(part, np.ndarray) else part
                for part in np.random.get_state()
            ],
            torch.get_rng_state().tolist(),
        )

    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    before = states()
    play(observer(), run_info())
    assert states() == before


def test_auto_without_a_key_is_offline_without_asking(
    tmp_path, run_info, observer, play, monkeypatch, caplog
):
    def no_prompt(*_args, **_kwargs):
        raise AssertionError("asked for something")

    monkeypatch.setattr("builtins.input", no_prompt)
    monkeypatch.setattr("getpass.getpass", no_prompt)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    caplog.set_level(logging.INFO)
    play(observer("auto"), run_info())
    directory = run_file(tmp_path).parent
    assert f"W&B: offline; upload it later with: wandb sync {directory}" in caplog.messages


@pytest.mark.parametrize("source", ["variable", "netrc"])
def test_auto_with_a_key_goes_online_and_falls_back_when_nobody_answers(
    tmp_path, run_info, observer, play, monkeypatch, set_variable, caplog, capfd, source
):
    key = "0123456789" * 4
    if source == "variable":
        set_variable("WANDB_API_KEY", key)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {key}\n")
        (tmp_path / "netrc").chmod(0o600)
        set_variable("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("clpeft.tracking.wandb.INIT_SECONDS", 2.0)
    start = time.monotonic()
    play(observer("auto"), run_info())
    assert time.monotonic() - start < 30  # 2 s of trying, and the start of W&B's process, twice
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "W&B did not start online and records offline instead" in warning.getMessage()
    assert "127.0.0.1:9" in warning.getMessage()
    assert capfd.readouterr() == ("", "")  # not even that a key was found
    path = run_file(tmp_path)
    assert summary(path)["metrics/average_accuracy"] == 0.8125
    assert (tmp_path / "wandb" / "run_id.txt").read_text().strip() == the_run(path).run_id


def test_online_without_a_key_warns_and_goes_offline(tmp_path, run_info, observer, play, caplog):
    play(observer("online"), run_info())
    assert "no key is configured" in caplog.text
    assert exit_code(run_file(tmp_path)) == 0


def test_a_malformed_key_is_told_and_the_run_is_offline(
    tmp_path, run_info, observer, play, caplog, set_variable
):
    set_variable("WANDB_API_KEY", "short")
    play(observer("auto"), run_info())
    assert "WANDB_API_KEY invalid" in caplog.text
    assert exit_code(run_file(tmp_path)) == 0


def test_auto_respects_the_variable_that_switches_wandb_off(
    tmp_path, run_info, observer, play, set_variable
):
    set_variable("WANDB_MODE", "disabled")
    play(observer("auto"), run_info())
    assert list(tmp_path.glob("wandb/*run-*")) == []


def test_nothing_is_printed(run_info, observer, play, capfd):
    play(observer(), run_info())
    assert capfd.readouterr() == ("", "")


def test_flat_config_leaves_its_source_alone(run_info):
    info = run_info(config={"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None})
    assert flat_config(info) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
        "strategy": "ewc+replay",
        "parameters.total": 1_234_567,
        "parameters.trainable": 12_345,
    }
    assert info.config == {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None}
