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
- serving.py, decoding.py, generation.py: prompts continued under many adapters
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch

from fedloom.engine import reference, selfcheck
from fedloom.engine.fitting import check, fit_all, score_all
from fedloom.engine.forward import PackedModel
from fedloom.engine.generation import generate_all
from fedloom.engine.layers import ActivePass, inject
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Encoder
from fedloom.engine.planner import plan, return_memory, reuse_memory
from fedloom.engine.reference import ReferenceModel
from fedloom.engine.serving import Generation, ServedModel
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, LoraSpec, Score, Tokens


class LoraEngine:
    """An `Engine` for one base model, which belongs to it from `build` on.

    Same requests, same answers to the bit on the same machine. A job's answer does not depend on which
    other jobs are asked with it, up to the rounding of sums taken in another order.
    """

    workers = 1

    def __init__(
        self,
        served: ServedModel,
        *,
        slow: ReferenceModel | None,
        path_reason: str,
        encode: Encoder,
        generation: Generation,
        close: Callable[[], None],
    ):
        self.served = served  # for answers token by token (`generation.stream`)
        self.model = served.model
        self.layout = served.layout
        self.path: Literal["fast", "reference"] = "reference" if served.packed is None else "fast"
        self.path_reason = path_reason  # why not "fast": the component, and what it did; else empty
        self._slow = slow
        self._encode = encode
        self._generation = generation
        self.close = close  # ends what `generation` has started

    @property
    def decoding_reason(self) -> str:
        """Why answers are left to the model's own cache and attention; empty: they are not."""
        return self.served.decoding_reason

    @classmethod
    def build(
        cls,
        model: Any,
        encode: Callable[[Any], Tokens],
        *,
        lora: LoraSpec,
        tokens_per_pass: int = 4096,
        path: Literal["auto", "fast", "reference"] = "auto",
        checkpointing: bool = False,
        generation: Generation = generate_all,
        close: Callable[[], None] = lambda: None,
    ) -> LoraEngine:
        """Take over `model` (a Hugging Face causal LM, on its device, in its dtype) and put LoRA into it.

        "auto" compares the fast path with plain PEFT on a small batch and falls back when they differ;
        "fast" raises instead. `encode` is called once for each example. `tokens_per_pass` bounds memory
        and changes no result; it shrinks by itself when memory runs out. `generation` answers the Generates,
        and `close` ends what it has started.
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
        served = ServedModel(model, layout, active, None if reason else packed, dtype)
        if served.packed is None:
            served.decoding_reason = f"training takes the reference path: {reason}"
        else:
            served.decoding_reason = selfcheck.decoding_mismatch(served, served.packed, slow) or ""
        return cls(
            served,
            slow=slow if reason else None,
            path_reason=reason,
            encode=Encoder(
                encode,
                vocabulary=model.get_input_embeddings().weight.shape[0],
                longest=getattr(config, "max_position_embeddings", None),
            ),
            generation=generation,
            close=close,
        )

    def initial_adapter(self, seed: int) -> AdapterState:
        """Where every run with this seed starts: it leaves the base model unchanged."""
        return self.layout.initial(seed)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit -> Fitted, Score -> list[Scored], Generate -> list of token ids a prompt; any mixture."""
        fits = {key: r for key, r in requests.items() if isinstance(r, Fit)}
        scores = {key: r for key, r in requests.items() if isinstance(r, Score)}
        prompts = {key: r for key, r in requests.items() if isinstance(r, Generate)}
        for fit in fits.values():
            check(fit)
        answers: dict[Hashable, Any] = {}
        if (packed := self.served.packed) is not None:
            kind: dict[str, Any] = {
                "encode": self._encode,
                "dtype": self.served.dtype,
                "device": self.model.device,
            }
            answers |= fit_all(packed, self.layout, fits, **kind)
            answers |= score_all(packed, self.layout, scores, **kind)
        elif self._slow is not None:
            answers |= reference.answer_all(self._slow, {**fits, **scores}, encode=self._encode)
        if prompts:
            answers |= self._generation(self.served, prompts)
        return_memory()
        return {key: answers[key] for key in requests}
