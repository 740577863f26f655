"""One packed forward, and backward, of many jobs' examples over one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.engine import attention
from fedloom.engine.attention import Blocks
from fedloom.engine.bank import AdapterBank
from fedloom.engine.head import LabelHead
from fedloom.engine.layers import ActivePass
from fedloom.engine.packing import Item, Packed, pack, split
from fedloom.engine.planner import Plan, out_of_memory
from fedloom.errors import ModelError

# (batch, last hidden states) -> a value, or a row of them, for each labelled position
Measure = Callable[[Packed, Tensor], Tensor]


class PackedModel:
    """A frozen causal LM whose LoRA layers are in place, run on packed batches."""

    def __init__(self, model: Any, active: ActivePass, plan: Plan, *, checkpointing: bool):
        self._model = model
        self._active = active
        self._head = LabelHead.of(model)
        self.plan = plan  # replaced by a smaller one when memory runs out
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._checkpointing = False
        if checkpointing and not self._layers:
            raise ModelError("This model has no layers that can be checkpointed; turn checkpointing off.")
        if checkpointing:
            self._checkpoint()

    def losses(
        self, items: Sequence[Item], bank: AdapterBank, *, dropout: tuple[float, int] | None = None
    ) -> Tensor:
        """Nats of each item, summed over its labelled tokens: (items,) float64 on the CPU.

        With a bank made for training, `bank.grads` afterwards is the gradient of each row's weighted
        loss, of these items and nothing else. Should any number come out infinite or NaN, everything is
        run again with no pass shared by two rows, so that a job that diverges does not affect the others.
        """
        return summed(self._sound(self.nll, items, bank, dropout), items)

    def token_losses(self, items: Sequence[Item], bank: AdapterBank) -> Tensor:
        """Nats of each labelled token: (labels of all items,) float64 on the CPU.

        The bank must not be made for training.
        """
        return self._sound(self.nll, items, bank, None)

    def energies(self, items: Sequence[Item], bank: AdapterBank) -> Tensor:
        """-logsumexp of the logits, summed over each item's labelled tokens: (items,) float64 on the CPU.

        The bank must not be made for training.
        """
        return summed(self._sound(self.energy, items, bank, None), items)

    def token_statistics(self, items: Sequence[Item], bank: AdapterBank) -> Tensor:
        """log p of each labelled token, mean and deviation of log p: (labels of all items, 3) float64, CPU.

        The bank must not be made for training.
        """
        return self._sound(self.statistics, items, bank, None).reshape(-1, 3)

    def _sound(
        self, measure: Measure, items: Sequence[Item], bank: AdapterBank, dropout: tuple[float, int] | None
    ) -> Tensor:
        values = self._fitting(measure, items, bank, dropout, isolated=False)
        finite = torch.isfinite(values).all() and (bank.grads is None or torch.isfinite(bank.grads).all())
        if not finite and len({item.row for item in items}) > 1:
            values = self._fitting(measure, items, bank, dropout, isolated=True)
        return values

    def _fitting(
        self,
        measure: Measure,
        items: Sequence[Item],
        bank: AdapterBank,
        dropout: tuple[float, int] | None,
        *,
        isolated: bool,
    ) -> Tensor:
        """Run all items. When memory runs out, start over with half the budget, and finally with checkpointing."""
        longest = max((len(item.example.ids) for item in items), default=0)
        while True:
            try:
                return self._all_passes(measure, items, bank, dropout, isolated=isolated)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.plan.tokens_per_pass > longest:
                    self.plan = self.plan.smaller()
                elif bank.grads is not None and self._layers and not self._checkpointing:
                    self._checkpoint()
                else:
                    raise ModelError(
                        f"Out of memory with a single example of {longest} tokens in a pass: cut examples shorter."
                    ) from error

    def _all_passes(
        self,
        measure: Measure,
        items: Sequence[Item],
        bank: AdapterBank,
        dropout: tuple[float, int] | None,
        *,
        isolated: bool,
    ) -> Tensor:
        """The measure at each labelled position, item after item."""
        training = bank.grads is not None
        if bank.grads is not None:
            bank.grads.zero_()
        found: list[Tensor] = []
        with self.plan.kernels(), self.own_attention(), torch.set_grad_enabled(training):
            for part in split(items, self.plan.tokens_per_pass, isolated=isolated):
                packed = pack(
                    part, bank, multiple=self.plan.multiple, dtype=self._model.dtype, dropout=dropout
                )
                values = measure(packed, self.hidden(packed, packed.blocks))  # (M, ...)
                if training:
                    (values * packed.weights).sum().backward()
                found.append(values.detach().double().cpu()[packed.label_of])
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def hidden(self, packed: Packed, blocks: Blocks) -> Tensor:
        """Last hidden states, padding included: (T, d). Inside `own_attention` only."""
        with self._active.using(packed.lora):
            return self._model.base_model(
                input_ids=packed.ids, position_ids=packed.positions, use_cache=False, blocks=blocks
            ).last_hidden_state[0]

    def nll(self, packed: Packed, hidden: Tensor) -> Tensor:
        """Nats at every labelled position, padding included: (M,)."""
        return self._head.nll(hidden, packed.label_at, packed.targets)

    def energy(self, packed: Packed, hidden: Tensor) -> Tensor:
        """-logsumexp of the logits at every labelled position, padding included: (M,)."""
        return self._head.energy(hidden, packed.label_at)

    def statistics(self, packed: Packed, hidden: Tensor) -> Tensor:
        """log p of every labelled token, mean and deviation of log p there, padding included: (M, 3)."""
        return self._head.token_statistics(hidden, packed.label_at, packed.targets)

    def _checkpoint(self) -> None:
        """From here on keep only each layer's input, and run the layer again when its gradient is due."""
        self._checkpointing = True
        for layer in self._layers:
            layer.forward = partial(_recomputed, layer.forward, self._active)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Attend within examples inside; outside the model keeps the attention it came with."""
        config = self._model.config
        before = config._attn_implementation
        config._attn_implementation = attention.NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def summed(values: Tensor, items: Sequence[Item]) -> Tensor:
    """Values at labelled positions -> their sum for each item."""
    counts = torch.tensor([len(item.example.at) for item in items], dtype=torch.long)
    owner = torch.arange(len(items)).repeat_interleave(counts)
    return torch.zeros(len(items), dtype=torch.float64).index_add_(0, owner, values)


def _recomputed(forward: Any, active: ActivePass, *args: Any, **kwargs: Any) -> Any:
    lora = active.current
    if lora is None or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        partial(forward, **kwargs),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), active.using(lora)),
    )
