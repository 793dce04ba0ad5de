"""The contract: what a strategy may define, and what is made of it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from clpeft.registry import STRATEGIES
from clpeft.strategies.anchors import AnchoredStrategy
from clpeft.strategies.base import HOOKS, Evidence, Strategy, defines, with_hook

# as the design names them, and what a strategy may say about its settings and adapters
CONTRACT = {
    "setup",
    "before_task",
    "train_examples",
    "transform_batch",
    "compute_gradients",
    "loss_terms",
    "task_gradients",
    "transform_gradients",
    "after_step",
    "after_task",
    "evaluating",
    "state_dict",
    "load_state_dict",
    "check",
    "save_adapter",
    "objections",
    "facts",
}


def test_hooks_are_those_of_the_contract() -> None:
    assert HOOKS == CONTRACT


def test_misspelt_hook_is_an_error_when_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Misspelt\.transfrom_gradients is not a hook.*") as error:

        class Misspelt(Strategy):
            def transfrom_gradients(self, run: Any) -> dict[str, float]:
                return {}

    assert "Did you mean 'transform_gradients'" in str(error.value)


def test_helpers_start_with_an_underscore() -> None:
    class Helped(Strategy):
        def after_step(self, run: Any) -> None:
            self._help()

        def _help(self) -> None:
            """Does nothing."""

    assert defines(Helped(None), "after_step")


def test_hooks_are_inherited_and_found() -> None:
    class First(Strategy):
        def after_step(self, run: Any) -> None:
            """Does nothing."""

    class Second(First):
        def loss_terms(self, run: Any, batch: Any, outputs: Any) -> dict[str, Any]:
            return {}

    plain, first, second = Strategy(None), First(None), Second(None)

    assert with_hook([second, plain, first], "after_step") == [second, first]
    assert with_hook([second, plain, first], "loss_terms") == [second]
    assert with_hook([second, plain, first], "transform_batch") == []


def test_no_hook_does_anything_by_default() -> None:
    strategy, batch = Strategy("settings"), object()
    run: Any = None

    assert strategy.config == "settings"
    assert strategy.transform_batch(run, batch) is batch  # type: ignore[arg-type]
    assert strategy.train_examples(run, run, batch) is batch  # type: ignore[arg-type]
    assert strategy.loss_terms(run, run, run) == {}
    assert strategy.transform_gradients(run) == {}
    assert strategy.state_dict() == {}
    assert strategy.save_adapter(run, run, run) is False
    with strategy.evaluating(run, None):
        pass


@pytest.mark.parametrize(
    "evidence",
    [{"train/loss/x": Evidence.TERM}, {"x": Evidence.TERM}, {"loss/x": "trem"}],
    ids=["train", "no slash", "no kind"],
)
def test_evidence_that_would_never_be_found_is_an_error_when_the_class_is_defined(
    evidence: dict[str, Any],
) -> None:
    with pytest.raises(TypeError, match=r"Unseen\.evidence maps a logged key without train/"):
        type("Unseen", (Strategy,), {"evidence": evidence})


def test_penalty_of_an_anchor_is_evidence_under_the_name_of_its_term() -> None:
    class Held(AnchoredStrategy):
        term = "held"

    class HeldOtherwise(Held):
        term = "otherwise"

    class Told(Held):
        term = "told"
        evidence: ClassVar = {"told/moves": Evidence.MASK}

    assert Held.evidence == {"loss/held": Evidence.PENALTY}
    assert HeldOtherwise.evidence == {"loss/otherwise": Evidence.PENALTY}
    assert Told.evidence == {"told/moves": Evidence.MASK}


@pytest.mark.parametrize("entry", list(STRATEGIES), ids=lambda entry: entry.name)
def test_every_strategy_says_what_it_can_do(entry: Any) -> None:
    target = entry.target

    assert issubclass(target, Strategy)
    assert target.__doc__
    assert target.task_types <= {"sequence_classification", "causal_lm", "seq2seq_lm"}
    assert set(target.conflicts) <= {other.name for other in STRATEGIES}
    # a bound is a reference; a reference runs alone
    assert target.is_reference or not target.is_bound
    # what others are compared with has nothing to show; a method has
    assert bool(target.evidence) != target.is_reference
