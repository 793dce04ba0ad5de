"""clpeft.load: what it answers is what the run's evaluation has scored."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import clpeft
from clpeft.config import ConfigError, RunError
from clpeft.evaluation.generation import rouge_l
from clpeft.loaded import Loaded, adapter_name
from clpeft.training.checkpoint import trained_checkpoints
from clpeft.training.run import Run
from tests.running import Outcome, run_it
from tests.settings import PEFT_SETTINGS, TINY, TINY_MODELS

Finished = Callable[..., Outcome]
Overrides = Callable[..., list[str]]

ROOT = Path(__file__).parents[1]
DESKS = ("north", "south", "east", "west")
# enough to learn a little, and enough letters for scores that tell models apart
LEARNS = ("training.epochs=3", "stream.test_size=48")


def accuracy(loaded: Loaded, run: Run, task: int) -> float:
    """What share of a task's letters the active adapter answers right."""
    stream = run.stream.stream
    raw, ids = stream.tasks[task - 1], stream.global_labels(task - 1)
    answers = loaded.predict(raw.test["text"], task=task)
    wanted = [stream.label_names[ids[label]] for label in raw.test["label"]]
    return sum(map(str.__eq__, answers, wanted)) / len(wanted)


def logits(model: Any, run: Run, task: int = 1) -> Tensor:
    """What a model says to a task's first letters."""
    with torch.inference_mode():
        batch = run.loader(run.stream.tasks[task - 1].test, shuffle=False).batch(0)
        found: Tensor = run.objective.forward(model.eval(), batch).logits
    return found


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("tiny_llama", ()),
        ("tiny_llama", ("stream.scenario=class", "stream.names_task=true")),
        ("tiny_llama", ("stream.scenario=task", "evaluation.mode=generate")),
        # the letters are cut where they do not fit
        ("tiny_llama", ("stream.max_length=50", "training.precision=bf16")),
        ("tiny_llama", ("model.dtype=bfloat16",)),
        ("tiny_bert", ("stream.scenario=class", "stream.names_task=true", "optimizer.lr=1e-3")),
        ("tiny_bert", ("stream.scenario=task", "optimizer.lr=1e-3")),
        ("tiny_t5", ("stream.max_length=50", "peft.target=all-linear")),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_answers_are_those_that_evaluation_scored(
    finished: Finished, model: str, more: tuple[str, ...]
) -> None:
    outcome = finished("finetune", *LEARNS, *more, model=model)
    matrix, run = outcome.results["matrix"], outcome.run
    loaded = clpeft.load(outcome.directory, task="all")

    assert loaded.task == "coleford"
    assert loaded.tasks == ["ashford", "birchford", "coleford"]
    assert torch.equal(logits(loaded.model, run), logits(run.model, run))
    for after in (3, 1, 2):
        loaded.use(after)
        # the tasks behind it, and the one ahead
        for task in range(1, min(after + 1, 3) + 1):
            assert accuracy(loaded, run, task) == matrix[after][task - 1]
    prompts = run.stream.tasks[1].test
    encoded = loaded._encoded(loaded.stream.tasks[1], run.stream.stream.tasks[1].test["text"])
    for mine, its, length in zip(
        encoded["input_ids"],
        prompts["input_ids"],
        prompts["prompt_length"] if "prompt_length" in prompts.column_names else [None] * 48,
        strict=True,
    ):
        assert mine[:length] == its[:length]


def test_labels_that_compete_are_those_seen_so_far(finished: Finished) -> None:
    outcome = finished("finetune", "stream.scenario=class", model="tiny_bert")
    loaded = clpeft.load(outcome.directory, 2)
    names = [f"{office}/{desk}" for office in ("ashford", "birchford") for desk in DESKS]

    assert loaded.labels == names
    assert set(loaded.predict(outcome.run.stream.stream.tasks[2].test["text"])) <= set(names)
    config = loaded.model.get_base_model().config
    assert [config.id2label[place] for place in range(12)][:8] == names
    assert config.label2id["coleford/west"] == 11


def test_a_word_of_several_labels_is_the_asked_tasks_own(tiny: Overrides, tmp_path: Path) -> None:
    folder = write_tasks(
        tmp_path / "tasks",
        ("text", "label"),
        # the second task has the first one's words
        {"first": [("a", "yes"), ("b", "no")] * 8, "second": [("c", "yes"), ("d", "no")] * 8},
    )
    outcome = run_it(of_folder(tiny("finetune"), folder, "stream.scenario=class"), tmp_path / "run")
    loaded = clpeft.load(outcome.directory)

    assert loaded.labels == ["first/no", "first/yes", "second/no", "second/yes"]
    for task in ("first", "second"):
        assert {name.split("/")[0] for name in loaded.predict(["a", "d"], task=task)} == {task}


def test_switching_leaves_no_trace(finished: Finished) -> None:
    outcome = finished("finetune", *LEARNS)
    together = clpeft.load(outcome.directory, "all")
    alone = [clpeft.load(outcome.directory, task) for task in ("ashford", "2", 3)]

    assert [loaded.number for loaded in alone] == [1, 2, 3]
    for number in (2, 1, 3, 1):
        one, other = together.use(number), alone[number - 1]
        assert one.task == other.task
        assert torch.equal(logits(one.model, outcome.run), logits(other.model, outcome.run))
    assert not any(parameter.requires_grad for parameter in together.model.parameters())


MIXED = {"lora", "lora:patterns"}  # the rows of PEFT_SETTINGS whose rows may differ in a batch
ADAPTERS = [name for name in PEFT_SETTINGS if name not in ("full", "lisa_layerwise")]
SHORT = ("stream.num_tasks=2", "training.epochs=1", "stream.test_size=8")


def mixed_and_alone(outcome: Outcome) -> tuple[list[Tensor], list[Tensor]]:
    """What a batch of two adapters gives for each row, and what the row's own adapter gives."""
    loaded = clpeft.load(outcome.directory, "all")
    inputs = outcome.run.loader(outcome.run.stream.tasks[0].test, shuffle=False).batch(0).inputs
    if loaded.model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": inputs["input_ids"][:, :4]}
    owners = [1, 2, 2, 1, 2, 1, 1, 2]
    alone = {k: loaded.use(k).model(**inputs).logits for k in (1, 2)}
    assert not torch.allclose(alone[1], alone[2], atol=1e-3)  # ten times what is let pass below
    names = [adapter_name(k) for k in owners]
    mixed = loaded.use(1).model(**inputs, adapter_names=names).logits
    return list(mixed), [alone[owner][row] for row, owner in enumerate(owners)]


# BOFT misses its CUDA extension, which one butterfly factor has no use for
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA
@pytest.mark.parametrize("name", ADAPTERS)
def test_rows_of_a_batch_have_their_own_adapters_or_are_refused(
    finished: Finished, name: str
) -> None:
    outcome = finished("finetune", *SHORT, peft=name, model=PEFT_SETTINGS[name].models[0])
    if name in MIXED:
        with torch.inference_mode():
            rows, own = mixed_and_alone(outcome)
        # a batch of other rows, multiplied apart: float32, two layers
        torch.testing.assert_close(rows, own, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ConfigError, match=r"adapter_names does not work .* in a batch of their"):
        mixed_and_alone(outcome)
    loaded = clpeft.load(outcome.directory, "all")
    with pytest.raises(ConfigError, match="adapter_names does not work"):
        loaded.model.generate(input_ids=torch.tensor([[5, 9]]), adapter_names=["task_1"])


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_t5"])
def test_rows_with_their_own_adapters_on_other_models(finished: Finished, model: str) -> None:
    outcome = finished("finetune", *SHORT, "optimizer.lr=5e-2", model=model)
    with torch.inference_mode():
        rows, own = mixed_and_alone(outcome)
    torch.testing.assert_close(rows, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("peft.use_dora=true", r"PEFT runs DoRA \(peft.use_dora=true\) for one adapter at a time"),
        ("peft.modules_to_save=[norm]", "norm, which trains whole, is a LlamaRMSNorm"),
        ("peft.bias=all", r"the base has the biases \(peft.bias\) of one adapter at a time"),
    ],
)
def test_lora_whose_rows_cannot_differ_goes_on_after_the_refusal(
    finished: Finished, more: str, told: str
) -> None:
    outcome = finished("finetune", *SHORT, more)
    loaded = clpeft.load(outcome.directory, "all")
    before = logits(loaded.model, outcome.run)

    for _ in range(2):
        with pytest.raises(ConfigError, match=told):
            loaded.model(input_ids=torch.tensor([[5, 9]] * 2), adapter_names=["task_1", "task_2"])
    assert torch.equal(logits(loaded.model, outcome.run), before)


# Streams of one's own.


def write_tasks(
    folder: Path, columns: Sequence[str], tasks: dict[str, list[tuple[str, ...]]]
) -> Path:
    """Tasks whose three splits hold the same rows, numbered so that none is in two."""
    for name, rows in tasks.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = [
                json.dumps(dict(zip(columns, (f"{row[0]} {split} {place}", *row[1:]), strict=True)))
                for place, row in enumerate(rows)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def of_folder(overrides: list[str], folder: Path, *more: str) -> list[str]:
    kept = [override for override in overrides if not override.startswith("stream.")]
    return [*kept, "stream=folder", f"stream.path={folder}", "training.epochs=6", *more]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_pairs(tiny: Overrides, tmp_path: Path, model: str) -> None:
    rows = [("the sea", "is wet", "yes"), ("the sea", "is dry", "no")] * 8
    folder = write_tasks(tmp_path / "tasks", ("text", "text_pair", "label"), {"true": rows})
    more = ("optimizer.lr=1e-3",)
    outcome = run_it(of_folder(tiny("finetune", model=model), folder, *more), tmp_path / "run")
    loaded = clpeft.load(outcome.directory)
    test = outcome.run.stream.stream.tasks[0].test
    answers = loaded.predict(list(zip(test["text"], test["text_pair"], strict=True)))
    wanted = [f"true/{('no', 'yes')[label]}" for label in test["label"]]

    assert loaded.labels == ["true/no", "true/yes"]
    score = sum(map(str.__eq__, answers, wanted)) / len(wanted)
    assert score == outcome.results["matrix"][1][0]
    with pytest.raises(ValueError, match="'true' is asked with a list of pairs of texts"):
        loaded.predict(["the sea"])


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_written_answers(tiny: Overrides, tmp_path: Path, model: str) -> None:
    rows = [("say what the baker brought", "butter and bread"), ("the sailor", "maps")] * 8
    folder = write_tasks(tmp_path / "tasks", ("input", "output"), {"goods": rows})
    more = ("evaluation.max_new_tokens=5",)
    outcome = run_it(of_folder(tiny("finetune", model=model), folder, *more), tmp_path / "run")
    test = outcome.run.stream.stream.tasks[0].test
    written = clpeft.load(outcome.directory).predict(test["input"])
    scores = [rouge_l(*pair) for pair in zip(written, test["references"], strict=True)]

    assert 0 < np.mean(scores) == outcome.results["matrix"][1][0]


@pytest.mark.parametrize("texts", ["a letter", [("a", "pair")]])
def test_a_task_of_single_texts_is_asked_with_a_list_of_them(
    finished: Finished, texts: Any
) -> None:
    loaded = clpeft.load(finished("finetune").directory)

    assert loaded.predict([]) == []
    with pytest.raises(ValueError, match="'coleford' is asked with a list of single texts"):
        loaded.predict(texts)


# Strategies that own the adapter, and runs without one.


@pytest.mark.parametrize("strategy", ["independent", "olora", "gdumb", "cumulative"])
def test_what_served_a_task_is_what_is_loaded(finished: Finished, strategy: str) -> None:
    outcome = finished(strategy, *LEARNS)
    matrix = outcome.results["matrix"]
    loaded = clpeft.load(outcome.directory, "all")

    for task in (1, 2, 3):
        assert accuracy(loaded.use(task), outcome.run, task) == matrix[task][task - 1]
        if strategy == "independent":  # every task is served by its own adapter to the end
            assert accuracy(loaded, outcome.run, task) == matrix[3][task - 1]
        else:
            assert accuracy(loaded, outcome.run, 1) == matrix[task][0]


def test_joint_has_one_model_for_all_tasks(finished: Finished) -> None:
    outcome = finished("joint", *LEARNS)
    loaded = clpeft.load(outcome.directory, "all")

    assert loaded.tasks == ["coleford"]
    scores = [accuracy(loaded, outcome.run, task) for task in (1, 2, 3)]
    assert scores == outcome.results["matrix"][3]
    with pytest.raises(ConfigError) as refusal:
        clpeft.load(outcome.directory, 1)
    assert str(refusal.value) == (
        f"{outcome.directory} holds no model after task 1 ('ashford'): its strategy trains that "
        f"task together with a later one; there is the one after task 3 ('coleford')."
    )


def test_without_an_adapter_the_newest_checkpoint_is_loaded(
    tiny: Overrides, tmp_path: Path
) -> None:
    overrides = [
        override
        for override in tiny("finetune", *LEARNS)
        if not override.startswith(("peft.", "training.checkpoint"))
    ]
    more = ("peft=full", "optimizer.lr=1e-3", "training.checkpoint.keep=1")
    outcome = run_it([*overrides, *more], tmp_path / "run")
    run = outcome.run
    loaded = clpeft.load(outcome.directory)

    assert torch.equal(logits(loaded.model, run), logits(run.model, run))
    assert [accuracy(loaded, run, task) for task in (1, 2, 3)] == outcome.results["matrix"][3]
    with pytest.raises(
        ConfigError, match=r"only the checkpoints' are kept; there is the one after"
    ):
        clpeft.load(outcome.directory, 2)
    shutil.rmtree(outcome.directory / "checkpoints")
    with pytest.raises(ConfigError, match=r"only the checkpoints' are kept; there is none\."):
        clpeft.load(outcome.directory)


def test_checkpoints_within_a_task_and_before_any_training_are_passed_by(
    finished: Finished,
) -> None:
    within = finished("finetune", "training.checkpoint.every_steps=3")
    names = [path.name for path in trained_checkpoints(within.directory).values()]
    joint = trained_checkpoints(finished("joint", *LEARNS).directory)

    assert (within.directory / "checkpoints" / "step-12-task-1").is_dir()
    assert names == ["step-8-task-1", "step-16-task-2", "step-24-task-3"]
    assert list(joint) == [3]


def test_whole_models_are_not_loaded_together(tiny: Overrides, tmp_path: Path) -> None:
    overrides = [override for override in tiny("finetune") if not override.startswith("peft.")]
    run_it([*overrides, "peft=full"], tmp_path / "run")

    assert clpeft.load(tmp_path / "run", 1).number == 1
    with pytest.raises(ConfigError, match=r"leaves whole models, .* of the tasks 1, 2, 3\."):
        clpeft.load(tmp_path / "run", "all")


@pytest.mark.parametrize(
    ("model", "bias"), [("tiny_bert", "lora_only"), ("tiny_bert", "all"), ("tiny_t5", "all")]
)
def test_adapters_with_biases_are_swapped(finished: Finished, model: str, bias: str) -> None:
    outcome = finished("finetune", *LEARNS, f"peft.bias={bias}", model=model)
    together = clpeft.load(outcome.directory, "all")
    alone = [clpeft.load(outcome.directory, task) for task in (1, 2, 3)]
    answers = [logits(loaded.model, outcome.run) for loaded in alone]

    assert together.tasks == ["ashford", "birchford", "coleford"]
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(logits(together.model, outcome.run), answers[2])
    for number in (2, 1, 3, 1):
        together.use(number)
        assert torch.equal(logits(together.model, outcome.run), answers[number - 1])
        assert list(together.model.peft_config) == [adapter_name(number)]
    assert not any(parameter.requires_grad for parameter in together.model.parameters())
    assert not any(module.training for module in together.model.modules())


def test_an_adapter_without_some_of_its_weights_is_refused(copied: Path) -> None:
    path = copied / "adapters" / "3_coleford" / "adapter_model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "lora_B" in name)
    save_file({name: weights[name] for name in weights if name != lost}, path)

    assert clpeft.load(copied, 2).number == 2
    with pytest.raises(RunError, match=rf"3_coleford is not whole: .*{lost.split('.weight')[0]}"):
        clpeft.load(copied)


# The base model.


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A finished run's directory, to be changed."""
    return shutil.copytree(finished("finetune").directory, tmp_path / "run")


def moved(run: Path, base: Path) -> Path:
    """The base model's folder, elsewhere than the run's directory says."""
    facts = json.loads((run / "serving.json").read_text())
    new = shutil.copytree(facts["model"]["path"], base)
    facts["model"]["path"] = "/no/such/base"
    (run / "serving.json").write_text(json.dumps(facts))
    return new


def test_base_that_has_moved(copied: Path, finished: Finished, tmp_path: Path) -> None:
    run = finished("finetune").run
    base = moved(copied, tmp_path / "base")

    with pytest.raises(ConfigError) as refusal:
        clpeft.load(copied)
    assert str(refusal.value) == (
        f"The base model of {copied} was in /no/such/base, which is no folder any more; give the "
        f"folder that it is in now as base= (--base)."
    )
    with pytest.raises(ConfigError, match=r"said to be in /nor/this, which is no folder"):
        clpeft.load(copied, base="/nor/this")
    loaded = clpeft.load(copied, base=base)
    assert torch.equal(logits(loaded.model, run), logits(run.model, run))


def other_weights(base: Path) -> None:
    weights = base / "model.safetensors"
    found = load_file(weights)
    found["model.norm.weight"][0] += 1e-3
    save_file(found, weights, metadata={"format": "pt"})


def other_settings(base: Path) -> None:
    settings = base / "config.json"
    text = settings.read_text()
    changed = text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    assert changed != text
    settings.write_text(changed)


@pytest.mark.parametrize("change", [other_weights, other_settings])
def test_another_base_is_refused(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None]
) -> None:
    base = moved(copied, tmp_path / "base")
    facts = json.loads((copied / "serving.json").read_text())
    facts["model"]["path"] = str(base)
    (copied / "serving.json").write_text(json.dumps(facts))
    assert clpeft.load(copied).number == 3
    change(base)

    with pytest.raises(
        ConfigError, match=rf"^The base model in {base} is not the one that finetune"
    ):
        clpeft.load(copied)
    with caplog.at_level(logging.WARNING):
        clpeft.load(copied, base=base)
    assert "what it answers may differ from what the run has scored" in caplog.text


def test_another_tokenizer_is_refused(copied: Path, tmp_path: Path) -> None:
    base = moved(copied, tmp_path / "base")
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(
        tokenizer.read_text()
        .replace('"add_prefix_space":true', "")
        .replace('"add_prefix_space": true', '"add_prefix_space": false')
    )

    with pytest.raises(ConfigError, match=r"The tokenizer in .* is not the one that finetune"):
        clpeft.load(copied, base=base)


def test_generated_base_is_built_again(tiny: Overrides, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    overrides = [*TINY, *TINY_MODELS["tiny_t5"], f"paths.cache_dir={cache}"]
    outcome = run_it(overrides, tmp_path / "run")
    shutil.rmtree(cache)
    loaded = clpeft.load(outcome.directory)

    run = outcome.run
    assert torch.equal(logits(loaded.model, run), logits(run.model, run))
    assert len(list((cache / "bases").iterdir())) == 1


def test_base_on_the_hub_is_loaded_by_its_commit(
    tiny: Overrides, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "hub" / "models--tiny--llama"
    shutil.copytree(bases("tiny_llama"), stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    overrides = [override for override in tiny("finetune") if not override.startswith("model")]
    overrides += ["model=gpt2", "model.hub_id=tiny/llama", "stream.num_tasks=1"]
    program = (
        "import sys, clpeft\n"
        "from pathlib import Path\n"
        "from tests.running import run_it\n"
        f"run_it({overrides!r}, Path('run'))\n"
        "print(clpeft.load('run').predict(['a letter']))\n"
    )
    # in a process of its own, because where the Hub's cache lies is read once
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "serving.json").read_text())
    known = [facts["model"][name] for name in ("hub_id", "revision", "path")]
    assert [*known, facts["base_digest"]] == ["tiny/llama", commit, None, None]


# Mistakes.


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^There is no run directory '{tmp_path / 'none'}'\.$"):
        clpeft.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is not a run's directory: it holds no config\.yaml"):
        clpeft.load(tmp_path)


def test_a_run_that_has_not_begun(copied: Path) -> None:
    written = copied / "serving.json"
    written.write_text(json.dumps({"run": "of a later version"}))
    with pytest.raises(
        ConfigError, match=rf"^{written} is not as this version of clpeft writes it"
    ):
        clpeft.load(copied)
    written.unlink()

    with pytest.raises(ConfigError, match=r"holds no serving\.json: its run has not begun"):
        clpeft.load(copied)


def test_a_task_that_is_not_trained_yet(tiny: Overrides, tmp_path: Path) -> None:
    outcome = run_it(tiny("finetune"), tmp_path / "run", interrupt_after=1)

    assert clpeft.load(outcome.directory, "ashford").task == "ashford"
    assert clpeft.load(outcome.directory, "all").tasks == ["ashford"]
    with pytest.raises(ConfigError) as refusal:
        clpeft.load(outcome.directory)
    assert str(refusal.value) == (
        f"{outcome.directory} holds no model after task 3 ('coleford'): the run is preempted and "
        f"has not trained it yet; there is the one after task 1 ('ashford')."
    )


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("ashfort", "'ashfort' is no task of .* or a name. Did you mean 'ashford'"),
        (0, "'0' is no task of .*, which has 3: give a number from 1 to 3"),
        (4, "'4' is no task"),
    ],
)
def test_a_task_that_does_not_exist(finished: Finished, task: int | str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        clpeft.load(finished("finetune").directory, task)


def test_an_adapter_that_is_not_loaded(finished: Finished) -> None:
    loaded = clpeft.load(finished("finetune").directory, 2)

    with pytest.raises(ConfigError) as refusal:
        loaded.use(1)
    assert str(refusal.value) == (
        "The adapter of 'ashford' is not loaded, but those of birchford; load them all with "
        "task='all'."
    )


def test_importing_clpeft_imports_nothing_heavy() -> None:
    program = "import sys, clpeft; print(clpeft.load.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.split() == ["load", "False"]
