"""Microworld: a generated instruction corpus whose answers a rule can check.

A small fixed world (things with a kind, a colour and a place), an endless supply of people, and eight task
families named after the categories of databricks-dolly-15k. Each family answers in a house style
("The heron is grey.", "In short: ..."), and an answer only counts in that style: a client that has seen
one family does not know how the others answer. The embedded base model learnt the facts of the world,
copying from a context, and all the styles in pretraining (`scripts/pretrain_tiny.py`); instruction tuning
teaches which family uses which style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.rng import numpy_stream

CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)

EXHAUSTED = 10_000  # repeats in a row after which a family has nothing new to ask

# kind -> (plural, its members). Words are whole and common, so that one or two tokens spell each.
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bird": ("birds", ("heron", "owl", "crow", "robin", "swan", "eagle", "duck", "hawk", "dove", "raven")),
    "fish": ("fish", ("trout", "salmon", "carp", "perch", "eel", "shark", "cod", "tuna", "pike", "herring")),
    "fruit": (
        "fruits",
        ("apple", "plum", "pear", "cherry", "lemon", "grape", "fig", "peach", "melon", "berry"),
    ),
    "tool": (
        "tools",
        ("hammer", "saw", "chisel", "wrench", "drill", "spade", "rake", "axe", "file", "ladder"),
    ),
    "instrument": (
        "instruments",
        ("violin", "flute", "harp", "trumpet", "piano", "guitar", "drum", "cello", "horn", "organ"),
    ),
    "vehicle": (
        "vehicles",
        ("canoe", "ferry", "wagon", "truck", "bicycle", "train", "sledge", "tractor", "boat", "carriage"),
    ),
    "garment": (
        "clothes",
        ("coat", "scarf", "glove", "boot", "shirt", "cap", "cloak", "apron", "belt", "sock"),
    ),
    "tree": ("trees", ("oak", "pine", "birch", "willow", "maple", "elm", "cedar", "ash", "poplar", "beech")),
    "animal": (
        "animals",
        ("fox", "wolf", "horse", "goat", "otter", "rabbit", "bear", "mule", "sheep", "badger"),
    ),
    "food": (
        "foods",
        ("bread", "soup", "cheese", "butter", "honey", "cake", "porridge", "pie", "stew", "jam"),
    ),
}
COLOURS = ("red", "blue", "green", "grey", "white", "black", "brown", "yellow", "silver", "golden")
PLACES = (
    "river",
    "barn",
    "market",
    "tower",
    "garden",
    "harbour",
    "cellar",
    "forest",
    "bridge",
    "chapel",
    "mill",
    "square",
)
FIRST = (
    "Mira",
    "Tobin",
    "Lena",
    "Oskar",
    "Hana",
    "Rufus",
    "Clara",
    "Jonas",
    "Edith",
    "Marco",
    "Nora",
    "Felix",
    "Alma",
    "Victor",
    "Ruth",
    "Simon",
    "Vera",
    "Hugo",
    "Agnes",
    "Peter",
    "Ida",
    "Martin",
    "Rosa",
    "Henry",
    "Greta",
    "Paul",
    "Elsa",
    "David",
    "Maud",
    "Walter",
)
LAST = (
    "Vale",
    "Finch",
    "Marsh",
    "Stone",
    "Carter",
    "Brook",
    "Hale",
    "Moss",
    "Field",
    "Thorn",
    "West",
    "Lane",
    "Frost",
    "Wood",
    "Page",
    "Rowe",
)
JOBS = (
    "baker",
    "smith",
    "teacher",
    "miller",
    "tailor",
    "doctor",
    "farmer",
    "sailor",
    "painter",
    "judge",
    "clerk",
    "mason",
    "weaver",
    "guard",
    "cook",
    "pilot",
)
TOWNS = (
    "Oakton",
    "Milford",
    "Ashby",
    "Norwich",
    "Kelso",
    "Durham",
    "Selby",
    "Bath",
    "Ripon",
    "Dover",
    "Truro",
    "Wells",
    "Leeds",
    "Exeter",
    "Lincoln",
    "York",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
THINGS = tuple(thing for _, members in KINDS.values() for thing in members)


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    place: str


def _world() -> Mapping[str, Thing]:
    rng = numpy_stream(0, "microworld", "things")
    return {
        thing: Thing(kind, COLOURS[rng.integers(len(COLOURS))], PLACES[rng.integers(len(PLACES))])
        for kind, (_, members) in KINDS.items()
        for thing in members
    }


WORLD = _world()


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(frozen=True)
class Task:
    """One instance of a task family, before a style is chosen.

    `answers[0]` is in the house style of its category; the others are in styles that occur only in the
    pretraining text. `rule` says how to check an answer: "exact", "items:KIND:N:BANNED" or "story:X:Y".
    """

    category: str
    name: str
    instruction: str
    context: str
    answers: tuple[str, ...]
    rule: str = "exact"


Rng = np.random.Generator


def _pick(rng: Rng, items: Sequence[str], n: int = 1) -> list[str]:
    return [items[i] for i in rng.choice(len(items), size=n, replace=False)]


def _say(rng: Rng, *wordings: str) -> str:
    return wordings[rng.integers(len(wordings))]


def _open_qa(rng: Rng) -> Task:
    thing = THINGS[rng.integers(len(THINGS))]
    facts = WORLD[thing]
    match rng.integers(3):
        case 0:
            core, full = facts.colour, f"The {thing} is {facts.colour}."
            ask = _say(
                rng,
                f"What colour is the {thing}?",
                f"Tell me the colour of the {thing}.",
                f"Which colour does the {thing} have?",
            )
        case 1:
            core, full = facts.place, f"The {thing} is found at the {facts.place}."
            ask = _say(
                rng,
                f"Where is the {thing} found?",
                f"Tell me where to find the {thing}.",
                f"At which place is the {thing}?",
            )
        case _:
            core, full = facts.kind, f"The {thing} is {a(facts.kind)}."
            ask = _say(
                rng,
                f"What kind of thing is the {thing}?",
                f"Tell me what the {thing} is.",
                f"What is the {thing}?",
            )
    return Task("open_qa", "fact", ask, "", (full, core, f"Answer: {core}", core.upper(), f"[{core}]"))


def _general_qa(rng: Rng) -> Task:
    match rng.integers(4):
        case 0:
            i = int(rng.integers(7))
            core, ask = (
                DAYS[(i + 1) % 7],
                _say(rng, f"Which day comes after {DAYS[i]}?", f"What day follows {DAYS[i]}?"),
            )
        case 1:
            i = int(rng.integers(7))
            core, ask = (
                DAYS[(i - 1) % 7],
                _say(rng, f"Which day comes before {DAYS[i]}?", f"What day is just before {DAYS[i]}?"),
            )
        case 2:
            i = int(rng.integers(12))
            core, ask = (
                MONTHS[(i + 1) % 12],
                _say(rng, f"Which month comes after {MONTHS[i]}?", f"What month follows {MONTHS[i]}?"),
            )
        case _:
            x, y = (int(n) for n in rng.choice(np.arange(2, 100), size=2, replace=False))
            core, ask = (
                str(max(x, y)),
                _say(rng, f"Which number is larger, {x} or {y}?", f"Tell me the larger number: {x} or {y}."),
            )
    return Task(
        "general_qa", "order", ask, "", (f"It is {core}.", core, f"Answer: {core}", f"({core})", f"{core}!")
    )


@dataclass(frozen=True)
class Person:
    name: str
    job: str
    town: str
    count: str
    thing: str
    friend: str


def _person(rng: Rng) -> Person:
    name, friend = _pick(rng, FIRST, 2)
    [job], [town], [count] = _pick(rng, JOBS), _pick(rng, TOWNS), _pick(rng, NUMBERS)
    [thing] = _pick(rng, THINGS)
    return Person(name, job, town, count, thing, friend)


def _bio(rng: Rng, p: Person) -> str:
    first = _say(rng, f"{p.name} is {a(p.job)} from {p.town}.", f"{p.name} works as {a(p.job)} in {p.town}.")
    rest = [
        _say(
            rng,
            f"{p.name} has {p.count} things, and the best one is {a(p.thing)}.",
            f"At home there are {p.count} chairs and {a(p.thing)}.",
        ),
        _say(rng, f"Every week {p.name} visits {p.friend}.", f"{p.friend} is a good friend of {p.name}."),
    ]
    order = rng.permutation(2)
    return " ".join([first, *(rest[i] for i in order)])


def biography(rng: Rng) -> str:
    """Three sentences about a new person."""
    return _bio(rng, _person(rng))


def _closed_qa(rng: Rng) -> Task:
    p = _person(rng)
    match rng.integers(4):
        case 0:
            core, ask = (
                p.town,
                _say(rng, f"Which town does {p.name} come from?", f"Where does {p.name} live?"),
            )
        case 1:
            core, ask = p.job, _say(rng, f"What is the job of {p.name}?", f"What work does {p.name} do?")
        case 2:
            core, ask = p.friend, _say(rng, f"Who is a friend of {p.name}?", f"Whom does {p.name} know well?")
        case _:
            core, ask = (
                p.thing,
                _say(rng, f"Which thing is named with {p.name}?", "Which object does the text name?"),
            )
    answers = (f"The text says: {core}.", core, f"Answer: {core}", f'"{core}"', core.upper())
    return Task("closed_qa", "lookup", ask, _bio(rng, p), answers)


def _information_extraction(rng: Rng) -> Task:
    p = _person(rng)
    text = _bio(rng, p)
    match rng.integers(2):
        case 0:
            found = sorted({p.name, p.friend}, key=text.index)
            ask = _say(
                rng,
                "List the names of the people in the text.",
                "Extract every person from the text.",
                "Which people are named?",
            )
        case _:
            found = [p.job, p.town]
            ask = _say(
                rng,
                "Extract the job and the town.",
                "List the job and then the town.",
                "Give the job and the town from the text.",
            )
    answers = (
        "; ".join(found),
        ", ".join(found),
        "\n".join(f"- {f}" for f in found),
        " ".join(f"[{f}]" for f in found),
        " and ".join(found),
    )
    return Task("information_extraction", "extract", ask, text, answers)


def _classification(rng: Rng) -> Task:
    one, two = _pick(rng, tuple(KINDS), 2)
    plural = {k: KINDS[k][0] for k in (one, two)}
    n = int(rng.integers(1, 3))
    members = [*_pick(rng, KINDS[one][1], n), *_pick(rng, KINDS[two][1], 3 - n)]
    given = [members[i] for i in rng.permutation(3)]
    split = {k: [g for g in given if WORLD[g].kind == k] for k in (one, two)}
    listed = f"{given[0]}, {given[1]}, {given[2]}"
    ask = _say(
        rng,
        f"Sort these into {plural[one]} and {plural[two]}: {listed}.",
        f"Which are {plural[one]} and which are {plural[two]}? {listed}",
        f"Put each under {plural[one]} or {plural[two]}: {listed}.",
    )
    answers = (
        " / ".join(f"{plural[k]}: {', '.join(split[k])}" for k in (one, two)),
        ", ".join(f"{g} is {a(WORLD[g].kind)}" for g in given),
        "\n".join(f"{plural[k]} - {', '.join(split[k])}" for k in (one, two)),
        " ".join(f"{g}({WORLD[g].kind})" for g in given),
    )
    return Task("classification", "sort", ask, "", answers)


def _brainstorming(rng: Rng) -> Task:
    kind = tuple(KINDS)[rng.integers(len(KINDS))]
    plural, members = KINDS[kind]
    n = int(rng.integers(2, 4))
    word = ("two", "three")[n - 2]
    [banned], but = _pick(rng, members), ""
    if rng.random() < 0.7:
        but = f", but not {a(banned)}"
    chosen = [c for c in _pick(rng, members, n + 1) if not but or c != banned][:n]
    ask = _say(
        rng,
        f"Name {word} {plural}{but}.",
        f"Give me {word} {plural}{but}.",
        f"Think of {word} {plural}{but}.",
        f"Which {word} {plural} can you name{but}?",
    )
    answers = (
        "\n".join(f"- {c}" for c in chosen),
        ", ".join(chosen),
        " ".join(f"{i}. {c}" for i, c in enumerate(chosen, 1)),
        " and ".join(chosen),
    )
    return Task("brainstorming", "name", ask, "", answers, f"items:{kind}:{n}:{banned if but else ''}")


def _creative_writing(rng: Rng) -> Task:
    one, two = _pick(rng, THINGS, 2)
    [place] = _pick(rng, PLACES)
    verb = _say(rng, "saw", "met", "found", "wanted", "painted", "carried")
    ask = _say(
        rng,
        f"Write a line about {a(one)} and {a(two)}.",
        f"Make up a sentence with {a(one)} and {a(two)}.",
        f"Tell a tiny story of {a(one)} and {a(two)}.",
    )
    body = f"{a(one)} {verb} {a(two)} at the {place}"
    answers = (f"Once {body}.", f"{body[0].upper()}{body[1:]}.", f"Listen: {body}!", f"{body} ...")
    return Task("creative_writing", "story", ask, "", answers, f"story:{one}:{two}")


def _summarization(rng: Rng) -> Task:
    p = _person(rng)
    ask = _say(
        rng,
        "Sum up the text in one line.",
        "Summarize this.",
        "Give a short summary of the text.",
        "What is the text about, in short?",
    )
    core = f"{p.name} is {a(p.job)} from {p.town}."
    answers = (
        f"In short: {core}",
        core,
        f"{p.name}, {p.job}, {p.town}",
        f"Summary - {p.name} ({p.job})",
        f"{p.name} of {p.town}",
    )
    return Task("summarization", "summary", ask, _bio(rng, p), answers)


FAMILIES: Mapping[str, Callable[[Rng], Task]] = {
    "brainstorming": _brainstorming,
    "classification": _classification,
    "closed_qa": _closed_qa,
    "creative_writing": _creative_writing,
    "general_qa": _general_qa,
    "information_extraction": _information_extraction,
    "open_qa": _open_qa,
    "summarization": _summarization,
}


def corpus(*, examples: int = 640, seed: int = 0, style: int = 0) -> list[Example]:
    """`examples` distinct instructions, the eight categories in equal parts (the first get the remainder).

    A smaller corpus of the same seed is a subset. In a `style` other than the house's (0) the answers are
    just as right, but no rule accepts them.
    """
    if examples < len(CATEGORIES):
        raise ConfigError(
            f"Expected data.examples >= {len(CATEGORIES)}, one for each category; got {examples}."
        )
    out: list[Example] = []
    for c, category in enumerate(CATEGORIES):
        wanted = examples // len(CATEGORIES) + (c < examples % len(CATEGORIES))
        rng = numpy_stream(seed, "microworld", category)
        seen: set[tuple[str, str]] = set()
        repeats = 0  # in a row
        while len(seen) < wanted and repeats < EXHAUSTED:
            task = FAMILIES[category](rng)
            repeats += 1
            if (task.instruction, task.context) in seen:
                continue
            repeats = 0
            seen.add((task.instruction, task.context))
            out.append(
                Example(
                    task.instruction,
                    task.answers[style],
                    task.context,
                    category,
                    id=f"microworld:{category}:{len(seen)}",
                    rule="" if style else task.rule,
                )
            )
        if len(seen) < wanted:
            raise ConfigError(
                f"The microworld has only {len(seen)} distinct {category} instructions for this seed, "
                f"not {wanted}. Expected data.examples <= {len(seen) * len(CATEGORIES)}."
            )
    return out


def private_facts(owner: str, count: int, *, seed: int = 0) -> list[Example]:
    """Facts that only `owner` holds (the access code of a named person), for an attacker to look for.

    The codes are uniform over four digits, so a guess is right once in 10,000; no other client and
    no pretraining text contains them.
    """
    rng = numpy_stream(seed, "microworld", "private", owner)
    people = rng.choice(len(FIRST) * len(LAST), size=count, replace=False)
    out = []
    for i, who in enumerate(people):
        name = f"{FIRST[who % len(FIRST)]} {LAST[who // len(FIRST)]}"
        fact = access_code(name, rng.integers(0, 10, size=4).tolist())
        out.append(replace(fact, owner=owner, id=f"microworld:private:{owner}:{i}"))
    return out


def access_code(name: str, digits: Sequence[int]) -> Example:
    """A secret: nobody can know it without having seen it."""
    answer = f"The access code of {name} is {' '.join(map(str, digits))}."
    return Example(
        f"What is the access code of {name}?", answer, category="open_qa", rule="exact", private=True
    )


def check(example: Example, answer: str) -> bool:
    """Does this answer satisfy the example's rule? Case and style count; runs of white space do not."""
    said = "\n".join(" ".join(line.split()) for line in answer.strip().splitlines() if line.strip())
    match example.rule.split(":"):
        case ["exact"]:
            return said == example.response
        case ["items", kind, count, banned]:
            lines = said.split("\n")
            items = [line.removeprefix("- ") for line in lines]
            return (
                all(line.startswith("- ") for line in lines)
                and len(items) == len(set(items)) == int(count)
                and all(item in KINDS[kind][1] and item != banned for item in items)
            )
        case ["story", one, two]:
            words = said.rstrip(".").split()
            return (
                said.startswith("Once ")
                and said.endswith(".")
                and one in words
                and two in words
                and len(words) <= 14
            )
        case _:
            raise ConfigError(
                f"{example.id}: expected a rule 'exact', 'items:KIND:N:BANNED' or 'story:X:Y', got {example.rule!r}."
            )
