"""Runs that start from an adapter: it is applied once, and is the one that was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from clpeft.config import ConfigError, ModelConfig
from clpeft.launching import check
from clpeft.models.load import check_model, load_model
from tests.peft_methods.models import moved as move
from tests.running import Outcome, build_it, compose, compose_only, run_it, same_bits

Tiny = Callable[..., list[str]]
SHORT = ("stream.num_tasks=2", "evaluation.ahead=false")


@pytest.fixture
def adapter(finished: Callable[..., Outcome]) -> Path:
    """The last adapter of a finished run."""
    (folder,) = (finished("finetune").directory / "adapters").glob("3_*")
    return folder


def starting_from(folder: Path, tiny: Tiny, *more: str, model: str | None = None) -> list[str]:
    overrides = [o for o in tiny("finetune", model=model) if not o.startswith("model.path=")]
    return [*overrides, f"model.path={folder}", *more]


def test_run_goes_on_from_the_adapter_of_another(
    finished: Callable[..., Outcome], adapter: Path, tiny: Tiny, tmp_path: Path
) -> None:
    outcome = run_it(starting_from(adapter, tiny, *SHORT), tmp_path / "run")

    for name, parameter in finished("finetune").trainable.items():
        assert torch.equal(outcome.before[name], parameter)
        assert not torch.equal(outcome.trainable[name], parameter)
    # once: no adapter within another, and the base's weights as they were
    assert outcome.trainable.keys() == finished("finetune").trainable.keys()
    wrapped = [type(module) for module in outcome.run.model.modules()]
    assert wrapped.count(type(outcome.run.model)) == 1
    frozen = {n: p for n, p in outcome.after.items() if n not in outcome.trainable}
    assert same_bits(frozen, {n: finished("finetune").before[n] for n in frozen})
    # what it wrote stands on the same base
    (last,) = (outcome.directory / "adapters").glob("2_*")
    told = json.loads((last / "adapter_config.json").read_text())
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert told["base_model_name_or_path"] == base
    assert outcome.results["digests"]["base"] != finished("finetune").results["digests"]["base"]


def test_it_answers_as_peft_itself_makes_it_answer(
    adapter: Path, tiny: Tiny, tmp_path: Path
) -> None:
    run = build_it(starting_from(adapter, tiny), tmp_path)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.tensor([[5, 9, 17, 40]])

    ours = run.model.eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs.eval()(input_ids=ids).logits)
    with theirs.disable_adapter():
        assert not torch.equal(ours, theirs(input_ids=ids).logits)


def test_a_classifier_brings_its_head(
    finished: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    (folder,) = (finished("finetune", model="tiny_bert").directory / "adapters").glob("3_*")
    run = build_it(starting_from(folder, tiny, model="tiny_bert"), tmp_path)
    there = finished("finetune", model="tiny_bert").trainable

    assert any("classifier" in name for name in there)
    assert any("pooler" in name for name in there)
    assert same_bits({n: p.detach() for n, p in run.trainable.items()}, there)


def test_an_adapter_that_others_made(adapter: Path, tiny: Tiny, tmp_path: Path) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    # the same modules by other names, and other dropout
    told = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.3,
        target_modules=r".*self_attn\.(q|v)_proj",
    )
    torch.manual_seed(5)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), told)
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(tmp_path / "theirs")
    run = build_it(starting_from(tmp_path / "theirs", tiny), tmp_path / "run")

    theirs = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert same_bits({n: p.detach() for n, p in run.trainable.items()}, theirs)
    layer = run.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.lora_dropout["default"].p == 0.1  # what the run asks for


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("peft.r=4", r"\(r is 8 there and 4 here\); set peft's settings to the adapter's"),
        ("peft.alpha=4", r"\(lora_alpha is 16(\.0)? there and 4(\.0)? here\)"),
        ("peft.use_rslora=true", r"\(use_rslora is False there and True here\)"),
        ("peft.target=attention", r"\(adapted there only: none; here only: k_proj, o_proj\)"),
        ("peft.target=[q_proj]", r"\(adapted there only: v_proj; here only: none\)"),
        ("peft.modules_to_save=[norm]", r"modules_to_save is None there and \['norm'\] here"),
    ],
)
def test_another_adapter_than_asked_for_is_refused(
    adapter: Path, tiny: Tiny, tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        build_it(starting_from(adapter, tiny, override), tmp_path)
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize(
    ("made_by", "asked", "right"),
    [
        ("lora", "full", "lora"),
        ("lora", "adalora", "lora"),
        ("any:loha", "lora", "any peft.type=LOHA"),
        ("prefix", "prompt", "prefix"),
        ("bottleneck", "lora", "bottleneck"),
        ("lora", "any:loha", "lora"),
    ],
)
def test_another_method_is_refused_before_a_model_is_loaded(
    tiny: Tiny, tmp_path: Path, made_by: str, asked: str, right: str
) -> None:
    method = compose(tiny("finetune", peft=made_by))[1].peft
    kind = (method.peft_type or method.kind).upper()
    base = str(compose(tiny("finetune"))[1].model.path)
    told = {"peft_type": kind, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    (tmp_path / "adapter_model.safetensors").touch()
    overrides = tiny("finetune", f"model.path={tmp_path}", peft=asked)

    name = asked.removeprefix("any:")
    match = f"peft={name} was asked for, .*; choose peft={right}, or set model.path to its base"
    with pytest.raises(ConfigError, match=match):
        check(compose_only(overrides), tmp_path / "run")
    check(compose_only(tiny("finetune", f"model.path={tmp_path}", peft=made_by)), tmp_path / "run")


def pissa(base: str, folder: Path, more: Path | None = None) -> Any:
    """A trained adapter that took its first weights out of the base's, saved; the model with it.

    With `more` also as PEFT turns it into plain LoRA on the base as it was.
    """
    told = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        init_lora_weights="pissa",
        target_modules=["q_proj", "v_proj"],
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), told)
    model.create_or_update_model_card = lambda folder: None
    if more is not None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
    move(model, 0.1)
    model.save_pretrained(folder / "pissa")
    if more is not None:
        model.save_pretrained(
            more, path_initial_model_for_weight_conversion=str(folder / "initial")
        )
    return model


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_an_adapter_that_changed_its_base_is_refused_and_its_conversion_is_gone_on_with(
    bases: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    base = str(bases("tiny_llama"))
    model = pissa(base, tmp_path, tmp_path / "plain")
    # its own base is another than the one in the folder
    path = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    own = AutoModelForCausalLM.from_pretrained(base).model.layers[0].self_attn.q_proj.weight
    assert (model.get_parameter(path) - own).abs().max() > 0.01
    asked = ("peft.target=[q_proj,v_proj]", "peft.r=4", "peft.alpha=8")

    with pytest.raises(ConfigError) as refusal:
        check(compose_only(starting_from(tmp_path / "pissa", tiny, *asked)), tmp_path / "run")
    assert str(refusal.value) == (
        f"The adapter in model.path={tmp_path / 'pissa'} was made with init_lora_weights=pissa, "
        f"which changed the weights of its base, so that it does not stand on {base} as that is; "
        f"have PEFT save it anew as plain LoRA, with "
        f"save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it where "
        f"it was made (merge_and_unload) and start from the whole model."
    )
    doubled = ("peft.target=[q_proj,v_proj]", "peft.r=8", "peft.alpha=16")
    run = build_it(starting_from(tmp_path / "plain", tiny, *doubled), tmp_path / "run")
    ids = torch.tensor([[5, 9, 17, 40]])
    expected = model.eval()(input_ids=ids).logits
    # B·A and what was taken out of the base, added in another order in float32
    torch.testing.assert_close(
        run.model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("pissa_niter_4", "have PEFT save it anew"),
        ("corda", "have PEFT save it anew"),
        ("olora", "have PEFT save it anew"),
        ("lora_ga", "have PEFT save it anew"),
        ("loftq", "as that is; merge it where it was made"),
        ("eva", None),
        ("gaussian", None),
        (True, None),
    ],
)
def test_which_beginnings_change_the_base(
    tiny: Tiny, tmp_path: Path, init: str | bool, told: str | None
) -> None:
    base = str(compose(tiny("finetune"))[1].model.path)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": base, "init_lora_weights": init}
        )
    )
    overrides = compose_only(tiny("finetune", f"model.path={tmp_path}"))

    if told is None:
        check(overrides, tmp_path / "run")
        return
    with pytest.raises(ConfigError, match=rf"made with init_lora_weights={init}, .*{told}"):
        check(overrides, tmp_path / "run")


@pytest.mark.parametrize("method", ["prompt", "lisa_hybrid"])
def test_a_prompt_may_have_begun_otherwise(
    finished: Callable[..., Outcome], tiny: Tiny, tmp_path: Path, method: str
) -> None:
    made_by = ("peft.init=text", "peft.init_text='which desk gets this'")
    outcome = finished("finetune", *SHORT, *made_by, peft=method)
    (folder,) = (outcome.directory / "adapters").glob("2_*")
    for more in (("peft.init=random",), ("peft.init=vocabulary",), ("peft.init=text", made_by[1])):
        overrides = [o for o in tiny("finetune", *more, peft=method) if "model.path=" not in o]
        run = build_it([*overrides, f"model.path={folder}"], tmp_path / more[0])
        assert same_bits({n: p.detach() for n, p in run.trainable.items()}, outcome.trainable)
    fewer = ("peft.num_virtual_tokens=2", f"model.path={folder}")
    with pytest.raises(ConfigError, match=r"\(num_virtual_tokens is \d there and 2 here\)"):
        build_it([*overrides, *fewer], tmp_path / "fewer")


def test_a_head_over_other_labels_is_refused(
    finished: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    (folder,) = (finished("finetune", model="tiny_bert").directory / "adapters").glob("3_*")
    overrides = starting_from(folder, tiny, "stream.scenario=class", model="tiny_bert")

    with pytest.raises(ConfigError, match=r"does not fit .*classifier.bias is \[\d+\] there and"):
        build_it(overrides, tmp_path)


def config(path: Path) -> ModelConfig:
    return ModelConfig(name="mine", task_type="causal_lm", path=str(path))


def moved(adapter: Path, tmp_path: Path, base: str | None) -> Path:
    """A copy of an adapter that says it stands on another base."""
    folder = shutil.copytree(adapter, tmp_path / "moved")
    told = json.loads((folder / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def test_folders_that_cannot_be_told_are_refused(adapter: Path, tmp_path: Path) -> None:
    check_model(config(adapter))
    for base, told in (
        ("/no/such", "json is /no/such, where there is no model; write there where"),
        (None, "is None, where there is no model"),
        (str(adapter), "which holds an adapter itself"),
    ):
        folder = moved(adapter, tmp_path, base)
        with pytest.raises(ConfigError, match=told):
            check_model(config(folder))
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", r"adapter_config.json is no JSON \(Expecting property name"),
        ("{}", "does not tell base_model_name_or_path and peft_type; PEFT has to save it"),
        (None, "holds an adapter's settings .* without its weights; put adapter_model.safetensors"),
    ],
)
def test_half_an_adapter_is_refused(
    adapter: Path, tmp_path: Path, content: str | None, told: str
) -> None:
    content = (adapter / "adapter_config.json").read_text() if content is None else content
    (tmp_path / "adapter_config.json").write_text(content)

    with pytest.raises(ConfigError, match=told):
        check_model(config(tmp_path))


def test_a_whole_model_beside_an_adapter_is_refused(
    adapter: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases("tiny_llama"), tmp_path / "both")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    with pytest.raises(ConfigError, match=r"holds a whole model .* and an adapter"):
        check_model(config(folder))
    # transformers would apply the adapter without a word
    told = json.loads((folder / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = str(folder)
    (folder / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="which transformers has applied already"):
        load_model(config(folder), str(folder), tokenizer, labels=2)


def test_weights_with_an_adapter_inside_are_refused(
    adapter: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases("tiny_llama"))
    inside = PeftModel.from_pretrained(base, adapter).get_base_model()
    torch.save(inside.state_dict(), tmp_path / "pytorch_model.bin")
    shutil.copy(bases("tiny_llama") / "config.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bases("tiny_llama"))

    with pytest.raises(
        ConfigError, match=r"an adapter inside it \(.*layers.0.self_attn.q_proj.base_layer.weight\)"
    ):
        load_model(config(tmp_path), str(tmp_path), tokenizer, labels=2)


def test_a_retrained_base_does_not_continue_a_run(
    bases: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    base = shutil.copytree(bases("tiny_llama"), tmp_path / "base")
    overrides = starting_from(base, tiny, *SHORT)
    run_it(overrides, tmp_path / "run", interrupt_after=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(base)

    with pytest.raises(ConfigError, match=r"the base model's weights is [0-9a-f]{16} there and"):
        run_it(overrides, tmp_path / "run")
