"""What every strategy declares of itself, as a table: `python -m clpeft.capabilities`."""

from __future__ import annotations

from clpeft.registry import STRATEGIES
from clpeft.strategies.base import Strategy

DISTRIBUTED = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
HEADER = ("strategy", "1 process", "DDP", *DISTRIBUTED.values(), "quantized base")
RUN = "yes"  # declared, and run by a test in every run of CI
DECLARED = "declared"  # and not run by any test
REFUSED = "no"  # refused in one sentence before a model is loaded


def capability_table() -> str:
    """A Markdown table of strategies by ways of running, from the strategies' declarations."""
    rows = [HEADER, tuple("---" for _ in HEADER)]
    rows += [(f"`{entry.name}`", *_cells(entry.target)) for entry in STRATEGIES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(strategy: type[Strategy]) -> list[str]:
    return [
        RUN,
        RUN if strategy.supports_multi_process else REFUSED,
        *(DECLARED if kind in strategy.supports_sharding else REFUSED for kind in DISTRIBUTED),
        RUN if strategy.supports_quantized else REFUSED,
    ]


if __name__ == "__main__":
    print(capability_table())
