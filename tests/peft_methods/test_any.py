"""Any PEFT method by its type: what is refused, what trains, what those of one YAML compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from clpeft.config import ConfigError
from clpeft.models.load import count_parameters
from clpeft.peft_methods.any import ON_QUANTIZED, AnySettings, config_class, fits, told
from clpeft.peft_methods.base import PeftMethodConfig, apply_peft
from clpeft.registry import PEFT_METHODS, Entry
from tests.peft_methods.models import (
    NEW_IN_BERT,
    bert,
    gpt2,
    llama,
    llama_classifier,
    logits,
    moved,
    t5,
    training,
)
from tests.running import compose

# without nvcc there is no CUDA extension of BOFT's; it is not needed for one butterfly factor
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # what BEFT and torch beneath SHiRA have to say
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

# PEFT's types, with options that suit layers of 16 and 8
TYPES: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], str, list[str]]] = {
    "llama": (llama, "causal_lm", []),
    "llama_classifier": (llama_classifier, "sequence_classification", ["score"]),
    "bert": (bert, "sequence_classification", NEW_IN_BERT),
    "t5": (t5, "seq2seq_lm", []),
}


def settings(kind: str, **changes: Any) -> AnySettings:
    return AnySettings(**({"method": "any", "type": kind, "target": "auto"} | changes))


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("kind", TYPES)
def test_other_types_adapt_the_targets_and_keep_what_is_new(
    tmp_path: Path, kind: str, model: str
) -> None:
    """One seam for all: a type that PEFT has needs no code here."""
    make, task_type, new = KINDS[model]
    config = settings(kind, options=TYPES[kind])
    config.check()
    assert task_type in config.task_types
    base = make()
    base.save_pretrained(tmp_path / "base")
    adapted: Any = apply_peft(base, config, task_type, new)
    moved(adapted, 0.1)

    assert config.kind == kind.lower() == adapted.peft_config["default"].peft_type.lower()
    whole = {n.split(".modules_to_save")[0] for n in training(adapted) if "modules_to_save" in n}
    assert whole == {f"base_model.model.{path}" for path in new}
    # beside that, what PEFT adds: nothing that the base has trains
    own = {name for name, _ in make().named_parameters()}
    added = {n.removeprefix("base_model.model.") for n in training(adapted)}
    assert added
    assert not added & own
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(loaded), logits(adapted))


def test_keys_and_values_learn_too() -> None:
    options = {"num_virtual_tokens": 3, "num_frozen_tokens": 1}
    config = settings("CARTRIDGE", target=None, options=options)
    config.check()
    model = apply_peft(llama(), config, "causal_lm", [])

    # in two layers, keys and values of two tokens: two heads of 4
    assert count_parameters(model)[1] == 2 * 2 * 2 * 2 * 4


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("VERRA", {}, "peft.type=VERRA does not exist. Did you mean 'VERA'"),
        ("vera", {}, "peft.type=vera does not exist. Did you mean 'VERA'"),
        ("LORA", {}, "peft.type=LORA has settings of its own: choose peft=lora."),
        ("ADALORA", {}, "has settings of its own: choose peft=adalora."),
        ("PROMPT_TUNING", {}, "has settings of its own: choose peft=prompt."),
        ("PREFIX_TUNING", {}, "has settings of its own: choose peft=prefix."),
        ("P_TUNING", {}, "has settings of its own: choose peft=p_tuning."),
        ("IA3", {}, "has settings of its own: choose peft=ia3."),
        ("POLY", {}, "peft.type=POLY cannot be trained here: its forward pass needs to be told"),
        ("VERA", {"options": [1]}, r"peft.options=\[1\] must be a mapping, such as {r: 8}"),
        (
            "VERA",
            {"options": {"rank": 3}},
            "peft.options.rank does not exist: PEFT's VERA has no such field",
        ),
        ("LOHA", {"options": {"alph": 3}}, "Did you mean 'alpha'?"),
        (
            "VERA",
            {"options": {"r": "many"}},
            "peft.options.r=many is of the wrong type: PEFT's VERA takes int.",
        ),
        ("VERA", {"options": {"r": True}}, "is of the wrong type"),
        (
            "OFT",
            {"options": {"bias": "some"}},
            "is of the wrong type: PEFT's OFT takes none or all or oft_only.",
        ),
        (
            "VERA",
            {"options": {"target_modules": ["q"]}},
            "peft.options.target_modules is not to be set: peft.target does.",
        ),
        (
            "OFT",
            {"options": {"r": 2, "oft_block_size": 4}},
            "is nothing that PEFT's OFT takes: You can only specify either r",
        ),
        (
            "CARTRIDGE",
            {"options": {"num_virtual_tokens": 3}},
            "peft.target=auto means nothing to peft.type=CARTRIDGE, .* set peft.target=null",
        ),
        (
            "LN_TUNING",
            {"target": "all-linear"},
            "peft.target=all-linear is not for peft.type=LN_TUNING, which adapts norms; set "
            "peft.target=null, which leaves the choice to PEFT, or list their names.",
        ),
        (
            "TRAINABLE_TOKENS",
            {"target": "attention", "options": {"token_indices": [3]}},
            "peft.target=attention is not for peft.type=TRAINABLE_TOKENS, which adapts embeddings",
        ),
        (
            "ADAPTION_PROMPT",
            {"target": ["self_attn"]},
            r"is not for peft.type=ADAPTION_PROMPT, .*; set peft.target=null, which leaves the "
            r"choice to PEFT\.$",
        ),
    ],
)
def test_refused_before_a_model_is_loaded(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(kind, **changes).check()


def test_refused_by_a_type_that_trains_no_head() -> None:
    tokens = ("peft=any", "peft.type=TRAINABLE_TOKENS", "peft.target=null")
    tokens += ("peft.options={token_indices:[3]}",)
    with pytest.raises(ConfigError) as refusal:
        compose([*tokens, "model=tiny_bert"])
    assert str(refusal.value) == (
        "peft=trainable_tokens does not work with model.task_type=sequence_classification, because "
        "PEFT trains no head beside it; it works with causal_lm, seq2seq_lm."
    )
    assert compose(tokens)[1].peft.kind == "trainable_tokens"


def test_a_type_that_a_third_partys_method_has_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class TheirSettings(PeftMethodConfig):
        peft_type: ClassVar[str] = "loha"

    theirs = Entry("their_loha", None, TheirSettings)
    monkeypatch.setitem(PEFT_METHODS._entries, "their_loha", theirs)
    settings("LOHA").check()


def allowed_types() -> list[str]:
    """Types that `peft=any` takes."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    possible = []
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        with suppress(ConfigError):
            config_class(kind.value)
            possible.append(kind.value)
    return possible


def test_gradient_checkpointing() -> None:
    """Each type that is allowed was trained so; keys and values that stand in a cache cannot be."""
    types = allowed_types()
    assert set(TYPES) | {"CARTRIDGE", "LN_TUNING", "ADAPTION_PROMPT"} <= set(types)
    refused = {}
    more = {"TRAINABLE_TOKENS": ("peft.options={token_indices:[3]}",)}
    for kind in types:
        target = "null" if kind == "CARTRIDGE" else "auto"
        how = ("peft=any", f"peft.type={kind}", f"peft.target={target}", *more.get(kind, ()))
        try:
            compose([*how, "training.gradient_checkpointing=true"])
        except ConfigError as error:
            refused[kind] = str(error)
    assert refused == {
        "CARTRIDGE": "peft=cartridge does not work with training.gradient_checkpointing=true, "
        "because its keys and values are put into a cache, which recomputing does without; set it "
        "to false."
    }


def test_quantized_bases() -> None:
    assert set(allowed_types()) >= ON_QUANTIZED
    assert settings("VERA").supports_quantized
    # takes the base's weights apart
    assert not settings("OSF").supports_quantized


@pytest.mark.parametrize(
    ("kind", "options", "method", "others"),
    [
        ("HIRA", "{r: 4}", "torchao_int8", "none or int8 or nf4"),
        ("LOHA", "{r: 4}", "nf4", "none or torchao_int8"),
    ],
)
def test_types_that_train_on_some_quantized_bases_only(
    kind: str, options: str, method: str, others: str
) -> None:
    asked = ("peft=any", f"peft.type={kind}", f"peft.options={options}")
    with pytest.raises(ConfigError) as refusal:
        compose([*asked, f"quantization={method}"])
    assert str(refusal.value) == (
        f"peft={kind.lower()} is not known to train on a base that quantization={method} stores; "
        f"use quantization={others}."
    )
    for other in others.split(" or "):
        assert compose([*asked, f"quantization={other}"])[1].quantization.method == other


def test_types_that_train_on_no_quantized_base() -> None:
    for method in ("nf4", "int8", "torchao_int8"):
        with pytest.raises(ConfigError, match=rf"which quantization={method} does not keep; use"):
            compose(["peft=any", "peft.type=OSF", f"quantization={method}"])


def test_what_peft_refuses_of_a_model() -> None:
    with pytest.raises(
        ConfigError,
        match="PEFT cannot put C3A on LlamaForCausalLM: The block size should be a factor",
    ):
        apply_peft(llama(), settings("C3A", options={"block_size": 5}), "causal_lm", [])


def test_what_peft_cannot_do_without() -> None:
    with pytest.raises(
        ConfigError,
        match=r"PEFT cannot put ADAPTION_PROMPT on LlamaForCausalLM: '<' not .*; it may be for "
        r"want of peft.options.adapter_len, peft.options.adapter_layers\.$",
    ):
        apply_peft(llama(), settings("ADAPTION_PROMPT"), "causal_lm", [])
    # what is given is not named, nor are sizes that PEFT finds itself
    one = settings("ADAPTION_PROMPT", options={"adapter_layers": 1})
    with pytest.raises(ConfigError, match=r"for want of peft.options.adapter_len\.$"):
        apply_peft(llama(), one, "causal_lm", [])
    with pytest.raises(ConfigError, match=r"for want of peft.options.num_virtual_tokens\.$"):
        apply_peft(llama(), settings("CARTRIDGE", target=None), "causal_lm", [])


@pytest.mark.parametrize("target", ["auto", None])
def test_norms(target: str | None) -> None:
    """Not the queries and values that `auto` means elsewhere."""
    config = settings("LN_TUNING", target=target)
    config.check()
    model = apply_peft(llama(), config, "causal_lm", [])

    # two norms in each of two layers and one behind them, of 16 weights
    assert count_parameters(model)[1] == (2 * 2 + 1) * 16
    assert all("norm" in name for name in training(model))


def test_norms_by_name() -> None:
    config = settings("LN_TUNING", target=["attention.output.LayerNorm"])
    config.check()
    model = apply_peft(bert(), config, "sequence_classification", NEW_IN_BERT)
    # weights and biases of 16 in two layers; pooler and classifier
    assert count_parameters(model)[1] == 2 * 2 * 16 + 16 * 16 + 16 + 16 * 3 + 3

    names = "input_layernorm, norm, post_attention_layernorm"
    for name, what in (("q_proj", "a Linear"), ("layernorm", "no module")):
        with pytest.raises(ConfigError) as refusal:
            apply_peft(llama(), settings("LN_TUNING", target=[name]), "causal_lm", [])
        assert str(refusal.value) == (
            f"peft.target names '{name}', which is {what} of LlamaForCausalLM, but "
            f"peft.type=LN_TUNING adapts norms; choose among {names}."
        )
    # PEFT knows no norms of BERT's
    with pytest.raises(
        ConfigError, match=r"LN_TUNING on BertFor\w+: Please specify peft.target\.$"
    ):
        apply_peft(bert(), settings("LN_TUNING"), "sequence_classification", NEW_IN_BERT)


def test_tokens() -> None:
    config = settings("TRAINABLE_TOKENS", options={"token_indices": [3, 7, 8]})
    config.check()
    model = apply_peft(llama(), config, "causal_lm", [])

    assert count_parameters(model)[1] == 3 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 5 does not divide 16, and 4 is the next that does
        (
            {"oft_block_size": 5},
            "peft.options.oft_block_size=5 does not divide the input size of every layer that is "
            "adapted, and PEFT's OFT on LlamaForCausalLM would take 4; set it to a number that "
            "does.",
        ),
        ({"oft_block_size": 0, "r": 7}, "peft.options.r=7 does not divide .* would take 8; set"),
        # divides 16, and not the 32 of another layer
        ({"oft_block_size": 24}, "peft.options.oft_block_size=24 does not divide"),
    ],
)
def test_blocks_that_do_not_divide(options: dict[str, Any], message: str) -> None:
    config = settings("OFT", target="all-linear", options=options)
    config.check()
    with pytest.raises(ConfigError, match=message):
        apply_peft(llama(), config, "causal_lm", [])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "OSF",
            {"rank_pattern": {"v_prj": 0.5}},
            "peft.options.rank_pattern names 'v_prj', which no adapted module of LlamaForCausalLM "
            "is called. Did you mean 'v_proj'",
        ),
        ("LOHA", {"rank_pattern": {"v_proj": 2, "nothing": 4}}, "rank_pattern names 'nothing'"),
        ("LOKR", {"alpha_pattern": {"o_proj": 4}}, "alpha_pattern names 'o_proj'"),
        ("HIRA", {"rank_pattern": {"proj": 4}}, "rank_pattern names 'proj'"),
        ("DELORA", {"lambda_pattern": {"nothing": 4}}, "lambda_pattern names 'nothing'"),
        (
            "LOHA",
            {"layers_to_transform": [0], "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
            "rank_pattern names 'layers.1.self_attn.q_proj', which no adapted",
        ),
        (
            "LOHA",
            {"layers_to_transform": [0, 99]},
            "peft.options.layers_to_transform names layer 99, but LlamaForCausalLM has 2 layers",
        ),
        ("LOHA", {"layers_to_transform": 2}, "names layer 2, but LlamaForCausalLM has 2 layers"),
    ],
)
def test_patterns_and_layers_that_fit_nothing(
    kind: str, options: dict[str, Any], message: str
) -> None:
    config = settings(kind, options=options)
    config.check()
    with pytest.raises(ConfigError, match=message):
        apply_peft(llama(), config, "causal_lm", [])


def test_patterns_that_fit() -> None:
    # LoHa has two pairs of matrices in each: q 16 → 16 of rank 4, v 16 → 8 of rank 2, in layer 1
    options = {"r": 4, "layers_to_transform": 1, "rank_pattern": {"v_proj": 2}}
    model = apply_peft(llama(), settings("LOHA", options=options), "causal_lm", [])
    assert count_parameters(model)[1] == 2 * 4 * (16 + 16) + 2 * 2 * (16 + 8)

    # OSF goes by any part of a path: 4 of 16 directions of q train in layer 1, and 8 in layer 0
    options = {"rank_pattern": {"layers.1": 12}}
    chosen = settings("OSF", target=["q_proj"], options=options)
    model = apply_peft(llama(), chosen, "causal_lm", [])
    assert count_parameters(model)[1] == (8 + 4) * (16 + 16 + 1)


def test_layers_that_peft_passes_over() -> None:
    """OSF is for linear layers, and GPT-2's are transposed ones."""
    with pytest.raises(
        ConfigError, match=r"peft\.type=OSF adapts no layer of GPT2LMHeadModel that peft\.target="
    ):
        apply_peft(gpt2(), settings("OSF"), "causal_lm", [])


def test_butterflies_that_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would take one factor in place of two, with a warning."""
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)
    two = settings("BOFT", options={"boft_n_butterfly_factor": 2})
    two.check()
    with pytest.raises(ConfigError, match="boft_n_butterfly_factor is more than 1, for which"):
        apply_peft(llama(), two, "causal_lm", [])


@pytest.mark.parametrize(
    ("value", "hint", "fitting", "text"),
    [
        (3, int, True, "int"),
        (3.0, int, False, "int"),
        (True, int, False, "int"),
        (3, float, True, "float"),
        (True, float, False, "float"),
        (True, bool, True, "bool"),
        (None, int | None, True, "int or null"),
        ("a", int | None, False, "int or null"),
        ("a", int | str | None, True, "int or str or null"),
        ("a", Literal["a", "b"], True, "a or b"),
        ("c", Literal["a", "b"], False, "a or b"),
        ([1, 2], list[int], True, "list of int"),
        ([1, "b"], list[int], False, "list of int"),
        (1, list[int] | int, True, "list of int or int"),
        (1, Union[int, None], True, "int or null"),  # noqa: UP007  as PEFT writes it
        ({"a": 1}, dict[str, int], True, "dict of int"),
        ({"a": "b"}, dict[str, int], False, "dict of int"),
        ({"a": "b"}, dict, True, "dict"),
    ],
)
def test_types_of_options(value: Any, hint: Any, fitting: bool, text: str) -> None:
    assert fits(value, hint) == fitting
    assert told(hint) == text


# What the methods that are a YAML each compute.


def chosen(name: str, *more: str) -> AnySettings:
    """The settings of conf/peft/<name>.yaml."""
    found: AnySettings = compose([f"peft={name}", *more])[1].peft
    return found


def query(model: Any) -> Any:
    """The adapted query projection, 16 → 16, of the first layer."""
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def test_vera() -> None:
    """ΔW = Λ_b·B·Λ_d·A: A and B of all layers' largest size, cut to each layer's own."""
    model = apply_peft(llama(), chosen("vera", "peft.options.r=6"), "causal_lm", [])
    # per layer d of 6 and b of d_out for seven linear layers
    outputs = 16 + 8 + 8 + 16 + 32 + 32 + 16
    assert count_parameters(model)[1] == 2 * (7 * 6 + outputs)
    moved(model)

    layer, x = query(model), random(3, 16)
    a, b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    assert (a.shape, b.shape) == ((6, 32), (32, 6))
    d, scale = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    update = torch.diag(scale) @ b[:16] @ torch.diag(d) @ a[:, :16]
    # float32, in another order
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + update).T)


def test_vera_draws_the_same_matrices_whatever_was_drawn_before() -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = apply_peft(llama(), chosen("vera", "peft.options.r=6"), "causal_lm", [])
        drawn.append(model.base_model.vera_A["default"])
    assert torch.equal(*drawn)


def test_oft() -> None:
    """W·R with blocks (I + Q)(I − Q)⁻¹ in R, which are orthogonal for a skew Q."""
    options = ("peft.options.oft_block_size=4", "peft.options.use_cayley_neumann=false")
    model = apply_peft(llama(), chosen("oft", *options), "causal_lm", [])
    # 4 · 3 / 2 numbers for a block; four blocks for inputs of 16, eight for those of 32
    assert count_parameters(model)[1] == 2 * 6 * (6 * 4 + 8)
    before = logits(model)
    moved(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)

    layer, x = query(model), random(3, 16)
    numbers = layer.oft_R["default"].weight.detach()
    turns = []
    for block in numbers:
        skew = torch.zeros(4, 4)
        skew[tuple(torch.triu_indices(4, 4, 1))] = block
        skew = skew - skew.T
        turns.append((torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew))
    turn = torch.block_diag(*turns)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16), rtol=0, atol=1e-5)
    # float32, in another order
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight @ turn).T, rtol=0, atol=1e-5)


def test_boft() -> None:
    """With one factor: blocks of 4 in each of all, ΔW keeping the norm of every input."""
    model = apply_peft(llama(), chosen("boft"), "causal_lm", [])
    layer: Any = query(model)
    # q and v in two layers: four blocks of 4 · 4, and a scale for each of 16 or 8 outputs
    assert count_parameters(model)[1] == 2 * (2 * 4 * 16 + 16 + 8)
    with torch.no_grad():
        layer.boft_R["default"] += 0.3 * random(*layer.boft_R["default"].shape)
    x = random(3, 16)
    weight = layer.base_layer.weight
    # what x is turned to: found from the output, since the weight can be inverted
    turned = layer(x) @ torch.linalg.inv(weight.T)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(turned, x, atol=1e-2)


def test_osf() -> None:
    """The small half of the singular directions trains, and gradients keep clear of the large."""
    model = apply_peft(llama(), chosen("osf", "peft.target=[q_proj]"), "causal_lm", [])
    layer: Any = query(model)
    # 8 of 16 directions on each side, and as many singular values
    assert count_parameters(model)[1] == 2 * (16 * 8 + 8 + 8 * 16)
    weight, x = layer.base_layer.weight.detach(), random(3, 16)
    u, s, v = torch.linalg.svd(weight)
    parts = layer.osf_svd_params["default"]
    torch.testing.assert_close(parts["S_low"].detach(), s[8:])

    moved(model)
    low = parts["U_low"] @ torch.diag(parts["S_low"]) @ parts["V_low"]
    changed = u[:, :8] @ torch.diag(s[:8]) @ v[:8] + low
    # float32 singular value decompositions
    torch.testing.assert_close(layer(x), x @ changed.T, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert float(parts["U_low"].grad.abs().max()) > 0.01
    torch.testing.assert_close(
        u[:, :8].T @ parts["U_low"].grad, torch.zeros(8, 8), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(parts["V_low"].grad @ v[:8].T, torch.zeros(8, 8), rtol=0, atol=1e-4)
