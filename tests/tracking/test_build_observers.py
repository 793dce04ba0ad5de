"""Which switches make which observers."""

import subprocess
import sys

import pytest

from clpeft.config import TrackingConfig, WandbConfig
from clpeft.tracking.build import build_observers
from clpeft.tracking.console import ConsoleObserver
from clpeft.tracking.tensorboard import TensorboardObserver
from clpeft.tracking.wandb import WandbObserver


@pytest.mark.parametrize(
    ("console", "mode", "tensorboard", "expected"),
    [
        (False, "disabled", False, []),
        (True, "disabled", False, [ConsoleObserver]),
        (False, "auto", False, [WandbObserver]),
        (False, "disabled", True, [TensorboardObserver]),
        (True, "offline", True, [WandbObserver, TensorboardObserver, ConsoleObserver]),
    ],
)
def test_each_switch_makes_its_observer(tmp_path, console, mode, tensorboard, expected):
    tracking = TrackingConfig(
        log_every=1, console=console, wandb=WandbConfig(mode=mode), tensorboard=tensorboard
    )
    assert [type(observer) for observer in build_observers(tracking, tmp_path)] == expected
    assert list(tmp_path.iterdir()) == []  # nothing is written before a run starts


def test_what_is_switched_off_is_not_imported():
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from clpeft.config import TrackingConfig, WandbConfig\n"
        "from clpeft.tracking.build import build_observers\n"
        "build_observers(TrackingConfig(1, True, WandbConfig('auto'), False), Path('.'))\n"
        "assert not {'wandb', 'tensorboard', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
