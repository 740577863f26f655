"""Answers Fit and Score: many jobs' batches in shared passes, each job as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom import rng
from fedloom.engine.bank import AdapterBank, Tuning
from fedloom.engine.dropout import token_keys
from fedloom.engine.forward import PackedModel, summed
from fedloom.engine.layout import AdapterLayout
from fedloom.engine.optimizer import RowOptimizer
from fedloom.engine.packing import Encoder, Item
from fedloom.errors import ConfigError
from fedloom.state import AdapterState
from fedloom.steps import Fit, Fitted, NextToken, Score, Scored, TokenScores

Place = tuple[int, int]  # (index into the job's examples, position in its endless stream)


def check(fit: Fit) -> None:
    """Raise ConfigError for a request that no path of this engine can do."""
    if fit.local.schedule != "constant":
        raise ConfigError(
            "Expected the learning rate of one round, got a schedule: hand over local.at(round)."
        )
    if not isinstance(fit.objective, NextToken):
        raise ConfigError(f"This engine trains on NextToken() alone, got the objective {fit.objective!r}.")
    if fit.privacy is not None:
        raise ConfigError(
            f"This engine does not clip and noise single examples yet; leave out {fit.privacy!r}."
        )


def batches(fit: Fit) -> Iterator[list[Place]]:
    """A job's examples, batch by batch; the last of an epoch and of the job may be smaller.

    The stream is permutation after permutation of the examples, the n-th drawn for (seed, stream, n). No batch
    holds examples of two of them, unless `local.batches` is "across_epochs".
    """
    n, local = len(fit.examples), fit.local
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
                order = rng.numpy_stream(fit.seed, "order", *fit.stream, epoch).permutation(n).tolist()
            batch.append((order[position % n], position))
        yield batch
        start = stop


def weight_of(fit: Fit, index: int) -> float:
    return 1.0 if fit.weights is None else fit.weights[index]


@dataclass(frozen=True)
class FlatCorrection:
    """A job's `Correction` as flat vectors."""

    offset: Tensor | None
    anchor: Tensor | None
    mu: float

    @classmethod
    def of(cls, fit: Fit, layout: AdapterLayout, like: Tensor) -> FlatCorrection:
        """In dtype and on the device of `like`. Raises ConfigError, or ShapeMismatch for shapes other than the adapter's."""

        def flat(state: AdapterState | None) -> Tensor | None:
            if state is None:
                return None
            fit.adapter.check_compatible(state)
            return layout.to_vector(state).to(like)

        correction = fit.correction
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

    def __init__(self, fit: Fit, row: int, bank: AdapterBank, trained: Tensor | None):
        self.fit = fit
        self.row = row
        self.trained = trained  # int64, places in a row of the numbers that are trained; None: all
        self.batches = batches(fit)
        self.optimizer = RowOptimizer(fit.local)
        self.correction = FlatCorrection.of(fit, bank.layout, bank.params)
        self.losses: list[float] = []
        self.examples = 0
        self.tokens = 0

    def next_batch(self, encode: Encoder, *, dropout: bool) -> list[Item] | None:
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
                    keys=token_keys(self.fit.seed, self.fit.stream, pos, len(example.ids))
                    if dropout
                    else None,
                )
                for pos, example, weight in batch
            ]
        return None

    def step(self, bank: AdapterBank, loss: float) -> bool:
        """Take the optimizer step; False if the job has diverged and must stop."""
        assert bank.grads is not None
        params, grad = bank.params[self.row], bank.grads[self.row]
        self.losses.append(loss)
        self.correction.add_to(grad, params)
        if self.trained is None:
            self.optimizer.step(params, grad)
        else:
            own = params[self.trained]
            self.optimizer.step(own, grad[self.trained])
            params[self.trained] = own
        return bool(torch.isfinite(params).all())

    def answer(self, bank: AdapterBank) -> Fitted:
        steps = len(self.losses)
        return Fitted(
            adapter=bank.state(self.row).to(next(iter(self.fit.adapter.values())).dtype),
            steps=steps,
            examples=self.examples,
            tokens=self.tokens,
            learning_rate=self.fit.local.learning_rate,
            loss=sum(self.losses) / steps if steps else float("nan"),
        )


def fit_all(
    packed: PackedModel,
    layout: AdapterLayout,
    requests: Mapping[Hashable, Fit],
    *,
    encode: Encoder,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Hashable, Fitted]:
    """Advance jobs together, one optimizer step each at a time; finished jobs leave the pass.

    A job whose parameters become infinite or NaN stops there; its adapter says so (`is_finite`).
    """
    answers: dict[Hashable, Fitted] = {}
    for wave in _waves(requests, packed.plan.rows, dropout=layout.spec.dropout > 0):
        fits = {key: requests[key] for key in wave}
        answers |= _advance(fits, packed, layout, encode=encode, dtype=dtype, device=device)
    return answers


def _waves(requests: Mapping[Hashable, Fit], rows: int, *, dropout: bool) -> Iterator[list[Hashable]]:
    """At most `rows` jobs that advance together: they train the same factors, so no gradient is computed in vain.

    Under dropout they have one seed, since a pass has one.
    """
    alike: dict[Hashable, list[Hashable]] = {}
    for key, fit in requests.items():
        alike.setdefault((fit.train, fit.seed if dropout else None), []).append(key)
    for keys in alike.values():
        for start in range(0, len(keys), rows):
            yield keys[start : start + rows]


def _advance(
    requests: Mapping[Hashable, Fit],
    packed: PackedModel,
    layout: AdapterLayout,
    *,
    encode: Encoder,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Hashable, Fitted]:
    """One wave."""
    fits = list(requests.values())
    train, seed = fits[0].train, fits[0].seed
    dropout = (layout.spec.dropout, seed) if layout.spec.dropout else None
    bank = AdapterBank(
        layout, [Tuning.of(fit) for fit in fits], dtype=dtype, device=device, training=True, train=train
    )
    trained = None if train == "AB" else layout.mask(train).nonzero()[:, 0].to(device)
    jobs = [_Job(fit, row, bank, trained) for row, fit in enumerate(fits)]
    running = jobs
    while running:
        ready: list[_Job] = []
        items: list[Item] = []
        for job in running:
            batch = job.next_batch(encode, dropout=dropout is not None)
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
    return {key: job.answer(bank) for key, job in zip(requests, jobs, strict=True)}


def token_scores(statistics: Tensor) -> TokenScores:
    """From rows of log p, mean and deviation: (labelled tokens, 3)."""
    logp, mean, std = statistics.T.tolist()
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
    """Score examples under their adapters; requests with the same objects for adapter and frozen factors share a row."""
    answers: dict[Hashable, list[Scored]] = {key: [] for key in requests}
    place = {key: (id(r.adapter), r.scale, id(r.frozen)) for key, r in requests.items()}
    tunings = {place[key]: Tuning.of(request) for key, request in requests.items()}
    tuned = [key for key, tuning in tunings.items() if not tuning.is_base]
    base = {key: -1 for key, tuning in tunings.items() if tuning.is_base}
    waves = [tuned[i : i + packed.plan.rows] for i in range(0, len(tuned), packed.plan.rows)] or [[]]
    for number, wave in enumerate(waves):
        rows = {key: row for row, key in enumerate(wave)} | (base if number == 0 else {})
        mine = [(rows[place[key]], key) for key in requests if place[key] in rows]
        mine.sort(key=lambda pair: pair[0])  # a row's examples side by side
        items = [Item(row, encode(example)) for row, key in mine for example in requests[key].examples]
        bank = AdapterBank(layout, [tunings[key] for key in wave], dtype=dtype, device=device, training=False)
        asked = [requests[key] for _, key in mine for _ in requests[key].examples]
        each = packed.token_losses(items, bank)
        nll = summed(each, items).tolist()
        ends = each.split([len(item.example.at) for item in items])
        energetic = [item for item, request in zip(items, asked, strict=True) if request.energy]
        energies = iter(packed.energies(energetic, bank).tolist())
        spelled = [item for item, request in zip(items, asked, strict=True) if request.per_token]
        statistics = iter(
            packed.token_statistics(spelled, bank).split([len(item.example.at) for item in spelled])
        )
        scored = iter(zip(nll, ends, items, strict=True))
        for _, key in mine:
            for _ in requests[key].examples:
                value, tail, item = next(scored)
                targets = len(item.example.targets)
                energy = next(energies) / max(targets, 1) if requests[key].energy else None
                tokens = token_scores(next(statistics)) if requests[key].per_token else None
                last = float(tail[-1]) if targets else None
                answers[key].append(Scored(value, targets, energy, tokens, last))
    return answers
