"""The slow truth: plain PEFT, the model's own forward, one example at a time, torch's own optimizers.

It shares with the fast path what defines a job (order, batches, rates, dropout masks) and nothing of how
a batch is computed. It is right for every causal LM, and the engine falls back on it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.engine.dropout import Dropout, token_keys
from fedloom.engine.fitting import Push, batches, token_scores, weight_of
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.optimizer import LocalTraining
from fedloom.engine.packing import Encoded, Encoder
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, Score, Scored, TokenScores


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
        self._masks: list[_CountedDropout] = []
        for target in layout:
            layer: Any = self._model.get_submodule(f"base_model.model.{target.name}")
            for key, side in ((target.a_key, "lora_A"), (target.b_key, "lora_B")):
                factor = getattr(layer, side)["default"].to(dtype)
                self.factors[key] = factor.weight
            if spec.dropout:
                self._masks.append(_CountedDropout(target.name))
                layer.lora_dropout["default"] = self._masks[-1]

    @property
    def device(self) -> torch.device:
        return self._model.device

    def load(self, adapter: AdapterState) -> None:
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(adapter[name])

    def state(self) -> AdapterState:
        return AdapterState({name: f.detach().to("cpu", copy=True) for name, f in self.factors.items()})

    def nll(self, example: Encoded, dropout: Dropout | None = None) -> Tensor:
        """Nats summed over the labelled tokens of one example, by the model's own forward."""
        return F.cross_entropy(
            self.logits(example, dropout), example.targets.to(self.device), reduction="sum"
        )

    def energy(self, example: Encoded) -> Tensor:
        """-logsumexp of the logits, summed over the labelled tokens of one example."""
        return -self.logits(example).logsumexp(-1).sum()

    def surprise(self, example: Encoded) -> Tensor:
        """log p of each labelled token, then mean and deviation of log p under p: (m, 3)."""
        logits = self.logits(example)
        of_target = -F.cross_entropy(logits, example.targets.to(self.device), reduction="none")
        p = logits.double().softmax(-1)
        mean = -torch.special.entr(p).sum(-1)
        square = -(torch.special.entr(p) * p.clamp_min(1e-300).log()).sum(-1)
        return torch.stack([of_target.double(), mean, (square - mean.square()).clamp_min(0).sqrt()], -1)

    def logits(self, example: Encoded, dropout: Dropout | None = None) -> Tensor:
        """From which the labelled tokens are predicted: (m, V), at least float32."""
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

    def vector(self, what: str = "data") -> Tensor:
        """All factors (or their "grad") as one flat vector, in the order of the layout."""
        return torch.cat([getattr(factor, what).reshape(-1) for factor in self.factors.values()])


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


def fit_one(model: ReferenceModel, fit: Fit, *, encode: Encoder, local: LocalTraining, seed: int) -> Fitted:
    """One job, alone: the textbook loop."""
    model.load(fit.adapter)
    params = list(model.factors.values())
    learning_rate = local.learning_rate_at(fit.round)
    optimizer = _torch_optimizer(params, local, learning_rate)
    push = Push.of(fit.correction, model.layout, model.vector())
    rate = model.layout.spec.dropout
    losses: list[float] = []
    examples = tokens = 0
    for places in batches(fit, local, seed):
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
            keys = token_keys(seed, fit.stream, position, len(example.ids)).to(model.device)
            nll = model.nll(example, Dropout(rate, seed, keys) if rate else None) * weight / targets
            nll.backward()
            loss += float(nll.detach())
            tokens += len(example.ids)
        grad = model.vector("grad")
        push.add_to(grad, model.vector())
        for param, part in zip(params, grad.split([p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param)
        if local.clip:
            nn.utils.clip_grad_norm_(params, local.clip)
        optimizer.step()
        losses.append(loss)
        if not all(torch.isfinite(param).all() for param in params):
            break
    return Fitted(
        adapter=model.state().to(next(iter(fit.adapter.values())).dtype),
        steps=len(losses),
        examples=examples,
        tokens=tokens,
        learning_rate=learning_rate,
        loss=sum(losses) / len(losses) if losses else float("nan"),
    )


def score_one(model: ReferenceModel, score: Score, *, encode: Encoder) -> list[Scored]:
    if score.adapter is None:
        with model.base_alone():
            return _scored(model, score, encode)
    model.load(score.adapter)
    return _scored(model, score, encode)


@torch.no_grad()
def _scored(model: ReferenceModel, score: Score, encode: Encoder) -> list[Scored]:
    examples = [encode(example) for example in score.examples]
    return [_score(model, e, energy=score.energy, per_token=score.per_token) for e in examples]


def _score(model: ReferenceModel, example: Encoded, *, energy: bool, per_token: bool) -> Scored:
    targets = len(example.at)
    if not targets:
        return Scored(0.0, 0, 0.0 if energy else None, TokenScores((), (), ()) if per_token else None)
    return Scored(
        float(model.nll(example)),
        targets,
        float(model.energy(example)) / targets if energy else None,
        token_scores(model.surprise(example)) if per_token else None,
    )


def answer_all(
    model: ReferenceModel,
    requests: Mapping[Hashable, Fit | Score],
    *,
    encode: Encoder,
    local: LocalTraining,
    seed: int,
) -> dict[Hashable, Any]:
    """One request after the other; the adapter in the model is overwritten by each."""
    answers: dict[Hashable, Any] = {}
    for key, request in requests.items():
        if isinstance(request, Fit):
            answers[key] = fit_one(model, request, encode=encode, local=local, seed=seed)
        else:
            answers[key] = score_one(model, request, encode=encode)
    return answers


def _torch_optimizer(
    params: list[nn.Parameter], local: LocalTraining, learning_rate: float
) -> torch.optim.Optimizer:
    if local.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=learning_rate, momentum=local.momentum, weight_decay=local.weight_decay
        )
    return torch.optim.AdamW(
        params,
        lr=learning_rate,
        betas=(local.beta1, local.beta2),
        eps=local.eps,
        weight_decay=local.weight_decay,
    )
