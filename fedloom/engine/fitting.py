"""Answers Fit and Score: many jobs' batches in shared passes, each job as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import rng
from fedloom.engine.bank import AdapterBank
from fedloom.engine.dropout import token_keys
from fedloom.engine.forward import PackedModel
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.optimizer import LocalTraining, RowOptimizer
from fedloom.engine.packing import Encoder, Item
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Correction, Fit, Fitted, Score, Scored, TokenScores

Place = tuple[int, int]  # (index into the job's examples, position in its endless stream)


def batches(fit: Fit, local: LocalTraining, seed: int) -> Iterator[list[Place]]:
    """What a job consumes, batch by batch; the last of an epoch and of the job may be smaller.

    The stream is permutation after permutation of the examples, the n-th drawn for (seed, stream, n). No batch
    holds examples of two of them, unless `local.batches` is "across_epochs".
    """
    n = len(fit.examples)
    if fit.seen < 0 or (fit.limit is not None and fit.limit < 0):
        raise ConfigError(f"Expected {fit.seen=} and {fit.limit=} of at least 0.")
    if fit.weights is not None and (len(fit.weights) != n or not all(0 <= w < math.inf for w in fit.weights)):
        raise ConfigError(
            f"Expected {n} weights, one an example, finite and not below 0; got {len(fit.weights)}."
        )
    count = (local.epochs * n if fit.limit is None else fit.limit) if n else 0
    epoch, order = -1, list[int]()
    start, end = fit.seen, fit.seen + count
    while start < end:
        stop = min(start + local.batch_size, end)
        if local.batches == "within_epochs":
            stop = min(stop, (start // n + 1) * n)
        batch: list[Place] = []
        for position in range(start, stop):
            if position // n != epoch:
                epoch = position // n
                order = rng.numpy_stream(seed, "order", *fit.stream, epoch).permutation(n).tolist()
            batch.append((order[position % n], position))
        yield batch
        start = stop


def weight_of(fit: Fit, index: int) -> float:
    return 1.0 if fit.weights is None else fit.weights[index]


@dataclass(frozen=True)
class Push:
    """A job's `Correction` as flat vectors."""

    offset: Tensor | None
    anchor: Tensor | None
    mu: float

    @classmethod
    def of(cls, correction: Correction, layout: AdapterLayout, like: Tensor) -> Push:
        def flat(state: AdapterState | None) -> Tensor | None:
            return None if state is None else layout.to_vector(state).to(like)

        if correction.mu and correction.anchor is None:
            raise ConfigError(f"A correction with mu = {correction.mu} needs an anchor to pull towards.")
        return cls(flat(correction.offset), flat(correction.anchor) if correction.mu else None, correction.mu)

    def add_to(self, grad: Tensor, params: Tensor) -> None:
        if self.offset is not None:
            grad.add_(self.offset)
        if self.anchor is not None:
            grad.add_(params - self.anchor, alpha=self.mu)


class _Job:
    """One Fit on its way: which batch comes next, its optimizer, what to report."""

    def __init__(self, fit: Fit, row: int, bank: AdapterBank, local: LocalTraining, seed: int):
        self.fit = fit
        self.row = row
        self.batches = batches(fit, local, seed)
        self.optimizer = RowOptimizer(local)
        self.learning_rate = local.learning_rate_at(fit.round)
        self.push = Push.of(fit.correction, bank.layout, bank.params)
        self.losses: list[float] = []
        self.examples = 0
        self.tokens = 0

    def next_batch(self, encode: Encoder, *, dropout: bool, seed: int) -> list[Item] | None:
        """The items of the next batch that has a labelled token; None when the job is done."""
        for places in self.batches:
            self.examples += len(places)
            batch = [(pos, encode(self.fit.examples[i]), weight_of(self.fit, i)) for i, pos in places]
            targets = sum(len(example.targets) for _, example, _ in batch)
            if targets == 0:
                continue
            self.tokens += sum(len(example.ids) for _, example, _ in batch)
            return [
                Item(
                    self.row,
                    example,
                    weight=weight / targets,
                    keys=token_keys(seed, self.fit.stream, pos, len(example.ids)) if dropout else None,
                )
                for pos, example, weight in batch
            ]
        return None

    def step(self, bank: AdapterBank, loss: float) -> bool:
        """Take the optimizer step; False if the job has diverged and must stop."""
        assert bank.grads is not None
        params, grad = bank.params[self.row], bank.grads[self.row]
        self.losses.append(loss)
        self.push.add_to(grad, params)
        self.optimizer.step(params, grad, learning_rate=self.learning_rate)
        return bool(torch.isfinite(params).all())

    def answer(self, bank: AdapterBank) -> Fitted:
        steps = len(self.losses)
        return Fitted(
            adapter=bank.state(self.row).to(next(iter(self.fit.adapter.values())).dtype),
            steps=steps,
            examples=self.examples,
            tokens=self.tokens,
            learning_rate=self.learning_rate,
            loss=sum(self.losses) / steps if steps else float("nan"),
        )


def fit_all(
    packed: PackedModel,
    layout: AdapterLayout,
    requests: Mapping[Hashable, Fit],
    *,
    encode: Encoder,
    local: LocalTraining,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Hashable, Fitted]:
    """Advance jobs together, one optimizer step each at a time; finished jobs leave the pass.

    A job whose parameters become infinite or NaN stops there; its adapter says so (`is_finite`).
    """
    answers: dict[Hashable, Fitted] = {}
    dropout = (layout.spec.dropout, seed) if layout.spec.dropout else None
    keys = list(requests)
    for start in range(0, len(keys), packed.plan.rows):
        wave = keys[start : start + packed.plan.rows]
        adapters = [requests[key].adapter for key in wave]
        bank = AdapterBank(layout, adapters, dtype=dtype, device=device, training=True)
        jobs = [_Job(requests[key], row, bank, local, seed) for row, key in enumerate(wave)]
        running = jobs
        while running:
            ready: list[_Job] = []
            items: list[Item] = []
            for job in running:
                batch = job.next_batch(encode, dropout=dropout is not None, seed=seed)
                if batch is not None:
                    ready.append(job)
                    items += batch
            if not ready:
                break
            weights = torch.tensor([item.weight for item in items], dtype=torch.float64)
            weighted = packed.losses(items, bank, dropout=dropout) * weights
            rows = torch.tensor([item.row for item in items])
            losses = torch.zeros(len(jobs), dtype=torch.float64).index_add_(0, rows, weighted).tolist()
            running = [job for job in ready if job.step(bank, losses[job.row])]
        answers.update((key, job.answer(bank)) for key, job in zip(wave, jobs, strict=True))
    return answers


def token_scores(surprise: Tensor) -> TokenScores:
    """(labelled tokens, 3) -> the same by column."""
    logp, mean, std = surprise.T.tolist()
    return TokenScores(tuple(logp), tuple(mean), tuple(std))


def score_all(
    packed: PackedModel,
    layout: AdapterLayout,
    requests: Mapping[Hashable, Score],
    *,
    encode: Encoder,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Hashable, list[Scored]]:
    """Score examples under their adapters; requests with the same adapter object share a row."""
    answers: dict[Hashable, list[Scored]] = {key: [] for key in requests}
    adapters = {id(request.adapter): request.adapter for request in requests.values()}
    tuned = [state for state in adapters.values() if state is not None]
    waves = [tuned[i : i + packed.plan.rows] for i in range(0, len(tuned), packed.plan.rows)] or [[]]
    for number, wave in enumerate(waves):
        rows = {id(state): row for row, state in enumerate(wave)}
        if number == 0:
            rows[id(None)] = -1
        mine = [(rows[id(r.adapter)], key) for key, r in requests.items() if id(r.adapter) in rows]
        mine.sort(key=lambda pair: pair[0])  # a row's examples side by side
        items = [Item(row, encode(example)) for row, key in mine for example in requests[key].examples]
        bank = AdapterBank(layout, wave, dtype=dtype, device=device, training=False)
        asked = [requests[key] for _, key in mine for _ in requests[key].examples]
        nll = packed.losses(items, bank).tolist()
        energetic = [item for item, request in zip(items, asked, strict=True) if request.energy]
        energies = iter(packed.energies(energetic, bank).tolist())
        spelled = [item for item, request in zip(items, asked, strict=True) if request.per_token]
        surprises = iter(packed.surprises(spelled, bank).split([len(item.example.at) for item in spelled]))
        scored = iter(zip(nll, items, strict=True))
        for _, key in mine:
            for _ in requests[key].examples:
                value, item = next(scored)
                targets = len(item.example.targets)
                energy = next(energies) / max(targets, 1) if requests[key].energy else None
                tokens = token_scores(next(surprises)) if requests[key].per_token else None
                answers[key].append(Scored(value, targets, energy, tokens))
    return answers
