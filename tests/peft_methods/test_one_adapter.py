"""Types of ours that run a batch for one adapter: PEFT alone is told so, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from clpeft.tuners import BottleneckConfig, LisaHybridConfig
from tests.peft_methods.models import IDS, llama, logits


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(task_type="CAUSAL_LM", target_modules=["o_proj"]),
        LisaHybridConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_virtual_tokens=3),
    ],
    ids=["bottleneck", "lisa_hybrid"],
)
def test_names_of_adapters_are_refused(config: Any) -> None:
    model: Any = get_peft_model(llama(), config, adapter_name="one")
    model.add_adapter("other", config)
    before = logits(model)

    for call in (model.eval(), model.generate):
        with pytest.raises(ValueError, match=r"takes no adapter_names, .* the active adapter; run"):
            call(input_ids=IDS, adapter_names=["one", "other"])
    assert torch.equal(logits(model), before)
