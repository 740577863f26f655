"""B6: a round of FedPIT. Every client generates examples with its own adapter, then tunes two adapters.

    python -m benchmarks.generation --scale real

Eight prompts per client are continued greedily by 48 tokens; the private adapter is tuned on local and
synthetic examples, the public one on synthetic ones. The peer passes prompts to Hugging Face's `generate` one
by one and calls Trainer twice per client; "per-client batches" passes all of a client's prompts at once. In
float64, on a small copy, all tokens must be the same. In float32 a random model's two best tokens are often
equal to the last digit, so there the share of equal tokens is reported and both sides tune on the same
synthetic examples. fedloom also runs in bfloat16 where the processor supports it; the change this makes is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import contest, hf_trainer, rounds, workload
from benchmarks.contest import Report, Row, Stopwatch, Times
from benchmarks.rounds import Outcome, Setting
from benchmarks.workload import Example, Work
from fedloom.engine.layout import AdapterLayout
from fedloom.state import AdapterState
from fedloom.steps import Fit, Generate, Tokens

FEDLOOM, BF16 = "fedloom", "fedloom, bfloat16"
ONE, BATCHES = "one prompt at a time", "per-client batches"
GOALS = {FEDLOOM: "5 (8)"}
NO_STOP: frozenset[int] = frozenset()
SETTING = Setting(
    size="15M",
    clients=5,
    samples=8,
    per_round=5,
    batch=8,
    micro_batch=8,
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
)
TINY = replace(SETTING, size="tiny", clients=2, per_round=2, samples=3, batch=3, micro_batch=3)


@dataclass(frozen=True)
class Round:
    """The common starting point of all contestants."""

    setting: Setting
    new: int  # tokens per answer
    local: list[list[Example]]  # by client
    prompts: list[list[list[int]]]  # by client
    adapters: list[AdapterState]  # by client
    encode: workload.Encode
    tokenizer: Any

    @classmethod
    def of(cls, setting: Setting, new: int, dtype: torch.dtype) -> Round:
        tokenizer = workload.tokenizer()
        local = workload.clients(setting.clients, setting.samples)
        asked = workload.clients(setting.clients, setting.samples, seed=43)
        prompts = [[workload.prompt_of(e, tokenizer)[-256:] for e in mine] for mine in asked]
        layout = AdapterLayout.of(workload.llama(setting.size), setting.lora)
        adapters = [workload.later_adapter(layout, dtype) * (1 + 0.1 * k) for k in range(setting.clients)]
        return cls(setting, new, local, prompts, adapters, workload.shepherd_tokens(tokenizer), tokenizer)


Answers = list[list[list[int]]]  # by client, by prompt


def by_hugging_face(peft: Any, given: Round, *, width: int | None) -> Answers:
    """Continue `width` prompts of a client at a time; None: all."""
    answers: Answers = []
    for adapter, prompts in zip(given.adapters, given.prompts, strict=True):
        workload.put(peft, adapter)
        step, mine = width or len(prompts), []
        for i in range(0, len(prompts), step):
            part = prompts[i : i + step]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
            with torch.no_grad():
                out = peft.generate(
                    input_ids=ids.to(peft.device),
                    attention_mask=mask.to(peft.device),
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                    max_new_tokens=given.new,
                    min_new_tokens=given.new,
                )
            mine += out[:, longest:].tolist()
        answers.append(mine)
    return answers


def by_fedloom(engine: Any, given: Round) -> Answers:
    pairs = enumerate(zip(given.prompts, given.adapters, strict=True))
    requests: dict[Hashable, Any] = {k: Generate(p, a, given.new, NO_STOP) for k, (p, a) in pairs}
    answered = engine.answer(requests)
    return [answered[k] for k in requests]


def equal_share(one: Answers, other: Answers) -> float:
    pairs = [
        a == b
        for mine, theirs in zip(one, other, strict=True)
        for x, y in zip(mine, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return sum(pairs) / len(pairs)


def engine_of(given: Round, dtype: torch.dtype) -> Any:
    return rounds.engine(never_ending(workload.llama(given.setting.size, dtype)), given.setting, given.encode)


def peft_of(given: Round, dtype: torch.dtype) -> Any:
    return hf_trainer.with_lora(never_ending(workload.llama(given.setting.size, dtype)), given.setting).eval()


def never_ending(model: Any) -> Any:
    """A model that cannot produce the end of text: all answers have the same number of tokens."""
    with torch.no_grad():
        model.generation_config.eos_token_id = None
    return model


def synthetic(given: Round, answers: Answers) -> list[list[Tokens]]:
    """Prompt and answer as an example with the loss on its answer."""
    return [
        [Tokens((*p, *a), (False,) * len(p) + (True,) * len(a)) for p, a in zip(ps, xs, strict=True)]
        for ps, xs in zip(given.prompts, answers, strict=True)
    ]


def tuned_by_trainer(
    peft: Any, given: Round, made: Sequence[Sequence[Tokens]]
) -> tuple[list[AdapterState], list[Any], Work]:
    """Tune private, then public adapters, client by client: the adapters, their orders of examples, the work."""
    found, orders, done = [], [], Outcome(given.adapters[0], Stopwatch())
    for adapter, local, new in zip(given.adapters, given.local, made, strict=True):
        for examples in ([*map(given.encode, local), *new], list(new)):
            workload.put(peft, adapter)
            orders.append(
                hf_trainer.fit(peft, given.setting, _as_is, examples, given.tokenizer, "unused", done)  # type: ignore[arg-type]
            )
            found.append(workload.adapter_of(peft))
    return found, orders, done.work


def _as_is(tokens: Any) -> Tokens:
    return tokens  # type: ignore[no-any-return]


def tuned_by_fedloom(
    engine: Any, given: Round, made: Sequence[Sequence[Tokens]], orders: Sequence[Any]
) -> list[AdapterState]:
    requests: dict[Hashable, Any] = {}
    for k, (adapter, local, new) in enumerate(zip(given.adapters, given.local, made, strict=True)):
        for kind, examples in enumerate(([*map(given.encode, local), *new], list(new))):
            known = {tokens.ids: tokens for tokens in examples}
            taken: Any = [known[ids] for ids in orders[2 * k + kind]]
            stream = (k, kind)
            requests[k, kind] = Fit(
                adapter,
                rounds.arranged(taken, given.setting.local, stream),
                given.setting.local,
                stream=stream,
            )
    answered = engine.answer(requests)
    return [answered[key].adapter for key in requests]


def small_copy_differs(new: int = 6) -> float:
    """The largest difference between values of the tuned adapters, in float64; all tokens must be equal."""
    given = Round.of(TINY, new, torch.float64)
    with workload.everything_in_double():
        peft, engine = peft_of(given, torch.float64), engine_of(given, torch.float64)
        answers = by_hugging_face(peft, given, width=1)
        for other in (by_hugging_face(peft, given, width=None), by_fedloom(engine, given)):
            contest.must_be("greedy tokens in float64", 1 - equal_share(other, answers), 0.0)
        made = synthetic(given, answers)
        theirs, orders, _ = tuned_by_trainer(peft, given, made)
        ours = tuned_by_fedloom(engine, given, made, orders)
    off = max(contest.largest_difference(a, b) for a, b in zip(ours, theirs, strict=True))
    return contest.must_be("the adapters of a small copy in float64", off, contest.EXACT)


def measure(*, scale: str = "tiny", repeats: int = 3, wall: bool = False) -> list[Report]:
    """Three reports: generation, tuning, and the round, which is one after the other."""
    with contest.threads(1):
        exact = small_copy_differs()
    given = Round.of(SETTING, 48, torch.float32) if scale == "real" else Round.of(TINY, 8, torch.float32)
    dtypes = {FEDLOOM: torch.float32}
    if contest.computes_in_bfloat16():
        dtypes[BF16] = torch.bfloat16
    peft = peft_of(given, torch.float32)
    engines = {name: engine_of(given, dtype) for name, dtype in dtypes.items()}
    answers: dict[str, Answers] = {}
    adapters: dict[str, list[AdapterState]] = {}
    made = synthetic(given, by_fedloom(engines[FEDLOOM], given))
    orders: list[Any] = []
    work = Work(0, 0, 0)

    def answering(name: str, how: Callable[[], Answers]) -> Callable[[], Stopwatch]:
        def run() -> Stopwatch:
            watch = Stopwatch()
            with watch.running():
                answers[name] = how()
            return watch

        return run

    def by_trainer() -> Stopwatch:
        nonlocal orders, work
        watch = Stopwatch()
        with watch.running():
            adapters[hf_trainer.NAME], orders, work = tuned_by_trainer(peft, given, made)
        peft.eval()
        return watch

    def by_engine(name: str) -> Callable[[], Stopwatch]:
        def run() -> Stopwatch:
            watch = Stopwatch()
            with watch.running():
                adapters[name] = tuned_by_fedloom(engines[name], given, made, orders)
            return watch

        return run

    generating = contest.take_turns(
        {
            ONE: answering(ONE, lambda: by_hugging_face(peft, given, width=1)),
            BATCHES: answering(BATCHES, lambda: by_hugging_face(peft, given, width=None)),
        }
        | {name: answering(name, partial(by_fedloom, engine, given)) for name, engine in engines.items()},
        repeats=repeats,
        wall=wall,
    )
    tuning = contest.take_turns(
        {hf_trainer.NAME: by_trainer} | {name: by_engine(name) for name in engines},
        repeats=repeats,
        wall=wall,
    )
    off = {
        name: max(
            contest.relative_difference(ours, theirs, given.adapters[i // 2])
            for i, (ours, theirs) in enumerate(zip(adapters[name], adapters[hf_trainer.NAME], strict=True))
        )
        for name in engines
    }
    contest.must_be("what was learnt in float32", off[FEDLOOM], contest.CLOSE)
    new = sum(len(a) for mine in answers[FEDLOOM] for a in mine)
    with contest.threads(1):
        peaks = {name: contest.peak(dtype) for name, dtype in dtypes.items()}
    useful = workload.flops(workload.llama(given.setting.size), tokens=work.tokens, head_rows=work.labelled)
    equal = {"small copy in float64, largest difference": exact}
    same = {f"equal tokens, {name}": equal_share(answers[name], answers[ONE]) for name in (BATCHES, *engines)}
    close = {f"{name}, relative difference": value for name, value in off.items()}
    shown: dict[str, Any] = {
        "clients": given.setting.clients,
        "prompts a client": given.setting.samples,
        "new tokens": given.new,
    }
    whole = {
        f"{ONE}, {hf_trainer.NAME}": _sum(generating[ONE], tuning[hf_trainer.NAME]),
        f"{BATCHES}, {hf_trainer.NAME}": _sum(generating[BATCHES], tuning[hf_trainer.NAME]),
    } | {name: _sum(generating[name], tuning[name]) for name in engines}
    return [
        Report(
            "B6-generation",
            "generation of a FedPIT round",
            scale,
            [Row(name, times, new, 0.0, 1.0) for name, times in generating.items()],
            equal | same,
            shown,
        ),
        Report(
            "B6-tuning",
            "two adapters of each client in a FedPIT round",
            scale,
            [
                Row(
                    hf_trainer.NAME,
                    tuning[hf_trainer.NAME],
                    work.tokens,
                    work.padding,
                    work.labelled_share,
                    useful,
                    peaks[FEDLOOM],
                ),
                *(
                    Row(n, tuning[n], work.tokens, 0.0, work.labelled / work.tokens, useful, peak)
                    for n, peak in peaks.items()
                ),
            ],
            equal | close,
            {"real tokens": work.tokens},
        ),
        Report(
            "B6",
            "a FedPIT round: 5 clients, 8 prompts of 48 new tokens each, two adapters",
            scale,
            [Row(name, times, work.tokens + new, 0.0, 1.0) for name, times in whole.items()],
            equal | same | close,
            shown,
            GOALS if scale == "real" else {},
            ["Its times are the sums of the two parts'."],
        ),
    ]


def _sum(one: Times, other: Times) -> Times:
    def added(a: list[float], b: list[float]) -> list[float]:
        return [x + y for x, y in zip(a, b, strict=True)]

    return Times(added(one.cpu, other.cpu), added(one.wall, other.wall))


def main() -> None:
    given = contest.arguments(__doc__).parse_args()
    for report in measure(scale=given.scale, repeats=given.repeats, wall=given.wall):
        contest.finish(report, given.out)


if __name__ == "__main__":
    main()
