from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LOCAL, distance, engine, example, examples, llama, moved, norms_in_double

from fedloom.engine.fitting import batches
from fedloom.errors import ConfigError, ModelError
from fedloom.state import AdapterState
from fedloom.steps import Correction, Fit, LocalTraining, Privacy, Score

SGD = LocalTraining(batch_size=4, learning_rate=0.1, optimizer="sgd", clip=0.0)
START = AdapterState({})
PATHS = pytest.mark.parametrize("path", ["fast", "reference"])


def consumed(fit: Fit) -> list[int]:
    return [index for batch in batches(fit) for index, _ in batch]


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    order = consumed(Fit(START, range(20), SGD, limit=60))
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_two_rounds_consume_what_one_longer_round_does():
    whole = consumed(Fit(START, range(7), SGD, stream=("c",), limit=19))
    first = consumed(Fit(START, range(7), SGD, stream=("c",), limit=5))
    second = consumed(Fit(START, range(7), SGD, stream=("c",), seen=5, limit=14))
    assert first + second == whole


def test_the_order_belongs_to_seed_and_stream():
    order = consumed(Fit(START, range(20), SGD, stream=("a", "local")))
    assert order != consumed(Fit(START, range(20), SGD, stream=("a", "other")))
    assert order != consumed(Fit(START, range(20), SGD, stream=("a", "local"), seed=1))


def test_without_a_limit_a_round_is_so_many_epochs():
    assert len(consumed(Fit(START, range(7), replace(SGD, epochs=3)))) == 21


def test_the_last_batch_may_be_smaller_and_is_kept():
    sizes = [len(batch) for batch in batches(Fit(START, range(10), SGD))]
    assert sizes == [4, 4, 2]


def test_a_batch_ends_with_its_epoch_as_a_data_loader_has_it():
    places = [[position for _, position in batch] for batch in batches(Fit(START, range(3), SGD, limit=4))]
    assert places == [[0, 1, 2], [3]]


def test_batches_across_epochs_are_an_option():
    endless = replace(SGD, batches="across_epochs")
    [batch] = batches(Fit(START, range(3), endless, limit=4))
    assert [position for _, position in batch] == [0, 1, 2, 3]
    assert [index for index, _ in batch] == consumed(
        Fit(START, range(3), SGD, limit=4)
    )  # the order is the same


@pytest.mark.parametrize(
    ("n", "size", "epochs", "steps"), [(5, 8, 3, 3), (50, 64, 10, 10), (16, 8, 2, 4), (9, 8, 2, 4)]
)
def test_a_job_takes_as_many_steps_as_a_data_loader(n, size, epochs, steps):
    local = replace(SGD, batch_size=size, epochs=epochs)
    loader = torch.utils.data.DataLoader(range(n), batch_size=size)  # type: ignore[arg-type]
    taken = list(batches(Fit(START, range(n), local)))
    assert [len(batch) for batch in taken] == [len(batch) for _ in range(epochs) for batch in loader]
    assert len(taken) == steps == local.steps_of(n, epochs * n)


@given(
    n=st.integers(1, 9),
    size=st.integers(1, 12),
    limits=st.lists(st.integers(0, 20), max_size=5),
    across=st.booleans(),
)
def test_rounds_with_a_limit_go_on_and_no_batch_holds_two_epochs(n, size, limits, across):
    local = replace(SGD, batch_size=size, batches="across_epochs" if across else "within_epochs")
    seen, taken = 0, []
    for limit in limits:
        places = list(batches(Fit(START, range(n), local, stream=("c",), seen=seen, limit=limit)))
        assert sum(map(len, places)) == limit
        assert all(0 < len(batch) <= size for batch in places)
        if not across:
            assert all(batch[0][1] // n == batch[-1][1] // n for batch in places)
        if seen == 0:
            assert len(places) == local.steps_of(n, limit)
        seen += limit
        taken += [place for batch in places for place in batch]
    assert [position for _, position in taken] == list(range(seen))
    assert [index for index, _ in taken] == consumed(Fit(START, range(n), local, stream=("c",), limit=seen))


@pytest.mark.parametrize("wrong", [{"seen": -1}, {"limit": -1}])
def test_negative_counts_are_refused(wrong):
    with pytest.raises(ConfigError, match="at least 0"):
        list(batches(Fit(START, range(3), SGD, **wrong)))


@PATHS
def test_two_sgd_rounds_equal_one_longer_round(path):
    with norms_in_double():
        trained = engine(llama(torch.float64), path=path)
        start = moved(trained.layout, torch.float64)
        whole = trained.answer({0: Fit(start, examples(7), SGD, limit=12)})[0]
        first = trained.answer({0: Fit(start, examples(7), SGD, limit=4)})[0]
        second = trained.answer({0: Fit(first.adapter, examples(7), SGD, seen=first.examples, limit=8)})[0]
    assert distance(second.adapter, whole.adapter) < 1e-14
    assert (first.steps + second.steps, first.tokens + second.tokens) == (whole.steps, whole.tokens)


@PATHS
@pytest.mark.parametrize("data", [[], [example(9, i, labelled=0) for i in range(5)]], ids=["none", "silent"])
def test_nothing_to_learn_from_leaves_the_adapter_as_it_was(path, data):
    trained = engine(llama(), path=path)
    start = moved(trained.layout)
    fitted = trained.answer({0: Fit(start, data, LOCAL)})[0]
    assert fitted.adapter.sha256() == start.sha256()
    assert (fitted.steps, fitted.tokens, fitted.examples) == (0, 0, len(data))
    assert math.isnan(fitted.loss)


@PATHS
def test_examples_without_labels_add_nothing_to_a_batch(path):
    one_batch = replace(SGD, batch_size=6)
    trained = engine(llama(), path=path)
    start = moved(trained.layout)
    silent = [example(9, 50 + i, labelled=0) for i in range(3)]
    mixed = trained.answer({0: Fit(start, examples(3) + silent, one_batch)})[0]
    pure = trained.answer({0: Fit(start, examples(3), one_batch)})[0]
    assert distance(mixed.adapter, pure.adapter) < 1e-6
    assert mixed.loss == pytest.approx(pure.loss, rel=1e-6)
    assert (mixed.examples, mixed.steps) == (6, 1)


@PATHS
def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_whole_batch(path):
    trained = engine(llama(), path=path, tokens_per_pass=10)
    start, data = moved(trained.layout), examples(4)
    scored = trained.answer({0: Score(data, start)})[0]
    fitted = trained.answer({0: Fit(start, data, SGD)})[0]
    expected = sum(s.nll for s in scored) / sum(s.targets for s in scored)
    assert fitted.loss == pytest.approx(expected, rel=1e-6)


@PATHS
def test_the_correction_is_added_to_the_gradient(path):
    with norms_in_double():
        trained = engine(llama(torch.float64), path=path)
        start, anchor, offset = (moved(trained.layout, torch.float64, seed) for seed in range(3))
        job = Fit(start, examples(4), SGD)
        plain = trained.answer({0: job})[0].adapter
        pushed = trained.answer({0: replace(job, correction=Correction(offset, anchor, mu=0.5))})[0].adapter
    expected = plain - 0.1 * (offset + 0.5 * (start - anchor))  # one step of SGD at rate 0.1
    assert distance(pushed, expected) < 1e-14


@PATHS
def test_the_anchor_pulls_from_where_the_job_is_not_from_where_it_began(path):
    with norms_in_double():
        trained = engine(llama(torch.float64), path=path)
        start = moved(trained.layout, torch.float64)
        job = Fit(start, examples(8), SGD, correction=Correction(anchor=start, mu=5.0))
        first = trained.answer({0: replace(job, limit=4)})[0].adapter
        both = trained.answer({0: job})[0].adapter
        second = trained.answer({0: replace(job, adapter=first, seen=4, limit=4)})[0].adapter
    assert distance(both, second) < 1e-14
    free = trained.answer({0: Fit(start, examples(8), SGD)})[0].adapter
    assert (both - start).norm() < (free - start).norm()


def test_clipping_bounds_the_corrected_gradient():
    clipped = replace(SGD, clip=0.5)
    trained = engine(llama())
    start = moved(trained.layout)
    offset = 10.0 * moved(trained.layout, seed=1)
    fitted = trained.answer({0: Fit(start, examples(4), clipped, correction=Correction(offset=offset))})[0]
    assert (fitted.adapter - start).norm() == pytest.approx(0.05, rel=1e-3)  # rate 0.1 * clip 0.5


def test_pulling_without_an_anchor_is_refused():
    trained = engine(llama())
    with pytest.raises(ConfigError, match="anchor"):
        trained.answer({0: Fit(moved(trained.layout), examples(2), LOCAL, correction=Correction(mu=0.1))})


def test_the_rate_of_a_fit_is_that_of_its_round():
    local = replace(SGD, schedule="cosine", rounds=10)
    trained = engine(llama())
    fits = {r: Fit(moved(trained.layout), examples(2), local.at(r)) for r in (0, 5, 10)}
    rates = [fitted.learning_rate for fitted in trained.answer(fits).values()]
    assert rates == pytest.approx([0.1, 0.05, 0.0])


REFUSED = {
    "schedule": ({"local": replace(SGD, schedule="cosine", rounds=10)}, r"local\.at\(round\)"),
    "objective": ({"objective": object()}, "objective"),
    "privacy": ({"privacy": Privacy(clip=1.0, noise_multiplier=1.0)}, "single examples"),
    "scale": ({"scale": math.inf}, "finite scale"),
}


@PATHS
@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_is_not_understood_is_refused_in_one_sentence(path, case):
    change, said = REFUSED[case]
    trained = engine(llama(), path=path)
    with pytest.raises(ConfigError, match=said):
        trained.answer({0: replace(Fit(moved(trained.layout), examples(2), SGD), **change)})


def test_a_job_that_diverges_takes_no_other_with_it():
    trained = engine(llama(), path="fast")
    start = moved(trained.layout)
    broken = AdapterState({name: t * float("inf") if "lora_A" in name else t for name, t in start.items()})
    jobs = {"ill": Fit(broken, examples(9, 1), LOCAL), "well": Fit(start, examples(9, 2), LOCAL)}
    answers = trained.answer(jobs)
    alone = trained.answer({"well": jobs["well"]})["well"]
    assert not answers["ill"].adapter.is_finite()
    assert answers["ill"].steps == 1
    assert answers["well"].steps == 3
    assert distance(answers["well"].adapter, alone.adapter) < 3e-4
    scores = trained.answer({"ill": Score(examples(2), broken), "well": Score(examples(2), start)})
    assert all(math.isnan(s.nll) for s in scores["ill"])
    assert all(math.isfinite(s.nll) for s in scores["well"])


def test_running_out_of_memory_halves_the_pass_and_moves_no_result(monkeypatch):
    with norms_in_double():
        calm, pressed = (engine(llama(torch.float64), path="fast", tokens_per_pass=400) for _ in range(2))
        limit = 128
        body = pressed.model.model.forward

        def cramped(input_ids, **options):
            if input_ids.shape[1] > limit:
                raise torch.OutOfMemoryError("no room")
            return body(input_ids=input_ids, **options)

        monkeypatch.setattr(pressed.model.model, "forward", cramped)
        jobs = {k: Fit(moved(calm.layout, torch.float64), examples(12, k), LOCAL) for k in range(3)}
        expected, answers = calm.answer(jobs), pressed.answer(jobs)
    assert pressed.served.packed.plan.tokens_per_pass == 100
    assert max(distance(answers[k].adapter, expected[k].adapter) for k in jobs) < 1e-10


def test_when_one_example_is_too_much_layers_are_recomputed_and_no_result_moves(monkeypatch):
    with norms_in_double():
        calm, pressed = (engine(llama(torch.float64), path="fast", tokens_per_pass=64) for _ in range(2))
        body = pressed.model.model.forward

        def cramped(**options):
            if torch.is_grad_enabled() and not pressed.served.packed._checkpointing:
                raise torch.OutOfMemoryError("no room")
            return body(**options)

        monkeypatch.setattr(pressed.model.model, "forward", cramped)
        jobs = {k: Fit(moved(calm.layout, torch.float64), examples(5, k), LOCAL) for k in range(2)}
        expected, answers = calm.answer(jobs), pressed.answer(jobs)
    assert pressed.served.packed._checkpointing
    assert max(distance(answers[k].adapter, expected[k].adapter) for k in jobs) < 1e-10


def test_too_little_memory_for_one_example_is_said_plainly(monkeypatch):
    trained = engine(llama(), path="fast")

    def never(**options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trained.model.model, "forward", never)
    with pytest.raises(ModelError, match="single example of 20 tokens"):
        trained.answer({0: Fit(moved(trained.layout), [example(21, 0)], LOCAL)})


def test_more_jobs_than_rows_are_answered_in_waves():
    trained = engine(llama(), path="fast")
    jobs = {k: Fit(moved(trained.layout, seed=k), examples(2 + k, k), LOCAL) for k in range(5)}
    jobs |= {("score", k): Score(examples(2, k), jobs[k].adapter) for k in range(5)}
    jobs["base"] = Score(examples(3))
    whole = trained.answer(jobs)
    trained.served.packed.plan = replace(trained.served.packed.plan, rows=2)
    waves = trained.answer(jobs)
    assert len(waves["base"]) == 3
    for k in range(5):
        assert distance(waves[k].adapter, whole[k].adapter) < 3e-4
        one, other = ([s.nll for s in answers[("score", k)]] for answers in (whole, waves))
        assert one == pytest.approx(other, rel=1e-5)


@PATHS
def test_a_mixture_of_requests_is_answered_under_their_keys_in_their_order(path):
    trained = engine(llama(), path=path)
    start = moved(trained.layout)
    requests = {
        "z": Score(examples(2)),
        3: Fit(start, examples(2), LOCAL),
        ("a", 1): Score(examples(3), start),
    }
    answers = trained.answer(requests)
    assert list(answers) == list(requests)
    assert (len(answers["z"]), answers[3].examples, len(answers["a", 1])) == (2, 2, 3)


@PATHS
def test_an_example_without_labels_scores_zero(path):
    trained = engine(llama(), path=path)
    [scored] = trained.answer({0: Score([example(9, 0, labelled=0)])})[0]
    assert (scored.nll, scored.targets) == (0.0, 0)


def test_a_fit_changes_neither_its_request_nor_the_model():
    trained = engine(llama())
    start = moved(trained.layout)
    before = start.sha256()
    weights = [p.clone() for p in trained.model.parameters()]
    trained.answer({0: Fit(start, examples(8), LOCAL)})
    assert start.sha256() == before
    assert all(torch.equal(p, w) for p, w in zip(trained.model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in trained.model.parameters())


def test_training_lowers_the_loss():
    local = LocalTraining(batch_size=4, learning_rate=1e-2, epochs=10)
    trained = engine(llama(initializer_range=0.2))
    data = examples(8)
    fitted = trained.answer({0: Fit(trained.initial_adapter(0), data, local)})[0]
    before, after = (
        sum(s.nll for s in trained.answer({0: Score(data, adapter)})[0]) for adapter in (None, fitted.adapter)
    )
    assert after < 0.9 * before
