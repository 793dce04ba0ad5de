"""Weights & Biases: online where a key is configured, offline where not, never a prompt."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import WandbConfig
from clpeft.evaluation.matrix import figure_pixels, matrix_heatmap
from clpeft.tracking.base import Observer, RunInfo

if TYPE_CHECKING:
    import wandb

INIT_SECONDS = 30.0  # to reach the server; after that the run is kept offline
FINISH_SECONDS = 600.0  # to upload what is left; after that `wandb sync` has to
MODES = ("online", "offline", "disabled")

log = logging.getLogger(__name__)


class WandbObserver(Observer):
    """One W&B run per run, resumed with it, with files under `<run_dir>/wandb`.

    `train/*` is drawn over `step`, `eval/*` and `matrix/*` over `tasks_trained`. The group is the
    run without its seed; config keys are flat (`optimizer.lr`), so that they can be filtered and
    swept by. In the end the summary has `metrics/<name>`, `cost/<name>` and `warnings`, each of
    which is an alert too, and the run the matrix as a table in long form (`matrix/table`) and as a
    picture (`matrix/heatmap`).

    W&B never stops training: if it cannot start online, it is told so in a warning and the run is
    kept offline.

    Args:
        config: `tracking.wandb` of the resolved config; its mode is not disabled.
        directory: The run directory.
    """

    def __init__(self, config: WandbConfig, directory: Path) -> None:
        self._directory = directory
        self._config = config
        self._run: wandb.Run | None = None
        self._tasks: tuple[str, ...] = ()
        self._step = 0
        self._rows = 0  # of the matrix, known so far

    def on_run_start(self, info: RunInfo) -> None:
        """See `Observer`."""
        import wandb

        self._tasks = info.tasks
        self._step = info.resumed_at_step
        if info.resumed:
            self._rows = info.resumed_at_task + 1
        (self._directory / "wandb").mkdir(parents=True, exist_ok=True)
        identifier = _run_id(self._directory / "wandb" / "run_id.txt", resumed=info.resumed)
        # the library's own messages are settings of the process, not of a run
        wandb.setup(wandb.Settings(silent=True))
        mode = _mode(self._config.mode)
        if mode == "disabled":
            return
        try:
            self._run = self._start(info, identifier, mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning(
                "W&B did not start online and records offline instead; "
                "tracking.wandb.mode=offline spares the attempt: %s",
                str(error).strip(),
            )
            with contextlib.suppress(SystemExit):  # of a service that ended badly, not of training
                wandb.teardown()  # else the failed attempt holds on to the run's id
            self._run = self._start(info, identifier, "offline")
        self._define_axes(self._run)
        self._tell_where(self._run)

    def _start(self, info: RunInfo, identifier: str, mode: str) -> wandb.Run:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError(
                "no key is configured (`wandb login` or WANDB_API_KEY), or WANDB_MODE is offline."
            )
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=self._config.project,
            entity=self._config.entity,
            tags=list(self._config.tags),
            group=info.group,
            name=info.name,
            id=identifier,
            resume="allow",
            reinit="create_new",  # leaves alone a run that a calling program may have open
            config=flat_config(info),
            dir=str(self._directory),
            settings=wandb.Settings(
                silent=True,
                console="off",  # the console is Hydra's log's and history.jsonl's business
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )

    def _define_axes(self, run: wandb.Run) -> None:
        run.define_metric("step", hidden=True)
        run.define_metric("train/*", step_metric="step")
        run.define_metric("tasks_trained", hidden=True)
        run.define_metric("eval/*", step_metric="tasks_trained")
        run.define_metric("matrix/*", step_metric="tasks_trained")

    def _tell_where(self, run: wandb.Run) -> None:
        if run.offline:
            directory = Path(run.dir).parent
            log.info("W&B: offline; upload it later with: wandb sync %s", directory)
        else:
            log.info("W&B: %s", run.url)

    def _log(self, values: dict[str, Any]) -> None:
        """Logs at W&B's own step, which must grow with every call and be the same after a resume.

        Optimizer steps and evaluations share it: a record comes after `step` steps and `rows`
        evaluations. What a resumed run logs again has the step it had, and W&B keeps the first.
        """
        assert self._run is not None
        self._run.log(values, step=self._step + self._rows, commit=True)

    def on_task_start(self, index: int, name: str, steps: int) -> None:
        """See `Observer`."""
        self._rows = index + 1

    def on_step(self, step: int, logs: dict[str, float] | None) -> None:
        """See `Observer`."""
        self._step = step
        if logs is not None and self._run is not None:
            self._log({"step": step, **logs})

    def on_evaluation(self, trained: int, row: list[float | None]) -> None:
        """See `Observer`."""
        self._rows = trained + 1
        scores = {
            f"eval/{name}": score
            for name, score in zip(self._tasks, row, strict=True)
            if score is not None
        }
        if scores and self._run is not None:
            self._log({"tasks_trained": trained, **scores})

    def on_error(self, error: BaseException) -> None:
        """See `Observer`."""
        if self._run is not None:
            self._run.summary["error"] = f"{type(error).__name__}: {error}".removesuffix(": ")

    def close(self, exit_code: int, results: dict[str, Any] | None) -> None:
        """See `Observer`."""
        if self._run is None:
            return
        try:
            if results is not None:
                self._record(self._run, results)
        finally:
            self._run.finish(exit_code=exit_code)

    def _record(self, run: wandb.Run, results: dict[str, Any]) -> None:
        import wandb

        table = wandb.Table(
            columns=["trained", "task", "score"],
            data=[
                [trained, name, score]
                for trained, row in enumerate(results["matrix"])
                for name, score in zip(results["tasks"], row, strict=True)
                if score is not None
            ],
        )
        picture = matrix_heatmap(results["matrix"], results["tasks"])
        self._rows += 1
        self._log(
            {
                "tasks_trained": len(results["tasks"]),
                "matrix/table": table,
                "matrix/heatmap": wandb.Image(figure_pixels(picture)),
            }
        )
        summary = {f"metrics/{name}": value for name, value in results["metrics"].items()}
        for name, value in results["cost"].items():
            if isinstance(value, int | float):  # the others are lists by task
                summary[f"cost/{name}"] = value
        findings = [f"{found['text']} {found['advice']}" for found in results["warnings"]]
        summary["warnings"] = findings
        run.summary.update(summary)
        for text in findings:
            run.alert(title="a doubtful result", text=text, level="WARN")


def flat_config(info: RunInfo) -> dict[str, Any]:
    """What W&B shows as a run's config: `optimizer.lr` and so on, all keys on one level.

    Args:
        info: Of the run.

    Returns:
        The leaves of the config by dotted key, lists whole; and, for grouping and plotting by,
        `strategy` (names joined with +) and the two numbers of parameters.
    """
    flat: dict[str, Any] = {}

    def descend(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                descend(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    descend("", info.config)
    flat["strategy"] = "+".join(info.strategies)
    flat["parameters.total"] = info.total_parameters
    flat["parameters.trainable"] = info.trainable_parameters
    return flat


def _mode(configured: str) -> str:
    """`auto` resolved: what WANDB_MODE says, or else online exactly if there is a key."""
    if configured != "auto":
        return configured
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in MODES:
        return wanted

    import wandb

    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.AuthenticationError as error:
        log.warning("The W&B key that is configured cannot be used, so W&B is offline: %s", error)
        return "offline"


def _run_id(path: Path, *, resumed: bool) -> str:
    """The run's id at W&B: a resumed run goes on under its own, a fresh start gets a new one."""
    if resumed and path.exists():
        return path.read_text().strip()
    identifier = secrets.token_hex(5)
    path.write_text(identifier + "\n")
    return identifier
