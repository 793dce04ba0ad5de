"""Peak memory of QLoRA against LoRA and full fine-tuning, on a model of 1.1 B random weights.

`python -m benchmarks.qlora`, on a GPU. Each row is a process of its own; the model has the shape of
TinyLlama and is written to a temporary folder once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.apart import trained_apart
from benchmarks.composed import config_of
from benchmarks.printing import machine, out
from clpeft.launching import quiet_libraries

# TinyLlama (Zhang et al. 2024)
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
STEPS, BATCH = 20, 16
LORA = ("peft=lora", "peft.target=all-linear", "peft.r=16")
NF4 = (*LORA, "quantization=nf4")
WAYS = {
    "full, bfloat16": ("peft=full",),
    "full, bfloat16, adamw_8bit": ("peft=full", "optimizer=adamw_8bit"),
    "LoRA, bfloat16": LORA,
    "LoRA, int8": (*LORA, "quantization=int8"),
    "LoRA, nf4": NF4,
    "LoRA, nf4, paged_adamw_8bit": (*NF4, "optimizer=paged_adamw_8bit"),
}
RUN = (
    *("model=llama3_1_8b", "strategy=finetune", "optimizer.lr=1e-5"),
    *("stream.num_tasks=1", f"stream.train_size={STEPS * BATCH}"),
    *("stream.validation_size=16", "stream.test_size=16", f"training.batch_size={BATCH}"),
)


def write_model(folder: Path) -> None:
    """A Llama of random weights in bfloat16, with a tokenizer of the toy stream's words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from clpeft.models.generated import train_tokenizer
    from clpeft.streams.build import build_stream

    quiet_libraries()
    stream = build_stream(config_of(["stream=toy"]).stream, data_dir=None)
    tokenizer = train_tokenizer(sorted(set(stream.training_text())), 2000)
    config = AutoConfig.for_model(
        "llama",
        **SHAPE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measures and prints."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.qlora measures the memory of a GPU, and there is no GPU here.")
    out(f"{machine()}; batches of {BATCH}, {STEPS} steps\n")
    out(
        "| | frozen base | trained | peak memory | with gradient checkpointing | steps per second |"
    )
    out("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for label, overrides in WAYS.items():
            given = [*RUN, f"model.path={folder}", *overrides]
            plain = trained_apart(given)
            less = trained_apart([*given, "training.gradient_checkpointing=true"])
            base, trains, peak, lower = (
                f"{cost[key] / 2**30:.2f} GiB"
                for cost, key in (
                    (plain, "base_bytes"),
                    (plain, "trained_bytes"),
                    (plain, "peak_memory_bytes"),
                    (less, "peak_memory_bytes"),
                )
            )
            speed = plain["steps_per_second"]
            out(f"| {label} | {base} | {trains} | {peak} | {lower} | {speed:.2f} |")


if __name__ == "__main__":
    main()
