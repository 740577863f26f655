"""Which tokens did a client train on? The first layer of its LoRA update tells.

A LoRA layer computes y = W x + s B A x, so its gradients are dA = s B^T (sum_t dy_t x_t^T) and
dB = s sum_t dy_t (A x_t)^T: every row of dA is a mixture of the layer's inputs x_t, and every row of dB
a mixture of their images A x_t. If positions enter inside attention (RoPE), the first layer's x_t depends on
the token alone, and embeddings are frozen and public. So the server can compute, for every token of the
vocabulary, how far its x_v is from the rows it received.

Any number of steps of SGD, momentum and clipping keep this exact. Adam scales single coordinates, which blurs
it, but attackers still read most of it. `q_proj`, `k_proj` and `v_proj` share their input, so rank r shows up
to 3 r directions. More distinct tokens than directions do not hide them: tokens are taken one at a time, each
removed from rows and vocabulary before the next, which identifies a sparse mixture well beyond its rank. In
the very first step B = 0 leaves dA = 0, but dB still identifies fewer than r tokens.

The span test is DAGER's (Petrov et al. 2024, arXiv 2405.15586), its LoRA form derived here; taking tokens one
at a time is rank-aware order-recursive matching pursuit (Davies & Eldar 2012, arXiv 1004.4529).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedloom import lora
from fedloom.attacks.membership import DIGITS
from fedloom.attacks.view import ServerView
from fedloom.state import AdapterState
from fedloom.steps import Engine, Score

_NEGLIGIBLE = 1e-5  # singular values this small relative to the largest come from rounding
_DUPLICATE = 1e-2  # of a vector's length; with less of it left, it is indistinguishable from those taken


@dataclass(frozen=True)
class FirstInputs:
    """The input of the first adapted layer for each token, which does not depend on context."""

    modules: tuple[str, ...]  # adapted modules that share this input: q_proj, k_proj, v_proj
    vectors: Tensor  # (V, d), float32 on the CPU


@dataclass(frozen=True)
class Inapplicable:
    """The reason why this attack does not apply. It does not mean that the update is safe to publish."""

    reason: str


@dataclass(frozen=True)
class TokenRanking:
    """The vocabulary, from the token most likely in the client's examples to the least."""

    tokens: Tensor  # (V,) token ids
    distances: Tensor  # (V,) by token id: share of its vector outside the rows' span, evened out; 0: inside
    explained: int | None  # how many first tokens explain the whole update, almost uniquely; None: unknown
    factor: Literal["A", "B"]  # whose rows were read
    directions: int  # numerical rank of those rows; for factor "B" the largest of a module


@dataclass(frozen=True)
class TokenRecall:
    recall: float  # share of the T true tokens among the T ranked first
    chance: float  # T / V: the recall of a random ranking
    chance_sd: float  # its standard deviation
    tokens: int  # T


def layer_inputs(model: Any, adapter: AdapterState) -> FirstInputs | Inapplicable:
    """Feed the vocabulary to a Hugging Face causal LM and keep the inputs of its first adapted layer.

    A measurement tells whether the attack applies: the same tokens in another order must give the same
    vectors. They do in Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX and OLMo, whose positions enter
    inside attention; they do not in GPT-2 and OPT, which add learned positions to the embeddings.
    """
    names = sorted(target.removeprefix(lora.ON_DISK) for target in lora.pairs(adapter))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1]).float().cpu()

        return hook

    def feed(ids: Tensor) -> None:
        model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False)

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    size = model.get_input_embeddings().weight.shape[0]
    probe = torch.arange(min(8, size), device=model.device)
    try:
        with torch.no_grad():
            feed(probe.flip(0))
            turned = {name: x.flip(0) for name, x in seen.items()}
            seen.clear()
            feed(probe)
            first = next(iter(seen))  # in order of call
            x = seen[first]
            shared = [name for name, y in seen.items() if y.shape == x.shape and y.equal(x)]
            if float((x - turned[first]).abs().max()) > 1e-3 * float(x.abs().max()):
                return Inapplicable(
                    f"The input of {first!r}, the first adapted layer, depends on position or context, so "
                    "tokens have no vectors of their own there (learned positions, or an adapter that leaves out "
                    "the first layer)."
                )
            hooks.append(model.get_submodule(first).register_forward_pre_hook(_stop))
            vectors = []
            for ids in torch.arange(size, device=model.device).split(256):
                with suppress(_Stop):
                    feed(ids)
                vectors.append(seen[first])
    finally:
        for handle in hooks:
            handle.remove()
    return FirstInputs(tuple(shared), torch.cat(vectors))


class _Stop(Exception):
    """Ends a forward pass once the first adapted layer has its input."""


def _stop(*_: Any) -> None:
    raise _Stop


def shrinkage(*, learning_rate: float, weight_decay: float, steps: int, momentum: float = 0.0) -> float:
    """The fraction of every parameter that weight decay removed in `steps` steps.

    AdamW's is decoupled; SGD's enters after clipping and passes through momentum. Both can be computed.
    """
    left, velocity = 1.0, 0.0
    for _ in range(steps):
        velocity = momentum * velocity + weight_decay * left
        left -= learning_rate * velocity
    return 1.0 - left


def invert(
    view: ServerView,
    inputs: FirstInputs,
    *,
    guesses: int = 64,
    decayed: float = 0.0,
) -> TokenRanking | Inapplicable:
    """Rank the vocabulary by how well each token's vector explains the rows of the update.

    The first `guesses` are taken one at a time; the rest follow by distance to the span, so 0 guesses are the
    span test alone. That suits Adam's updates on natural text, whose blur misleads a long search; the search
    suits SGD. `decayed` is the fraction of the broadcast adapter that weight decay removed (`shrinkage`); it
    is restored before anything else. Time grows with guesses * V * d * directions.
    """
    looks = _looks(view, inputs, decayed)
    if not looks:
        return Inapplicable("The update of the first layer is zero.")
    telling = [look for look in looks if len(look.basis) < look.rows.shape[1]]
    if not telling:
        return Inapplicable("The rows of the update fill their space, so they single out no token.")
    looks = telling
    directions = max(len(look.basis) for look in looks)
    distances = (1.0 - _closeness(looks)).clamp(0.0, 1.0).sqrt()

    taken: list[int] = []
    explained = None
    for _ in range(guesses):
        closeness = _closeness(looks)
        closeness[taken] = 0.0
        token = int(closeness.argmax())
        if closeness[token] <= 0.0:  # the rows, or the vocabulary, are used up
            break
        taken.append(token)
        for look in looks:
            look.take(token)
    # Below half of d + rank no other tokens explain the rows as well, unless vectors are linearly dependent.
    if not any(len(look.basis) for look in looks) and 2 * len(taken) < looks[0].rows.shape[1] + directions:
        explained = len(taken)
    order = distances.clone()
    order[taken] = torch.arange(-len(taken), 0, dtype=order.dtype)
    return TokenRanking(order.argsort(stable=True), distances, explained, looks[0].factor, directions)


def _looks(view: ServerView, inputs: FirstInputs, decayed: float) -> list[_Look]:
    """The rows of dA of all modules together; if they are zero, those of dB, module by module."""
    targets = [lora.ON_DISK + module for module in inputs.modules]
    own, sent = lora.pairs(view.adapter), lora.pairs(view.delta)
    vectors = inputs.vectors.double()  # (V, d)
    a = torch.cat([own[target].a.double() for target in targets])  # (modules * r, d)
    rounding = torch.finfo(own[targets[0]].a.dtype).eps
    rows = torch.cat([sent[target].a.double() for target in targets]) + decayed * a
    floor = rounding * float(a.abs().max())  # an entry this small is a difference of equal values
    if float(rows.abs().max()) > floor:
        even = _evening(vectors)
        return [_Look("A", rows @ even, vectors @ even, floor)]
    looks = []
    for target in targets:
        b = own[target].b.double()
        rows = sent[target].b.double() + decayed * b  # (out, r)
        floor = rounding * float(b.abs().max())
        if float(rows.abs().max()) > floor:
            looks.append(_Look("B", rows, vectors @ own[target].a.double().t(), floor))
    return looks


def _evening(vectors: Tensor) -> Tensor:
    """A linear map (d, d) that spreads the vocabulary evenly over all directions, without enlarging any.

    Vectors in a span stay in it. Others move away from it, since no token is near it merely because of
    the direction that most tokens share. Directions of little variance, where rounding and Adam matter most,
    are not amplified.
    """
    squares, axes = torch.linalg.eigh(vectors.t() @ vectors / len(vectors))
    mean = squares.mean()
    evened: Tensor = axes @ torch.diag((mean / (squares + mean)).sqrt()) @ axes.t()
    return evened


class _Look:
    """Rows of an update and the vocabulary in their space, with the tokens taken so far removed from both."""

    def __init__(self, factor: Literal["A", "B"], rows: Tensor, vectors: Tensor, floor: float):
        self.factor: Literal["A", "B"] = factor
        self.rows = rows  # (n, d)
        self.vectors = vectors  # (V, d), as given: removals are recorded in `left` and `removed`
        self.lengths = vectors.square().sum(1)  # (V,) squared
        self.left = self.lengths.clone()  # (V,) squared length that is left
        self.removed = rows.new_empty(0, rows.shape[1])  # orthonormal
        largest = float(torch.linalg.matrix_norm(rows, 2))
        noise = floor * (math.sqrt(rows.shape[0]) + math.sqrt(rows.shape[1]))  # norm of that much rounding
        self.tolerance = max(_NEGLIGIBLE * largest, noise)
        self._span()

    def _span(self) -> None:
        _, values, rows = torch.linalg.svd(self.rows, full_matrices=False)
        self.basis = rows[values > self.tolerance]  # (k, d), orthonormal

    def closeness(self) -> Tensor:
        """Squared share of each vector, without the tokens taken, that lies in the span: (V,), 1 inside."""
        inside = (self.vectors @ self.basis.t()).square().sum(1)
        told = self.left > _DUPLICATE**2 * self.lengths
        return torch.where(told, inside / self.left.clamp_min(1e-300), 0.0)

    def take(self, token: int) -> None:
        x = self.vectors[token]
        for _ in range(2):  # twice, to remove what rounding left
            x = x - self.removed.t() @ (self.removed @ x)
        x = x / x.norm()
        self.removed = torch.cat([self.removed, x[None]])
        self.left = (self.left - (self.vectors @ x).square()).clamp_min(0.0)
        self.rows = self.rows - torch.outer(self.rows @ x, x)
        self._span()


def _closeness(looks: Sequence[_Look]) -> Tensor:
    return torch.stack([look.closeness() for look in looks]).mean(0)


def recall(ranking: TokenRanking, tokens: Collection[int], *, known: Collection[int] = ()) -> TokenRecall:
    """How many of the T distinct `tokens` are among the T ranked first.

    `known` tokens, those of a public prompt format, are excluded from both.
    """
    wanted, skipped = set(tokens) - set(known), set(known)
    size = len(ranking.tokens) - len(skipped)
    if not wanted:
        return TokenRecall(float("nan"), float("nan"), float("nan"), 0)
    ranked = [token for token in ranking.tokens.tolist() if token not in skipped]
    t = len(wanted)
    chance = t / size
    # Hits of a random ranking are hypergeometric: t draws from `size`, of which t count.
    sd = math.sqrt(chance * (1 - chance) * (size - t) / max(1, size - 1) / t)
    return TokenRecall(len(wanted.intersection(ranked[:t])) / t, chance, sd, t)


def precision(ranking: TokenRanking, tokens: Collection[int], *, threshold: float) -> float:
    """Share of true tokens among those within `threshold` of the span, DAGER's rule; NaN if none are."""
    accepted = (ranking.distances < threshold).nonzero().flatten().tolist()
    return len(set(tokens).intersection(accepted)) / len(accepted) if accepted else float("nan")


def membership(view: ServerView, engine: Engine, examples: Sequence[Any]) -> list[float]:
    """A score for each example, higher for those the client trained on: how far its update lowers their loss.

    It is the loss under the broadcast adapter less the loss with this one update applied, in nats per
    labelled token. The broadcast adapter is the reference, so easy examples gain no advantage.
    """
    answers = engine.answer(
        {"before": Score(examples, view.adapter), "after": Score(examples, view.adapter + view.delta)}
    )
    pairs = zip(answers["before"], answers["after"], strict=True)
    return [round((before.nll - after.nll) / max(1, before.targets), DIGITS) for before, after in pairs]
