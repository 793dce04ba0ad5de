"""Exports: an adapter that PEFT loads on its base, or a whole model that transformers loads."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpeft.config import ConfigError, ModelConfig, RunError
from clpeft.model_card import model_card
from clpeft.models.own import OwnModelConfig
from clpeft.serving import Models
from clpeft.streams.description import stream_of

if TYPE_CHECKING:
    from torch import Tensor

    from clpeft.loaded import Loaded

# how far the logits of an exported model may lie from the run's own, as a share of their spread:
# rounding alone, which grows with depth; what went wrong is ten times as far off
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
SUFFIX = {False: "", True: "-merged"}
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where to.
        number: The number of tasks behind the model.
        difference: Of a whole model: between its logits and the run's own, as a share of their
            spread.
    """

    folder: Path
    number: int
    difference: float | None = None

    @property
    def told(self) -> str:
        """What was written, in words."""
        if self.difference is None:
            return f"The adapter after task {self.number} is in {self.folder}."
        return (
            f"The model after task {self.number} is in {self.folder}; loaded from there, its "
            f"logits differ from the run's own by {self.difference:.1e} of their spread."
        )


def export(
    run_dir: Path,
    task: int | str | None = None,
    *,
    merge: bool = False,
    dtype: str | None = None,
    to: Path | None = None,
    base: Path | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a model of a run for use elsewhere, with its tokenizer, labels, prompts and a README.

    Args:
        run_dir: The run's directory.
        task: The model as it was after this task, by number or name; the last if not given.
        merge: Whether to write a whole model rather than an adapter. A run without an adapter
            leaves whole models anyway.
        dtype: float32, bfloat16 or float16; as it is if not given.
        to: A folder that does not exist or is empty; one below the run's directory if not given.
        base: The folder of the base model, where it is not where it was.
        dequantize: Whether to merge into a copy of a quantized base in floating point.
        trust_remote_code: Whether code that comes with the base may be run.

    Raises:
        ConfigError: If there is nothing to export, or not so.
        RunError: If a whole model does not compute what the run's own does.
    """
    models = Models(run_dir)
    serving = models.serving
    if serving.exported is not None:
        raise ConfigError(f"{run_dir} is an export already; name the directory of its run.")
    number = models.number(task)
    source = models.path(number)
    whole = merge or not serving.adapts
    if whole and isinstance(serving.model_config, OwnModelConfig):
        raise ConfigError(
            f"model={serving.model['builder']} is a model of your own, which transformers cannot "
            f"load: export an adapter without --merge, and load it with clpeft.load or PEFT."
        )
    if merge and serving.adapts:
        _check_mergeable(models, source, dequantize)
    target = to or run_dir / "exports" / f"{number}_{serving.tasks[number - 1]}{SUFFIX[whole]}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} exists and is not an empty folder; remove it, or name another with --to."
        )
    config = replace(models.base(base), trust_remote_code=trust_remote_code)
    if merge and serving.adapts:
        _check_untied(models, source, config)
    aside = target.resolve().with_name(f".{target.resolve().name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    difference = None
    try:
        if whole:
            config, difference = _write_whole(models, number, config, dtype, aside)
        else:
            _write_adapter(models, source, config, dtype, aside)
        kept = replace(config, trust_remote_code=False)
        served = replace(serving, model=asdict(kept), exported=number, merged=whole)
        (aside / "serving.json").write_text(json.dumps(asdict(served), indent=1) + "\n")
        (aside / "README.md").write_text(model_card(models, number, config, merged=whole))
        if target.is_dir():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(target, number, difference)


def _check_mergeable(models: Models, adapter: Path, dequantize: bool) -> None:
    """Refuses, before a model is loaded, what cannot become a part of the base's weights."""
    from peft import PeftConfig

    from clpeft.peft_methods.registration import register_types

    serving = models.serving
    method = serving.quantization["method"]
    if method != "none" and not dequantize:
        raise ConfigError(
            f"The run's base is quantized ({method}): merging would round its weights once more, "
            f"and the errors would add up. Merge into a copy in floating point with --dequantize, "
            f"or export the adapter without --merge."
        )
    register_types()
    if PeftConfig.from_pretrained(adapter).is_prompt_learning:
        raise ConfigError(
            f"peft={serving.peft} learns prompts, which the model reads beside its input and which "
            f"cannot be merged into its weights; export the adapter without --merge."
        )


def _check_untied(models: Models, adapter: Path, config: ModelConfig) -> None:
    """Refuses, before weights are loaded, to merge LoRA into weights that two modules share.

    A run adapts the one module, mostly the embedding, and leaves the other as it is.
    """
    from peft import LoraConfig, PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from clpeft.models.load import model_source, skeleton_of

    settings = PeftConfig.from_pretrained(adapter)
    if not isinstance(settings, LoraConfig):
        return
    base = skeleton_of(config, model_source(config, stream_of(models.serving.stream), Path()))
    for names in base.all_tied_weights_keys.items():
        tied = [name.rpartition(".")[0] for name in names]
        if {path.rpartition(".")[2] for path in tied} & set(settings.modules_to_save or ()):
            continue  # it trains whole, on weights of its own
        for path, other in (tied, reversed(tied)):
            if check_target_module_exists(settings, path):
                name = path.rpartition(".")[2]
                raise ConfigError(
                    f"peft.target has {name}, whose weights are tied to those of {other}, which "
                    f"{name}'s adapter leaves alone: merged, it would change both, and the model "
                    f"would answer otherwise; export without --merge, or leave {name} out of "
                    f"peft.target."
                )


def _write_adapter(
    models: Models, source: Path, config: ModelConfig, dtype: str | None, folder: Path
) -> None:
    """Writes an adapter as the run has saved it, and the tokenizer of its base."""
    import torch
    from safetensors.torch import load_file, save_file

    from clpeft.models.load import load_tokenizer, model_source

    shutil.copytree(source, folder, dirs_exist_ok=True)
    settings = json.loads((folder / ADAPTER).read_text())
    if not isinstance(config, OwnModelConfig):
        settings["base_model_name_or_path"] = config.path or config.hub_id
        settings["revision"] = config.revision
    (folder / ADAPTER).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if dtype is not None:
        tensors = load_file(folder / WEIGHTS)
        cast = {
            name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
    stream = stream_of(models.serving.stream)
    place = model_source(config, stream, Path())
    load_tokenizer(config, place, stream).save_pretrained(folder)


def _write_whole(
    models: Models, number: int, config: ModelConfig, dtype: str | None, folder: Path
) -> tuple[ModelConfig, float]:
    """Writes a model that needs no adapter, and compares what it computes with the run's own.

    Returns:
        How it is loaded, and how far its logits lie from the run's, as a share of their spread.
    """
    import torch

    from clpeft.loaded import assembled
    from clpeft.models.load import load_model

    loaded = assembled(models, [number], config)
    own = _name(loaded.model.dtype)
    inputs = _probe(loaded)
    expected = _logits(loaded.model, inputs)
    if models.serving.quantized.method != "none":
        own = "bfloat16"  # what products with a quantized base are about as precise as
        del loaded
        gc.collect()  # the one model, before the other comes
        loaded = assembled(models, [number], config, dequantize=True)
    model, labels = loaded.model, len(loaded.stream.label_names)
    if dtype == "float32":
        model.float()  # before merging, so that the sum is not rounded to less
    if models.serving.adapts:
        model = _merged(model, models.serving.peft)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    written = _name(model.dtype)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    tokenizer, device = loaded.tokenizer, loaded.device
    del loaded, model
    gc.collect()  # the one model, before the other comes
    whole = replace(config, path=str(folder), dtype=written)
    again, missing = load_model(whole, str(folder), tokenizer, labels)
    difference = _difference(_logits(again.to(device).eval(), inputs), expected)
    tolerance = max(TOLERANCE[own], TOLERANCE[written])
    if missing or not difference <= tolerance:
        wider = "" if written == "float32" else "try --dtype float32, or "
        raise RunError(
            f"The merged model does not compute what the run's own does: its logits differ by "
            f"{difference:.1e} of their spread, and {tolerance:g} is what rounding from {own} to "
            f"{written} may come to. Nothing was written; {wider}export the adapter without "
            f"--merge."
        )
    return replace(whole, path=None, hub_id=None, revision=None), difference


def _merged(model: Any, peft: str) -> Any:
    """The base model with the adapter's updates in its weights."""
    from peft.tuners.tuners_utils import BaseTuner

    refusal = f"peft={peft} cannot be merged into the base's weights"
    if not isinstance(model.base_model, BaseTuner):
        raise ConfigError(f"{refusal}; export the adapter without --merge.")
    try:
        with warnings.catch_warnings():
            # about tied embeddings, of which one was trained: PEFT notes in the config that they
            # are tied no longer
            warnings.simplefilter("ignore")
            return model.merge_and_unload()
    except (NotImplementedError, ValueError) as error:
        told = str(error).splitlines()[0].rstrip(".") if str(error) else "PEFT does not know how"
        raise ConfigError(f"{refusal} ({told}); export the adapter without --merge.") from error


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _probe(loaded: Loaded) -> dict[str, Tensor]:
    """An input to compare two models by: the prompts of all tasks, one after another."""
    from clpeft.models.load import positions

    stream, limit = loaded.stream, positions(loaded.model)
    text = " ".join(stream.prompt(task).fill(task.name, task.name) for task in stream.tasks)
    read = loaded.tokenizer(
        text,
        truncation=True,
        max_length=int(min(stream.config.max_length, limit)),
        return_tensors="pt",
    ).to(loaded.device)
    inputs = {name: read[name] for name in ("input_ids", "attention_mask")}
    if loaded.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = read["input_ids"]
    return inputs


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    import torch

    with torch.inference_mode():
        found: Tensor = model(**inputs).logits.float()
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    """How far logits lie apart, as a share of their spread over the classes; a common shift of a
    position's logits changes no probability and counts nothing."""
    centred = [logits - logits.mean(dim=-1, keepdim=True) for logits in (one, other)]
    return float((centred[0] - centred[1]).norm() / centred[1].norm())
