"""One typed experiment: a TOML file and `key=value` overrides in, one frozen tree out.

Hyper-parameters live once. Where a section is the constructor of a library class (`[adapter]`,
`[local]`, `partition`, `cohort`, `algorithm`), that class is the schema; no class ever sees a config.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
)

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedmit import FedMIT
from fedloom.algorithms.fedpit import FedPIT
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.fewfedweight import FewFedWeight
from fedloom.algorithms.flexlora import FlexLoRA
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.self_augmented import SelfAugmented
from fedloom.algorithms.server_optimizers import SGD
from fedloom.data import partition
from fedloom.data.canaries import Canaries
from fedloom.errors import ConfigError
from fedloom.gate import Gate
from fedloom.selection import All, Fixed, Fraction, Poisson, RoundRobin
from fedloom.steps import LocalTraining, LoraSpec
from fedloom.synthesis.pool import FromPool
from fedloom.synthesis.self_instruct import SelfInstruct, SelfInstructWording, Wording
from fedloom.transport.codec import Bf16, Fp32, Int4, Int8

# Settings that change no adapter, but by rounding: names, what is measured, where and how fast things are computed.
# Where the base and the data lie is among them, since what they are is checked by their hashes (run.INPUTS).
UNTRAINED = (
    "name",
    "evaluation",
    "audit",
    "judge",
    "compare.seeds",
    "compare.local",
    "compare.methods",
    "compare.leakage",
    "model.base",
    "model.device",
    "model.allow_download",
    "model.checkpointing",
    "model.tokens_per_pass",
    "model.path",
    "model.vllm",
    "data.path",
    "data.test_path",
    "transport.width",
)
# ... unless training generates text: so long, and by what.
GENERATING = ("evaluation.max_new_tokens", "model.vllm")
# Settings that name files, and are written into a run's folder in full: a run may be read from another place.
PATHS = (
    "model.base",
    "model.vllm.python",
    "data.path",
    "data.test_path",
    "evaluation.questions",
    "evaluation.references",
    "judge.by.model",
    "judge.by.prompt",
)

STRICT = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True)


# --- a named choice among classes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A class picked by name, with its options checked against its constructor; `build` calls it."""

    tag: str  # the key that names it: "name", "kind"
    name: str
    make: Callable[..., Any]
    options: Mapping[str, Any]

    def build(self, **given: Any) -> Any:
        made = {
            key: value.build() if isinstance(value, Choice) else value for key, value in self.options.items()
        }
        return self.make(**made, **given)

    @property
    def shared(self) -> bool:
        """Of an algorithm: does it train a model that all clients share?"""
        return bool(self.make.shared)  # type: ignore[attr-defined]

    def takes(self, parameter: str) -> bool:
        return any(f.name == parameter for f in fields(self.make))  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        return {
            self.tag: self.name,
            **{k: v.plain() if isinstance(v, Choice) else v for k, v in self.options.items()},
        }


def choice(
    tag: str,
    table: Mapping[str, Any],
    *,
    given: Sequence[str] = (),
    stand_ins: Mapping[str, Any] | None = None,
    nested: Mapping[str, Any] = {},
) -> Any:
    """A field type: `{tag: name, options...}` or just the name; the first of the table where it is not said.

    `given` parameters are not the user's to set; with `stand_ins` for them the class is tried on the spot, for
    the checks of its own. `nested` parameters are choices themselves.
    """

    def check(raw: Any) -> Choice:
        if isinstance(raw, Choice):
            return raw
        options = {tag: raw} if isinstance(raw, str) else dict(raw) if isinstance(raw, Mapping) else {}
        name = options.pop(tag, next(iter(table)))
        if name not in table:
            raise ValueError(
                f"expected {tag} = one of {', '.join(table)}; got {name!r}{did_you_mean(str(name), table)}"
            )
        known = {f.name: f for f in fields(table[name]) if f.name not in given}
        hints = typing.get_type_hints(table[name])
        schema = create_model(
            name,
            __config__=STRICT,
            **{
                key: (nested[key], {}) if key in nested else (hints[key], _default(f))
                for key, f in known.items()
                if key in nested or not _is_callable_type(hints[key])
            },
        )  # type: ignore[call-overload]
        checked = schema.model_validate(options)
        made = Choice(tag, name, table[name], {key: getattr(checked, key) for key in schema.model_fields})
        if stand_ins is not None or not given:
            made.build(**{key: value for key, value in (stand_ins or {}).items() if made.takes(key)})
        return made

    return Annotated[Choice, BeforeValidator(check), PlainSerializer(Choice.plain)]


def _default(f: Any) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    return ... if f.default is MISSING else f.default


def _is_callable_type(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.get_origin(Callable[..., Any])


SERVER_OPTIMIZERS = {"sgd": SGD}
ALGORITHMS = {
    "fedavg": FedAvg,
    "flexlora": FlexLoRA,
    "fewfedpit": FewFedPIT,
    "ppfedit": FewFedPIT,  # the name of its journal version
    "fedpit": FedPIT,
    "fedmit": FedMIT,
    "fewfedweight": FewFedWeight,
    "local_only": LocalOnly,
    "self_augmented": SelfAugmented,
}
PARTS = ("synthesize", "contrast", "relabel")  # of an algorithm, made from the other sections
SYNTHESES = {"self_instruct": SelfInstruct, "spare": FromPool, "restyled": FromPool}
WORDINGS = {"embedded": Wording, "self_instruct": SelfInstructWording}
CODECS = {"fp32": Fp32, "bf16": Bf16, "int8": Int8, "int4": Int4}
COHORTS = {"all": All, "fixed": Fixed, "fraction": Fraction, "round_robin": RoundRobin, "poisson": Poisson}

if TYPE_CHECKING:  # made at run time, of which a type checker sees nothing
    AlgorithmChoice: TypeAlias = Any
    CodecChoice: TypeAlias = Any
    CohortChoice: TypeAlias = Any
    PartitionChoice: TypeAlias = Any
    SynthesisChoice: TypeAlias = Any
else:
    AlgorithmChoice = choice(
        "name",
        ALGORITHMS,
        given=PARTS,
        stand_ins=dict.fromkeys(PARTS),
        nested={"server_optimizer": choice("name", SERVER_OPTIMIZERS)},
    )
    SynthesisChoice = choice(
        "kind",
        SYNTHESES,
        given=("encode", "decode", "stop", "seed", "context_length", "pool"),
        nested={"wording": choice("style", WORDINGS)},
    )
    CodecChoice = choice("name", CODECS)
    CohortChoice = choice("kind", COHORTS, given=("clients", "seed"))
    PartitionChoice = choice("kind", partition.PARTITIONS)


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
        raise ValueError("this name is that of a row which is always there")
    return text


Label = Annotated[str, AfterValidator(_label)]


def _apart(methods: dict[str, Any]) -> dict[str, Any]:
    """Each has a folder of its own, in which capitals and blanks do not tell."""
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
    max_model_len: int | None = Field(None, gt=0)  # None: what the model says


class Model(Section):
    base: str = "embedded"  # "embedded", "random:llama", a folder, or a Hugging Face id
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    quantize: Literal["none", "8bit", "4bit", "fp8"] = "none"  # 8bit, 4bit: with the extra "quant"
    allow_download: bool = False  # a Hugging Face id that is not in the local cache
    checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    tokens_per_pass: int = Field(
        4096, gt=0
    )  # how many tokens run together; changes no result but by rounding
    path: Literal["auto", "fast", "reference"] = "auto"  # auto: fast where the self-check agrees
    vllm: Vllm | None = None  # answers are generated by vLLM, in a process of its own


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
    owner: Literal["file"] | None = (
        None  # "file": each file's examples are one owner's; None: as the data say
    )
    test_path: str | list[str] | None = (
        None  # a test set of one's own, read like `path`; nothing is held out then
    )
    test_columns: dict[str, str] | None = None  # ours -> theirs, where the test set names them otherwise
    field: str | None = None  # JSON: the key whose list or object holds the records, where that is in doubt
    delimiter: str | None = (
        None  # CSV: what separates columns, such as ";" or "tab"; None: told from the header
    )
    encoding: str | None = (
        None  # of text files, such as "cp1252"; None: UTF-8, or what a byte order mark says
    )
    split: str = "train"  # for "hub"
    revision: str | None = None  # for "hub"
    on_bad: Literal["fail", "skip"] = "fail"
    examples: int | None = Field(
        None, gt=0
    )  # microworld: how many to make; elsewhere a random part of the data
    clusters: Clusters | None = None  # categories of our own making: groups of alike texts
    pool: int | None = Field(
        None, gt=0
    )  # training examples in the federation, as many of each category; None: all
    private_facts: int = Field(0, ge=0)  # microworld: access codes that only one client knows, each
    canaries: Canaries | None = None  # secrets planted in each client's data, for an audit to look for
    clients: int | None = Field(None, gt=0)  # None: what the partition says (by_owner)
    partition: PartitionChoice = {}
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
    width: int = Field(8, gt=0)  # clients in one engine batch
    codec: CodecChoice = {}  # what messages lose on their way, in simulation too


class Evaluation(Section):
    every: int = Field(1, gt=0)  # rounds between evaluations of held-out loss; the last round always is
    questions: str | None = (
        None  # a file of questions that the judge's table is made of; None: the held-out examples
    )
    references: str | None = None  # a file of stored answers to them, in one column or several
    reference_columns: list[
        str
    ] = []  # of that file; none: every column of text that is not part of the question
    examples: int | None = Field(None, gt=0)  # of the held-out set, drawn once; None: all
    answers: int | None = Field(None, ge=0)  # held-out instructions to answer after the last round; None: all
    max_new_tokens: int = Field(64, gt=0)


class Audit(Section):
    examples: int = Field(100, gt=0)  # training examples attacked, drawn over all clients
    references: int = Field(2048, gt=1)  # secrets that were never planted, to rank a canary among
    every: int | None = Field(
        None, gt=0
    )  # rounds between measurements of leakage while a run goes on; None: never


class Compare(Section):
    seeds: int = Field(5, gt=0)  # runs with seed, seed + 1, ...: everything random differs
    local: list[
        Annotated[list[str], Field(min_length=1)]
    ] = []  # FedIT's rows Local-1, Local-2, ...: the categories of each
    methods: Annotated[
        dict[Label, AlgorithmChoice], AfterValidator(_apart)
    ] = {}  # further rows: label -> algorithm, on the same data and settings
    leakage: bool = False  # attack every shared model, too
    budget: Literal["epochs", "steps"] = "epochs"  # what centralised tuning shares with the federation
    local_clients: int | None = Field(None, gt=0)  # how many clients to tune alone; None: all

    @property
    def local_labels(self) -> list[str]:
        """What the rows of `local` are called, as in FedIT's table."""
        return [f"Local-{number}" for number in range(1, len(self.local) + 1)]


class ByRule(Section):
    """The microworld's own check."""

    kind: Literal["rule"] = "rule"


class ByLikelihood(Section):
    """How likely an answer makes the reference, under a model."""

    kind: Literal["likelihood"] = "likelihood"
    model: str | None = None  # a folder or a Hugging Face id; None: the experiment's base
    max_length: int = Field(2048, ge=32)  # tokens of question, answer and reference


class InWords(Section):
    """Of a judge that is asked in words."""

    rubric: Literal["aspects", "total"] = (
        "aspects"  # FedPIT's four aspects from 1 to 5, or FedIT's total from 1 to 10
    )
    prompt: str | None = None  # a text file with words of your own; None: ours
    repeats: int = Field(1, ge=1)  # ratings of each pair in each order
    retries: int = Field(2, ge=0)  # how often a malformed reply is asked for again
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(400, ge=1)  # of a reply


class ByModel(InWords):
    """A model on this machine."""

    kind: Literal["local"] = "local"
    model: str  # a folder or a Hugging Face id
    max_length: int = Field(2048, ge=32)  # tokens it reads and writes


class ByEndpoint(InWords):
    """An OpenAI-compatible endpoint. Nothing is sent before its cost was told and agreed to."""

    kind: Literal["endpoint"] = "endpoint"
    url: str
    model: str
    key_variable: str | None = None  # the environment variable that holds the key
    timeout: float = Field(60.0, gt=0)  # seconds
    concurrency: int = Field(4, ge=1)  # requests at a time
    per_minute: float | None = Field(None, gt=0)  # requests at most
    price_in: float | None = Field(None, ge=0)  # of a million prompt tokens
    price_out: float | None = Field(None, ge=0)  # of a million reply tokens


JudgedBy = Annotated[ByRule | ByLikelihood | ByModel | ByEndpoint, Field(discriminator="kind")]


class Judge(Section):
    # Who judges; None: the rule where every question has one, else the likelihood.
    by: Annotated[
        JudgedBy | None, BeforeValidator(lambda raw: {"kind": raw} if isinstance(raw, str) else raw)
    ] = None
    table: Literal["relative", "wins"] = (
        "relative"  # FedIT's: every row's summed scores beside the federated row's; or FedPIT's: win, tie, lose
    )
    against: list[
        str
    ] = []  # of "wins": columns of evaluation.references, "reference", or rows; none: every column, else "reference"
    both_orders: bool = True  # false: each pair is shown once, the baseline or the row first, as FedIT's paper is thought to have done
    questions: int | None = Field(None, gt=0)  # how many are judged, at equal steps; None: all


class Experiment(Section):
    name: Name = "experiment"  # of the run, and of its folder
    rounds: int = Field(10, ge=1)
    seed: int = Field(0, ge=0)
    model: Model = Model()
    adapter: LoraSpec = LoraSpec()
    data: Data = Data()
    prompt: Prompt = Prompt()
    algorithm: AlgorithmChoice = {}
    synthesis: SynthesisChoice = {}
    local: LocalTraining = LocalTraining()
    examples_per_round: int | None = Field(None, gt=0)  # of a client, in its own order; None: local.epochs
    cohort: CohortChoice = {}
    transport: Transport = Transport()
    gate: Gate = Gate()
    evaluation: Evaluation = Evaluation()
    audit: Audit = Audit()
    compare: Compare = Compare()
    judge: Judge | None = None  # compare's models judged in pairs, too

    def plain(self) -> dict[str, Any]:
        """Nested dicts of TOML values, every default written out, nothing that is None."""
        tree = _without_none(self.model_dump(mode="json"))
        del tree["local"]["rounds"]  # the run's own
        return tree

    def to_toml(self) -> str:
        return tomli_w.dumps(self.plain())

    def trained(self) -> dict[str, Any]:
        """The settings that decide what is trained; others may be changed for a training that has begun."""
        tree = self.plain()
        algorithms = (self.algorithm, *self.compare.methods.values())
        generating = any(a.takes("synthesize") or a.takes("relabel") for a in algorithms)
        kept = {path: found for path in GENERATING if generating and (found := _at(tree, path)) is not None}
        for path in UNTRAINED:
            *parents, leaf = path.split(".")
            if isinstance(table := _at(tree, ".".join(parents)) if parents else tree, dict):
                table.pop(leaf, None)
        return tree | kept

    def fingerprint(self) -> str:
        """Names what is trained: equal for two experiments that would give the same adapter, but for rounding."""
        return hashlib.sha256(json.dumps(self.trained(), sort_keys=True).encode()).hexdigest()

    def anchored(self) -> Experiment:
        """With whole paths, so that its meaning does not depend on the folder it is read in.

        A base that is no folder here is left as it is: the name of a shipped or random model, or a Hub id.
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
                continue  # a program of that name, wherever the system finds it
            always = parents[0] == "data"
            found = table[leaf]
            table[leaf] = (
                [_whole(p, always) for p in found] if isinstance(found, list) else _whole(found, always)
            )
        return _validate(tree, "this experiment")

    def with_(self, **changes: Any) -> Experiment:
        return _validate({**self.plain(), **changes}, "this experiment")


def changed(one: Mapping[str, Any], other: Mapping[str, Any], within: str = "") -> list[str]:
    """Where two trees of settings differ, as dotted keys."""
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
    """The absolute path; of what may be no path at all, only where there is something. Links are left as they are."""
    local = os.path.abspath(os.path.expanduser(path))
    return local if always or (path not in ("", "embedded") and os.path.exists(local)) else path


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value


# --- reading it ------------------------------------------------------------------------------------------


def recipes() -> dict[str, str]:
    """Shipped recipes: name -> TOML text."""
    folder = resources.files("fedloom") / "recipes"
    return {
        f.name.removesuffix(".toml"): f.read_text("utf-8")
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".toml")
    }


def load(what: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """A recipe's name or a TOML file, then `section.key=value` overrides. Raises ConfigError."""
    name, text = _read(str(what))
    return parse(text, name, overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """The text of a TOML file; `name` is what errors call it. Raises ConfigError."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as bad:
        raise ConfigError(f"{name} is not valid TOML: {bad}") from bad
    for item in overrides:
        _override(tree, item)
    return _validate(tree, name)


DATA = {".json", ".jsonl", ".csv", ".tsv", ".parquet"}  # what people give where a recipe is expected


def _read(what: str) -> tuple[str, str]:
    shipped = recipes()
    if what in shipped:
        return f"recipe {what}", shipped[what]
    path = Path(what)
    if DATA & set(path.suffixes) and os.path.isfile(path):
        raise ConfigError(
            f"{path} is data. Expected a recipe ({', '.join(shipped)}) or a TOML file, and there data.path={path}."
        )
    try:
        if path.is_dir():
            path = path / "experiment.toml"
        return str(path), path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError) as missing:
        hint = did_you_mean(what, shipped)
        raise ConfigError(
            f"Expected a recipe ({', '.join(shipped)}) or a TOML file; there is no {str(path)!r}{hint}"
        ) from missing
    except UnicodeDecodeError as foreign:
        line = foreign.object.count(b"\n", 0, foreign.start) + 1
        raise ConfigError(
            f"{path}:{line} is not UTF-8. Expected a TOML file, which always is: save it as UTF-8."
        ) from foreign
    except OSError as failed:
        raise ConfigError(f"Could not read {path}: {failed.strerror or failed}.") from failed


def _override(tree: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise ConfigError(f"Expected an override like rounds=5 or data.path=FILE, got {item!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: no quotes needed on the command line
    *parents, leaf = path.split(".")
    table = tree
    for parent in parents:
        below = table.setdefault(parent, {})
        if isinstance(below, str):  # `cohort = "all"` is short for `cohort = { kind = "all" }`
            below = table[parent] = {
                "name" if parent in ("algorithm", "server_optimizer", "codec") else "kind": below
            }
        if not isinstance(below, dict):
            raise ConfigError(f"Cannot set {path}: {parent} is a value, not a section.")
        table = below
    if leaf in ("name", "kind") and parents and table.get(leaf) != value:
        table.clear()  # another class: the options of the old one do not apply to it
    table[leaf] = value


def _validate(tree: Mapping[str, Any], name: str) -> Experiment:
    if "rounds" in tree.get("local", {}):
        raise ConfigError(f"{name}: local.rounds is not a setting; rounds belongs at the top of the file.")
    for where, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {where} is no finite number.")
        if isinstance(value, str) and (foreign := re.search("[\0\ud800-\udfff]", value)):
            raise ConfigError(f"{name}: {where} holds {foreign[0]!r}, which is no text. Expected UTF-8.")
    try:
        experiment = Experiment.model_validate(tree)
        local = {**tree.get("local", {}), "rounds": experiment.rounds}
        return Experiment.model_validate({**tree, "local": local})
    except ValidationError as bad:
        raise ConfigError(
            "\n".join([f"{name} cannot be used:", *(f"  {_explain(e)}" for e in bad.errors())])
        ) from bad


def _leaves(value: Any, where: str = "file") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value, in lists too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key) if where == "file" else f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, where)
    else:
        yield where, value


def _explain(error: Any) -> str:
    where = (
        ".".join(
            str(part) for part in error["loc"] if not str(part).startswith(("function-", "str", "tuple["))
        )
        or "file"
    )
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *section, key = [str(p) for p in error["loc"]]
        return f"{where}: there is no such key{did_you_mean(key, _keys(section))}"
    got = error.get("input")
    shown = "" if isinstance(got, dict | Choice) or error["type"] == "value_error" else f", got {got!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _keys(section: Sequence[str]) -> list[str]:
    schema: Any = Experiment
    for part in section:
        schema = (
            schema.model_fields[part].annotation
            if isinstance(schema, type) and issubclass(schema, BaseModel) and part in schema.model_fields
            else None
        )
        schema = (
            next((s for s in typing.get_args(schema) if s is not type(None)), schema)
            if type(None) in typing.get_args(schema)
            else schema
        )
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return list(schema.model_fields)
    return [f.name for f in fields(schema)] if is_dataclass(schema) and schema is not Choice else []


def did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
