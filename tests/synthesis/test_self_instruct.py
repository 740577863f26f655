"""Self-generation of instructions and responses, by models that are a function of the prompt's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import pytest

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.steps import Generate, drive
from fedloom.synthesis.candidates import Synthesis
from fedloom.synthesis.filters import Filters
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.pseudo_labels import PseudoLabels
from fedloom.synthesis.self_instruct import SelfInstruct, SelfInstructWording, Wording
from tests.fakes import state

BEGIN, END = 1, 2
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jon", "Kim", "Lou"]
OWN = [
    Example(f"How old is {name} by now?", f"{name} turned {30 + i} in spring.")
    for i, name in enumerate(NAMES)
]
NEW = "Name a river that flows through {} countries."


def encode(text: str) -> list[int]:
    """Every character is a token, and so is an empty line."""
    return [BEGIN, *(3 if c == "\0" else ord(c) + 10 for c in text.replace("\n\n", "\0"))]


def decode(ids: Sequence[int]) -> str:
    return "".join("\n\n" if i == 3 else chr(i - 10) for i in ids if i > 2)


@dataclass(frozen=True)
class Characters:
    """Words of a model that reads characters."""

    positions: int = 2048
    stop: frozenset[int] = frozenset({END})

    def document_ids(self, text: str) -> list[int]:
        return encode(text)

    def text(self, ids: Sequence[int]) -> str:
        return decode(ids)

    def prompt_ids(self, example: Example, *, room: int = 0) -> list[int]:
        return encode(example.instruction)

    def decode(self, ids: Sequence[int]) -> str:
        return decode(ids)


@dataclass
class Writer:
    """A model that goes on as `say` tells it to; `asked` holds the requests, `prompts` their texts."""

    say: Callable[[str], str]
    asked: list[Mapping[Hashable, Generate]] = field(default_factory=list)

    def answer(self, requests: Mapping[Hashable, Generate]) -> dict[Hashable, list[list[int]]]:
        self.asked.append(dict(requests))
        return {key: [self._written(decode(ids), r) for ids in r.prompts] for key, r in requests.items()}

    def _written(self, prompt: str, request: Generate) -> list[int]:
        ids = encode(self.say(prompt))[1:]
        ended = next((i for i, token in enumerate(ids) if token in request.stop), len(ids))
        return ids[: min(ended, request.max_new_tokens)]

    @property
    def prompts(self) -> list[str]:
        return [decode(ids) for round in self.asked for r in round.values() for ids in r.prompts]


def fluent(prompt: str) -> str:
    """Another instruction for every list, and an answer to whatever is asked; both depend on the prompt."""
    number = crc32(prompt.encode())
    if prompt.rstrip().endswith(":"):
        return f" {NEW.format(number)}\nTask 10: and so on\n"
    return f"Output: The river number {number}.\n\nTask 9\nInstruction: more\nOutput: no"


def synthesizer(**settings: Any) -> SelfInstruct:
    filters = settings.pop("filters", Filters(verbatim=0, rouge_instruction=0.99))
    return SelfInstruct(filters=filters, **{"candidates": 6, **settings})


def made(
    say: Callable[[str], str] = fluent,
    examples: Sequence[Example] = OWN,
    *,
    seed: int = 0,
    positions: int = 2048,
    **settings: Any,
) -> tuple[Synthesis, Writer]:
    engine = Writer(say)
    words = Characters(positions)
    steps = synthesizer(**settings)(examples, state(1.0), words, seed=seed, stream=("c", 0))
    [(_, found)] = drive({"c": steps}, engine)
    return found, engine


def answering(response: str) -> Callable[[str], str]:
    """Fluent in instructions, and this for every response."""
    return lambda prompt: fluent(prompt) if prompt.endswith(":") else response


def is_summed_up(found: Synthesis) -> bool:
    counts = dict(found.counts)
    repeated, generated, kept = (counts.pop(key) for key in ("repeated", "generated", "kept"))
    return (
        generated == kept + sum(counts.values()) == len(found.candidates)
        and kept == len(found.examples)
        and repeated >= 0
    )


def test_a_fluent_model_gives_as_many_examples_as_asked_for() -> None:
    found, _ = made()
    assert dict(found.counts) == {"generated": 6, "kept": 6, "repeated": 0}
    for e in found.examples:
        assert re.fullmatch(r"Name a river that flows through \d+ countries.", e.instruction)
        assert re.fullmatch(r"The river number \d+.", e.response)
    assert len({e.id for e in found.examples}) == 6


def test_instructions_are_asked_for_as_the_ninth_of_a_numbered_list_of_eight() -> None:
    _, engine = made()
    opening, *items, blank = engine.prompts[0].split("\n")
    assert opening == "Come up with a list of tasks."
    assert [item.split(": ")[0] for item in items] == [f"Task {i}" for i in range(1, 9)]
    shown = [item.split(": ")[1] for item in items]
    assert len(set(shown)) == 8
    assert set(shown) <= {e.instruction for e in OWN}
    assert blank == "Task 9:"


def test_responses_are_asked_for_after_worked_examples() -> None:
    found, engine = made(worked=2)
    opening, first, second, last = engine.prompts[-1].split("\n\n")
    assert opening == "Here is a list of tasks."
    for number, item in ((1, first), (2, second)):
        header, instruction, output = item.split("\n")
        shown = Example(instruction.removeprefix("Instruction: "), output.removeprefix("Output: "))
        assert header == f"Task {number}"
        assert shown in OWN
    assert last == f"Task 3\nInstruction: {found.examples[-1].instruction}\n"


def test_the_examples_shown_differ_from_draw_to_draw() -> None:
    _, engine = made()
    assert len(set(engine.prompts)) == len(engine.prompts) == 12


def test_a_context_is_shown_as_an_input() -> None:
    told = replace(OWN[0], context="Ada was born in May.")
    assert (
        "Instruction: How old is Ada by now?\nInput: Ada was born in May.\nOutput: Ada"
        in Wording().response_prompt([told], "x")
    )


def test_a_demonstration_cannot_break_the_format_it_is_shown_in() -> None:
    broken = Example("How\nold?", "One.\n\nTwo.", "A.\n\nB.")
    assert "Task 1: How old?\n" in Wording().instruction_prompt([broken])
    assert (
        Wording()
        .response_prompt([broken], "x")
        .split("\n\n")[1]
        .endswith("Input: A.\nB.\nOutput: One.\nTwo.")
    )


def test_every_request_goes_to_the_adapter_that_was_handed_in() -> None:
    engine, adapter = Writer(fluent), state(3.0)
    list(drive({"c": synthesizer()(OWN, adapter, Characters(), seed=0, stream=("c", 0))}, engine))
    assert len(engine.asked) == 2
    assert all(r.adapter is adapter for round in engine.asked for r in round.values())


def test_all_prompts_of_a_phase_are_one_request() -> None:
    _, engine = made()
    assert [len(r.prompts) for round in engine.asked for r in round.values()] == [6, 6]


def test_the_prompts_of_several_clients_are_answered_together_and_no_different() -> None:
    synthesize, engine = synthesizer(), Writer(fluent)
    clients = {"a": OWN[:9], "b": OWN[3:], "c": OWN}
    steps = lambda c: synthesize(clients[c], state(1.0), Characters(), seed=0, stream=(c, 4))  # noqa: E731
    together = {
        found.candidates[0].example.id.split("/")[0]: found
        for _, found in drive({c: steps(c) for c in clients}, engine)
    }
    assert [sorted(map(str, round)) for round in engine.asked] == [["a", "b", "c"]] * 2
    for client in clients:
        assert list(drive({client: steps(client)}, Writer(fluent))) == [
            (client, together[f"synthetic:{client}"])
        ]


@pytest.mark.parametrize("other", [("c", 1), ("d", 0)])
def test_another_round_or_client_draws_other_examples(other: tuple[str, int]) -> None:
    engine, again = Writer(fluent), Writer(fluent)
    list(drive({"c": synthesizer()(OWN, None, Characters(), seed=0, stream=("c", 0))}, engine))
    list(drive({"c": synthesizer()(OWN, None, Characters(), seed=0, stream=other)}, again))
    assert not set(engine.prompts) & set(again.prompts)


def test_another_seed_draws_other_examples() -> None:
    assert not set(made(seed=0)[1].prompts) & set(made(seed=1)[1].prompts)


def test_a_client_with_three_examples_shows_all_of_them_in_changing_order() -> None:
    found, engine = made(examples=OWN[:3], candidates=32)
    lists = [p for p in engine.prompts if p.endswith("Task 4:")]
    assert sorted(lists) == sorted(set(lists))
    assert len(lists) == 6  # 3! orders, each asked once
    assert found.counts["repeated"] == 96 - 6  # the other attempts would have been repetitions
    assert is_summed_up(found)


def test_one_example_is_one_prompt() -> None:
    found, engine = made(examples=OWN[:1])
    assert len(engine.prompts) == 2  # one instruction, one response
    assert dict(found.counts) == {"generated": 1, "kept": 1, "repeated": 95}


def test_a_client_without_examples_generates_nothing_and_asks_nobody() -> None:
    found, engine = made(examples=[])
    assert found == Synthesis()
    assert engine.asked == []


def test_sampling_may_ask_the_same_prompt_again_with_other_random_numbers() -> None:
    found, engine = made(answering("none\n\n"), OWN[:1], temperature=0.7, candidates=4, attempts=8)
    assert found.counts["repeated"] == 0
    assert len(set(engine.prompts)) == 2
    asked = [r for round in engine.asked for r in round.values()]
    assert len(asked) >= 2 + 3  # waves of instructions, trials of an answer
    assert {r.temperature for r in asked} == {0.7}
    assert len({r.stream for r in asked}) == len(asked)


def test_the_repetition_penalty_is_on_responses() -> None:
    _, engine = made(repetition_penalty=1.1)
    assert [r.repetition_penalty for round in engine.asked for r in round.values()] == [1.0, 1.1]


def test_attempts_are_bounded() -> None:
    found, engine = made(lambda _: " Sorry, I know no more.\n", attempts=10)
    assert len(engine.prompts) == 10
    assert dict(found.counts) == {"generated": 10, "kept": 0, "filtered/refusal": 10, "repeated": 0}


def test_instructions_that_fail_are_replaced_by_further_draws() -> None:
    count = iter(range(1000))
    half = lambda prompt: "\n" if prompt.endswith("Task 9:") and next(count) % 2 else fluent(prompt)  # noqa: E731
    found, _ = made(half, attempts=60)
    assert found.counts["kept"] == 6
    assert found.counts["failed/empty"] >= 5
    assert is_summed_up(found)


def test_what_is_more_than_was_asked_for_is_counted_and_not_answered() -> None:
    # Six wanted, the first wave gives five; the second asks for three at least, of which one is needed.
    lists = iter(range(100))
    found, engine = made(lambda p: "\n" if p.endswith(":") and next(lists) == 2 else fluent(p))
    assert [len(r.prompts) for round in engine.asked for r in round.values()] == [6, 3, 6]
    assert dict(found.counts) == {
        "generated": 9,
        "kept": 6,
        "failed/empty": 1,
        "filtered/surplus": 2,
        "repeated": 0,
    }


@pytest.mark.parametrize(
    ("said", "fate"),
    [
        ("\n", "failed/empty"),
        (" Name a river " + "x" * 100, "failed/unfinished"),
        (" River\n", "filtered/short"),
        (" As a doctor, say what a river is.\n", "filtered/refusal"),
        (" Draw the longest river of Europe.\n", "filtered/keyword"),
        (" Task 10: what is a river?\n", "filtered/format"),
        (f" {OWN[2].instruction}\n", "filtered/near-instruction"),
        (f" {OWN[2].instruction.replace('Cleo', 'Zoe')}\n", "filtered/near-instruction"),
    ],
)
def test_every_bad_instruction_is_dropped_with_its_reason(said: str, fate: str) -> None:
    found, engine = made(lambda _: said, attempts=6, filters=Filters())
    assert {c.fate for c in found.candidates} == {fate}
    assert found.examples == []
    assert len(engine.asked) == 1  # nothing is left to be answered
    assert is_summed_up(found)


def test_the_same_instruction_twice_is_kept_once() -> None:
    found, _ = made(
        lambda p: " What is a river made of?\n" if p.endswith(":") else "Output: Water.", attempts=6
    )
    assert dict(found.counts) == {"generated": 6, "kept": 1, "filtered/duplicate": 5, "repeated": 0}


def test_the_same_instruction_with_another_input_may_count_as_distinct() -> None:
    def say(prompt: str) -> str:
        return (
            " Sum up the text in a line.\n"
            if prompt.endswith(":")
            else f"Input: Text {crc32(prompt.encode()) % 3}.\nOutput: Good."
        )

    found, _ = made(say, distinct="sample", attempts=6)
    assert {e.context for e in found.examples} <= {"Text 0.", "Text 1.", "Text 2."}
    assert found.counts["kept"] == len({e.context for e in found.examples}) > 1
    assert is_summed_up(found)


@pytest.mark.parametrize(
    ("said", "fate"),
    [
        ("The Rhine.\n\n", "failed/no-output"),
        ("Where is it? Output: The Rhine.\n\n", "failed/no-output"),  # the instruction goes on
        ("Output:\n\n", "failed/empty-output"),
        ("Output: " + "the river " * 60, "failed/unfinished-output"),
        ("Input: " + "w " * 151 + "\nOutput: The Rhine.\n\n", "failed/long-input"),
    ],
)
def test_a_failed_answer_is_asked_for_three_times_in_all(said: str, fate: str) -> None:
    found, engine = made(answering(said), response_tokens=400)
    assert {c.fate for c in found.candidates} == {fate}
    assert len(engine.asked) == 1 + 3
    assert is_summed_up(found)


def test_a_failed_answer_is_not_asked_for_again_where_no_other_examples_can_be_shown() -> None:
    found, engine = made(answering("The Rhine.\n\n"), examples=OWN[:1])
    assert [c.fate for c in found.candidates] == ["failed/no-output"]
    assert len(engine.asked) == 1 + 1


@pytest.mark.parametrize(
    ("said", "fate"),
    [
        ("Output: Sorry, that is not known.\n\n", "filtered/refusal"),
        ("Output: a a a a\n\n", "filtered/repetitive"),
        ("Output: ?\n\n", "filtered/format"),
    ],
)
def test_a_bad_answer_is_dropped_and_not_asked_for_again(said: str, fate: str) -> None:
    found, engine = made(answering(said))
    assert {c.fate for c in found.candidates} == {fate}
    assert len(engine.asked) == 1 + 1


def test_an_answer_that_succeeds_at_the_second_trial_is_kept() -> None:
    seen: list[str] = []

    def say(prompt: str) -> str:
        if prompt.endswith(":"):
            return fluent(prompt)
        asked = prompt.rsplit("Instruction: ", 1)[1]
        seen.append(asked)
        return fluent(prompt) if seen.count(asked) == 2 else "what?\n\n"

    found, engine = made(say)
    assert found.counts["kept"] == 6
    assert len(engine.asked) == 1 + 2
    assert len(set(engine.prompts)) == len(engine.prompts)  # other examples are shown the second time


def test_an_input_that_the_model_writes_becomes_the_context() -> None:
    found, _ = made(answering("Input: It rained\nall day.\nOutput: Rain.\n\n"))
    assert {(e.context, e.response) for e in found.examples} == {("It rained\nall day.", "Rain.")}


@pytest.mark.parametrize("nothing", ["<noinput>", "None", "N/A", ""])
def test_an_input_that_says_there_is_none_is_none(nothing: str) -> None:
    found, _ = made(answering(f"Input: {nothing}\nOutput: Rain.\n\n"))
    assert {e.context for e in found.examples} == {""}


def test_an_answer_that_copies_a_local_example_is_dropped() -> None:
    filters = Filters(rouge_instruction=1.0)
    copied = OWN[5]
    found, _ = made(
        lambda p: f" {copied.instruction}\n" if p.endswith(":") else f"Output: {copied.response}\n\n",
        filters=filters,
        attempts=6,
    )
    assert dict(found.counts) == {
        "generated": 6,
        "kept": 0,
        "filtered/copy": 1,
        "filtered/duplicate": 5,
        "repeated": 0,
    }


def test_an_answer_ends_where_the_next_task_begins() -> None:
    found, _ = made(answering("Output: The Rhine.\n\nTask 9\nInstruction: Name a lake\nOutput: Garda\n\n"))
    assert {e.response for e in found.examples} == {"The Rhine."}


def test_generation_stops_at_the_token_that_ends_an_item() -> None:
    _, engine = made()
    instructions, responses = (next(iter(round.values())) for round in engine.asked)
    assert instructions.stop == {END, ord("\n") + 10}
    assert responses.stop == {END, 3}


def test_an_end_of_several_tokens_stops_nothing_but_the_text() -> None:
    found, engine = made(wording=SelfInstructWording(), say=answering("Output: One.\n\nTwo.\n\nTask 4\nmore"))
    assert next(iter(engine.asked[1].values())).stop == {END}
    assert {e.response for e in found.examples} == {"One.\n\nTwo."}


def test_fewer_examples_are_shown_where_the_context_is_short() -> None:
    found, engine = made(positions=300, instruction_tokens=64, response_tokens=64)
    assert all(len(encode(prompt)) + 64 <= 300 for prompt in engine.prompts)
    assert found.counts["kept"] == 6
    # 300 - 64 = 236 tokens: 1 + 29 for the opening, 32 for each of six tasks, 8 for the number of the next
    assert engine.prompts[0].endswith("\nTask 7:")


def test_samples_show_a_few_of_each_fate() -> None:
    found, _ = made(lambda p: " Sorry, no.\n" if crc32(p.encode()) % 2 else fluent(p), attempts=30)
    samples = found.samples(per_fate=1)
    assert set(samples) == {c.fate for c in found.candidates}
    for fate, [sample] in samples.items():
        assert found.candidates[sample["index"]].fate == fate
        assert found.candidates[sample["index"]].example.instruction == sample["instruction"]


@pytest.mark.parametrize(
    "settings",
    [{"candidates": 0}, {"trials": 0}, {"distinct": "both"}, {"worked": -1}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        synthesizer(**settings)


def test_a_model_that_reads_too_little_for_a_prompt_beside_an_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="512 tokens leaves no room for a prompt beside an answer of 512"):
        made(positions=512)


def test_pseudo_labels_are_the_models_answers_to_the_clients_own_instructions() -> None:
    engine, adapter = Writer(lambda p: "" if "Ben" in p else f" About {p.split()[3]}. "), state(1.0)
    relabel = PseudoLabels()
    [(_, found)] = drive({"c": relabel(OWN[:3], adapter, Characters(), seed=0, stream=("c", 0))}, engine)
    assert [e.instruction for e in found.examples] == [OWN[0].instruction, OWN[2].instruction]
    assert [e.response for e in found.examples] == ["About Ada.", "About Cleo."]
    assert dict(found.counts) == {"generated": 3, "kept": 2, "failed/empty-output": 1, "repeated": 0}
    assert next(iter(engine.asked[0].values())).adapter is adapter


def test_a_pool_is_drawn_from_without_asking_a_model() -> None:
    engine = Writer(fluent)
    draw = FromPool(pool=OWN, candidates=5)
    [(_, one)] = drive({"c": draw([], None, None, seed=0, stream=("c", 0))}, engine)
    [(_, same)] = drive({"c": draw([], None, None, seed=0, stream=("c", 0))}, engine)
    [(_, other)] = drive({"c": draw([], None, None, seed=0, stream=("c", 1))}, engine)
    assert engine.asked == []
    assert len({e.id + e.instruction for e in one.examples}) == 5
    assert one == same != other


@pytest.mark.parametrize("candidates", [0, 13])
def test_a_pool_that_is_too_small_is_refused(candidates: int) -> None:
    with pytest.raises(ConfigError, match="12 examples of the pool"):
        FromPool(pool=OWN, candidates=candidates)
