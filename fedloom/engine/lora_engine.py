"""LoraEngine: answers Fit, Generate and Score of many clients over one frozen base model.

Its parts, in reading order:

- layout.py: which modules are adapted, where their factors lie in a flat row
- packing.py: examples of many jobs end to end, and which row each token belongs to
- layers.py: the frozen linear map plus each token's own low-rank update
- attention.py: each example attends to itself only
- head.py: logits and loss at labelled positions only
- forward.py: these four put together: items in, losses out, gradients in the bank
- optimizer.py: AdamW and SGD, row by row
- fitting.py: the loop: batches of all jobs in shared passes
- reference.py: the same answers from plain PEFT; selfcheck.py compares the two at build time
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedloom.engine import reference, selfcheck
from fedloom.engine.bank import AdapterBank, RowGroup
from fedloom.engine.fitting import LocalTraining, fit_all, score_all
from fedloom.engine.forward import PackedModel
from fedloom.engine.generation import generate_all
from fedloom.engine.layers import ActivePass, inject
from fedloom.engine.layout import AdapterLayout, LoraSpec
from fedloom.engine.packing import Encoder, Pass
from fedloom.engine.planner import plan, return_memory, reuse_memory
from fedloom.engine.reference import ReferenceModel
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, Score, Tokens

# (engine, requests) -> a list of token ids a prompt
Generation = Callable[["LoraEngine", Mapping[Hashable, Generate]], dict[Hashable, list[list[int]]]]


class LoraEngine:
    """An `Engine` for one base model, which belongs to it from `build` on.

    Same requests, same answers to the bit on the same machine. A job's answer does not depend on which
    other jobs are asked with it, up to the rounding of sums taken in another order.
    """

    def __init__(
        self,
        model: Any,
        layout: AdapterLayout,
        *,
        active: ActivePass,
        packed: PackedModel | None,
        slow: ReferenceModel | None,
        path_reason: str,
        encode: Encoder,
        local: LocalTraining,
        seed: int,
        dtype: torch.dtype,
        generation: Generation,
    ):
        self.model = model
        self.layout = layout
        self.path: Literal["fast", "reference"] = "reference" if packed is None else "fast"
        self.path_reason = path_reason  # why not "fast": the component, and what it did; else empty
        self.decoding_reason = ""  # why answers are left to the model's own cache and attention; else empty
        self.local = local
        self.seed = seed
        self._active = active
        self.packed = packed
        self._slow = slow
        self._encode = encode
        self._dtype = dtype
        self._generation = generation

    @classmethod
    def build(
        cls,
        model: Any,
        encode: Callable[[Any], Tokens],
        *,
        lora: LoraSpec,
        local: LocalTraining,
        seed: int = 0,
        tokens_per_pass: int = 4096,
        path: Literal["auto", "fast", "reference"] = "auto",
        checkpointing: bool = False,
        generation: Generation = generate_all,
    ) -> LoraEngine:
        """Take over `model` (a Hugging Face causal LM, on its device, in its dtype) and put LoRA into it.

        "auto" compares the fast path with plain PEFT on a small batch and falls back when they differ;
        "fast" raises instead. `encode` is called once for each example. `tokens_per_pass` bounds memory
        and moves no result; it shrinks by itself when memory runs out. `generation` answers the Generates.
        """
        config = model.config.get_text_config()
        if config.is_encoder_decoder:
            raise ModelError("Expected a decoder-only causal LM; this model is an encoder-decoder.")
        if model.device.type == "cpu":
            reuse_memory()
        model.eval()
        model.requires_grad_(False)
        layout = AdapterLayout.of(model, lora)
        dtype = torch.promote_types(model.dtype, torch.float32)  # of the adapters
        slow = ReferenceModel(model, layout, dtype=dtype)
        active = ActivePass()
        inject(model, layout, active)
        packed: PackedModel | None = None
        reason = "asked for"
        if path != "reference":
            chosen = plan(layout, tokens_per_pass=tokens_per_pass, dtype=model.dtype, device=model.device)
            packed = PackedModel(model, active, chosen, checkpointing=checkpointing)
            reason = selfcheck.mismatch(packed, slow, model, layout, dtype=dtype) or ""
            if reason and path == "fast":
                raise ModelError(f'The fast path does not fit this model. {reason}. Use path="auto".')
        engine = cls(
            model,
            layout,
            active=active,
            packed=None if reason else packed,
            slow=slow if reason else None,
            path_reason=reason,
            encode=Encoder(
                encode,
                vocabulary=model.get_input_embeddings().weight.shape[0],
                longest=getattr(config, "max_position_embeddings", None),
            ),
            local=local,
            seed=seed,
            dtype=dtype,
            generation=generation,
        )
        if engine.packed is None:
            engine.decoding_reason = f"training takes the reference path: {reason}"
        else:
            adapters = selfcheck.two_adapters(layout, dtype)
            with engine.rows(dict(enumerate(adapters))) as rows:
                found = selfcheck.decoding_mismatch(engine.packed, slow, model, rows, adapters)
            engine.decoding_reason = found or ""
        return engine

    def initial_adapter(self) -> AdapterState:
        """Where every run with this seed starts: it leaves the base model unchanged."""
        return self.layout.initial(self.seed)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit -> Fitted, Score -> list[Scored], Generate -> list of token ids a prompt; any mixture."""
        fits = {key: r for key, r in requests.items() if isinstance(r, Fit)}
        scores = {key: r for key, r in requests.items() if isinstance(r, Score)}
        prompts = {key: r for key, r in requests.items() if isinstance(r, Generate)}
        answers: dict[Hashable, Any] = {}
        if self.packed is not None:
            kind: dict[str, Any] = {"encode": self._encode, "dtype": self._dtype, "device": self.model.device}
            answers |= fit_all(self.packed, self.layout, fits, local=self.local, seed=self.seed, **kind)
            answers |= score_all(self.packed, self.layout, scores, **kind)
        elif self._slow is not None:
            answers |= reference.answer_all(
                self._slow, {**fits, **scores}, encode=self._encode, local=self.local, seed=self.seed
            )
        if prompts:
            answers |= self._generation(self, prompts)
        return_memory()
        return {key: answers[key] for key in requests}

    @contextmanager
    def rows(self, adapters: Mapping[Hashable, AdapterState | None]) -> Iterator[Rows]:
        """Serve these adapters, each under its key, from one model: for generation.

        Inside, the model has the attention it was loaded with ("sdpa"), dropout is off and no gradient is
        kept. A forward runs under `rows.tokens(owner)`; without it, it is the base model's.
        """
        tuned = {key: state for key, state in adapters.items() if state is not None}
        bank = AdapterBank(
            self.layout, list(tuned.values()), dtype=self._dtype, device=self.model.device, training=False
        )
        index = dict.fromkeys(adapters, -1) | {key: row for row, key in enumerate(tuned)}
        group = RowGroup(bank, range(len(tuned)))
        with torch.no_grad():
            yield Rows(index, group, self._active, self.model.dtype)


@dataclass(frozen=True)
class Rows:
    """Adapters in a bank, ready to serve."""

    index: Mapping[Hashable, int]  # key -> what `owner` calls it; -1: the base alone
    group: RowGroup
    active: ActivePass
    dtype: torch.dtype

    @contextmanager
    def tokens(self, owner: Tensor) -> Iterator[None]:
        """Run forwards inside whose tokens belong to `owner`.

        `owner` has the shape of `input_ids`, (B, L), padding included; values are those of `index`. While
        decoding with a cache, L is 1: pass (B, 1). It may be any mixture in any order.
        """
        lora = Pass.of(self.group, owner.reshape(-1).to(self.group.bank.params.device), dtype=self.dtype)
        with self.active.using(lora):
            yield
