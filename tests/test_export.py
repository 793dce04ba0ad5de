"""Exports: PEFT and transformers load them, and they compute what the run's own model does."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import clpeft
from clpeft import cli
from clpeft import export as module
from clpeft.config import ConfigError, RunError
from clpeft.export import export
from clpeft.loaded import Loaded
from clpeft.training.run import Run
from tests.running import Outcome, run_it

Finished = Callable[..., Outcome]
Overrides = Callable[..., list[str]]


def logits(model: Any, run: Run) -> Tensor:
    """What a model says to the first letters of the last task."""
    with torch.inference_mode():
        batch = run.loader(run.stream.tasks[2].test, shuffle=False).batch(0)
        found: Tensor = run.objective.forward(model.eval(), batch).logits
    return found.float()


def loaded_as_told(folder: Path) -> Any:
    """The model that the README's code gives, and its tokenizer."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    known: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), known)
    return known["model"], known["tokenizer"]


# what rounding to a type comes to, grown through two layers
EPS = {
    dtype: 20 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of logits, as a share of their standard deviation."""
    return float((one - other).pow(2).mean().sqrt() / other.std(dim=-1).mean())


FULL = ("peft=full", "optimizer.lr=1e-3")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("tiny_llama", ()),
        ("tiny_llama", ("peft.use_dora=true", "peft.target=all-linear")),
        ("tiny_bert", ("peft.use_rslora=true", "stream.scenario=class")),
        ("tiny_t5", ("peft.bias=all",)),
    ],
    ids=["llama-lora", "llama-dora", "bert-rslora", "t5-bias"],
)
def test_adapter(finished: Finished, tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    outcome = finished("finetune", *more, model=model)
    run = outcome.run
    done = export(outcome.directory, to=tmp_path / "adapter")
    exported, tokenizer = loaded_as_told(done.folder)

    assert torch.equal(logits(exported, run), logits(run.model, run))
    assert tokenizer("the sea").input_ids == run.tokenizer("the sea").input_ids
    assert tokenizer.pad_token_id == run.tokenizer.pad_token_id
    again = clpeft.load(done.folder)
    assert torch.equal(logits(again.model, run), logits(run.model, run))
    texts = run.stream.stream.tasks[2].test["text"]
    assert again.predict(texts) == clpeft.load(outcome.directory).predict(texts)
    with pytest.raises(
        ConfigError, match=r"no model after task 1 .*: it is an export of one; there"
    ):
        clpeft.load(done.folder, 1)


# of a run that trains one of two tied matrices
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("tiny_llama", ("peft.target=all-linear",)),
        ("tiny_llama", ("peft.use_dora=true",)),
        ("tiny_llama", ("peft.modules_to_save=[embed_tokens]",)),
        ("tiny_bert", ("peft.use_rslora=true", "stream.scenario=class")),
        ("tiny_t5", ("peft.bias=all",)),
        ("tiny_bert", FULL),
    ],
    ids=["llama-lora", "llama-dora", "llama-untied", "bert-rslora", "t5-bias", "bert-full"],
)
def test_merged_model(
    tiny: Overrides, finished: Finished, tmp_path: Path, model: str, more: tuple[str, ...]
) -> None:
    if more == FULL:
        overrides = [
            override for override in tiny("finetune", model=model) if "peft." not in override
        ]
        outcome = run_it([*overrides, *more], tmp_path / "run")
    else:
        outcome = finished("finetune", *more, model=model)
    run = outcome.run
    done = export(outcome.directory, merge=True, to=tmp_path / "merged")
    exported, tokenizer = loaded_as_told(done.folder)

    assert not (done.folder / "adapter_config.json").exists()
    # x(W + sBA)ᵀ against xWᵀ + s(xAᵀ)Bᵀ in float32, through two layers
    torch.testing.assert_close(logits(exported, run), logits(run.model, run), rtol=1e-4, atol=1e-4)
    assert 0.0 <= done.difference < 1e-5  # type: ignore[operator]
    assert tokenizer("the sea").input_ids == run.tokenizer("the sea").input_ids
    if model == "tiny_bert":
        assert list(exported.config.id2label.values()) == list(run.stream.stream.label_names)
    again = clpeft.load(done.folder)
    texts = run.stream.stream.tasks[2].test["text"]
    assert torch.equal(logits(again.model, run), logits(exported, run))
    assert again.predict(texts) == clpeft.load(outcome.directory).predict(texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(finished: Finished, tmp_path: Path, dtype: str) -> None:
    outcome = finished("finetune")
    run, wanted = outcome.run, getattr(torch, dtype)
    merged = export(outcome.directory, merge=True, dtype=dtype, to=tmp_path / "merged")
    adapter = export(outcome.directory, dtype=dtype, to=tmp_path / "adapter")

    for weights in ("merged/model", "adapter/adapter_model"):
        tensors = load_file(tmp_path / f"{weights}.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {wanted}
    own = logits(run.model, run)
    for folder in (merged.folder, adapter.folder):
        error = distance(logits(loaded_as_told(folder)[0], run), own)
        assert error < EPS[wanted]
        assert error > 0 or dtype == "float32"
    assert merged.difference < EPS[wanted]  # type: ignore[operator]
    assert loaded_as_told(merged.folder)[0].dtype == wanted


def test_merging_into_a_base_of_less_precision(finished: Finished, tmp_path: Path) -> None:
    outcome = finished("finetune", "model.dtype=bfloat16")
    run = outcome.run
    done = export(outcome.directory, merge=True, to=tmp_path / "as_it_is")
    wide = export(outcome.directory, merge=True, dtype="float32", to=tmp_path / "wide")

    assert run.model.dtype == torch.bfloat16
    for folder, dtype in ((done.folder, torch.bfloat16), (wide.folder, torch.float32)):
        exported, _ = loaded_as_told(folder)
        assert exported.dtype == dtype
        assert distance(logits(exported, run), logits(run.model, run)) < EPS[torch.bfloat16]


@pytest.mark.parametrize("strategy", ["independent", "olora", "gdumb"])
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_what_served_a_task_is_what_is_exported(
    finished: Finished, tmp_path: Path, strategy: str, merge: bool
) -> None:
    outcome = finished(strategy, "stream.test_size=48", "training.epochs=3")
    stream = outcome.run.stream.stream
    for task in (1, 2):
        done = export(outcome.directory, task, merge=merge, to=tmp_path / str(task))
        letters = stream.tasks[task - 1].test
        answers = clpeft.load(done.folder).predict(letters["text"])
        wanted = [stream.label_names[label] for label in letters["label"]]
        score = sum(map(str.__eq__, answers, wanted)) / len(wanted)

        assert score == outcome.results["matrix"][task][task - 1]


def test_card(finished: Finished, tmp_path: Path) -> None:
    outcome = finished("ewc", "stream.names_task=true")
    done = export(outcome.directory, "birchford", to=tmp_path / "adapter")
    card = (done.folder / "README.md").read_text()

    assert card.startswith(
        "---\nlibrary_name: peft\ntags: [clpeft]\n---\n\n# tiny_llama after task 2"
    )
    row = outcome.results["matrix"][2]
    offices = ("ashford", "birchford", "coleford")
    for office, score in zip(offices, row, strict=True):
        assert f"| {office} | accuracy | {score:.4f} |" in card
    assert "one after another, with `ewc`." in card
    assert "Task: birchford\nWhich desk gets this letter?\nOption: north, south, east, west" in card
    assert "\nstrategies.ewc.lambda_=20" in card
    assert "\nor, with the prompt and the labels that it was trained with:\n" in card
    assert done.told == f"The adapter after task 2 is in {done.folder}."


# An export starts a run, with the adapter on it exactly once.


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_export_starts_a_run(
    finished: Finished, tiny: Overrides, tmp_path: Path, model: str, merge: bool
) -> None:
    outcome = finished("finetune", "stream.test_size=48", model=model)
    done = export(outcome.directory, merge=merge, to=tmp_path / "export")
    overrides = tiny("finetune", "stream.test_size=48", f"model.path={done.folder}", model=model)
    second = run_it([*overrides, "stream.num_tasks=2", "training.max_steps=1"], tmp_path / "run")

    # the untrained model of the one run is the trained one of the other
    first = outcome.results["matrix"][3][:2]
    assert second.results["matrix"][0] == first
    lora = [name for name in second.before if "lora_A" in name]
    assert len(lora) == len([name for name in outcome.before if "lora_A" in name]) > 0
    assert all(
        ("lora_B" in name) <= bool(value.any() != merge) for name, value in second.before.items()
    )
    loaded = clpeft.load(second.directory)
    run = second.run
    with torch.inference_mode():
        batch = run.loader(run.stream.tasks[1].test, shuffle=False).batch(0)
        ours, its = (
            run.objective.forward(m.eval(), batch).logits for m in (loaded.model, run.model)
        )
    assert torch.equal(ours, its)


def test_example_of_the_docs(
    finished: Finished, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("outputs/toy/ewc-s0-1a2b3c4d", str(finished("ewc").directory)), {})

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert set(re.findall(r"\w+", " ".join(lines))) <= {"north", "south", "east", "west"}


# Refusals.


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A finished run's directory, to be changed."""
    return shutil.copytree(finished("finetune").directory, tmp_path / "run")


def test_folder_in_use(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(copied, to=tmp_path / "empty").folder == tmp_path / "empty"
    for used in (tmp_path / "empty", copied / "config.yaml"):
        with pytest.raises(ConfigError) as refusal:
            export(copied, to=used)
        assert str(refusal.value) == (
            f"{used} exists and is not an empty folder; remove it, or name another with --to."
        )
    with pytest.raises(ConfigError, match=r"is an export already; name the directory of its run"):
        export(tmp_path / "empty", to=tmp_path / "more")


def test_base_that_has_moved(copied: Path, finished: Finished, tmp_path: Path) -> None:
    run = finished("finetune").run
    facts = json.loads((copied / "serving.json").read_text())
    base = shutil.copytree(facts["model"]["path"], tmp_path / "base")
    facts["model"]["path"] = "/no/such/base"
    (copied / "serving.json").write_text(json.dumps(facts))
    for merge in (False, True):
        with pytest.raises(ConfigError, match=r"was in /no/such/base, which is no folder any more"):
            export(copied, merge=merge, to=tmp_path / "export")
        done = export(copied, merge=merge, to=tmp_path / f"export-{merge}", base=base)
        exported, _ = loaded_as_told(done.folder)
        assert distance(logits(exported, run), logits(run.model, run)) < EPS[torch.float32]
        if not merge:
            settings = json.loads((done.folder / "adapter_config.json").read_text())
            assert settings["base_model_name_or_path"] == str(base)
            assert torch.equal(logits(clpeft.load(done.folder).model, run), logits(run.model, run))


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("tiny_llama", "nf4"),
        ("tiny_bert", "nf4"),
        ("tiny_t5", "int8"),
        ("tiny_llama", "torchao_int8"),
        ("tiny_bert", "torchao_int8"),
    ],
)
def test_quantized_base(finished: Finished, tmp_path: Path, model: str, method: str) -> None:
    outcome = finished("finetune", f"quantization={method}", model=model)
    run, own = outcome.run, logits(outcome.run.model, outcome.run)
    assert torch.equal(logits(clpeft.load(outcome.directory).model, run), own)
    adapter = export(outcome.directory, to=tmp_path / "adapter")
    assert torch.equal(logits(clpeft.load(adapter.folder).model, run), own)

    with pytest.raises(ConfigError, match=rf"base is quantized \({method}\): merging would round"):
        export(outcome.directory, merge=True, to=tmp_path / "merged")
    done = export(outcome.directory, merge=True, dequantize=True, to=tmp_path / "merged")
    exported, _ = loaded_as_told(done.folder)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    # the weights are the quantized ones: what differs is the precision of products
    assert distance(logits(exported, run), own) < 0.05
    again = clpeft.load(done.folder)
    assert torch.equal(logits(again.model, run), logits(exported, run))
    with run.model.disable_adapter():
        assert distance(logits(run.model, run), own) > 0.1


def test_prompts_are_not_merged(copied: Path, bases: Callable[[str], Path]) -> None:
    folder = copied / "adapters" / "3_coleford"
    shutil.rmtree(folder)
    base = AutoModelForCausalLM.from_pretrained(bases("tiny_llama"))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(base, config)
    model.save_pretrained(folder)

    with pytest.raises(
        ConfigError, match=r"learns prompts, which the model reads beside its input"
    ):
        export(copied, merge=True)
    (written, _) = loaded_as_told(export(copied).folder)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(written(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_method_that_peft_cannot_merge(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    def merge(self: Any, **settings: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Linear, "merge", merge)
    with pytest.raises(ConfigError) as refusal:
        export(copied, merge=True)
    assert str(refusal.value) == (
        "peft=lora cannot be merged into the base's weights (PEFT does not know how); export the "
        "adapter without --merge."
    )
    assert list((copied / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (None, "0.001 is .*written; export the adapter without --merge"),
        ("bfloat16", "written; try --dtype float32, or export the adapter without --merge"),
    ],
)
def test_a_model_that_computes_something_else_is_not_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, told: str
) -> None:
    # unloaded rather than merged: the base without its adapter
    monkeypatch.setattr(module, "_merged", lambda model, peft: model.unload())

    with pytest.raises(
        RunError, match=rf"does not compute what the run's own does: its logits diff.*{told}"
    ):
        export(copied, merge=True, dtype=dtype)
    assert list((copied / "exports").iterdir()) == []


# PEFT's own warning of what is refused here
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
def test_a_tied_embedding_is_not_merged_into(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = finished("finetune", "peft.target=[embed_tokens,q_proj]")
    run = outcome.run
    adapter = export(outcome.directory, to=tmp_path / "adapter")
    assert torch.equal(logits(loaded_as_told(adapter.folder)[0], run), logits(run.model, run))

    def never(*given: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("clpeft.loaded.assembled", never)
    with pytest.raises(ConfigError) as refusal:
        export(outcome.directory, merge=True, to=tmp_path / "merged")
    assert str(refusal.value) == (
        "peft.target has embed_tokens, whose weights are tied to those of lm_head, which "
        "embed_tokens's adapter leaves alone: merged, it would change both, and the model would "
        "answer otherwise; export without --merge, or leave embed_tokens out of peft.target."
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_embedding_that_is_not_tied_is_merged_into(
    tiny: Overrides, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(bases("tiny_llama"), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(base)
    more = ("peft.target=[embed_tokens,q_proj]", "stream.num_tasks=3", f"model.path={base}")
    overrides = [option for option in tiny("finetune") if not option.startswith("model.path=")]
    run = run_it([*overrides, *more], tmp_path / "run").run
    done = export(tmp_path / "run", merge=True, to=tmp_path / "merged")
    exported, _ = loaded_as_told(done.folder)

    assert not torch.equal(exported.lm_head.weight, exported.get_input_embeddings().weight)
    # (E + sBA)[t] against E[t] + s(BA)[t] in float32, through two layers
    torch.testing.assert_close(logits(exported, run), logits(run.model, run), rtol=1e-4, atol=1e-4)


def test_runs_without_an_adapter_leave_their_last_model(tiny: Overrides, tmp_path: Path) -> None:
    overrides = [override for override in tiny("finetune") if "peft." not in override]
    kept = ("training.checkpoint.keep=1", "training.max_steps=1")
    outcome = run_it([*overrides, *FULL, *kept], tmp_path / "run")
    done = export(outcome.directory)

    assert done.folder == outcome.directory / "exports" / "3_coleford-merged"
    assert done.difference == 0.0
    with pytest.raises(
        ConfigError, match=r"only the checkpoints' are kept; there is the one after"
    ):
        export(outcome.directory, 1)


# The command.


def answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["clpeft", "export", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


def test_command(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(monkeypatch, capsys, str(copied), "--task", "1")
    assert told == (0, f"The adapter after task 1 is in {copied / 'exports' / '1_ashford'}.\n", "")

    code, out, err = answer(monkeypatch, capsys, str(copied), "--merge", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    folder = copied / "exports" / "3_coleford-merged"
    assert re.fullmatch(
        rf"The model after task 3 is in {folder}; loaded from there, its logits differ from the "
        rf"run's own by \d\.\de-\d\d of their spread\.\n",
        out,
    )
    assert isinstance(clpeft.load(folder), Loaded)

    code, out, err = answer(monkeypatch, capsys, str(copied), "--task", "ashfort")
    assert (code, out) == (1, "")
    assert err.startswith("clpeft: 'ashfort' is no task of ")
