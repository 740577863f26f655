"""The slow truth: plain PEFT, the model's own forward, one example at a time, torch's own optimizers.

It shares with the fast path the definition of a job (order, batches, rates, dropout masks) and nothing of how a batch
is computed. It is right for every causal LM, and the engine falls back on it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom import lora
from fedloom.engine.bank import Tuning
from fedloom.engine.dropout import Dropout, token_keys
from fedloom.engine.fitting import FlatCorrection, batches, token_scores, weight_of
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.packing import Encoded, Encoder
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Factors, Fit, Fitted, LocalTraining, Score, Scored, TokenScores


class ReferenceModel:
    """A PEFT model that shares its frozen weights with the model it was made from."""

    def __init__(self, model: Any, layout: AdapterLayout, *, dtype: torch.dtype):
        """Make it before LoRA layers are put into `model`; weights are shared, modules are not."""
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        spec = layout.spec
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            target_modules=[target.name for target in layout],
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out layer by layer, and says so
            try:
                self._model: Any = get_peft_model(copy.deepcopy(model, memo), config)
            except ValueError as error:
                raise ModelError(f"PEFT cannot adapt these targets: {error}") from error
        self._model.eval()
        self.layout = layout
        self.factors: dict[str, nn.Parameter] = {}
        self._layers: list[Any] = []
        self._masks: list[_CountedDropout] = []
        self._frozen: dict[str, tuple[float, Tensor, Tensor]] = {}  # target -> scale, A, B
        for target in layout:
            layer: Any = self._model.get_submodule(f"base_model.model.{target.name}")
            self._layers.append(layer)
            layer.base_layer.register_forward_hook(partial(self._add_frozen, target.key))
            for side in lora.SIDES:
                factor = getattr(layer, f"lora_{side}")["default"].to(dtype)
                self.factors[lora.key(target.key, side)] = factor.weight
            if spec.dropout:
                self._masks.append(_CountedDropout(target.name))
                layer.lora_dropout["default"] = self._masks[-1]

    @property
    def device(self) -> torch.device:
        return self._model.device

    def load(self, tuning: Tuning, train: Factors = "AB") -> None:
        """Put it in the model; a lower rank is filled up with zeros. Without an adapter, run the model in `base_alone`."""
        if tuning.adapter is not None:
            vector = self.layout.to_vector(tuning.adapter)
            parts = vector.split([factor.numel() for factor in self.factors.values()])
            with torch.no_grad():
                for factor, part in zip(self.factors.values(), parts, strict=True):
                    factor.copy_(part.view_as(factor))
        for name, factor in self.factors.items():
            found = lora.parse(name)
            factor.requires_grad_(found is not None and found[1] in train)
        for layer in self._layers:
            layer.scaling["default"] = self.layout.spec.scale if tuning.scale is None else tuning.scale
        self._frozen = {}
        if (frozen := tuning.frozen) is not None:
            device, dtype = self.device, next(iter(self.factors.values())).dtype
            for target, (a, b) in lora.pairs(frozen.factors).items():
                self._frozen[target] = frozen.scale, a.to(device, dtype), b.to(device, dtype)

    def _add_frozen(self, target: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if target not in self._frozen:
            return output
        scale, a, b = self._frozen[target]
        return output + (scale * (inputs[0].to(a.dtype) @ a.t() @ b.t())).to(output.dtype)

    def state(self, ranks: Sequence[int] | None = None) -> AdapterState:
        return self.layout.to_state(self.vector(), ranks)

    def nll(self, example: Encoded, dropout: Dropout | None = None) -> Tensor:
        """Nats summed over the labelled tokens of one example, by the model's own forward."""
        return F.cross_entropy(
            self.logits(example, dropout), example.targets.to(self.device), reduction="sum"
        )

    def token_losses(self, example: Encoded) -> Tensor:
        """Nats of each labelled token: (m,)."""
        return F.cross_entropy(self.logits(example), example.targets.to(self.device), reduction="none")

    def energy(self, example: Encoded) -> Tensor:
        """-logsumexp of the logits, summed over the labelled tokens of one example."""
        return -self.logits(example).logsumexp(-1).sum()

    def token_statistics(self, example: Encoded) -> Tensor:
        """log p of each labelled token, then mean and deviation of log p under p: (m, 3)."""
        logits = self.logits(example)
        of_target = -F.cross_entropy(logits, example.targets.to(self.device), reduction="none")
        p = logits.double().softmax(-1)
        mean = -torch.special.entr(p).sum(-1)
        square = -(torch.special.entr(p) * p.clamp_min(1e-300).log()).sum(-1)
        return torch.stack([of_target.double(), mean, (square - mean.square()).clamp_min(0).sqrt()], -1)

    def logits(self, example: Encoded, dropout: Dropout | None = None) -> Tensor:
        """The logits that predict the labelled tokens: (m, V), at least float32."""
        self._use(dropout)
        logits = self._model(input_ids=example.ids[None].to(self.device), use_cache=False).logits[0]
        return logits[example.at.to(self.device)].to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def hidden(self, example: Encoded, dropout: Dropout | None = None) -> Tensor:
        """Last hidden states of one example: (n, d)."""
        self._use(dropout)
        body = self._model.base_model.model.base_model
        return body(input_ids=example.ids[None].to(self.device), use_cache=False).last_hidden_state[0]

    def _use(self, dropout: Dropout | None) -> None:
        for mask in self._masks:
            mask.dropout = dropout

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        with self._model.disable_adapter():
            yield

    def vector(self) -> Tensor:
        """All factors as one flat vector, in the order of the layout."""
        return torch.cat([factor.detach().reshape(-1) for factor in self.factors.values()])

    def gradient(self) -> Tensor:
        """The same of their gradients; zero for factors that are not trained."""
        factors = self.factors.values()
        return torch.cat([(torch.zeros_like(f) if f.grad is None else f.grad).reshape(-1) for f in factors])


class _CountedDropout(nn.Module):
    """In the place of PEFT's dropout: the masks of the fast path."""

    def __init__(self, name: str):
        nn.Module.__init__(self)
        self.name = name
        self.dropout: Dropout | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout is None:
            return x
        return x * self.dropout.keep(self.name, x.shape[-1]) * self.dropout.gain


def fit_one(model: ReferenceModel, fit: Fit, *, encode: Encoder) -> Fitted:
    """One job, alone: the textbook loop."""
    ranks = model.layout.ranks(fit.adapter)
    model.load(Tuning.of(fit), fit.train)
    local, factors = fit.local, list(model.factors.values())
    trained = [factor for factor in factors if factor.requires_grad]
    optimizer = _torch_optimizer(trained, local)
    correction = FlatCorrection.of(fit, model.layout, model.vector())
    rate = model.layout.spec.dropout
    losses: list[float] = []
    examples = tokens = 0
    for places in batches(fit):
        examples += len(places)
        batch = [(position, encode(fit.examples[i]), weight_of(fit, i)) for i, position in places]
        targets = sum(len(example.targets) for _, example, _ in batch)
        if targets == 0:
            continue
        optimizer.zero_grad()
        loss = 0.0
        for position, example, weight in batch:
            if len(example.targets) == 0:
                continue
            keys = token_keys(fit.seed, fit.stream, position, len(example.ids)).to(model.device)
            nll = model.nll(example, Dropout(rate, fit.seed, keys) if rate else None) * weight / targets
            nll.backward()
            loss += float(nll.detach())
            tokens += len(example.ids)
        grad = model.gradient()
        correction.add_to(grad, model.vector())
        for factor, part in zip(factors, grad.split([f.numel() for f in factors]), strict=True):
            if factor.requires_grad:
                factor.grad = part.view_as(factor)
        if local.clip:
            nn.utils.clip_grad_norm_(trained, local.clip)
        optimizer.step()
        losses.append(loss)
        if not all(torch.isfinite(factor).all() for factor in trained):
            break
    return Fitted(
        adapter=model.state(ranks).to(next(iter(fit.adapter.values())).dtype),
        steps=len(losses),
        examples=examples,
        tokens=tokens,
        learning_rate=local.learning_rate,
        loss=sum(losses) / len(losses) if losses else float("nan"),
    )


def score_one(model: ReferenceModel, score: Score, *, encode: Encoder) -> list[Scored]:
    model.load(Tuning.of(score))
    if score.adapter is None:
        with model.base_alone():
            return _scored(model, score, encode)
    return _scored(model, score, encode)


@torch.no_grad()
def _scored(model: ReferenceModel, score: Score, encode: Encoder) -> list[Scored]:
    examples = [encode(example) for example in score.examples]
    return [_score(model, e, energy=score.energy, per_token=score.per_token) for e in examples]


def _score(model: ReferenceModel, example: Encoded, *, energy: bool, per_token: bool) -> Scored:
    targets = len(example.at)
    if not targets:
        return Scored(0.0, 0, 0.0 if energy else None, TokenScores((), (), ()) if per_token else None)
    each = model.token_losses(example)
    return Scored(
        float(each.sum()),
        targets,
        float(model.energy(example)) / targets if energy else None,
        token_scores(model.token_statistics(example)) if per_token else None,
        float(each[-1]),
    )


def answer_all(
    model: ReferenceModel, requests: Mapping[Hashable, Fit | Score], *, encode: Encoder
) -> dict[Hashable, Any]:
    """One request after the other; the adapter in the model is overwritten by each."""
    return {
        key: fit_one(model, r, encode=encode) if isinstance(r, Fit) else score_one(model, r, encode=encode)
        for key, r in requests.items()
    }


def _torch_optimizer(params: list[nn.Parameter], local: LocalTraining) -> torch.optim.Optimizer:
    if local.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=local.learning_rate, momentum=local.momentum, weight_decay=local.weight_decay
        )
    return torch.optim.AdamW(
        params,
        lr=local.learning_rate,
        betas=(local.beta1, local.beta2),
        eps=local.eps,
        weight_decay=local.weight_decay,
    )
