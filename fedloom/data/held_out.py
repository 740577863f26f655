"""Examples that nobody trains on: drawn from the data, or a test set of the user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedloom import rng
from fedloom.data.example import Example
from fedloom.data.partition import Label, check_labels, shuffled_pools
from fedloom.errors import ConfigError


def hold_out(
    examples: Sequence[Example],
    *,
    per_category: int = 10,
    seed: int = 0,
    by: Label = "category",
    keep_owners: bool = False,
) -> tuple[list[int], list[int]]:
    """Indices to train on and to test on, `per_category` of each label; FedIT holds out 10 of each.

    A label gives at most half of its examples, so one with a single example gives none. With `keep_owners`,
    for clients that are owners, an owner's last example is never held out: the client would vanish. An
    instruction and context that occur more than once are never held out: a copy would be trained on. If no
    example names a category, all form one group. If only some do, or if an example lacks the owner to group
    by, the data is refused.
    """
    if per_category < 0:
        raise ConfigError(f"Expected per_category of at least 0, got {per_category}.")
    if any(e.category for e in examples) or by == "owner":
        check_labels(examples, by, f"holding out examples of each {by}", several=False)
    prompts = Counter(map(_prompt, examples))
    left = Counter(e.owner for e in examples if keep_owners)
    held: set[int] = set()
    for pool in shuffled_pools(examples, by, rng.numpy_stream(seed, "hold-out")).values():
        wanted = min(per_category, len(pool) // 2)
        for i in pool.tolist():
            owner = examples[i].owner
            if wanted and prompts[_prompt(examples[i])] == 1 and left[owner] != 1:
                held.add(i)
                left[owner] -= keep_owners
                wanted -= 1
    return [i for i in range(len(examples)) if i not in held], sorted(held)


def apart(examples: Sequence[Example], test: Sequence[Example]) -> list[Example]:
    """The examples whose question, context included, is not in the test set."""
    asked = set(map(_prompt, test))
    return [e for e in examples if _prompt(e) not in asked]


def _prompt(example: Example) -> tuple[object, str, str]:
    return example.turns, example.instruction, example.context
