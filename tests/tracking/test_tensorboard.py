"""TensorBoard's event files, read back."""

import sys

import numpy as np
import pytest

from clpeft.config import ConfigError
from clpeft.tracking.tensorboard import TensorboardObserver

pytest.importorskip("tensorboard")


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def scalars(events):
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_whole_run(tmp_path, run_info, play):
    play(TensorboardObserver(tmp_path), run_info())
    events = read(tmp_path)
    assert scalars(events) == {
        "train/loss": [(2, 1.0), (4, 0.5)],
        "train/lr": [(2, pytest.approx(0.001)), (4, pytest.approx(0.001))],  # kept as float32
        "eval/north": [(0, 0.25), (1, 0.875), (2, 0.625)],
        "eval/south": [(0, 0.5), (1, 0.5), (2, 1.0)],
        "metrics/average_accuracy": [(2, 0.8125)],
        "metrics/forgetting": [(2, 0.25)],
    }
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.001' in text
    (picture,) = events.Images("matrix")
    assert picture.width > 100
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_an_unevaluated_task_is_left_out(tmp_path, run_info):
    observer = TensorboardObserver(tmp_path)
    observer.on_run_start(run_info())
    observer.on_evaluation(0, [0.25, None])
    observer.close(1, None)
    assert scalars(read(tmp_path)) == {"eval/north": [(0, 0.25)]}


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path, run_info):
    first = TensorboardObserver(tmp_path)
    first.on_run_start(run_info())
    for step in (1, 2, 3):
        first.on_step(step, {"train/loss": 1.0})
    first.close(1, None)
    second = TensorboardObserver(tmp_path)
    second.on_run_start(run_info(resumed_at_step=1))
    for step in (2, 3):
        second.on_step(step, {"train/loss": 0.5})
    second.close(0, None)
    assert scalars(read(tmp_path)) == {"train/loss": [(1, 1.0), (2, 0.5), (3, 0.5)]}


def test_closing_before_the_start_is_fine(tmp_path):
    TensorboardObserver(tmp_path).close(1, None)


def test_no_random_state_is_touched(tmp_path, run_info, play):
    import random

    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    play(TensorboardObserver(tmp_path), run_info())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


def test_without_the_package_there_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracking\.tensorboard=true needs the package"):
        TensorboardObserver(tmp_path)
