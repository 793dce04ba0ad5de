"""What it takes to serve a run's models: which there are, on which base, and how they are asked."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import Config, ConfigError, ModelConfig, nearest
from clpeft.models.adapted import adapter_settings, whole_source
from clpeft.models.own import OwnModelConfig
from clpeft.models.quantize import NOT_QUANTIZED, QUANTIZATIONS, QuantizationConfig
from clpeft.registry import MODELS
from clpeft.rundir import RunDirectory

if TYPE_CHECKING:
    from clpeft.training.run import Run

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # where the one of a model of one's own lies in a run's directory


@dataclass(frozen=True)
class Serving:
    """What serving.json holds, in a run's directory and in what is exported from it.

    Attributes:
        run: The run's name.
        peft: The PEFT method.
        adapts: Whether there is an adapter; otherwise the model's own weights were trained.
        quantization: How the base was stored.
        trained_whole: Names of its modules that are not quantized, because they train whole.
        model: How the base is loaded, as `ModelConfig` has it.
        base_digest: Of the base's weights and config.json; None for one on the Hub, where the
            revision says it.
        tokenizer: The tokenizer's fingerprint.
        stream: The tasks, as `described` has them.
        evaluation: How tasks were scored: mode, batch_size, max_new_tokens, task_id_given, and
            precision.
        exported: Of an export: the number of tasks behind its model.
        merged: Of an export: whether it is a whole model.
    """

    run: str
    peft: str
    adapts: bool
    quantization: dict[str, Any]
    trained_whole: list[str]
    model: dict[str, Any]
    base_digest: str | None
    tokenizer: str
    stream: dict[str, Any]
    evaluation: dict[str, Any]
    exported: int | None = None
    merged: bool = False

    @property
    def quantized(self) -> QuantizationConfig:
        """How the base was stored; a merged model is not quantized any more."""
        if self.merged:
            return NOT_QUANTIZED
        return QUANTIZATIONS[self.quantization["method"]](**self.quantization)

    @property
    def model_config(self) -> ModelConfig:
        """How the base is loaded, or built."""
        builder = self.model.get("builder")
        if builder is None:
            return ModelConfig(**self.model)
        if builder not in MODELS:
            raise ConfigError(
                f"model={builder} is a model of your own, which no installed package registers; "
                f"install the one that {self.run} was made with."
            )
        return MODELS[builder].config(**self.model)

    @property
    def tasks(self) -> list[str]:
        """The names of the stream's tasks, in their order."""
        return [task["name"] for task in self.stream["tasks"]]


def record_serving(run: Run, name: str, task_id_given: bool) -> None:
    """Leaves serving.json in the run directory, unless an earlier part of the run has.

    Args:
        run: Before its first task; in the main process.
        name: The run's name.
        task_id_given: Whether it is evaluated with the task's identity.
    """
    from peft import PeftModel

    from clpeft.streams.description import described
    from clpeft.streams.encoded import tokenizer_fingerprint

    record = RunDirectory(run.directory)
    if record.serving:
        return
    config = run.config
    model, digest = _base_of(run)
    if isinstance(model, OwnModelConfig):  # whose tokenizer may be trained on the stream's text
        run.tokenizer.save_pretrained(run.directory / TOKENIZER)
    serving = Serving(
        run=name,
        peft=config.peft.kind,
        adapts=isinstance(run.model, PeftModel),
        quantization=asdict(config.quantization),
        trained_whole=list(config.peft.trained_whole),
        model=asdict(model),
        base_digest=digest,
        tokenizer=tokenizer_fingerprint(run.tokenizer),
        stream=described(run.stream.stream),
        evaluation={
            "mode": config.evaluation.mode,
            "batch_size": config.evaluation.batch_size,
            "max_new_tokens": config.evaluation.max_new_tokens,
            "task_id_given": task_id_given,
            "precision": config.training.precision,
        },
    )
    record.write_serving(asdict(serving))


def _base_of(run: Run) -> tuple[ModelConfig, str | None]:
    """How the base beneath a run's source is loaded again, and what its weights are known by."""
    from huggingface_hub import try_to_load_from_cache

    from clpeft.models.weights import files_digest

    config = run.config.model
    # code from elsewhere is run if whoever loads it says so, not because a file does
    known = replace(config, architecture=None, warmup=None, trust_remote_code=False)
    if isinstance(known, OwnModelConfig):
        # an adapter that the run started from is known by it too, and replaced by those served
        return known, run.base if adapter_settings(run.source) is None else None
    base = whole_source(run.source)
    if Path(base).is_dir():
        kept = Path(run.config.paths.cache_dir).expanduser() / "digests"
        return replace(known, path=str(Path(base).resolve())), files_digest(base, None, kept)
    cached = try_to_load_from_cache(base, "config.json", revision=config.revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else config.revision
    return replace(known, path=None, hub_id=base, revision=commit), None


class Models:
    """The models that a run's directory or an export holds.

    Args:
        folder: The directory.

    Attributes:
        serving: How they are served.
        paths: Where each lies, by the number of tasks behind it: an adapter's folder, or that of a
            checkpoint or of a whole model.

    Raises:
        ConfigError: If it is neither.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = RunDirectory(folder)
        if not folder.is_dir():
            raise ConfigError(f"There is no run directory '{folder}'.")
        facts = self.record.serving
        if not facts and self.record.frozen is None:
            raise ConfigError(
                f"{folder} is not a run's directory: it holds no config.yaml; nor is it what "
                f"`clpeft export` wrote."
            )
        if not facts:
            raise ConfigError(
                f"{folder} holds no serving.json: its run has not begun, or an earlier version of "
                f"clpeft made it; run it (again) with `clpeft run ... force=true`."
            )
        if facts.keys() != {field.name for field in fields(Serving)}:
            raise ConfigError(
                f"{folder / 'serving.json'} is not as this version of clpeft writes it."
            )
        self.serving = Serving(**facts)
        self.paths = self._found()

    def _found(self) -> dict[int, Path]:
        if self.serving.exported is not None:
            return {self.serving.exported: self.folder}
        if not self.serving.adapts:
            from clpeft.training.checkpoint import trained_checkpoints

            return trained_checkpoints(self.folder)
        folders = {
            number: self.folder / "adapters" / f"{number}_{name}"
            for number, name in enumerate(self.serving.tasks, 1)
        }
        return {number: path for number, path in folders.items() if path.is_dir()}

    def number(self, task: int | str | None) -> int:
        """The number of a task, from 1.

        Args:
            task: Its number or its name; None for the last.

        Raises:
            ConfigError: If the stream has no such task.
        """
        names = self.serving.tasks
        if task is None:
            return self.serving.exported or len(names)
        if task in names:
            return names.index(str(task)) + 1
        if str(task).isdecimal() and 1 <= int(task) <= len(names):
            return int(task)
        hint = nearest(str(task), names)
        raise ConfigError(
            f"'{task}' is no task of {self.folder}, which has {len(names)}: give a number from 1 "
            f"to {len(names)}, or a name.{hint}"
        )

    def path(self, number: int) -> Path:
        """Where the model lies that so many tasks are behind.

        Raises:
            ConfigError: If there is none: why, and which there are.
        """
        if number in self.paths:
            return self.paths[number]
        name = self.serving.tasks[number - 1]
        known = ", ".join(f"{there} ('{self.serving.tasks[there - 1]}')" for there in self.paths)
        there_are = f"there is the one after task {known}" if known else "there is none"
        raise ConfigError(
            f"{self.folder} holds no model after task {number} ('{name}'): {self._reason(number)}; "
            f"{there_are}."
        )

    def _reason(self, number: int) -> str:
        if self.serving.exported is not None:
            return "it is an export of one"
        state = "killed" if self.record.was_killed else self.record.status.get("status")
        if state != "completed" and number > max(self.paths, default=0):
            return f"the run is {state} and has not trained it yet"
        if not self.serving.adapts:
            return (
                f"peft={self.serving.peft} leaves whole models, of which only the checkpoints' are "
                f"kept"
            )
        return "its strategy trains that task together with a later one"

    def base(self, given: str | Path | None = None) -> ModelConfig:
        """How the base model is loaded.

        Args:
            given: The folder that it lies in now, if that is not where it was.

        Raises:
            ConfigError: If it is not there any more, or is another one.
        """
        serving = self.serving
        known = serving.model_config
        if isinstance(known, OwnModelConfig):
            folder = self.folder if serving.exported is not None else self.folder / TOKENIZER
            return replace(known, tokenizer=str(folder))
        if serving.merged:
            return replace(known, path=str(self.folder))
        if given is not None:
            if not Path(given).is_dir():
                raise ConfigError(f"The base model was said to be in {given}, which is no folder.")
            known = replace(known, path=str(given))
        if known.path is None:
            return known
        if not Path(known.path).is_dir():
            known = replace(known, path=str(self._rebuilt(known.path)))
        assert known.path is not None
        from clpeft.models.weights import files_digest

        if serving.base_digest != files_digest(known.path):
            told = f"The base model in {known.path} is not the one that {serving.run} stands on"
            if given is None:
                raise ConfigError(
                    f"{told}: its weights or its config.json differ; give the folder of the one "
                    f"that is, or this folder to use it all the same, as base= (--base)."
                )
            log.warning("%s; what it answers may differ from what the run has scored", told)
        return known

    def _rebuilt(self, gone: str) -> Path:
        """The folder of a generated base that is gone: in the run's cache, or built anew."""
        moved = ConfigError(
            f"The base model of {self.folder} was in {gone}, which is no folder any more; give the "
            f"folder that it is in now as base= (--base)."
        )
        frozen = self.record.frozen
        if frozen is None or frozen.model.path is not None or frozen.model.architecture is None:
            raise moved
        from clpeft.composition import settle
        from clpeft.models.generated import generated_base
        from clpeft.streams.build import build_stream

        config: Config = settle(frozen)
        try:
            stream = build_stream(config.stream, data_dir=config.paths.data_dir)
            cache = Path(config.paths.cache_dir).expanduser()
            return generated_base(config.model, stream, cache)
        except (OSError, ConfigError) as error:
            raise moved from error
