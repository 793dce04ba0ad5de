"""Published benchmarks: on a small copy of their layout, and on the data where they are at hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pyarrow import parquet

from clpeft.config import ConfigError
from clpeft.registry import STREAMS
from clpeft.streams.benchmark import BenchmarkConfig
from clpeft.streams.build import build_stream, check_stream

NAMES = ["yahoo", "dbpedia", "agnews", "amazon"]
SHIPPED = ("standard_cl", "mbpa", "long_sequence")


def _config(**changes: Any) -> BenchmarkConfig:
    given = {
        "scenario": "task",
        "tasks_dir": "cl_benchmark",
        "orders": {"first": ["dbpedia", "amazon"], "second": ["amazon", "dbpedia"]},
        "order": "first",
        "max_length": 128,
        **changes,
    }
    return BenchmarkConfig(kind="benchmark", name="small", **given)


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Four tasks in the layout of the public data: Parquet with label indices, labels.json."""
    for name in NAMES:
        folder = tmp_path / "data" / "cl_benchmark" / name
        folder.mkdir(parents=True)
        for split, count in (("train", 6), ("validation", 2), ("test", 4)):
            table = pyarrow.table(
                {
                    "text": [f"{name} {split} {number}" for number in range(count)],
                    "label": pyarrow.array(
                        [number % 2 for number in range(count)], pyarrow.int64()
                    ),
                    "source": ["nowhere"] * count,
                }
            )
            parquet.write_table(table, folder / f"{split}.parquet", compression="zstd")
        labels = {
            "task": name,
            "label_names": ["neg", "pos"],
            "num_labels": 2,
            "instruction": f"Judge this {name}.",
            "input_template": "{text}",
            "answer_words": ["bad", "good"],
            "licence": "none",
        }
        (folder / "labels.json").write_text(json.dumps(labels))
    return tmp_path / "data"


def test_order_decides_the_tasks(small_data: Path) -> None:
    first = build_stream(_config(), data_dir=str(small_data))
    second = build_stream(_config(order="second"), data_dir=str(small_data))
    assert [task.name for task in first.tasks] == ["dbpedia", "amazon"]
    assert [task.name for task in second.tasks] == ["amazon", "dbpedia"]
    listed = build_stream(_config(tasks=["yahoo"]), data_dir=str(small_data))
    assert [task.name for task in listed.tasks] == ["yahoo"]


def test_task_is_what_its_files_say(small_data: Path) -> None:
    stream = build_stream(_config(), data_dir=str(small_data))
    task = stream.tasks[0]
    assert task.labels == ("neg", "pos")
    assert task.answer_words == ("bad", "good")
    assert task.test[:] == {
        "text": [f"dbpedia test {number}" for number in range(4)],
        "label": [0, 1, 0, 1],
        "example_id": [0, 1, 2, 3],
    }
    assert stream.prompt(task).fill("x") == "Judge this dbpedia.\nOption: bad, good \nx\nAnswer:"


def test_one_label_space_where_all_tasks_share_it(small_data: Path) -> None:
    stream = build_stream(_config(scenario="domain"), data_dir=str(small_data))
    assert stream.label_names == ("neg", "pos")


def test_neutral_text_is_of_the_folders_other_tasks(small_data: Path) -> None:
    stream = build_stream(_config(), data_dir=str(small_data))
    expected = {f"{name} train {number}" for name in ("yahoo", "agnews") for number in range(6)}
    texts = stream.neutral_text(0)
    assert set(texts) == expected
    assert stream.neutral_text(1) != texts


@pytest.mark.parametrize("data_dir", [None, ""])
def test_data_folder_that_was_not_named(data_dir: str | None) -> None:
    with pytest.raises(ConfigError, match=r"paths\.data_dir=<folder> or .* CLPEFT_DATA.*cl_bench"):
        check_stream(_config(), data_dir)


def test_data_folder_that_does_not_exist(tmp_path: Path) -> None:
    expected = rf"needs the folder {re.escape(str(tmp_path))}/cl_benchmark, which does not exist"
    with pytest.raises(ConfigError, match=expected):
        check_stream(_config(), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "third"}, "has no order 'third'; its orders are first, second"),
        ({"order": None}, r"needs stream\.order \(one of first, second\) or stream\.tasks"),
        ({"tasks": ["agnew"]}, r"no task 'agnew' in .*cl_benchmark. Did you mean 'agnews'"),
        ({"tasks": ["agnews", "agnews"]}, "lists the task 'agnews' twice"),
    ],
)
def test_what_does_not_exist_is_told(small_data: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stream(_config(**changes), str(small_data))


def test_missing_split_is_told(small_data: Path) -> None:
    (small_data / "cl_benchmark" / "amazon" / "test.parquet").unlink()
    with pytest.raises(ConfigError, match=r"'amazon' has no test\.csv, test\.jsonl or test\.parq"):
        check_stream(_config(), str(small_data))


# What is shipped.


def _shipped(name: str, *overrides: str) -> Any:
    for entry in STREAMS:
        ConfigStore.instance().store(group="schema/stream", name=entry.name, node=entry.config)
    with initialize_config_module("clpeft.conf", version_base="1.3"):
        return OmegaConf.to_object(compose(f"stream/{name}", list(overrides)).stream)


def test_standard_orders_are_o_loras() -> None:
    config = _shipped("standard_cl")
    assert config.orders == {
        "order1": ["dbpedia", "amazon", "yahoo", "agnews"],
        "order2": ["dbpedia", "amazon", "agnews", "yahoo"],
        "order3": ["yahoo", "amazon", "agnews", "dbpedia"],
    }
    assert (config.order, config.scenario, config.tasks_dir) == ("order1", "task", "cl_benchmark")


def test_orders_are_permutations_of_the_same_tasks() -> None:
    for name, count in (("mbpa", 5), ("long_sequence", 15)):
        orders = list(_shipped(name).orders.values())
        assert {len(order) for order in orders} == {count}
        assert len({frozenset(order) for order in orders}) == 1
        assert {len(set(order)) for order in orders} == {count}
        assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("name", [*SHIPPED, "toy", "folder"])
def test_shipped_streams_fit_their_schema(name: str) -> None:
    config = _shipped(name)
    assert isinstance(config, STREAMS[config.kind].config)
    assert config.name == name
    assert config.names_task is config.allow_overlap is False


@pytest.mark.parametrize("name", [*SHIPPED, "toy", "folder"])
def test_shipped_streams_say_what_they_are(name: str) -> None:
    lines = (Path(__file__).parents[2] / "conf" / "stream" / f"{name}.yaml").read_text().split("\n")
    assert re.fullmatch(r"# \S.*\.", lines[0])
    assert lines[1].startswith("# Paper: ")
    assert lines[2].startswith(f"# Use: clpeft stream={name}")


# The public data themselves.


def test_shipped_orders_are_those_of_the_data_folder(data_dir: Path) -> None:
    published = OmegaConf.to_container(OmegaConf.load(data_dir / "orders.yaml"))
    for ours, theirs in (
        ("standard_cl", "standard_cl"),
        ("mbpa", "mbpa_5tasks"),
        ("long_sequence", "long_sequence"),
    ):
        assert _shipped(ours).orders == published[theirs]["orders"]


def test_standard_stream_on_its_data(data_dir: Path) -> None:
    config = _shipped("standard_cl", "stream.max_train=140", "stream.max_test=70")
    stream = build_stream(config, data_dir=str(data_dir))
    assert [len(task.labels) for task in stream.tasks] == [14, 5, 10, 4]
    assert len(stream.label_names) == 33
    assert {len(task.train) for task in stream.tasks} == {140}
    assert [len(task.validation) for task in stream.tasks] == [1256, 2500, 1000, 2000]
    assert set(Counter(stream.tasks[0].train["label"]).values()) == {10}
    assert stream.tasks[3].answer_words == (
        "World", "Sports", "Business", "Science or Technology"
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["superni", "trace"])
def test_generation_benchmarks_are_read_too(data_dir: Path, folder: str) -> None:
    if not (data_dir / folder).is_dir():
        pytest.skip(f"needs the public data: set CLPEFT_DATA to a folder that holds {folder}")
    names = sorted(path.name for path in (data_dir / folder).iterdir())
    config = _config(tasks_dir=folder, tasks=names, max_train=10)
    stream = build_stream(config, data_dir=str(data_dir))
    assert stream.label_names == ()
    for task in stream.tasks:
        assert (task.metric, len(task.train)) == ("rougeL", 10)
        assert task.instruction or task.name == "Py150"  # code, to be gone on with
        assert all(row["output"] == row["references"][0] for row in task.test)
