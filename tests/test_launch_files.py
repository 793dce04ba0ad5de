"""The files under launch/: what Accelerate reads, and what SLURM takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

LAUNCH = Path(__file__).parents[1] / "launch"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_every_accelerate_config_is_tested() -> None:
    assert {path.stem for path in (LAUNCH / "accelerate").iterdir()} == KINDS.keys()


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads_its_config(name: str, kind: DistributedType) -> None:
    # an unknown key is an error there
    config = load_config_from_file(str(LAUNCH / "accelerate" / f"{name}.yaml"))

    assert config.distributed_type == kind
    # which training.precision and the command line are to decide
    assert config.mixed_precision == "no"
    assert config.num_processes == -1


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_launches_with_its_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # it would ask for DeepSpeed and for the GPUs of this machine
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    file = str(LAUNCH / "accelerate" / f"{name}.yaml")
    command = ["--config_file", file, "--num_processes", "4", "--module", "clpeft", "seed=1"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))

    assert arguments.num_processes == 4
    assert arguments.multi_gpu == (name == "ddp")
    assert arguments.use_fsdp == (name == "fsdp2")
    assert arguments.use_deepspeed == name.startswith("deepspeed")
    if name == "fsdp2":
        assert arguments.fsdp_version == 2
        assert arguments.fsdp_reshard_after_forward is True
    if arguments.use_deepspeed:
        assert arguments.zero_stage == int(name[-1])
