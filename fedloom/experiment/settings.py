"""One typed experiment: the tree of its settings, every default in its place.

Hyper-parameters live once. Where a section is the constructor of a library class (`[adapter]`, `[local]`,
`partition`, `cohort`, `algorithm`), that class is the schema and the setting is an instance of it; no class
ever sees a config. `toml.py` reads files and overrides.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import tomli_w
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from fedloom.algorithms.base import Algorithm, ServerOptimizer
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.names import ALGORITHMS, ALIASES
from fedloom.algorithms.server_optimizers import SERVER_OPTIMIZERS
from fedloom.data.canaries import Canaries
from fedloom.data.partition import IID, PARTITIONS, Partitioner
from fedloom.errors import ConfigError
from fedloom.experiment.choices import STRICT, OneOf, did_you_mean, keys
from fedloom.gate import Gate
from fedloom.rows import Row
from fedloom.selection import SELECTORS, All, Selector
from fedloom.steps import LocalTraining, LoraSpec
from fedloom.synthesis.pool import HeldBack, OtherStyle
from fedloom.synthesis.self_instruct import WORDINGS, SelfInstruct, Wording
from fedloom.transport.codec import CODECS, Codec, Fp32

# Settings that change no adapter, except by rounding: names, measuring, where and how fast things run.
# They include the places of base and data, whose contents are checked by their hashes (see inputs.py).
UNTRAINED = (
    "name",
    "machine",
    "evaluation",
    "audit",
    "leakage",
    "judge",
    "compare.seeds",
    "compare.local",
    "compare.methods",
    "compare.leakage",
    "model.base",
    "model.allow_download",
    "data.path",
    "data.test_path",
)
# ... unless training generates text: then these decide its length and what generates it.
GENERATING = ("evaluation.max_new_tokens", "machine.vllm")
# Settings that name files. A run's folder holds them as absolute paths, so that it can be read from anywhere.
PATHS = (
    "model.base",
    "machine.vllm.python",
    "data.path",
    "data.test_path",
    "evaluation.questions",
    "evaluation.references",
    "judge.by.model",
    "judge.by.prompt",
)

Synthesis: TypeAlias = SelfInstruct | HeldBack | OtherStyle

ALGORITHM = OneOf(
    "name",
    ALGORITHMS,
    aliases=ALIASES,
    nested={"server_optimizer": Annotated[ServerOptimizer, OneOf("name", SERVER_OPTIMIZERS)]},
)
SYNTHESIS = OneOf(
    "kind",
    {"self_instruct": SelfInstruct, "held_back": HeldBack, "other_style": OtherStyle},
    nested={"wording": Annotated[Wording, OneOf("style", WORDINGS)]},
)
COHORT = OneOf("kind", SELECTORS)
PARTITION = OneOf("kind", PARTITIONS)
CODEC = OneOf("name", CODECS)


# --- names -----------------------------------------------------------------------------------------------


def _name(text: str) -> str:
    if not re.fullmatch(r"\w[\w .+=-]{0,59}(?<![ .])", text):  # it names a folder
        raise ValueError(
            f"expected up to 60 letters, digits, blanks and .+=_-, a letter or digit first and no blank or dot last; got {text[:80]!r}"
        )
    return text


Name = Annotated[str, AfterValidator(_name)]


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .+=_-]{0,31}", text):
        raise ValueError("expected a name of up to 32 letters, digits, blanks and .+=_-")
    if re.fullmatch(r"base|reference|local(-\d+)?|federated|centralised", text.lower()):
        raise ValueError("this is the name of a row that is always there")
    if Row.parse(text) != Row(text, "global"):
        raise ValueError(
            'expected a name that does not end in "mean", "best" or "personal", as rows of clients do'
        )
    return text


Label = Annotated[str, AfterValidator(_label)]


def _apart(methods: dict[str, Any]) -> dict[str, Any]:
    """Each method has its own folder, and capitals and blanks do not distinguish folder names."""
    folded = [label.lower().replace(" ", "-") for label in methods]
    if alike := {name for name in folded if folded.count(name) > 1}:
        raise ValueError(
            f"expected names that differ by more than capitals, blanks and hyphens; got {', '.join(alike)} twice"
        )
    return methods


# --- the tree --------------------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = STRICT


class Vllm(Section):
    python: str  # the interpreter of an environment that has vLLM; fedloom need not be in it
    gpu_memory_utilization: float = Field(0.4, gt=0, lt=1)  # of the GPU's memory: training needs the rest
    max_model_len: int | None = Field(None, gt=0)  # None: the model's own


class Model(Section):
    base: str = "embedded"  # "embedded", "random:llama", a folder, or a Hugging Face id
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    quantize: Literal["none", "8bit", "4bit", "fp8"] = "none"  # 8bit, 4bit: with the extra "quant"
    allow_download: bool = False  # a Hugging Face id that is not in the local cache


class Machine(Section):
    """How computing is done, and how fast: nothing here changes a result, except by rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    kernels: Literal["auto", "fast", "reference"] = "auto"  # auto: fast where the self-check agrees
    tokens_per_pass: int = Field(4096, gt=0)  # how many tokens run together
    checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    clients_per_batch: int = Field(8, gt=0)  # clients that train together
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"  # batches of clients at a time
    threads: Literal["auto"] | Annotated[int, Field(gt=0)] = (
        "auto"  # per worker; another number changes rounding
    )
    ray: str | None = None  # "auto" or an address: workers on a Ray cluster; None: on this machine
    vllm: Vllm | None = None  # vLLM generates the answers, in a process of its own


class Clusters(Section):
    count: int = Field(100, gt=0)
    of: Literal["tfidf", "base"] = (
        "tfidf"  # k-means over TF-IDF, or over the base model's own mean hidden states
    )


class Data(Section):
    source: Literal["microworld", "dolly", "alpaca", "alpacare", "medquad", "chat", "table", "hub"] = (
        "microworld"
    )
    path: str | list[str] | None = None  # a file, a folder, a pattern or several; for "hub" the id
    columns: dict[str, str] = {}  # ours -> theirs, for "table" and "hub"
    owner: Literal["file"] | None = None  # "file": one owner per file; None: as the data say
    test_path: str | list[str] | None = (
        None  # a test set of your own, read like `path`; nothing else is held out then
    )
    test_columns: dict[str, str] | None = None  # ours -> theirs, where its columns have other names
    field: str | None = None  # JSON: the key of the list or object that holds the records, if in doubt
    delimiter: str | None = (
        None  # CSV: the column separator, such as ";" or "tab"; None: found from the header
    )
    encoding: str | None = (
        None  # of text files, such as "cp1252"; None: UTF-8, or as the byte order mark says
    )
    split: str = "train"  # for "hub"
    revision: str | None = None  # for "hub"
    on_bad: Literal["fail", "skip"] = "fail"
    examples: int | None = Field(
        None, gt=0
    )  # microworld: how many to make; elsewhere a random part of the data
    clusters: Clusters | None = None  # categories made by clustering similar texts
    pool: int | None = Field(
        None, gt=0
    )  # training examples in the federation, equally many of each category; None: all
    private_facts: int = Field(0, ge=0)  # microworld: access codes per client that nobody else knows
    canaries: Canaries | None = None  # secrets planted in each client's data, for an audit to look for
    clients: int | None = Field(None, gt=0)  # None: the partition decides (by_owner)
    partition: Annotated[Partitioner, PARTITION] = IID()
    hold_out: int = Field(10, ge=1)  # test examples of each category
    hold_out_by: Literal["category", "owner"] = "category"


class Prompt(Section):
    format: Literal["auto", "chat", "alpaca", "plain"] = (
        "auto"  # auto: the tokenizer's chat template, else alpaca
    )
    max_length: int = Field(512, ge=32)  # tokens of prompt and response
    loss_on: Literal["response", "assistant", "all"] = "response"  # assistant: every answer of a conversation
    system: str = ""


class Transport(Section):
    codec: Annotated[Codec, CODEC] = Fp32()  # how messages are coded, in simulation too


class Evaluation(Section):
    every: int = Field(1, gt=0)  # rounds between evaluations of held-out loss; the last round always is
    questions: str | None = None  # a file of questions for the judge's table; None: the held-out examples
    references: str | None = None  # a file of stored answers to them, in one column or several
    reference_columns: list[
        str
    ] = []  # of that file; empty: every text column that is not part of the question
    examples: int | None = Field(None, gt=0)  # of the held-out set, drawn once; None: all
    answers: int | None = Field(None, ge=0)  # held-out instructions to answer after the last round; None: all
    max_new_tokens: int = Field(64, gt=0)


class Audit(Section):
    examples: int = Field(100, gt=0)  # training examples attacked, drawn over all clients
    references: int = Field(2048, gt=1)  # secrets never planted, among which a canary is ranked


class Leakage(Section):
    """Measured during a run, on the targets that `[audit]` describes."""

    every: int | None = Field(None, gt=0)  # rounds between measurements; None: never


class Compare(Section):
    seeds: int = Field(5, gt=0)  # runs with seed, seed + 1, ...: everything random differs
    local: list[
        Annotated[list[str], Field(min_length=1)]
    ] = []  # FedIT's rows Local-1, Local-2, ...: the categories of each
    methods: Annotated[
        dict[Label, Annotated[Algorithm, ALGORITHM]], AfterValidator(_apart)
    ] = {}  # further rows: label -> algorithm, on the same data and settings
    leakage: bool = False  # attack every shared model, too
    budget: Literal["epochs", "steps"] = "epochs"  # what centralised tuning has in common with the federation
    local_clients: int | None = Field(None, gt=0)  # how many clients to tune alone; None: all

    @property
    def local_labels(self) -> list[str]:
        """The names of the rows in `local`, as in FedIT's table."""
        return [f"Local-{number}" for number in range(1, len(self.local) + 1)]


@dataclass(frozen=True, kw_only=True)
class ByRule:
    """The microworld's own check."""


@dataclass(frozen=True, kw_only=True)
class ByLikelihood:
    """How likely the reference becomes, under a model, after an answer."""

    model: str | None = None  # a folder or a Hugging Face id; None: the experiment's base
    max_length: Annotated[int, Field(ge=32)] = 2048  # tokens of question, answer and reference


@dataclass(frozen=True, kw_only=True)
class InWords:
    """Settings of a judge that is asked in words."""

    # FedPIT's four aspects from 1 to 5, or FedIT's total from 1 to 10
    rubric: Literal["aspects", "total"] = "aspects"
    prompt: str | None = None  # a text file with your own wording; None: ours
    repeats: Annotated[int, Field(ge=1)] = 1  # ratings of each pair in each order
    retries: Annotated[int, Field(ge=0)] = 2  # how often a malformed reply is asked for again
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 400  # of a reply


@dataclass(frozen=True, kw_only=True)
class ByModel(InWords):
    """A model on this machine."""

    model: str  # a folder or a Hugging Face id
    max_length: Annotated[int, Field(ge=32)] = 2048  # tokens it reads and writes


@dataclass(frozen=True, kw_only=True)
class ByEndpoint(InWords):
    """An OpenAI-compatible endpoint. Nothing is sent until its cost has been shown and agreed to."""

    url: str
    model: str
    key_variable: str | None = None  # the environment variable that holds the key
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds
    concurrency: Annotated[int, Field(ge=1)] = 4  # requests at a time
    per_minute: Annotated[float, Field(gt=0)] | None = None  # requests at most
    price_in: Annotated[float, Field(ge=0)] | None = None  # of a million prompt tokens
    price_out: Annotated[float, Field(ge=0)] | None = None  # of a million reply tokens


JudgedBy: TypeAlias = ByRule | ByLikelihood | ByModel | ByEndpoint
JUDGED_BY = OneOf(
    "kind", {"rule": ByRule, "likelihood": ByLikelihood, "local": ByModel, "endpoint": ByEndpoint}
)


class Judge(Section):
    # Who judges; None: the rule where every question has one, else the likelihood.
    by: Annotated[JudgedBy, JUDGED_BY] | None = None
    table: Literal["relative", "wins"] = (
        "relative"  # FedIT's: summed scores of every row and the federated row; or FedPIT's: win, tie, lose
    )
    against: list[
        str
    ] = []  # "wins": columns of evaluation.references, "reference", rows; empty: the columns, or "reference"
    both_orders: bool = True  # false: each pair once, the baseline or row first, probably as in FedIT's paper
    questions: int | None = Field(None, gt=0)  # how many to judge, evenly spaced; None: all


class Experiment(Section):
    name: Name = "experiment"  # of the run, and of its folder
    rounds: int = Field(10, ge=1, le=99_999)  # files of rounds have five digits
    seed: int = Field(0, ge=0)
    model: Model = Model()
    machine: Machine = Machine()
    adapter: LoraSpec = LoraSpec()
    data: Data = Data()
    prompt: Prompt = Prompt()
    algorithm: Annotated[Algorithm, ALGORITHM] = FedAvg()
    synthesis: Annotated[Synthesis, SYNTHESIS] = SelfInstruct()
    local: LocalTraining = LocalTraining()
    examples_per_round: int | None = Field(None, gt=0)  # of a client, in its own order; None: local.epochs
    cohort: Annotated[Selector, COHORT] = All()
    transport: Transport = Transport()
    gate: Gate = Gate()
    evaluation: Evaluation = Evaluation()
    audit: Audit = Audit()
    leakage: Leakage = Leakage()
    compare: Compare = Compare()
    judge: Judge | None = None  # judge compare's models in pairs, too

    @property
    def algorithms(self) -> list[Algorithm]:
        """The experiment's own algorithm and those of `compare.methods`."""
        return [self.algorithm, *self.compare.methods.values()]

    def plain(self) -> dict[str, Any]:
        """Nested dicts of TOML values, with every default written out and no None."""
        tree: dict[str, Any] = _without_none(self.model_dump(mode="json"))
        del tree["local"]["rounds"]  # the run's own
        return tree

    def to_toml(self) -> str:
        return tomli_w.dumps(self.plain())

    def trained(self) -> dict[str, Any]:
        """The settings that decide what is trained; the others may change after a training has begun."""
        tree = self.plain()
        generating = any(a.needs & {"synthesize", "relabel"} for a in self.algorithms)
        kept = {path: found for path in GENERATING if generating and (found := _at(tree, path)) is not None}
        for path in UNTRAINED:
            *parents, leaf = path.split(".")
            if isinstance(table := _at(tree, ".".join(parents)) if parents else tree, dict):
                table.pop(leaf, None)
        return tree | kept

    def fingerprint(self) -> str:
        """A hash of what is trained: equal for experiments with the same adapter, except for rounding."""
        return hashlib.sha256(json.dumps(self.trained(), sort_keys=True).encode()).hexdigest()

    def anchored(self) -> Experiment:
        """The same with absolute paths, so that its meaning does not depend on the current folder.

        A base that is not a folder here is left alone: the name of a shipped or random model, or a Hub id.
        """
        tree = self.plain()
        for path in PATHS:
            *parents, leaf = path.split(".")
            table = _at(tree, ".".join(parents))
            if (
                not isinstance(table, dict)
                or leaf not in table
                or (path == "data.path" and self.data.source == "hub")
            ):
                continue
            if leaf == "python" and not os.path.dirname(table[leaf]):
                continue  # a program of that name, found by the system
            always = parents[0] == "data"
            found = table[leaf]
            table[leaf] = (
                [_whole(p, always) for p in found] if isinstance(found, list) else _whole(found, always)
            )
        return checked(tree, "this experiment")

    def with_(self, **changes: Any) -> Experiment:
        return checked({**self.plain(), **changes}, "this experiment")


def changed(one: Mapping[str, Any], other: Mapping[str, Any], within: str = "") -> list[str]:
    """The dotted keys at which two trees of settings differ."""
    found: list[str] = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changed(a, b, f"{within}{key}.")
        elif a != b:
            found.append(within + key)
    return found


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _whole(path: str, always: bool) -> str:
    """The absolute path; a value that may not be a path only if it exists. Links are not resolved."""
    local = os.path.abspath(os.path.expanduser(path))
    return local if always or (path not in ("", "embedded") and os.path.exists(local)) else path


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value


# --- checking it -----------------------------------------------------------------------------------------


def checked(tree: Mapping[str, Any], name: str) -> Experiment:
    """The experiment that a tree of values describes; errors refer to it as `name`. Raises: ConfigError."""
    if isinstance(own := tree.get("local", {}), Mapping) and "rounds" in own:
        raise ConfigError(f"{name}: local.rounds is not a setting; put rounds at the top of the file.")
    for where, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {where} is not a finite number.")
        if isinstance(value, str) and (foreign := re.search("[\0\ud800-\udfff]", value)):
            raise ConfigError(f"{name}: {where} holds {foreign[0]!r}, which is no text. Expected UTF-8.")
    try:
        experiment = Experiment.model_validate(tree)
        local = {**tree.get("local", {}), "rounds": experiment.rounds}
        experiment = Experiment.model_validate({**tree, "local": local})
    except ValidationError as bad:
        raise ConfigError("\n".join([f"{name} cannot be used:", *_explained(bad, tree)])) from bad
    found = dict(_leaves(experiment.plain()))
    for where, value in _leaves(tree):
        if isinstance(value, bool) and not isinstance(
            found.get(where, value), bool
        ):  # pydantic reads true as 1
            raise ConfigError(
                f"{name}: {where} is neither true nor false. Expected a value like {found[where]!r}."
            )
    return experiment


def _leaves(value: Any, where: str = "file") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for every value, including those in lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key) if where == "file" else f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, where)
    else:
        yield where, value


def _explained(bad: ValidationError, tree: Any) -> list[str]:
    """A line for each key that is wrong: the key, then the mistake in words."""
    mistakes: dict[
        tuple[str, str], list[str]
    ] = {}  # (key, the value shown) -> what each member of a union says
    for error in bad.errors():
        path = [str(part) for part in error["loc"] if not BRANCH.fullmatch(str(part))]
        said, shown = error["msg"].removeprefix("Value error, "), ""
        if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            said = f"there is no such key{did_you_mean(path[-1], _known(path[:-1], tree))}"
        elif error["type"] != "value_error" and not isinstance(error.get("input"), Mapping):
            shown = f", got {error.get('input')!r}"
        mistakes.setdefault((".".join(path) or "file", shown), []).append(said)
    return [
        f"  {where}: {' or '.join([said, *(more.removeprefix('Input should be ') for more in others)])}{shown}"
        for (where, shown), (said, *others) in mistakes.items()
    ]


# pydantic's names for members of a union and for wrapped checks; neither is a key.
BRANCH = re.compile(r"function-.*|constrained-.*|\[key\]|str|int|float|(literal|list|tuple)\[.*")


def _known(section: Sequence[str], tree: Any) -> dict[str, Any]:
    """The keys of a section."""
    hint: Any = Experiment
    for key in section:
        hint, tree = keys(hint, tree).get(key), tree.get(key) if isinstance(tree, Mapping) else None
    return keys(hint, tree)
