"""B7 and B8: a Llama of the shape of 7B, random weights, bfloat16, on one GPU, in eight minutes.

    python -m benchmarks.gpu --scale real --out runs/benchmarks

First, on small copies, fedloom and Trainer must learn the same: in float64 as everywhere, and in float32 and
bfloat16 on the device. B7 is a round of FedIT: five clients with about 150 examples, loss on all tokens, rank
8 on the attention. fedloom does all of it, over weights in bfloat16 and in 8 bits. The trainers get two
optimizer steps of one client and are compared by their time per token: as Shepherd trains (padded
micro-batches of 8, checkpointing); packed, with flash attention and Liger's kernels (packed_trainer.py); and
plain Trainer at its best (batches of similar length, no checkpointing). fedloom does their part too, and the
learnt adapters are compared. B8 continues 64 prompts of each of five clients by 256 tokens; Hugging Face's
`generate` gets one client's batch, and two prompts one by one, compared by tokens per second.

Each part has a time limit, and SECONDS limits them all. Results are printed and written part by part, and
missing ones are named. Times are wall times: a GPU has no processor time. Without a GPU only `--scale tiny`
runs, to try the program.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import contest, generation, hf_trainer, packed_trainer, rounds, training, workload
from benchmarks.contest import Stopwatch
from benchmarks.rounds import Outcome, Setting
from fedloom.engine import fp8
from fedloom.engine.layout import AdapterLayout
from fedloom.state import AdapterState

WHOLE = replace(training.B1, size="7B", clients=5, samples=150, tokens_per_pass=16_384)
TINY = replace(training.B1, size="tiny", clients=2, samples=4, per_round=2, batch=2, micro_batch=2)
SMALL = replace(TINY, size="5M", samples=8, batch=4, micro_batch=4)
FEDLOOM, IN_8_BITS = "fedloom", "fedloom, 8-bit weights"
LIKE_SHEPHERD = "HF Trainer, padded, checkpointing"
WELL = "HF Trainer, like lengths, no checkpointing"
DIFFERENT = 0.3  # bfloat16: norm of the difference over the norm of the learnt change
SECONDS = 450.0  # for all parts together

Peer = Callable[[Any, Setting, AdapterState], Outcome]  # model, setting, start


class TimeUp(Exception):
    pass


@dataclass
class Findings:
    """Results so far, on the screen and in a file, whatever happens next."""

    out: Path | None
    found: dict[str, Any]
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + SECONDS - time.monotonic()

    def part(self, group: str, name: str, most: float, run: Callable[[], Any]) -> Any:
        """`run()`, stored under its names; None, and the reason stored, if it fails or takes over `most` s."""
        began = time.monotonic()
        try:
            with _alarm(min(most, self.left)):
                value = run()
            self.found.setdefault(group, {})[name] = value
        except Exception as error:  # whatever happened to this part, the others are still worth running
            value = None
            reason = (
                "no time was left" if isinstance(error, TimeUp) else f"{type(error).__name__}: {error}"[:500]
            )
            self.found.setdefault("missing", {})[f"{group}, {name}"] = reason
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        took = {"seconds": round(time.monotonic() - began, 1), "left": round(self.left)}
        reason = self.found.get("missing", {}).get(f"{group}, {name}")
        print(
            json.dumps({f"{group}, {name}": value if reason is None else {"missing": reason}} | took),
            flush=True,
        )
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        return value


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeUp

    if seconds <= 0:
        raise TimeUp
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Work:
    """The common starting point of B7's contestants."""

    setting: Setting
    device: str
    tokenizer: Any
    encode: workload.Encode
    blank: Any  # the model without weights
    start: AdapterState
    data: list[list[workload.Example]]
    learnt: dict[str, AdapterState] = field(default_factory=dict)  # by fedloom, in the whole round

    @classmethod
    def of(cls, setting: Setting, device: str) -> Work:
        blank = workload.llama(setting.size, device="meta")
        start = workload.later_adapter(AdapterLayout.of(blank, setting.lora), torch.float32)
        data = workload.clients(setting.clients, setting.samples)
        return cls(setting, device, *training.tokens_of(setting), blank, start, data)

    def model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return workload.llama(self.setting.size, dtype, device=self.device)

    def trainer(self, model: Any, setting: Setting, start: AdapterState) -> Outcome:
        return hf_trainer.run(model, setting, self.encode, start, self.data, self.tokenizer)

    def packed(self, *, liger: bool) -> Peer:
        def peer(model: Any, setting: Setting, start: AdapterState) -> Outcome:
            return packed_trainer.run(model, setting, self.encode, start, self.data, liger=liger)

        return peer

    def beside(self, peer: Peer, how: Setting, dtype: torch.dtype, limit: float) -> dict[str, Any]:
        """Time and compare a peer and fedloom on the same work, twice each: the first run warms the device."""
        times, our_times = [], []
        for _ in range(2):
            theirs = peer(self.model(dtype), how, self.start)
            ours = rounds.by_fedloom(self.model(dtype), how, self.encode, self.start, theirs, self.data)
            times.append(theirs.watch.wall)
            our_times.append(ours.watch.wall)
        off = contest.relative_difference(ours.adapter, theirs.adapter, self.start)
        contest.must_be(f"what was learnt in {dtype}", off, limit)
        return {
            "us_per_token": 1e6 * min(times) / theirs.work.tokens,
            "padding": theirs.work.padding,
            "fedloom_on_the_same": 1e6 * min(our_times) / theirs.work.tokens,
            "relative_difference": off,
        }

    def whole_round(self, repeats: int, peak: float, *, in_8_bits: bool) -> dict[str, Any]:
        """fedloom alone on all of the work, at least twice on a GPU and for at most half a minute."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [[[self.encode(e).ids for e in mine] for mine in self.data]]
        everything = Outcome(self.start, Stopwatch(), taken, [[1 / len(self.data)] * len(self.data)])
        seconds: list[float] = []
        for _ in range(max(repeats, 2 if self.device == "cuda" else 1)):
            model = self.model()
            if in_8_bits:
                fp8.quantise(model)
            done = rounds.by_fedloom(model, self.setting, self.encode, self.start, everything, self.data)
            seconds.append(done.watch.wall)
            if sum(seconds) > 30:
                break
        other = self.learnt.setdefault("bfloat16", done.adapter)
        tokens = done.work.tokens
        rows = sum(self.encode(e).targets for mine in self.data for e in mine)
        useful = workload.flops(self.blank, tokens=tokens, head_rows=rows)
        memory = {"gigabytes": torch.cuda.max_memory_allocated() / 1e9} if self.device == "cuda" else {}
        return {
            "seconds": seconds,
            "tokens": tokens,
            "us_per_token": 1e6 * min(seconds) / tokens,
            "tflops": useful / min(seconds) / 1e12,
            "measured_peak_tflops": peak / 1e12,
            "of_peak": useful / min(seconds) / peak,
            "goal_seconds": 6.0 if in_8_bits else 8.0,
            "relative_difference_to_bfloat16": contest.relative_difference(done.adapter, other, self.start),
        } | memory


def equality(findings: Findings, device: str) -> None:
    """The exact comparisons in float64; then the device's own arithmetic."""
    b1 = training.BENCHMARKS["B1"]
    _, peer = training.contestant(b1, {})
    findings.part("equal", "tuning in float64", 60, lambda: training.small_copy_differs(b1, peer))
    findings.part("equal", "generation in float64", 60, generation.small_copy_differs)
    small = Work.of(SMALL if device == "cuda" else TINY, device)

    def both(dtype: torch.dtype, limit: float) -> float:
        return small.beside(small.trainer, small.setting, dtype, limit)["relative_difference"]

    findings.part("equal", f"tuning in float32 on {device}", 60, lambda: both(torch.float32, contest.CLOSE))
    findings.part("equal", f"tuning in bfloat16 on {device}", 60, lambda: both(torch.bfloat16, DIFFERENT))


def tuning(findings: Findings, work: Work, *, repeats: int) -> None:
    """B7, the most important parts first."""
    part = replace(work.setting, per_round=1, steps=2)
    bf16 = torch.bfloat16
    peak = contest.peak(bf16, size=8192 if work.device != "cpu" else 256, device=work.device)
    findings.part("B7", FEDLOOM, 100, lambda: work.whole_round(repeats, peak, in_8_bits=False))
    padded = replace(part, checkpointing=True)
    findings.part("B7", LIKE_SHEPHERD, 80, lambda: work.beside(work.trainer, padded, bf16, DIFFERENT))
    findings.part("B7", IN_8_BITS, 100, lambda: work.whole_round(repeats, peak, in_8_bits=True))
    if packed_trainer.has_liger():
        findings.part(
            "B7",
            packed_trainer.LIGER,
            80,
            lambda: work.beside(work.packed(liger=True), part, bf16, DIFFERENT),
        )
    findings.part(
        "B7", packed_trainer.PLAIN, 60, lambda: work.beside(work.packed(liger=False), part, bf16, DIFFERENT)
    )


def answering(findings: Findings, setting: Setting, new: int, *, device: str, repeats: int) -> None:
    """B8: new tokens per second."""
    given = generation.Round.of(setting, new, torch.float32)

    def model() -> Any:
        return generation.never_ending(workload.llama(setting.size, torch.bfloat16, device=device))

    def by_fedloom() -> float:
        engine = rounds.engine(model(), setting, given.encode)
        return _rate(lambda: generation.by_fedloom(engine, given), repeats)

    def by_hugging_face(prompts: int | None, width: int | None) -> float:
        peft = hf_trainer.with_lora(model(), setting).eval()
        some = replace(given, prompts=[given.prompts[0][:prompts]], adapters=given.adapters[:1])
        return _rate(lambda: generation.by_hugging_face(peft, some, width=width), 1)

    findings.part("B8", FEDLOOM, 120, by_fedloom)
    findings.part("B8", generation.BATCHES, 60, lambda: by_hugging_face(None, None))
    findings.part("B8", generation.ONE, 60, lambda: by_hugging_face(2, 1))
    findings.found.setdefault("B8", {})["goal"] = 6000.0


def _rate(how: Callable[[], generation.Answers], repeats: int) -> float:
    """The best of several repeats, which together take about half a minute."""
    best, began = 0.0, time.monotonic()
    for _ in range(repeats):
        start = time.perf_counter()
        answers = how()  # lists, so everything on the GPU has ended
        best = max(best, sum(len(a) for mine in answers for a in mine) / (time.perf_counter() - start))
        if time.monotonic() - began > 30:
            break
    return best


def measure(*, scale: str, repeats: int, out: Path | None = None) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if scale == "real" and device == "cpu":
        raise SystemExit("B7 and B8 need a CUDA device. Without one: python -m benchmarks.gpu --scale tiny")
    findings = Findings(out, {"scale": scale})
    findings.part("machine", "machine", 10, contest.machine)
    equality(findings, device)
    whole = WHOLE if scale == "real" else TINY
    prompts = replace(whole, samples=64 if scale == "real" else 2)
    work = Work.of(whole, device)
    tuning(findings, work, repeats=repeats)
    answering(findings, prompts, 256 if scale == "real" else 4, device=device, repeats=repeats)
    part = replace(whole, per_round=1, steps=2, group_by_length=True)
    findings.part("B7", WELL, 60, lambda: work.beside(work.trainer, part, torch.bfloat16, DIFFERENT))
    return findings.found


def main() -> None:
    given = contest.arguments(__doc__).parse_args()
    found = measure(scale=given.scale, repeats=given.repeats, out=given.out)
    print(json.dumps(found, indent=1))
    if unequal := [name for name in found.get("missing", {}) if name.startswith("equal")]:
        raise SystemExit(f"not known to be equal: {', '.join(unequal)}")


if __name__ == "__main__":
    main()
