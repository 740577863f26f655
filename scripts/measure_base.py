"""Measure the untuned base model's in-context ability, on which FedPIT depends.

    python scripts/measure_base.py [MODEL] [--tasks 200]

Three numbers per task family: "bare", right answers to a bare instruction in the fine-tuning format; "shown",
right answers when the task ends a list of five solved ones of the same kind in the house style; "new", given
five instructions of one kind, the share of continuations that are a well-formed instruction of that kind and
not one of the five.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict

import numpy as np
import torch

from fedloom.data import microworld as mw
from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.engine.lora_engine import LoraEngine
from fedloom.engine.models import load_base
from fedloom.rng import numpy_stream
from fedloom.steps import Generate, LoraSpec

SHOTS = 5
NAMES = (
    {w: "NAME" for w in mw.FIRST}
    | {w: "THING" for w in mw.THINGS}
    | {w: "DAY" for w in (*mw.DAYS, *mw.MONTHS)}
)
NAMES |= {w: "KIND" for kind, (plural, _) in mw.KINDS.items() for w in (kind, plural)}


def skeleton(text: str) -> str:
    """The wording without its particulars: the same for any two instructions of one kind."""
    words = [NAMES.get(w, "N" if w.isdigit() else w) for w in re.findall(r"\w+|[^\w\s]", text)]
    return re.sub(r"\ban\b", "a", " ".join(words))


def worked(number: int, e: Example, *, answered: bool = True) -> str:
    context = f"\nInput: {e.context}" if e.context else ""
    return f"Task {number}\nInstruction: {e.instruction}{context}\nOutput:" + (
        f" {e.response}" if answered else ""
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="embedded")
    p.add_argument("--tasks", type=int, default=200, help="of each family")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_base(args.model)
    template = Template(tokenizer, format="plain")
    engine = LoraEngine.build(model, template.encode, lora=LoraSpec())

    def ask(prompts: list[str], stop: str, longest: int) -> list[str]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        [said] = engine.answer({"": Generate(ids, max_new_tokens=longest, stop=template.stop)}).values()
        return [tokenizer.decode(s).split(stop)[0].strip() for s in said]

    known: dict[str, set[str]] = defaultdict(set)
    for family, make in mw.FAMILIES.items():
        rng = numpy_stream(args.seed, "measure", "known", family)
        known[family] = {skeleton(make(rng).instruction) for _ in range(3000)}

    print(f"{'family':24s} {'bare':>6s} {'shown':>6s} {'new':>6s}")
    means = []
    for family, make in mw.FAMILIES.items():
        rng = numpy_stream(args.seed, "measure", family)
        lists = []
        for _ in range(args.tasks):
            tasks = [make(rng) for _ in range(SHOTS + 1)]
            lists.append([Example(t.instruction, t.answers[0], t.context, rule=t.rule) for t in tasks])
        bare = ask([template.prompt(own[-1]).removeprefix(tokenizer.bos_token) for own in lists], "\n\n", 32)
        shown = ask(
            [
                "\n\n".join(
                    [
                        *(worked(i, e) for i, e in enumerate(own[:-1], 1)),
                        worked(SHOTS + 1, own[-1], answered=False),
                    ]
                )
                for own in lists
            ],
            "\n\n",
            32,
        )
        listed = [
            "\n".join(f"Task {i}: {e.instruction}" for i, e in enumerate(own[:-1], 1))
            + f"\nTask {SHOTS + 1}:"
            for own in lists
        ]
        new = ask(listed, "\n", 32)
        row = [
            np.mean([mw.check(own[-1], said) for own, said in zip(lists, bare, strict=True)]),
            np.mean([mw.check(own[-1], said) for own, said in zip(lists, shown, strict=True)]),
            np.mean(
                [
                    skeleton(said) in known[family] and said not in {e.instruction for e in own[:-1]}
                    for own, said in zip(lists, new, strict=True)
                ]
            ),
        ]
        means.append(row)
        print(f"{family:24s} " + " ".join(f"{100 * x:5.1f}%" for x in row), flush=True)
    print(f"{'mean':24s} " + " ".join(f"{100 * x:5.1f}%" for x in np.mean(means, axis=0)))


if __name__ == "__main__":
    main()
