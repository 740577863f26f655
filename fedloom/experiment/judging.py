"""Judge a run's answers, or a comparison's models in FedIT's table of scores or FedPIT's of wins and losses.

Nothing is trained. Answers are kept in each seed's answers.jsonl, verdicts in judge/verdicts.jsonl, so
another judge or another table asks only for the replies that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data.example import Example
from fedloom.errors import RunError
from fedloom.evaluation import questions as question_files
from fedloom.evaluation.answers import answers_of
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.judge import compare
from fedloom.evaluation.pairwise import Comparison
from fedloom.experiment import judged
from fedloom.experiment.comparison import seed_folders, trained, untrained
from fedloom.experiment.datasets import load_data
from fedloom.experiment.finished import adapter_of, finished
from fedloom.experiment.judged import Asked
from fedloom.experiment.judges import build, how, judged_by, tell_cost
from fedloom.experiment.machine import Machine, load_machine
from fedloom.experiment.questions import REFERENCE, opponents, questions_of, stored_of
from fedloom.experiment.settings import Experiment
from fedloom.experiment.settings import Judge as Settings
from fedloom.report import page
from fedloom.rows import BASE, FEDERATED, Row, is_single
from fedloom.state import AdapterState
from fedloom.storage import checkpoint, folders
from fedloom.storage.files import (
    ANSWERS,
    JUDGE,
    JUDGED,
    SCHEMA,
    SUMMARY,
    VERDICTS,
    read_judged,
    write_json,
)

Ask = Callable[[str], None]  # hears each step before it happens


def judge(
    run: Path | str,
    experiment: Experiment | None = None,
    *,
    against: Sequence[str] = (),
    field: str = "answer",
    agreed: bool = False,
    say: Ask = lambda _: None,
) -> dict[str, Any]:
    """Judge a finished run's answers, or all models of a comparison, pair by pair; nothing is trained.

    `experiment` is the run's own, perhaps with its section `judge` changed. `against` names the opponents:
    for a run "base" (default), "reference" (the held-out responses) or a file whose field `field` holds
    answers; for a comparison, those in its table of wins. `agreed` permits asking an endpoint that costs
    money. Returns the contents of judge.json, or the table added to judged.json. Answers and verdicts are
    kept, and only missing ones are requested. Raises: FedloomError; where consent is missing, before anything
    is sent.
    """
    run = Path(run)
    saved = finished(run)
    experiment = saved if experiment is None else experiment
    if folders.kind(run) == "run":
        return _judge_run(run, experiment, (*against, BASE)[0], field, agreed=agreed, say=say)
    if not (run / SUMMARY).exists():
        raise RunError(f"{run} is a comparison that is not finished. Go on with it: {folders.resume(run)}")
    if against:
        experiment = experiment.with_(judge={**experiment.plain().get("judge", {}), "against": list(against)})
    table = _judge_comparison(run, experiment, agreed=agreed, say=say)
    page.write(run)
    return table


def _judge_run(
    run: Path, experiment: Experiment, against: str, field: str, *, agreed: bool, say: Ask
) -> dict[str, Any]:
    settings = experiment.judge or Settings()
    asked, _ = questions_of(experiment, load_data(experiment))
    machine = load_machine(experiment)
    the_judge = build(judged_by(settings, asked), experiment, machine)
    rows = {"run": adapter_of(run, machine)} | ({BASE: None} if against == BASE else {})
    said = _answers(experiment, machine, asked, rows, run)
    if against == BASE:
        theirs: Sequence[str] = said[BASE]
    elif against == REFERENCE:
        theirs = [e.response for e in asked]
    else:
        theirs = question_files.answers(against, asked, field)
    kept = Cache(run / VERDICTS)
    shown = (asked, said["run"], theirs)
    tell_cost(settings, the_judge, [shown], kept, agreed=agreed, say=say)
    found = compare(the_judge, *shown, cache=kept, **how(settings))
    table = {"against": against, "judge": judged.named(the_judge), **found.plain()}
    write_json(run / JUDGE, table)
    return table


def _judge_comparison(folder: Path, experiment: Experiment, *, agreed: bool, say: Ask) -> dict[str, Any]:
    """The table that `experiment.judge` asks for; judged.json keeps it too."""
    settings = experiment.judge or Settings()
    seeds = seed_folders(experiment, folder)
    machine = load_machine(experiment)
    with checkpoint.lock(folder):
        asked = [_asked(its, seed, machine, say) for seed, its in seeds.items()]
        the_judge = build(judged_by(settings, asked[0].questions), experiment, machine)
        kept = Cache(folder / VERDICTS)
        pairs = _pairs(settings, asked)
        tell_cost(
            settings,
            the_judge,
            [p.shown for its in pairs.values() for p in its],
            kept,
            agreed=agreed,
            say=say,
        )
        found: dict[tuple[str, str], list[list[Comparison]]] = {}
        for (row, opponent), its in pairs.items():
            say(f"judging {row} against {opponent}")
            by_seed: list[list[Comparison]] = [[] for _ in asked]
            for pair in its:
                by_seed[pair.seed].append(compare(the_judge, *pair.shown, cache=kept, **how(settings)))
            found[row, opponent] = by_seed
        table = judged.table(
            settings, the_judge, experiment, asked, found, list(seeds.values()), judged.leaks(folder)
        )
        _keep(folder, table)
    return table


def _keep(folder: Path, table: Mapping[str, Any]) -> None:
    """Store a table beside those of other judges and forms; one of the same kind is replaced."""

    def kind(t: Mapping[str, Any]) -> Any:
        return t["table"], t["judge"], t["both_orders"], t["questions"]

    others = [t for t in read_judged(folder) if kind(t) != kind(json.loads(json.dumps(table)))]
    write_json(folder / JUDGED, {"schema": SCHEMA, "tables": [*others, table]})


# --- the models of a comparison --------------------------------------------------------------------------


def _asked(experiment: Experiment, folder: Path, machine: Machine, say: Ask) -> Asked:
    say(f"answers of {folder.name}")
    dataset = load_data(experiment)
    questions, left_out = questions_of(experiment, dataset)
    if missing := untrained(experiment, folder):
        raise RunError(
            f"{folder} holds no finished training of {', '.join(missing)}, and judging trains nothing. "
            f"Train first: fedloom compare --resume --out {folder.parent}"
        )
    rows, _ = trained(experiment, dataset, machine, folder)
    if experiment.judge is None or experiment.judge.table == "relative":
        rows = {row: adapter for row, adapter in rows.items() if not is_single(row)}
    return Asked(
        questions,
        _answers(experiment, machine, questions, rows, folder),
        stored_of(experiment, questions),
        left_out,
    )


def _answers(
    experiment: Experiment,
    machine: Machine,
    questions: Sequence[Example],
    rows: Mapping[str, AdapterState | None],
    folder: Path,
) -> dict[str, list[str]]:
    """Row -> its answers; any already in the folder's answers.jsonl are reused."""
    said = answers_of(
        machine.engine,
        machine.template,
        questions,
        rows,
        weights=machine.base_hash,
        max_new_tokens=experiment.evaluation.max_new_tokens,
        cache=Cache(folder / ANSWERS),
    )
    return {row: [a.text for a in its] for row, its in said.items()}


@dataclass(frozen=True)
class _Pair:
    seed: int  # index
    shown: tuple[Sequence[Example], Sequence[str], Sequence[str]]  # questions, ours, theirs


def _pairs(settings: Settings, asked: Sequence[Asked]) -> dict[tuple[str, str], list[_Pair]]:
    """(row, opponent) -> the answers to compare: a pair per seed, or per client for clients' own models."""
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for s, its in enumerate(asked):
        if settings.table == "relative":
            against = {FEDERATED: its.said[FEDERATED]}
        else:
            against = {
                name: its.stored.get(name) or its.said[name]
                for name in opponents(settings, its.stored, its.said)
            }
        for row, ours in its.said.items():
            label = str(Row.parse(row).over("mean")) if is_single(row) else row
            for opponent, theirs in against.items():
                if label != opponent:
                    pairs.setdefault((label, opponent), []).append(_Pair(s, (its.questions, ours, theirs)))
    return pairs
