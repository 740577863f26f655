"""B7 and B8: a Llama of the shape of 7B, random weights, bfloat16, on one GPU.

Written to end within eight minutes on an H200, which is an estimate: it has run on small models only.

    python -m benchmarks.gpu --scale real --out runs/benchmarks

B7 is a round of FedIT: five clients with about 150 examples, loss on all tokens, rank 8 on the attention.
fedloom does all of it. The trainers get two optimizer steps of one client, and are compared by the time a token
takes them: as Shepherd trains (padded micro-batches of 8, checkpointing), and as well as Trainer can without
further packages (batches of like length, no checkpointing). fedloom does their part too, and what
was learnt is compared. B8 continues 64 prompts of each of five clients by 256 tokens; Hugging Face's `generate` gets
one client's batch, and two prompts one by one, compared by tokens a second.

Wall times: a GPU has no processor time. Without a GPU only `--scale tiny` runs, to try the program.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import contest, generation, hf_trainer, rounds, training, workload
from benchmarks.contest import Stopwatch
from benchmarks.rounds import Outcome, Setting
from fedloom.engine.layout import AdapterLayout

WHOLE = replace(training.B1, size="7B", clients=5, samples=150, tokens_per_pass=16_384)
TINY = replace(training.B1, size="tiny", clients=2, samples=4, per_round=2, batch=2, micro_batch=2)
LIKE_SHEPHERD = "HF Trainer, padded, checkpointing"
WELL = "HF Trainer, like lengths, no checkpointing"
DIFFERENT = 0.3  # bfloat16: length of the difference over the length of what was learnt


def tuning(setting: Setting, part: Setting, *, device: str, repeats: int) -> dict[str, Any]:
    """Seconds a token of each, and fedloom's whole round."""
    tokenizer, encode = training.tokens_of(setting)
    data = workload.clients(setting.clients, setting.samples)
    dtype = torch.bfloat16

    def model() -> Any:
        return workload.llama(setting.size, dtype, device=device)

    blank = workload.llama(setting.size, dtype, device="meta")
    layout = AdapterLayout.of(blank, setting.lora)
    start = workload.later_adapter(layout, torch.float32)
    figures: dict[str, Any] = {}
    for name, how in {
        LIKE_SHEPHERD: replace(part, checkpointing=True),
        WELL: replace(part, group_by_length=True),
    }.items():
        peer = hf_trainer.run(model(), how, encode, start, data, tokenizer)
        ours = rounds.by_fedloom(model(), how, encode, start, peer, data)
        off = contest.relative_difference(ours.adapter, peer.adapter, start)
        contest.must_be("what was learnt in bfloat16", off, DIFFERENT)
        figures[name] = {
            "us_per_token": 1e6 * peer.watch.wall / peer.work.tokens, "padding": peer.work.padding,
            "fedloom_on_the_same": 1e6 * ours.watch.wall / peer.work.tokens, "relative_difference": off,
        }  # fmt: skip
        _free()
    everything = Outcome(start, Stopwatch(), [[[encode(e).ids for e in mine] for mine in data]], [[1 / len(data)] * len(data)])
    seconds, done = [], everything
    for _ in range(repeats):
        done = rounds.by_fedloom(model(), setting, encode, start, everything, data)
        seconds.append(done.watch.wall)
        _free()
    rows = sum(encode(e).targets for mine in data for e in mine)
    useful = workload.flops(blank, tokens=done.work.tokens, head_rows=rows)
    best = contest.peak(dtype, size=8192 if device != "cpu" else 256, device=device)
    figures["fedloom"] = {
        "seconds": seconds, "tokens": done.work.tokens, "us_per_token": 1e6 * min(seconds) / done.work.tokens,
        "tflops": useful / min(seconds) / 1e12, "measured_peak_tflops": best / 1e12,
        "of_peak": useful / min(seconds) / best, "goal_seconds": 8.0,
    }  # fmt: skip
    return figures


def answering(setting: Setting, new: int, *, device: str, repeats: int) -> dict[str, Any]:
    """New tokens a second."""
    given = generation.Round.of(setting, new, torch.float32)
    figures: dict[str, Any] = _by_hugging_face(setting, given, device)
    _free()
    engine = rounds.engine(
        generation.never_ending(workload.llama(setting.size, torch.bfloat16, device=device)), setting, given.encode
    )
    figures["fedloom"] = _rate(lambda: generation.by_fedloom(engine, given), repeats)
    figures["goal"] = 6000.0
    return figures


def _by_hugging_face(setting: Setting, given: generation.Round, device: str) -> dict[str, float]:
    model = generation.never_ending(workload.llama(setting.size, torch.bfloat16, device=device))
    peft = hf_trainer.with_lora(model, setting).eval()
    first = replace(given, prompts=given.prompts[:1], adapters=given.adapters[:1])
    two = replace(first, prompts=[first.prompts[0][:2]])
    return {
        generation.ONE: _rate(lambda: generation.by_hugging_face(peft, two, width=1), 1),
        generation.BATCHES: _rate(lambda: generation.by_hugging_face(peft, first, width=None), 1),
    }


def _rate(how: Callable[[], generation.Answers], repeats: int) -> float:
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        answers = how()  # lists: whatever ran on the GPU has ended
        best = max(best, sum(len(a) for mine in answers for a in mine) / (time.perf_counter() - start))
    return best


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(*, scale: str, repeats: int) -> dict[str, Any]:
    """The exact comparisons first, in float64 on the CPU, as everywhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if scale == "real" and device == "cpu":
        raise SystemExit("B7 and B8 need a CUDA device. Without one: python -m benchmarks.gpu --scale tiny")
    b1 = training.BENCHMARKS["B1"]
    _, peer = training.contestant(b1, {})
    exact = {"training": training.small_copy_differs(b1, peer), "generation": generation.small_copy_differs()}
    whole = WHOLE if scale == "real" else TINY
    part = replace(whole, per_round=1, steps=2)
    prompts = replace(whole, samples=64 if scale == "real" else 2)
    found: dict[str, Any] = {"scale": scale, "exact": exact}
    found["B7"] = tuning(whole, part, device=device, repeats=repeats)
    found["B8"] = answering(prompts, 256 if scale == "real" else 4, device=device, repeats=repeats)
    return found | {"machine": contest.machine()}


def main() -> None:
    given = contest.arguments(__doc__).parse_args()
    found = measure(scale=given.scale, repeats=given.repeats)
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
