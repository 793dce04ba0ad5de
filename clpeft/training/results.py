"""results.json: the raw matrix and everything derived from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from clpeft.config import RESULT_KEYS, SETTING_KEYS, digest, run_name
from clpeft.doubts import doubts
from clpeft.evaluation.metrics import compute_metrics
from clpeft.models.load import count_parameters
from clpeft.models.weights import weights_digest
from clpeft.registry import STRATEGIES
from clpeft.rundir import RESULTS_SCHEMA, RunDirectory, git_commit, versions

if TYPE_CHECKING:
    from clpeft.training.loop import Loop


def collect(loop: Loop, composed: DictConfig) -> dict[str, Any]:
    """What a completed run leaves: `metrics` is a pure function of the rest.

    Args:
        loop: A loop that has gone through its stream.
        composed: The run's config, for its digests.
    """
    run, config = loop.run, loop.run.config
    tasks = [task.task for task in run.stream.tasks]
    total, trainable = count_parameters(run.model)
    sizes = [len(loop.evaluator.examples(task)) for task in run.stream.tasks]
    chance = [task.chance for task in tasks]
    setting = digest(composed, SETTING_KEYS)
    references = find_references(run.directory.parent, setting, config.seed, run.base)
    for name in config.strategies:
        references.pop(name, None)  # no run is its own reference
    metrics, undefined = compute_metrics(
        loop.matrix,
        chance=chance,
        independent=references.get("independent"),
        test_sizes=sizes,
    )
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "name": run_name(composed),
        "stream": config.stream.name,
        "order": None if config.stream.tasks else config.stream.order,
        "scenario": config.stream.scenario,
        "model": config.model.name,
        "task_type": config.model.task_type,
        "peft": config.peft.kind,
        "strategies": list(config.strategies),
        "bound": any(STRATEGIES[name].target.is_bound for name in config.strategies),
        "seed": config.seed,
        "digests": {
            "run": digest(composed, [*RESULT_KEYS, "seed"]),
            "family": digest(composed, RESULT_KEYS),
            "setting": setting,
            # of what was scored: results that share neither are not of the same thing
            "test": run.stream.stream.fingerprint_of(config.evaluation.split),
            "base": run.base,
            "weights": weights_digest(run.changed),
        },
        "tasks": [task.name for task in tasks],
        "metric": {task.name: task.metric for task in tasks},
        "split": config.evaluation.split,
        "names_task": config.stream.names_task,
        "evaluation": {
            "mode": config.evaluation.mode,
            "task_id_given": loop.evaluator.task_id_given,
        },
        "test_sizes": sizes,
        "chance": chance,
        "matrix": loop.matrix,
        "references": references,
        "metrics": metrics,
        "undefined": undefined,
        "cost": loop.cost.summary(run),
        "parameters": {
            "total": total,
            "trainable": trainable,
            "percent": 100 * trainable / total,
        },
        "environment": {
            **versions(),
            "git_commit": git_commit(),
            "device": str(run.device),
            "threads": torch.get_num_threads(),
            "data": run.stream.stream.fingerprint,
        },
    }
    found = doubts(composed, run.directory, results)
    results["warnings"] = [asdict(finding) for finding in found]
    return results


def find_references(folder: Path, setting: str, seed: int, base: str) -> dict[str, list[float]]:
    """Scores of completed reference runs in the same setting, on the same base, of the same seed.

    Args:
        folder: Where runs of the same stream lie.
        setting: The digest of what is being compared: model, adapter, stream, evaluation.
        seed: The seed to match.
        base: What the base model's weights are known by.

    Returns:
        `independent`: the diagonal of an independent run, S_i; `joint`: the last row of a joint
        run. Each only where there is exactly one such run.
    """
    found: dict[str, list[float]] = {}
    for name in ("independent", "joint"):
        for path in sorted(folder.glob(f"{name}-s{seed}-*/results.json")):
            other = RunDirectory(path.parent).results
            digests = other.get("digests", {})
            if (digests.get("setting"), digests.get("base")) != (setting, base):
                continue
            if other["strategies"] != [name]:
                continue
            if name in found:  # which of several to take is left to `clpeft report`
                del found[name]
                break
            matrix = other["matrix"]
            last = matrix[-1]
            diagonal = [row[i] for i, row in enumerate(matrix[1:])]
            found[name] = diagonal if name == "independent" else last
    return found
