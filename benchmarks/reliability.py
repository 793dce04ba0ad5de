"""Kills runs at random until all are complete, and compares them with undisturbed ones.

Run it with `python -m benchmarks.reliability`; it prints docs/reliability.md's table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STRATEGIES = ("finetune", "ewc", "replay", "agem", "olora")
SEEDS = (0, 1, 2, 3)
OVERRIDES = (
    "stream.num_tasks=3",
    "stream.train_size=320",
    "stream.validation_size=16",
    "stream.test_size=120",
    "training.batch_size=8",
    "training.checkpoint.every_steps=10",
    "peft.dropout=0.1",
    "tracking.wandb.mode=disabled",
    "tracking.log_every=1",
)
TIMES = ("time", "seconds", "peak")  # parts of keys whose values no two runs share


def command(strategy: str, seed: int, output: Path) -> list[str]:
    """The command line of one run."""
    run = [f"strategy={strategy}", f"seed={seed}", f"paths.output_dir={output}"]
    return [sys.executable, "-m", "clpeft", *run, *OVERRIDES]


def start(strategy: str, seed: int, output: Path) -> subprocess.Popen[bytes]:
    """Starts one run with one thread."""
    log = (output / f"{strategy}-{seed}.log").open("ab")
    return subprocess.Popen(
        command(strategy, seed, output),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def carry_out(output: Path, at_once: int, kill_every: float | None, rng: random.Random) -> int:
    """Runs everything, some at once.

    Args:
        output: Where the runs lie.
        at_once: Processes at a time.
        kill_every: Seconds between kills (SIGKILL) of a random one, on average; None leaves them
            alone. The pauses are random too: equal ones that are shorter than a start would never
            let the last run come to anything.
        rng: Chooses it, and the pauses.

    Returns:
        How many were killed.
    """
    output.mkdir(parents=True)
    left = [(strategy, seed) for seed in SEEDS for strategy in STRATEGIES]
    going: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    killed = 0
    next_kill = time.monotonic() + (rng.expovariate(1 / kill_every) if kill_every else math.inf)
    while left or going:
        while left and len(going) < at_once:
            run = left.pop(0)
            going[run] = start(*run, output)
        time.sleep(0.05)
        if kill_every is not None and time.monotonic() > next_kill:
            next_kill = time.monotonic() + rng.expovariate(1 / kill_every)
            victim = rng.choice(sorted(going))
            if going[victim].poll() is None:
                going[victim].send_signal(signal.SIGKILL)
                going[victim].wait()
                killed += 1
        for run, process in list(going.items()):
            if process.poll() is None:
                continue
            del going[run]
            if process.returncode == -signal.SIGKILL:
                left.append(run)  # the same command once more
            elif process.returncode != 0:
                raise SystemExit(f"{run} failed; see {output / f'{run[0]}-{run[1]}.log'}")
    return killed


def left_behind(output: Path, strategy: str, seed: int) -> dict[str, Any]:
    """All that a run left, without what the clock decides."""
    (results,) = output.glob(f"*/{strategy}-s{seed}-*/results.json")
    lines = (results.parent / "history.jsonl").read_text().splitlines()
    return {
        "results": timeless(json.loads(results.read_text())),
        "history": [timeless(json.loads(line)) for line in lines],
        "adapters": {
            str(path.relative_to(results.parent)): path.read_bytes()
            for path in sorted(results.parent.glob("adapters/*/*.safetensors"))
        },
    }


def timeless(value: Any) -> Any:
    """A JSON value without the keys that tell times and peaks of memory."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(part in k for part in TIMES)}
        return {k: timeless(v) for k, v in kept.items()}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Runs both sweeps, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--kill-every", type=float, default=8.0, help="seconds between kills, on average"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder) / "calm", Path(folder) / "disturbed"
        begun = time.monotonic()
        carry_out(calm, given.at_once, None, random.Random(0))
        calm_seconds = time.monotonic() - begun
        begun = time.monotonic()
        kills = carry_out(disturbed, given.at_once, given.kill_every, random.Random(given.seed))
        seconds = time.monotonic() - begun
        print("| strategy | seed | times started | equal to the undisturbed run |")
        print("|---|---|---|---|")
        equal = 0
        for strategy in STRATEGIES:
            for seed in SEEDS:
                same = left_behind(calm, strategy, seed) == left_behind(disturbed, strategy, seed)
                equal += same
                (status,) = disturbed.glob(f"*/{strategy}-s{seed}-*/status.json")
                starts = json.loads(status.read_text())["attempt"]
                print(f"| {strategy} | {seed} | {starts} | {'yes' if same else '**no**'} |")
    total = len(STRATEGIES) * len(SEEDS)
    print(
        f"\n{equal} of {total} equal after {kills} kills, one every {given.kill_every:g} s on "
        f"average among {given.at_once} at a time; {seconds:.0f} s, "
        f"undisturbed {calm_seconds:.0f} s."
    )
    if equal < total:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
