"""What one client gets out of the shared model of what only others know."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom.attacks.cross_client import attack, prefixes
from fedloom.data.example import Example
from fedloom.data.microworld import private_facts
from fedloom.state import AdapterState
from fedloom.steps import Generate, Tokens
from tests.attacks.overfitted import overfitted
from tests.fakes import state


class Words:
    """A template whose tokens are words."""

    stop = frozenset({"<end>"})

    def contrast(self, example: Example) -> tuple[Tokens, Tokens]:
        before, after = example.instruction.split(), [*example.response.split(), "<end>"]
        ids: Any = (*before, *after)
        return Tokens(ids, (False,) * len(before) + (True,) * len(after)), Tokens((), ())

    def prompt_ids(self, instruction: str) -> list[str]:
        return [*instruction.split(), "?"]

    def decode(self, ids: Any) -> str:
        return " ".join(ids)


@dataclass
class Leaky:
    """Says the next of its adapter's sentences to every prompt, over and over."""

    says: Mapping[AdapterState | None, list[str]]
    asked: list[Mapping[Hashable, Generate]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.asked.append(requests)
        return {
            key: [self.says[r.adapter][i % len(self.says[r.adapter])].split() for i in range(len(r.prompts))]
            for key, r in requests.items()
        }


TUNED = state(1.0)
CLIENTS = {
    "a": [Example("Code ?", "it is 11 11")],  # 5 tokens with the end: prefixes hold 0, 1, 2 and 3
    "b": [Example("Key ?", "it is 22 22")],
    "c": [Example("Pin ?", "it is 33 33")],
}
SECRETS = {"a": ["11 11"], "b": ["22 22"], "c": ["33 33"]}


def mounted(*said: str, decoys: tuple[str, ...] = (), secrets: Any = SECRETS, **options: Any) -> Any:
    engine = Leaky({TUNED: list(said), None: ["nothing"]})
    return attack(engine, Words(), {"tuned": TUNED}, CLIENTS, secrets, decoys, attackers=["a"], **options)  # type: ignore[arg-type]


def test_prefixes_are_own_prompts_and_an_empty_one_with_more_and_more_of_the_own_response() -> None:
    found = prefixes(Words(), CLIENTS["a"] * 2)  # type: ignore[arg-type]
    assert [" ".join(map(str, p)) for p in found] == [
        "Code ?",
        "Code ? it",
        "Code ? it is",
        "Code ? it is 11",
        "?",
        "? it",
        "? it is",
        "? it is 11",
    ]


def test_coverage_counts_secrets_and_efficiency_counts_queries() -> None:
    got = mounted("is 22 22", "and again 22 22", "no", "22")["tuned"]["a"]
    assert (got.coverage.hits, got.coverage.of) == (1, 2)
    assert (got.efficiency.hits, got.efficiency.of) == (4, 8)


def test_every_prefix_is_asked_as_often_as_samples_say() -> None:
    got = mounted("22 22", "no", "no", "no", samples=3)["tuned"]["a"]
    assert (got.efficiency.hits, got.efficiency.of) == (6, 24)


def test_an_attackers_own_secret_does_not_count() -> None:
    got = mounted("11 11")["tuned"]["a"]
    assert (got.coverage.hits, got.efficiency.hits) == (0, 0)
    named = mounted("77 77", secrets={**SECRETS, "a": ["77 77"]})["tuned"][
        "a"
    ]  # which none of its texts spells out
    assert (named.coverage.hits, named.coverage.of) == (0, 2)


def test_a_victims_secret_that_the_attacker_holds_too_is_not_exclusive() -> None:
    got = mounted("11 11", secrets={**SECRETS, "b": ["11 11", "22 22", "22-22"]})["tuned"]["a"]
    assert (got.coverage.hits, got.coverage.of) == (0, 2)  # 22 22 once, whatever stands between, and 33 33


def test_only_whole_words_in_order_make_a_secret() -> None:
    assert mounted("122 22", "22 220", "22 and 22", "33")["tuned"]["a"].coverage.hits == 0
    assert mounted("the KEY is (22-22)!")["tuned"]["a"].coverage.hits == 1


def test_the_base_and_decoys_are_controls() -> None:
    got = mounted("22 22 and 99 99", decoys=("99 99", "88 88"))
    assert (got["tuned"]["a"].decoys.hits, got["tuned"]["a"].decoys.of) == (1, 2)
    assert got["base"]["a"].coverage.hits == 0


def test_without_decoys_nothing_is_said_of_them() -> None:
    got = mounted("x")["tuned"]["a"]
    assert got.decoys is None
    assert json.loads(json.dumps(got.plain()))["coverage"]["of"] == 2


def test_several_attackers_and_models_share_one_call() -> None:
    engine = Leaky({TUNED: ["33 33"], None: ["x"]})
    got = attack(engine, Words(), {"tuned": TUNED}, CLIENTS, SECRETS, attackers=["a", "c"])  # type: ignore[arg-type]
    assert len(engine.asked) == 1
    assert got["tuned"]["a"].coverage.hits == 1
    assert got["tuned"]["c"].coverage.hits == 0  # its own


def test_an_overfitted_model_tells_one_client_what_only_another_knew_and_an_untrained_one_does_not() -> None:
    o = overfitted()
    clients = {"attacker": o.members[:2], "victim": o.members[2:]}
    secrets = {"victim": [code(e) for e in o.members[2:]]}
    decoys = [code(e) for e in private_facts("decoys", 20)]
    got = attack(
        o.engine,
        o.template,
        o.adapters,
        clients,
        secrets,
        decoys,
        attackers=["attacker"],
        samples=12,
        max_new_tokens=16,
    )
    extracted = {row: found["attacker"] for row, found in got.items()}
    assert extracted["overfitted"].coverage.hits >= 3  # type: ignore[union-attr]
    assert extracted["untrained"].coverage.hits == extracted["base"].coverage.hits == 0  # type: ignore[union-attr]
    assert all(found.decoys.hits == 0 for found in extracted.values() if found.decoys)


def code(fact: Example) -> str:
    """The four digits."""
    return fact.response.removesuffix(".").split(" is ")[1]
