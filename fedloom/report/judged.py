"""Judges' findings as tables: a run's answers against an opponent's, or a comparison as in the papers.

The terminal prints these tables and the page draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.report.terms import arrow, half_width, metric_title, short, value
from fedloom.rows import Row

Judged = Mapping[str, Any]  # a table of judged.json

# FedIT's table (arXiv 2305.05644): federated score / baseline's, for LLaMA-7B on Dolly, judged by GPT-4 on 20
# of Vicuna's questions.
PAPER_RELATIVE = {
    ("base", "none"): 1.155,
    ("Local-1", "brainstorming"): 1.092,
    ("Local-2", "closed_qa"): 1.111,
    ("Local-3", "classification, brainstorming"): 1.087,
    ("centralised", "everybody's"): 0.919,
}
# PPFedIT's Table 2 (arXiv 2403.06131v3): win / tie / lose in percent, mean of its three data sets, judged by
# GPT-4 against their references.
PAPER_WINS = {
    ("centralised", "fedavg"): (27.2, 37.0, 35.9),
    ("global", "fedavg"): (20.4, 33.5, 46.1),
    ("global", "fewfedweight"): (22.4, 33.3, 44.3),
    ("global", "fewfedpit"): (26.2, 35.8, 38.0),
}
PAPER_SHARE = 0.5  # beta of its row
ONE_ORDER = "Judged in one order, so position bias passes for quality."


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    bold: Sequence[bool]  # for each line: is it the experiment's own method?
    notes: Sequence[str]


def pair(judged: Judged) -> Table:
    """A run's answers against an opponent's, from judge.json."""
    body = [
        [name, *_with_interval(judged[key])]
        for name, key in (("win", "win"), ("tie", "tie"), ("lose", "lose"), ("win or tie", "win_or_tie"))
    ]
    if judged["order_disagreement"] is not None:
        body.append(["orders disagree", *_with_interval(judged["order_disagreement"])])
    if (apart := judged["difference"]) is not None:
        ci = apart["ci95"]
        spread = "the same everywhere" if apart["constant"] else f"{ci[0]:+.3f} to {ci[1]:+.3f}" if ci else ""
        body.append(["score difference", f"{apart['mean']:+.3f}", spread])
        body.append(["total scores", f"{judged['totals'][0]:.1f} : {judged['totals'][1]:.1f}", ""])
    if judged["relative"] is not None:
        ci = judged["relative_ci95"]
        body.append(
            ["relative score", f"{judged['relative']:.3f}", f"{ci[0]:.3f} to {ci[1]:.3f}" if ci else ""]
        )
    if len(judged["aspects"]) > 1:
        body += [
            [name, f"{ours:.2f} : {theirs:.2f}", ""] for name, (ours, theirs) in judged["aspects"].items()
        ]
    title = f"run against {judged['against']}, judged by {judge_name(judged)}"
    return Table(title, ["", "run", "95% interval"], body, [False] * len(body), _pair_notes(judged))


def _with_interval(part: Mapping[str, Any]) -> tuple[str, str]:
    if part["share"] is None:
        return "–", ""
    low, high = part["ci95"]
    return f"{100 * part['share']:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}%"


def _pair_notes(judged: Judged) -> list[str]:
    read = judged["ratings"] - sum(judged["unread"].values())
    notes = [
        f"{judged['judged']} of {judged['questions']} pairs judged; {read} of {judged['ratings']} ratings read.",
        *(f"  {count} without scores: {reason}" for reason, count in sorted(judged["unread"].items())),
    ]
    if not judged["both_orders"]:
        notes.append(ONE_ORDER)
    if judged["position_bias"]:
        notes.append(_bias(judged["position_bias"]))
    return notes


def _bias(bias: float) -> str:
    return f"The answer shown first scored {bias:+.3f} over the second, on average."


def tables(judged: Judged, own: str) -> list[Table]:
    """FedIT's table, or one of FedPIT's per opponent. `own` names the federated method."""
    make = _relative if judged["table"] == "relative" else _wins
    return make(judged, own)


def shown(judged: Judged, own: str) -> dict[str, Any]:
    """The page's part on one judgement: tables, also by category, and a few questions with every answer."""
    samples = [
        {
            **s,
            "answers": [
                {"title": _name(a["of"], own), "text": a["text"], "score": f"{a['score']:.3g}"}
                for a in s["answers"]
            ],
        }
        for s in judged["samples"]
    ]
    return {
        "tables": tables(judged, own),
        "by_category": by_category(judged, own),
        "samples": samples,
        "by": judge_name(judged),
        "rubric": judged["rubric"],
    }


def judge_name(judged: Judged) -> str:
    judge = judged["judge"]
    if judge.get("writer") == "endpoint":
        return f"{judge['model']} behind {judge['url']}"
    if judge.get("writer") == "local":
        return f"a local model ({judge['weights'][:12]})"
    return {"microworld rule": "the microworld's rule", "likelihood": "the likelihood of the references"}.get(
        judge.get("judge", ""), "a judge"
    )


def _relative(judged: Judged, own: str) -> list[Table]:
    body = []
    paper = any(
        (r["row"], r["task"]) in PAPER_RELATIVE for r in judged["rows"] if Row.parse(r["row"]).specialist
    )
    for r in judged["rows"]:
        line = [_name(r["row"], own), r["task"], f"{r['scores'][0]:.1f} : {r['scores'][1]:.1f}", _ratio(r)]
        body.append([*line, _paper_relative(r)] if paper else line)
    head = ["baseline", "task", "scores", "relative score"] + (["paper's own"] if paper else [])
    notes = [
        "Scores are sums over the questions, the baseline's first and the federated model's second"
        + (", means over seeds" if len(judged["seeds"]) > 1 else "")
        + "; relative is federated / baseline, above 1 where the federated model is better.",
        f"Intervals: 95%, bootstrap over questions{' and seeds' if len(judged['seeds']) > 1 else ''}.",
    ]
    if any(r["ratio"] is None for r in judged["rows"]):
        why = "the scale has no zero" if judged["rubric"] == "likelihood" else "the baseline scores nothing"
        notes.append(
            f"No ratio where {why}: there the mean difference, federated - baseline, stands in brackets, with its own interval."
        )
    if paper:
        notes.append(
            "The paper's own: LLaMA-7B on Dolly, GPT-4 on 20 of Vicuna's questions, one seed; not comparable in size."
        )
    return [
        Table(
            _title(judged, "baselines beside the federated model"),
            head,
            body,
            [False] * len(body),
            [*notes, *_notes(judged)],
        )
    ]


def _wins(judged: Judged, own: str) -> list[Table]:
    made = []
    for opponent in dict.fromkeys(r["opponent"] for r in judged["rows"]):
        rows = [r for r in judged["rows"] if r["opponent"] == opponent]
        paper = {i: p for i, r in enumerate(rows) if (p := _paper_wins(r)) is not None}
        leak = next((r["leakage"]["metric"] for r in rows if r.get("leakage")), None)
        body = []
        for i, r in enumerate(rows):
            if r["win"] is None:
                body.append([_name(r["row"], own), r["model"], *["–"] * 5])
            else:
                line = [_percent(r[k]) for k in ("win", "tie", "lose", "win_or_tie")]
                body.append([_name(r["row"], own), r["model"], *line, _share(r["order_disagreement"])])
            if leak:
                found = r.get("leakage") or {"mean": None, "ci95": None}
                body[-1].append(f"{value(leak, found['mean'])} {half_width(leak, found['ci95'])}".strip())
            if paper:
                body[-1].append("{:.1f} / {:.1f} / {:.1f}".format(*paper[i]) if i in paper else "")
        head = ["method", "model", "win", "tie", "lose", "win + tie", "orders disagree"]
        head += ([f"{metric_title(leak)} {arrow(leak)}"] if leak else []) + (["paper's own"] if paper else [])
        notes = [
            "Shares of judged questions"
            + (
                "; mean over seeds ± half of the 95% interval."
                if len(judged["seeds"]) > 1
                else "; 95% intervals over questions."
            )
        ]
        if paper:
            notes.append(
                "The paper's own: PPFedIT's Table 2, mean of three data sets against their references, GPT-4, one seed; not comparable in size."
            )
        against = "the questions' own responses" if opponent == "reference" else _name(opponent, own)
        made.append(
            Table(
                _title(judged, f"every method against {against}"),
                head,
                body,
                [r["row"] == "federated" for r in rows],
                [*notes, *_notes(judged)],
            )
        )
    return made


def by_category(judged: Judged, own: str) -> list[Table]:
    """The same for each category of question, where there are several."""
    names = list(dict.fromkeys(name for r in judged["rows"] for name in r.get("categories") or {}))
    if len(names) < 2:
        return []
    body, relative = [], judged["table"] == "relative"
    several = len({r["opponent"] for r in judged["rows"]}) > 1
    for r in judged["rows"]:
        found = r.get("categories") or {}
        cells = [
            "–" if (x := found.get(name)) is None else f"{x:.2f}" if relative else f"{100 * x:.0f}%"
            for name in names
        ]
        body.append(
            [_name(r["row"], own) + (f" against {_name(r['opponent'], own)}" if several else ""), *cells]
        )
    what = "relative score" if relative else "won or tied"
    return [
        Table(
            f"By category of question: {what}",
            ["row", *names],
            body,
            [r["row"] == "federated" for r in judged["rows"]],
            [],
        )
    ]


def _title(judged: Judged, what: str) -> str:
    asked = judged["questions"]
    order = "both orders" if judged["both_orders"] else "ONE ORDER, as in FedIT's paper"
    seeds = f"{len(judged['seeds'])} seed{'s' if len(judged['seeds']) > 1 else ''}"
    return f"{what[0].upper()}{what[1:]}: {asked['count']} questions ({asked['from']}), {seeds}, judged by {judge_name(judged)}, {order}"


def _notes(judged: Judged) -> list[str]:
    notes = []
    judged_, of = sum(r["judged"] for r in judged["rows"]), sum(r["of"] for r in judged["rows"])
    if judged_ < of:
        notes.append(f"{judged_:,} of {of:,} pairs could be judged; the others are left out.")
    if left_out := judged["questions"]["left_out"]:
        notes.append(
            f"{left_out} question{'s' if left_out > 1 else ''} of the file left out, since a client holds {'them' if left_out > 1 else 'it'}."
        )
    if not judged["both_orders"]:
        notes.append(ONE_ORDER)
    biases = [r["position_bias"] for r in judged["rows"] if r["position_bias"]]
    if biases:
        notes.append(_bias(sum(biases) / len(biases)))
    return notes


def _paper_wins(r: Mapping[str, Any]) -> tuple[float, float, float] | None:
    if r["method"] == "fewfedpit" and r.get("private_share") != PAPER_SHARE:
        return None
    return PAPER_WINS.get((r["row"] if r["row"] == "centralised" else r["model"], r["method"]))


def _name(row: str, own: str) -> str:
    return f"Federated ({own})" if row == "federated" else short(row)


def _ratio(r: Mapping[str, Any]) -> str:
    if r["ratio"] is None:
        apart = r["difference"]
        said = f"– ({apart['mean']:+.3f} a question"
        return said + (f", {apart['ci95'][0]:+.3f} to {apart['ci95'][1]:+.3f})" if apart["ci95"] else ")")
    if r["ci95"] is None:
        return f"{r['ratio']:.3f}"
    low, high = r["ci95"]
    return f"{r['ratio']:.3f} ({low:.3f} to {'∞' if high is None else f'{high:.3f}'})"


def _paper_relative(r: Mapping[str, Any]) -> str:
    found = PAPER_RELATIVE.get((r["row"], r["task"]))
    return "" if found is None else f"{found:.3f}"


def _percent(found: Mapping[str, Any]) -> str:
    ci = found["ci95"]
    if ci is None:
        return f"{100 * found['mean']:.1f}%"
    if len(found["values"]) > 1:
        return f"{100 * found['mean']:.1f}% ± {50 * (ci[1] - ci[0]):.1f}"
    return f"{100 * found['mean']:.1f}% ({100 * ci[0]:.0f} to {100 * ci[1]:.0f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
