"""Gradients of single examples from one batched backward pass."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from clpeft.streams.batching import Columns, sorted_batches

if TYPE_CHECKING:
    from datasets import Dataset

    from clpeft.streams.batch import Batch
    from clpeft.training.run import Run

log = logging.getLogger(__name__)

# numbers held at a time for one parameter's gradients of single examples: in float32 half a MiB,
# which stays in a core's cache with what is made of it (twice as fast for a whole BERT as what has
# to go to memory), and 128 MiB on an accelerator, which would rather be started seldom
CHUNK_NUMBERS = {"cpu": 2**17}
LARGE_CHUNK_NUMBERS = 2**25

# tables of positions, which are looked up once for a whole batch and added to each of its examples
POSITIONS = {"position_embeddings", "wpe"}
# others that are looked up once, but whose rows go another way
SHARED = {"embed_positions", "relative_attention_bias"}


Elementwise = Callable[[Tensor], Tensor]  # 0 at 0: an example reads but a few rows of a table


@dataclass
class Call:
    """One use of a module in a forward pass."""

    module: nn.Module
    given: Tensor  # what it read: [B, ..., in], or token ids [B, T]
    output: Tensor  # what it made of that, a part of the graph: [B, ..., out]


@dataclass
class Use:
    """One use of a parameter, and what came back to it.

    Args:
        module: Whose the parameter is.
        own: What the module calls it.
        given: What the module read: [B, ..., in], or token ids [B, T].
        gradient: Of what it made of that [B, ..., out].
    """

    module: nn.Module
    own: str
    given: Tensor
    gradient: Tensor

    @property
    def in_table(self) -> bool:
        """Whether the parameter is a table here, of which single rows are read."""
        return _is_table(self.module)

    def of(self, examples: slice, rows: slice) -> Use:
        """The same for some examples, and of a linear layer's weight for some of its rows."""
        return Use(self.module, self.own, self.given[examples], self.gradient[examples, ..., rows])

    def read(self) -> tuple[Tensor, Tensor]:
        """Of a table: the rows that were read [B, T], and in float32 what came back [B, T, H]."""
        ids = self.given.flatten(1)
        gradient = self.gradient.float().reshape(*ids.shape, -1)
        padding: int | None = getattr(self.module, "padding_idx", None)
        if padding is not None:
            gradient = gradient.masked_fill(ids.eq(padding)[..., None], 0.0)
        return ids, gradient


class PerExample:
    """Records a model's forward passes, so that gradients of single examples can be told apart.

    For a linear layer, LoRA's A and B among them, the gradient of example b is Σ_t g_bt x_btᵀ, x
    the layer's input and g the gradient of its output: one backward pass over a batch gives both
    for all of its examples. Embeddings and norms go likewise. What else has parameters that train
    is listed in `single`, for its gradients need batches of one.

    Args:
        model: Whose forward passes are recorded, inside `with`.
        trainable: Name to parameter, those that count.

    Attributes:
        single: Names of the parameters that batches do not give; known in full after the first
            batch of more than one example. A weight that is used without its module being called,
            as nn.MultiheadAttention does with its last layer's, shows in the first batch.
    """

    def __init__(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
        self.trainable = dict(trainable)
        self._names = {id(parameter): name for name, parameter in trainable.items()}
        users: dict[str, list[nn.Module]] = defaultdict(list)
        shared = set()
        for path, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in self._names:
                    name = self._names[id(parameter)]
                    users[name].append(module)
                    known = _is_table(module) or _handler(module) is not None
                    if not known or path.split(".")[-1] in SHARED:
                        shared.add(name)
        self.single = [name for name in trainable if name in shared or not users[name]]
        batched = [module for name in users if name not in self.single for module in users[name]]
        self._modules = list({id(module): module for module in batched}.values())
        self._positions = [
            module
            for path, module in model.named_modules()
            if path.split(".")[-1] in POSITIONS and module in self._modules
        ]
        self._size = 0
        self._calls: list[Call] = []
        self._unseen = [name for name in trainable if name not in self.single]
        self._handles: list[Any] = []

    def __enter__(self) -> PerExample:
        self._handles = [
            *(m.register_forward_pre_hook(self._for_each) for m in self._positions),
            *(m.register_forward_hook(self._record) for m in self._modules),
        ]
        return self

    def _for_each(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Positions looked up for every example: then each has gradients of its own."""
        ids = given[0]
        return (ids.expand(self._size, -1), *given[1:]) if ids.shape[0] == 1 else given

    def _record(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            self._calls.append(Call(module, given[0].detach(), output))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._calls = []

    def expect(self, size: int) -> None:
        """Drops what was recorded; to be called before each forward pass, with its examples."""
        self._calls = []
        self._size = size

    def add(
        self,
        function: Elementwise,
        scores: Tensor,
        weights: Tensor,
        into: Mapping[str, Tensor],
    ) -> None:
        """Adds Σ_b w_b f(∂s_b/∂θ) for the parameters that batches give.

        Args:
            function: f, applied to each number, such as `torch.square`.
            scores: s_b of each example of the last forward pass [B]; their graph is kept.
            weights: w_b [B].
            into: Name to float32 tensor, added to.
        """
        if self._unseen:
            self._find_used_elsewhere(scores)
        if not self._calls:
            return
        for name, uses in self._uses(scores, into).items():
            if all(use.in_table for use in uses):
                _add_rows(uses, function, weights, into[name])
                continue
            numbers = CHUNK_NUMBERS.get(scores.device.type, LARGE_CHUNK_NUMBERS)
            for rows in _blocks(uses, into[name], numbers):
                total = into[name][rows].view(-1)
                size = max(1, numbers // len(total))
                for start in range(0, len(scores), size):
                    examples = slice(start, start + size)
                    found = function(_of_examples(uses, examples, rows))
                    total.addmv_(found.flatten(1).t(), weights[examples])

    def add_single(
        self,
        function: Elementwise,
        scores: Tensor,
        weights: Tensor,
        into: Mapping[str, Tensor],
    ) -> None:
        """The same for the parameters in `single`, from a batch of one."""
        parameters = [self.trainable[name] for name in self.single]
        found = torch.autograd.grad(scores.sum(), parameters, allow_unused=True, retain_graph=True)
        for name, gradient in zip(self.single, found, strict=True):
            if gradient is not None:
                into[name].add_(function(gradient.float()) * weights[0])

    def _find_used_elsewhere(self, scores: Tensor) -> None:
        """Moves to `single` what has a gradient though no call of its module was recorded."""
        called = {id(p) for call in self._calls for p in call.module.parameters(recurse=False)}
        unseen = [name for name in self._unseen if id(self.trainable[name]) not in called]
        self._unseen = []
        if not unseen:
            return
        parameters = [self.trainable[name] for name in unseen]
        found = torch.autograd.grad(scores.sum(), parameters, allow_unused=True, retain_graph=True)
        self.single += [n for n, g in zip(unseen, found, strict=True) if g is not None]

    def _uses(self, scores: Tensor, into: Mapping[str, Tensor]) -> dict[str, list[Use]]:
        """What the recorded modules did with each parameter, and the gradients of their outputs.

        A parameter whose examples turn out not to be kept apart moves to `single`.
        """
        size = len(scores)
        outputs = [call.output for call in self._calls]
        found = torch.autograd.grad(scores.sum(), outputs, allow_unused=True, retain_graph=True)
        uses: dict[str, list[Use]] = defaultdict(list)
        for call, gradient in zip(self._calls, found, strict=True):
            for own, parameter in call.module.named_parameters(recurse=False):
                name = self._names.get(id(parameter))
                if name is None or name in self.single:
                    continue
                if call.output.shape[0] != size or call.given.shape[0] != size:
                    # examples are not kept apart; all batches of a data set show it alike
                    self.single.append(name)
                    into[name].zero_()  # what an earlier batch, of one example, gave
                    uses.pop(name, None)
                elif gradient is not None:
                    uses[name].append(Use(call.module, own, call.given, gradient))
        return uses


def _blocks(uses: Sequence[Use], parameter: Tensor, numbers: int) -> list[slice]:
    """Cuts a linear layer's weight into blocks of rows of at most so many numbers; others are one.

    A row of it belongs to one number of what the layer puts out.
    """
    if parameter.dim() < 2 or any(_handler(use.module) is not _linear for use in uses):
        return [slice(None)]
    height = max(1, numbers // parameter[0].numel())
    return [slice(start, start + height) for start in range(0, len(parameter), height)]


def _of_examples(uses: Sequence[Use], examples: slice, rows: slice) -> Tensor:
    """The gradients of some examples [b, *shape], summed over the uses of a parameter.

    Args:
        uses: Of the parameter.
        examples: Which.
        rows: Of a linear layer's weight, see `_blocks`.
    """
    total: Tensor | None = None
    chosen = [use.of(examples, rows) for use in uses]
    for use in chosen:
        if not use.in_table:
            handler = _handler(use.module)
            assert handler is not None
            part = handler(use.module, use.own, use.given, use.gradient.float())
            total = part if total is None else total + part
    assert total is not None
    for use in chosen:
        if use.in_table:  # a table that is an output layer too
            ids, gradient = use.read()
            total.scatter_add_(1, ids[..., None].expand_as(gradient), gradient)
    return total


def _add_rows(uses: Sequence[Use], function: Elementwise, weights: Tensor, into: Tensor) -> None:
    """Adds Σ_b w_b f(∂s_b/∂W) of a table W [K, H]: f of the rows that each example read."""
    ids, gradients = (torch.cat(parts, dim=1) for parts in zip(*map(Use.read, uses), strict=True))
    rows = len(into)
    examples = torch.arange(len(ids), device=ids.device)[:, None]
    # a row that an example reads twice has one gradient, the sum
    places, which = torch.unique(examples * rows + ids, return_inverse=True)
    found = gradients.new_zeros(len(places), gradients.shape[-1])
    found.index_add_(0, which.flatten(), gradients.flatten(0, 1))
    into.index_add_(0, places % rows, function(found) * weights[places // rows][:, None])


Handler = Callable[[Any, str, Tensor, Tensor], Tensor]


def _is_table(module: nn.Module) -> bool:
    return type(module) is nn.Embedding  # subclasses scale what they look up


def _handler(module: nn.Module) -> Handler | None:
    """How a module's gradients of single examples are found; None for tables and unknown kinds."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return _linear
    if kind == "Conv1D":  # GPT-2's linear layer, its weight the other way round
        return _transposed_linear
    if isinstance(module, nn.LayerNorm) or "RMSNorm" in kind or kind == "T5LayerNorm":
        return _norm
    return None


def _linear(module: nn.Module, own: str, given: Tensor, gradient: Tensor) -> Tensor:
    g = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
    if own == "bias":
        return g.sum(dim=1)
    x = given.float().flatten(1, -2) if given.dim() > 2 else given.float()[:, None]
    return torch.bmm(g.transpose(1, 2), x)


def _transposed_linear(module: nn.Module, own: str, given: Tensor, gradient: Tensor) -> Tensor:
    found = _linear(module, own, given, gradient)
    return found if own == "bias" else found.transpose(1, 2)


def _norm(module: nn.Module, own: str, given: Tensor, gradient: Tensor) -> Tensor:
    if own == "bias":
        return gradient.flatten(1, -2).sum(dim=1)
    # the output is affine in the weight, x̂·(c + w): x̂ is what one more of w adds
    weight = dict(module.named_parameters(recurse=False))["weight"]
    with torch.no_grad():
        one, none = (
            functional_call(module, {"weight": value}, (given,)).float()
            for value in (torch.ones_like(weight), torch.zeros_like(weight))
        )
    return (gradient * (one - none)).flatten(1, -2).sum(dim=1)


def mean_over_examples(
    run: Run,
    dataset: Dataset,
    function: Elementwise,
    scored: Callable[[Batch, Tensor], Iterator[tuple[Tensor, Tensor]]],
    *,
    examples: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """E_x f(∂s(x)/∂θ) over examples of a data set, without dropout.

    Batched passes (`PerExample`) give it, which cost about as much as training on the examples;
    several processes share them.

    Args:
        run: Whose trainable parameters count.
        dataset: Encoded examples.
        function: f, applied to each number.
        scored: Runs the model on a batch; gives s of its examples [B] and their weights [B], as
            often as there are scores of an example. Takes a seed for each example too [B], which
            hangs neither on its batch nor on its process.
        examples: How many are drawn from the data set, at most.
        generator: Draws them, and the seeds.

    Returns:
        One float32 tensor per entry of `run.trainable`, in its order.
    """
    chosen = torch.randperm(len(dataset), generator=generator)[:examples].numpy()
    columns = Columns(dataset)
    seeds = torch.randint(2**31, (len(chosen),), generator=generator)
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in run.trainable.items()}
    batches = sorted_batches(columns.lengths[chosen], run.config.training.batch_size)
    mine = batches[run.rank :: run.world_size]
    recorded = PerExample(run.model, run.trainable)

    def go_through(places: np.ndarray, adding: Callable[..., None]) -> None:
        recorded.expect(len(places))
        batch = run.batch(columns, chosen[places])
        for scores, weights in scored(batch, seeds[places]):
            adding(function, scores, weights / len(chosen), sums)

    # cuDNN differentiates LSTMs, of which P-tuning has one, in training mode only
    with run.eval_mode(), torch.backends.cudnn.flags(enabled=False), recorded:
        for places in mine:
            go_through(places, recorded.add)
        if recorded.single:
            log.info("batches of one are needed for %s", ", ".join(recorded.single))
            for places in mine:  # of few examples a process may have none
                for place in places:
                    go_through(np.array([place]), recorded.add_single)
    return run.sum_gradients(list(sums.values()))
