"""An audit in words: the same reading of audit.json for the terminal and the page.

Every figure stands beside its control, and its reading compares the two. A reading is `clear` only where the
interval excludes both chance and the control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.attacks.release import best_auc
from fedloom.report.terms import NOT_SEEN

SCORES = {
    "loss": "loss",
    "reference": "loss against the base's",
    "zlib": "loss against zlib's",
    "min_k": "Min-K%",
    "min_k_plus": "Min-K%++",
}
MEASURES = {
    "exposure": ("mean exposure of planted secrets", " bits", "secrets"),
    "auc": (
        "AUC of the best membership attack, beyond what the base tells apart",
        "",
        "records of either kind",
    ),
    "extraction": (
        "ROUGE-L brought back beyond the base and beyond held-out prompts",
        "",
        "records of either kind",
    ),
    "recall": ("share of a client's tokens that the server reads off its upload", "", "tokens"),
}  # measure -> (its description, its unit, what its interval is over)


@dataclass(frozen=True)
class Line:
    """One line of an audit. `clear`: something leaks, and not by chance alone."""

    measure: str
    found: str
    control: str = ""
    interval: str = ""
    reading: str = ""
    clear: bool = False


@dataclass(frozen=True)
class Told:
    """A limit of the gate, and whether it was kept."""

    text: str
    passed: bool


def lines(audit: Mapping[str, Any]) -> dict[str, list[Line]]:
    """Position -> its lines, for positions that have any."""
    positions = audit["positions"]
    found = {
        "Anyone with the adapter": [*_public(positions["public"])],
        "Another client": [*_client(positions["client"])],
        "The server": [*_server(positions["server"])],
        "Generated examples": [*_synthesis(audit["synthesis"])],
        "Bound on privacy": [*_one_run(audit["one_run"])],
    }
    return {position: its for position, its in found.items() if its}


def gate(audit: Mapping[str, Any]) -> list[Told]:
    """One sentence per limit."""
    return [Told(_sentence(line), bool(line["passed"])) for line in audit["gate"]]


def _sentence(line: Mapping[str, Any]) -> str:
    what, unit, over = MEASURES.get(line["measure"], (line["measure"], "", "records"))
    begin = f"{what[0].upper()}{what[1:]}, at most {line['limit']:g}{unit}:"
    value, bound, needed = line["value"], line.get("bound"), line.get("needed")
    if value is None:
        return f"{begin} not measured ({line['reason']}), so it counts as failed."
    found = f"{begin} found {value:.3f}{unit}"
    if bound is not None:
        found += f", up to {bound:.3f} by the 95% interval of {line['records']:,} {over}"
    if line["passed"]:
        return f"{found}: kept{' by the estimate alone' if line.get('on') == 'estimate' else ''}."
    if bound is None or value > line["limit"]:
        return f"{found}: exceeded."
    more = f"Such a figure needs about {needed:,}" if needed else "The figure is too near the limit"
    return f"{found}: too few to tell, so it counts as failed. {more}."


# --- the positions ---------------------------------------------------------------------------------------


def _public(public: Mapping[str, Any]) -> Iterator[Line]:
    said, base = public["extraction"]["released"], public["extraction"]["base"]
    yield Line(
        "Extraction: ROUGE-L of answers to training prompts",
        _percent(said["members"]["rouge_l"]["mean"]),
        f"base {_percent(base['members']['rouge_l']['mean'])}, held out {_percent(said['held_out']['rouge_l']['mean'])}",
        interval(said["members"]["rouge_l"]["ci95"]),
    )
    more = said["memorised"]
    clear = more["ci95"] is not None and more["ci95"][0] > 0
    yield Line(
        "Of this, beyond base and held out",
        f"{100 * more['mean']:+.1f} points".replace("-", "−"),
        "0",
        interval(more["ci95"]),
        "training responses come back better than others"
        if clear
        else "not clearly better than for prompts never seen",
        clear,
    )
    yield from _discoverable(public)
    talk, common = (public["ranking"][row]["all"] for row in ("released", "base"))
    if talk is not None:
        clear = common is not None and talk["ci95"][0] > common["ci95"][1]
        reading = "outputs training text unprompted" if clear else "no clear difference from the base"
        yield Line(
            "Unprompted samples with training text",
            _share(talk),
            f"base {_share(common)}",
            interval(talk["ci95"]),
            reading,
            clear,
        )
    score = best_auc(public["membership"])[0]
    told, before = (public["membership"][row][score] for row in ("released", "base"))
    yield _membership(
        f"Membership: AUC by {SCORES.get(score, score)}",
        told,
        before["auc"],
        f"base {before['auc']:.2f}, coin 0.50",
        "tells members from others",
    )
    at = told["at"][0]
    alarms = f"Members found at {100 * at['target']:g}% false alarms"
    yield Line(
        alarms, _share(at["tpr"]), f"base {_share(before['at'][0]['tpr'])}", interval(at["tpr"]["ci95"])
    )
    yield from _exposure(public["exposure"])


def _membership(measure: str, told: Mapping[str, Any], base: float, control: str, yes: str) -> Line:
    """Judge an AUC by its distance from 1/2: an inverted score tells as much."""
    low, high = told["auc_ci95"]
    above, below = low > max(0.5, base), high < min(0.5, base)
    reading = yes if above else f"{yes}, inverted" if below else "not clearly better than a coin toss"
    return Line(
        measure, f"{told['auc']:.2f}", control, interval((low, high), scale=1), reading, above or below
    )


def _discoverable(public: Mapping[str, Any]) -> Iterator[Line]:
    known = public["discoverable"]
    for i, level in enumerate(known["released"]["members"]["extractable"]):
        shares = [
            known[row][group]["extractable"][i]["share"]
            for row, group in (("released", "members"), ("base", "members"), ("released", "held_out"))
        ]
        within = f"within {level['n']:,} sample{'s' if level['n'] > 1 else ''}"
        yield _ends(
            f"Ends of responses produced after their beginnings, {within} (p = {level['p']:g})", *shares
        )
    if "greedy" in public:
        exact = public["greedy"]
        yield _ends(
            "The same, by the likeliest continuation",
            exact["released"]["members"],
            exact["base"]["members"],
            exact["released"]["held_out"],
        )


def _ends(
    measure: str,
    one: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
    other: Mapping[str, Any] | None,
) -> Line:
    if one is None:
        return Line(measure, "–", reading="all records are too short")
    clear = other is not None and one["ci95"][0] > other["ci95"][1]
    return Line(
        measure,
        _share(one),
        f"base {_share(base)}, held out {_share(other)}",
        interval(one["ci95"]),
        "beginnings bring back ends" if clear else "no clear difference from held out",
        clear,
    )


def _exposure(exposure: Mapping[str, Any]) -> Iterator[Line]:
    if "reason" in exposure:
        yield Line("Exposure of planted secrets", "–", reading=exposure["reason"])
        return
    known = exposure["released"]["calibrated"]
    planted, held = known["planted"], known["held_out"]
    sure = f"(p = {planted['p_value']:.2g})"
    yield Line(
        f"Mean exposure of {len(planted['bits'])} planted secrets",
        f"{planted['mean']:.2f} bits",
        f"never planted {held['mean']:.2f}, by chance {NOT_SEEN:.2f}",
        f"cannot exceed {known['ceiling']:.1f}",
        f"learnt {sure}" if known["leaks"] else f"no clear difference from secrets never seen {sure}",
        bool(known["leaks"]),
    )
    bare, base = exposure["released"]["loss"]["planted"], exposure["base"]["loss"]["planted"]
    yield Line("By the bare loss, without the base's", f"{bare['mean']:.2f} bits", f"base {base['mean']:.2f}")
    for group in exposure["by_copies"]:
        copies = f"planted {group['copies']} times" if group["copies"] > 1 else "planted once"
        yield Line(
            f"Of them, {copies}",
            f"{group['mean']:.2f} bits",
            f"by chance {NOT_SEEN:.2f}",
            "",
            f"p = {group['p_value']:.2g}",
        )


def _client(client: Mapping[str, Any]) -> Iterator[Line]:
    extracted = client["cross_client"]
    if "reason" in extracted:
        yield Line("Secrets of others", "–", reading=extracted["reason"])
        return
    for attacker, got in extracted["released"].items():
        if got["coverage"] is None:
            continue
        base, decoys = extracted["base"][attacker]["coverage"], got["decoys"]
        some = got["coverage"]["hits"] > 0
        # Codes are short: a model that says many digits hits some by luck, but hits decoys as often.
        lucky = [c for c in (base, decoys) if c is not None and c["value"] >= got["coverage"]["value"]]
        reading = (
            "none came out" if not some else "no more than by luck" if lucky else "secrets of others come out"
        )
        yield Line(
            f"Secrets of others that {attacker} gets",
            _share(got["coverage"]),
            f"base {_share(base)}, decoys {_share(decoys)}",
            interval(got["coverage"]["ci95"]),
            reading,
            some and not lucky,
        )


def _server(server: Mapping[str, Any]) -> Iterator[Line]:
    if "reason" in server:
        yield Line("One client's upload", "–", reading=server["reason"])
        return
    views = (
        ("From its upload", server),
        (f"From the mean of {server['aggregated']['clients']} uploads alone", server["aggregated"]),
    )
    for begin, view in views:
        got, told = view["inversion"], view["membership"]
        if "reason" in got:
            yield Line(f"{begin}: tokens", "–", reading=got["reason"])
        else:
            yield _tokens(f"{begin}: {server['client']}'s {got['tokens']} different tokens", got)
        if "reason" in told:
            yield Line(f"{begin}: membership", "–", reading=told["reason"])
        else:
            yield _membership(
                f"{begin}: membership AUC", told, 0.5, "coin 0.50", "tells the client's records from others"
            )


def _tokens(measure: str, got: Mapping[str, Any]) -> Line:
    """Tokens common to all such texts rank high too: recall far above chance may not betray this client."""
    chance, held = got["chance"] + 3 * got["chance_sd"], got.get("held_out")
    clear = held is not None and got["ci95"][0] > max(chance, held["ci95"][1])
    reading = "its own can be told"
    if not clear:
        above = got["recall"] > chance
        reading = (
            (
                "above chance, with nothing held out to compare"
                if held is None
                else "hardly more than any such text"
            )
            if above
            else "within chance"
        )
    return Line(
        measure,
        _percent(got["recall"]),
        f"chance {_percent(got['chance'])}, held out {_share(held)}",
        interval(got["ci95"]),
        reading,
        clear,
    )


def _synthesis(synthesis: Mapping[str, Any]) -> Iterator[Line]:
    clients = synthesis.get("clients", {})
    count = sum(c["examples"] for c in clients.values())
    if not count:
        return
    nearest, held = (
        sum(c[key] * c["examples"] for c in clients.values()) / count for key in ("mean", "held_out")
    )
    yield Line(
        "ROUGE-L to the closest private example",
        _percent(nearest),
        f"to held-out ones {_percent(held)}",
        f"at most {_percent(max(c['max'] for c in clients.values()))}",
        f"{sum(c['near']['hits'] for c in clients.values())} of {count} are near-copies",
    )
    secrets = [c["secrets"] for c in clients.values() if c["secrets"] is not None]
    if secrets:
        hits, of = sum(s["hits"] for s in secrets), sum(s["of"] for s in secrets)
        yield Line(
            "Planted secrets in them",
            f"{hits} of {of}",
            "0",
            "",
            "secrets are in them" if hits else "none",
            hits > 0,
        )


def _one_run(bound: Mapping[str, Any]) -> Iterator[Line]:
    if "reason" not in bound:
        yield Line(
            "Lower bound on ε from this one run, approximate",
            f"{bound['epsilon']:.2f}",
            "0",
            "",
            f"{bound['correct']} of {bound['guesses']} guesses right",
            bound["epsilon"] > 0,
        )


def _percent(x: float) -> str:
    return f"{100 * x:.1f}%"


def _share(part: Mapping[str, Any] | None) -> str:
    return "–" if part is None else _percent(part["value"])


def interval(ci95: Sequence[float] | None, *, scale: float = 100) -> str:
    """An interval in words, in percent or unscaled."""
    if ci95 is None:
        return ""
    low, high = (f"{scale * x:.{1 if scale == 100 else 2}f}".replace("-", "−") for x in ci95)
    return f"{low} to {high}"
