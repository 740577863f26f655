"""What `fedloom audit` found, for people: every figure beside its control, exposures, AUCs, and the gate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from fedloom.errors import RunError
from fedloom.report import figures
from fedloom.report.findings import NOT_SEEN
from fedloom.report.pictures import Picture

FILE = "audit.json"
SCHEMA = 1
SCORES = {
    "loss": "loss",
    "reference": "loss against the base's",
    "zlib": "loss against zlib's",
    "min_k": "Min-K%",
    "min_k_plus": "Min-K%++",
}
MEASURES = {
    "exposure": ("mean exposure of planted secrets", " bits"),
    "auc": ("AUC of the best membership attack, beyond what the base tells apart", ""),
    "extraction": ("ROUGE-L brought back beyond the base and beyond held-out prompts", ""),
    "recall": ("share of a client's tokens that the server reads off its upload", ""),
}
PLANTED, UNSEEN, BASE = "#cc6677", "#3b7dd8", figures.ROW_COLOURS["base"]


@dataclass(frozen=True)
class Line:
    """`clear`: the reading says that something leaks, and not by chance alone."""

    measure: str
    found: str
    control: str = ""
    interval: str = ""
    reading: str = ""
    clear: bool = False


def read(folder: Path) -> Mapping[str, Any] | None:
    """None where nobody audited the run. Raises: RunError."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as damage:
        raise RunError(
            f"{path} cannot be read: {type(damage).__name__}. Delete it, or audit anew: fedloom audit {folder}"
        ) from damage
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "positions" not in found:
        raise RunError(
            f"{path}: expected an audit of schema {SCHEMA}. Delete it, or audit anew: fedloom audit {folder}"
        )
    return found


def shown(audit: Mapping[str, Any], adapter_sha256: str) -> dict[str, Any]:
    """What the page's section needs."""
    positions = audit["positions"]
    return {
        "groups": {
            "Whoever gets the adapter": [*_public(positions["public"])],
            "Another client": [*_client(positions["client"])],
            "The server": [*_server(positions["server"])],
            "Generated examples": [*_synthesis(audit["synthesis"])],
            "Bound on privacy": [*_one_run(audit["one_run"])],
        },
        "targets": audit["targets"],
        "gate": gate(audit),
        "passed": audit["passed"],
        "other": audit["adapter_sha256"] != adapter_sha256,
    }


def gate(audit: Mapping[str, Any]) -> list[str]:
    """A sentence for each limit."""
    said = []
    for line in audit["gate"]:
        what, unit = MEASURES.get(line["measure"], (line["measure"], ""))
        begin = f"{what[0].upper()}{what[1:]}, at most {line['limit']:g}{unit}: "
        if line["value"] is None:
            said.append(f"{begin}not measured ({line['reason']}), so it counts as failed.")
        else:
            said.append(f"{begin}found {line['value']:.3f}{unit}, {'kept' if line['passed'] else 'exceeded'}.")
    return said


# --- the table's lines -----------------------------------------------------------------------------------


def _public(public: Mapping[str, Any]) -> Iterator[Line]:
    said, base = public["extraction"]["released"], public["extraction"]["base"]
    yield Line(
        "Extraction: ROUGE-L of answers to training prompts",
        _percent(said["members"]["rouge_l"]["mean"]),
        f"base {_percent(base['members']['rouge_l']['mean'])}, held out {_percent(said['held_out']['rouge_l']['mean'])}",
        _interval(said["members"]["rouge_l"]["ci95"]),
    )
    more = said["memorised"]
    clear = more["ci95"] is not None and more["ci95"][0] > 0
    yield Line(
        "Of it, beyond base and held out",
        f"{100 * more['mean']:+.1f} points".replace("-", "−"),
        "0",
        _interval(more["ci95"]),
        "training responses come back better than others" if clear else "no more than for prompts never seen",
        clear,
    )
    known = public["discoverable"]
    for i, level in enumerate(known["released"]["members"]["extractable"]):
        one, untuned, other = (
            known[row][group]["extractable"][i]["share"]
            for row, group in (("released", "members"), ("base", "members"), ("released", "held_out"))
        )
        if one is not None:
            clear = other is not None and one["ci95"][0] > other["ci95"][1]
            yield Line(
                f"Ends of responses said after their beginnings, within {level['n']:,} sample{'s' if level['n'] > 1 else ''}",
                _share(one),
                f"base {_share(untuned)}, held out {_share(other)}",
                _interval(one["ci95"]),
                "beginnings bring back ends" if clear else "no clear difference from held out",
                clear,
            )
    talk, common = (public["ranking"][row]["all"] for row in ("released", "base"))
    if talk is not None:
        clear = common is not None and talk["ci95"][0] > common["ci95"][1]
        reading = "says training text unasked" if clear else "no more than the base, as far as so few tell"
        yield Line("Unasked samples with training text", _share(talk), f"base {_share(common)}", _interval(talk["ci95"]), reading, clear)  # fmt: skip
    score = best_score(public["membership"])
    told, before = (public["membership"][row][score] for row in ("released", "base"))
    clear = told["auc_ci95"][0] > max(0.5, before["auc"])
    yield Line(
        f"Membership: AUC by {SCORES.get(score, score)}",
        f"{told['auc']:.2f}",
        f"base {before['auc']:.2f}, coin 0.50",
        _interval(told["auc_ci95"], scale=1),
        "tells members from others" if clear else "not clearly better than a coin",
        clear,
    )
    at = told["at"][0]
    alarms = f"Members found at {100 * at['target']:g}% false alarms"
    yield Line(
        alarms, _share(at["tpr"]), f"base {_share(before['at'][0]['tpr'])}", _interval(at["tpr"]["ci95"])
    )
    yield from _exposure(public["exposure"])


def best_score(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The one that tells members best beyond what it tells apart of the base, which never saw any."""
    return max(rows["released"], key=lambda s: rows["released"][s]["auc"] - max(0.0, rows["base"][s]["auc"] - 0.5))


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
        f"learnt {sure}" if known["leaks"] else f"not told from secrets never seen {sure}",
        bool(known["leaks"]),
    )
    bare, base = exposure["released"]["loss"]["planted"], exposure["base"]["loss"]["planted"]
    yield Line("By the bare loss, without the base's", f"{bare['mean']:.2f} bits", f"base {base['mean']:.2f}", "", "")
    for group in exposure["by_copies"]:
        copies = f"planted {group['copies']} times" if group["copies"] > 1 else "planted once"
        yield Line(
            f"Of them, {copies}", f"{group['mean']:.2f} bits", "", "", f"p = {group['p_value']:.2g}"
        )


def _client(client: Mapping[str, Any]) -> Iterator[Line]:
    fished = client["cross_client"]
    if "reason" in fished:
        yield Line("Secrets of others", "–", reading=fished["reason"])
        return
    for attacker, got in fished["released"].items():
        if got["coverage"] is not None:
            some = got["coverage"]["hits"] > 0
            yield Line(
                f"Secrets of others that {attacker} gets",
                _share(got["coverage"]),
                f"base {_share(fished['base'][attacker]['coverage'])}, decoys {_share(got['decoys'])}",
                _interval(got["coverage"]["ci95"]),
                "secrets of others come out" if some else "none came out",
                some,
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
            clear = got["recall"] > got["chance"] + 3 * got["chance_sd"]
            yield Line(
                f"{begin}: {server['client']}'s {got['tokens']} different tokens",
                _percent(got["recall"]),
                f"chance {_percent(got['chance'])}",
                _interval(got["ci95"]),
                "far above chance" if clear else "within chance",
                clear,
            )
        if "reason" in told:
            yield Line(f"{begin}: membership", "–", reading=told["reason"])
        else:
            clear = told["auc_ci95"][0] > 0.5
            yield Line(
                f"{begin}: membership AUC",
                f"{told['auc']:.2f}",
                "coin 0.50",
                _interval(told["auc_ci95"], scale=1),
                "tells the client's records from others" if clear else "not clearly better than a coin",
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
        yield Line("Planted secrets in them", f"{hits} of {of}", "0", "", "secrets are in them" if hits else "none", hits > 0)


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


def _interval(ci95: Sequence[float] | None, *, scale: float = 100) -> str:
    if ci95 is None:
        return ""
    low, high = (f"{scale * x:.{1 if scale == 100 else 2}f}".replace("-", "−") for x in ci95)
    return f"{low} to {high}"


# --- figures ---------------------------------------------------------------------------------------------


def pictures(audit: Mapping[str, Any]) -> dict[str, Picture]:
    """ "exposures" where secrets were planted, and "aucs"."""
    public, made = audit["positions"]["public"], {}
    if "reason" not in public["exposure"]:
        label = "Exposure of planted and of held-out secrets, with the law of secrets never seen."
        made["exposures"] = Picture("exposures", label, exposures_figure(public["exposure"]), *_exposures_table(public["exposure"]))
    label = "AUC of five scores that tell members from others, of the released model and of the base."
    made["aucs"] = Picture("aucs", label, aucs_figure(public["membership"]), *_aucs_table(public["membership"]))
    return made


def exposures_figure(exposure: Mapping[str, Any]) -> go.Figure:
    """Shares of secrets by whole bits, planted beside held out, and the share that chance gives each bin.

    A secret that was never seen has an exposure of at least x with probability 2^-x: so half of them lie
    below one bit, a quarter between one and two, ...; what is left over lies in the last bin.
    """
    known = exposure["released"]["calibrated"]
    planted, unseen, chance = _bins(known)
    bins = len(chance)
    traces: list[Any] = []
    for nth, (side, name, hue) in enumerate((("planted", "planted", PLANTED), ("held_out", "never planted", UNSEEN))):
        bits, counts = known[side]["bits"], planted if side == "planted" else unseen
        traces.append(
            go.Bar(
                x=[i + 0.5 for i in range(bins)],
                y=[100 * n / max(1, len(bits)) for n in counts],
                name=f"{name}, mean {known[side]['mean']:.2f} bits" if bits else name,
                marker=figures.bar(hue, nth),
                hovertext=[f"{name}, {i} to {i + 1} bits: {n} of {len(bits)}" for i, n in enumerate(counts)],
                hoverinfo="text",
            )
        )
    traces.append(
        go.Scatter(
            x=[i + 0.5 for i in range(bins)],
            y=chance,
            mode="lines+markers",
            line={"color": BASE, "width": 2, "dash": "dash"},
            name=f"never seen, mean {NOT_SEEN:.2f} bits",
            hovertext=[f"never seen, {i} to {i + 1} bits: {p:.1f}%" for i, p in enumerate(chance)],
            hoverinfo="text",
        )
    )
    return figures.figure(
        traces,
        height=340,
        barmode="group",
        bargap=0.15,
        hovermode="closest",
        showlegend=True,
        xaxis={
            "title": figures.axis_title("exposure, bits"),
            "range": [0, bins],
            "dtick": max(1, bins // 12),
        },
        yaxis={"title": figures.axis_title("share of secrets, %"), "rangemode": "tozero"},
    )


def _bins(known: Mapping[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """By whole bits: planted secrets, those never planted, and the percentage that chance puts there."""
    bins = max(1, -int(-known["ceiling"] // 1))
    counts = {side: [0] * bins for side in ("planted", "held_out")}
    for side, its in counts.items():
        for b in known[side]["bits"]:
            its[min(bins - 1, max(0, int(b)))] += 1
    chance = [100 * (2.0**-i - (2.0 ** -(i + 1) if i + 1 < bins else 0.0)) for i in range(bins)]
    return counts["planted"], counts["held_out"], chance


def _exposures_table(exposure: Mapping[str, Any]) -> tuple[list[str], list[list[str | int]]]:
    found = zip(*_bins(exposure["released"]["calibrated"]), strict=True)
    return ["bits", "planted", "never planted", "by chance"], [[f"{i} to {i + 1}", a, b, f"{c:.1f}%"] for i, (a, b, c) in enumerate(found)]


def aucs_figure(rows: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """The five scores: released and base side by side, 95% intervals over records, and a coin."""
    names = list(rows["released"])
    traces = []
    for row, name, hue, shape, shift in (
        ("released", "released model", PLANTED, "circle", -0.12),
        ("base", "untuned base", BASE, "square", 0.12),
    ):
        found = [rows[row][score] for score in names]
        traces.append(
            go.Scatter(
                x=[one["auc"] for one in found],
                y=[i + shift for i in range(len(names))],
                mode="markers",
                name=name,
                marker={"size": 10, "color": hue, "symbol": shape},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [one["auc_ci95"][1] - one["auc"] for one in found],
                    "arrayminus": [one["auc"] - one["auc_ci95"][0] for one in found],
                    "thickness": 1.5,
                    "width": 4,
                    "color": hue,
                },
                hovertext=[
                    f"{name}, {SCORES.get(s, s)}: {one['auc']:.2f} ({_interval(one['auc_ci95'], scale=1)})"
                    for s, one in zip(names, found, strict=True)
                ],
                hoverinfo="text",
            )
        )
    coin = {"type": "line", "x0": 0.5, "x1": 0.5, "yref": "paper", "y0": 0, "y1": 1}
    return figures.figure(
        traces,
        height=340,
        hovermode="closest",
        showlegend=True,
        shapes=[{**coin, "line": {"color": BASE, "width": 1.5, "dash": "dot"}}],
        xaxis={"title": figures.axis_title("AUC (0.5: a coin)"), "range": [0, 1.02]},
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": [figures.label(SCORES.get(s, s)) for s in names],
            "range": [len(names) - 0.5, -0.5],
        },
    )


def _aucs_table(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str | int]]]:
    head = ["score", "released", "95% interval", "base", "95% interval"]
    body: list[list[str | int]] = []
    for score in rows["released"]:
        one, other = rows["released"][score], rows["base"][score]
        cells = [c for x in (one, other) for c in (f"{x['auc']:.2f}", _interval(x["auc_ci95"], scale=1))]
        body.append([SCORES.get(score, score), *cells])
    return head, body
