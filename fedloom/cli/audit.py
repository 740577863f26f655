"""fedloom audit: what a run gives away, position by position, and a gate for its release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.arguments import Overrides, RunFolder, load_finished
from fedloom.cli.console import complain, err, out

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str, str, str, str]  # measure, model, control, interval, reading

OPTIONS = {"exposure": "--max-exposure", "auc": "--max-auc", "extraction": "--max-extraction", "recall": "--max-recall"}
WORDS = {
    "exposure": "the mean exposure of planted canaries, in bits",
    "auc": "the AUC of the best membership attack, beyond what the untuned base tells apart",
    "extraction": "the ROUGE-L that training prompts bring back beyond the base and beyond held-out prompts",
    "recall": "the share of a client's tokens that the server reads off its upload",
}  # fmt: skip


def command(
    run: RunFolder,
    overrides: Overrides = None,
    max_exposure: Annotated[float | None, typer.Option(help="Release gate: bits known of a planted canary, on average.")] = None,
    max_auc: Annotated[float | None, typer.Option(help="Release gate: AUC of the best membership attack, less what the untuned base tells apart.")] = None,
    max_extraction: Annotated[float | None, typer.Option(help="Release gate: ROUGE-L brought back beyond the base and beyond held-out prompts.")] = None,
    max_recall: Annotated[float | None, typer.Option(help="Release gate: share of a client's tokens that the server reads off its upload.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Texts a model is let to say unasked. Default: 64, or 1024 with --full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Greedy continuations too, and more samples: slower.")] = False,
) -> None:  # fmt: skip
    """Attack a finished run as whoever gets its adapter, as another client and as the server.

    Every figure stands beside what the untuned base or unseen secrets give. Exits with 1 where a limit is
    exceeded, or could not be measured. Needs the data the run was trained on.
    """
    load_finished(run)
    from fedloom.audit import AUDIT, FULL, SAMPLES, Limits, audit
    from fedloom.report import page

    limits = Limits(exposure=max_exposure, auc=max_auc, extraction=max_extraction, recall=max_recall)
    found = audit(
        run, overrides or [], limits=limits, full=full, samples=samples or (FULL if full else SAMPLES),
        say=lambda part: err.print(f"[dim]auditing: {part}[/]", highlight=False),
    )  # fmt: skip
    out.print(_table(found))
    out.print(f"Wrote {run / AUDIT} and {page.write(run)}", highlight=False, soft_wrap=True)
    for line in found["gate"]:
        if line["passed"]:
            out.print(f"passed: {OPTIONS[line['measure']]} {line['limit']:g}, found {line['value']:.3f}", highlight=False)
    for line in found["gate"]:
        if not line["passed"]:
            complain(_failure(line))
    if found["passed"] is False:
        raise typer.Exit(1)
    if found["passed"]:
        out.print("Every limit is kept. That is no proof of privacy: stronger attacks exist.", highlight=False)


def _failure(line: Mapping[str, Any]) -> str:
    what, limit = WORDS[line["measure"]], f"{OPTIONS[line['measure']]} {line['limit']:g}"
    if line["value"] is None:
        return f"{limit} failed, since it could not be measured: {line['reason']}."
    return f"{limit} failed; {what}: {line['value']:.3f}."


def _table(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{found['name']}: what can be learnt from it", title_justify="left")
    for name, justify in (("measure", "left"), ("model", "right"), ("control", "right"), ("95% interval", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("reading", min_width=12)
    positions = found["positions"]
    for part in (_public(positions["public"]), _client(positions["client"]), _server(positions["server"]),
                 _synthesis(found["synthesis"]), _one_run(found["one_run"])):  # fmt: skip
        for row in part:
            table.add_row(*row)
        table.add_section()
    return table


def _public(public: Mapping[str, Any]) -> Iterator[Row]:
    from fedloom.audit import best_auc

    said, base = public["extraction"]["released"], public["extraction"]["base"]
    members, held = said["members"]["rouge_l"], said["held_out"]["rouge_l"]
    yield (
        "extraction: ROUGE-L to trained responses", _percent(members["mean"]),
        f"base {_percent(base['members']['rouge_l']['mean'])}, held out {_percent(held['mean'])}",
        _interval(members["ci95"]), "",
    )  # fmt: skip
    more = said["memorised"]
    yield (
        "  beyond base and held out", f"{100 * more['mean']:+.1f}", "0", _interval(more["ci95"]),
        _above(more["ci95"], 0.0, "training responses come back better", "not clearly better than for prompts never seen"),
    )  # fmt: skip
    yield from _discoverable(public)
    talk, common = public["ranking"]["released"]["all"], public["ranking"]["base"]["all"]
    if talk is not None:
        yield (
            "unasked: samples with training text", _share(talk), f"base {_share(common)}", _interval(talk["ci95"]),
            "says training text by itself" if common and talk["ci95"][0] > common["ci95"][1] else "no more than the base, as far as so few tell",
        )  # fmt: skip
    name, _ = best_auc(public["membership"])
    told, before = public["membership"]["released"][name], public["membership"]["base"][name]
    yield (
        f"membership: AUC by {name}", f"{told['auc']:.3f}", f"base {before['auc']:.3f}", _interval(told["auc_ci95"], scale=1),
        _above(told["auc_ci95"], max(0.5, before["auc"]), "tells members from others", "not clearly better than a coin"),
    )  # fmt: skip
    at = told["at"][0]
    yield f"  found at {at['target']:.0%} false alarms", _share(at["tpr"]), f"base {_share(before['at'][0]['tpr'])}", _interval(at["tpr"]["ci95"]), ""
    yield from _exposure(public["exposure"])


def _discoverable(public: Mapping[str, Any]) -> Iterator[Row]:
    rows = public["discoverable"]
    for i, level in enumerate(rows["released"]["members"]["extractable"]):
        name = f"suffixes within {level['n']:,} sample{'s' if level['n'] > 1 else ''} (p = {level['p']:g})"
        shares = [rows[row][group]["extractable"][i]["share"] for row, group in (("released", "members"), ("base", "members"), ("released", "held_out"))]
        yield _three(name, shares)
    if "greedy" in public:
        rows = public["greedy"]
        yield _three("suffixes, greedily", [rows["released"]["members"], rows["base"]["members"], rows["released"]["held_out"]])


def _three(name: str, shares: list[dict[str, Any] | None]) -> Row:
    members, base, held = shares
    if members is None:
        return name, "-", "-", "", "all records are too short"
    control = f"base {_share(base)}, held out {_share(held)}"
    above = held is not None and members["ci95"][0] > held["ci95"][1]
    return name, _share(members), control, _interval(members["ci95"]), "beginnings bring back ends" if above else ""


def _exposure(exposure: Mapping[str, Any]) -> Iterator[Row]:
    if "reason" in exposure:
        yield "canaries: exposure", "-", "-", "", exposure["reason"]
        return
    known = exposure["released"]["calibrated"]
    planted, held = known["planted"], known["held_out"]
    yield (
        f"canaries: mean exposure of {len(planted['bits'])}", f"{planted['mean']:.2f} bits", f"held out {held['mean']:.2f}", f"at most {known['ceiling']:.0f}",
        f"learnt (p = {planted['p_value']:.2g})" if known["leaks"] else f"cannot be told from unseen ones (p = {planted['p_value']:.2g})",
    )  # fmt: skip
    bare, base = exposure["released"]["loss"]["planted"], exposure["base"]["loss"]["planted"]
    yield "  by the bare loss", f"{bare['mean']:.2f} bits", f"base {base['mean']:.2f}", "", ""
    for group in exposure["by_copies"]:
        name = f"  {group['copies']} {'copy' if group['copies'] == 1 else 'copies'} each"
        yield name, f"{group['mean']:.2f} bits", "unseen 1.44", "", f"p = {group['p_value']:.2g}"


def _client(client: Mapping[str, Any]) -> Iterator[Row]:
    fished = client["cross_client"]
    if "reason" in fished:
        yield "another client: secrets of others", "-", "-", "", fished["reason"]
        return
    for attacker, got in fished["released"].items():
        base = fished["base"][attacker]["coverage"]
        if got["coverage"] is None:
            continue
        yield (
            f"another client: secrets {attacker} gets", _share(got["coverage"]), f"base {_share(base)}, decoys {_share(got['decoys'])}",
            _interval(got["coverage"]["ci95"]), "secrets of others come out" if got["coverage"]["hits"] else "none came out",
        )  # fmt: skip


def _server(server: Mapping[str, Any]) -> Iterator[Row]:
    if "reason" in server:
        yield "server: one upload", "-", "-", "", server["reason"]
        return
    views = ((f"server: {server['client']}'s", server), (f"server: mean of {server['aggregated']['clients']},", server["aggregated"]))
    for whose, view in views:
        read, told = view["inversion"], view["membership"]
        if "reason" in read:
            yield f"{whose} tokens", "-", "-", "", read["reason"]
        else:
            control = f"chance {_percent(read['chance'])}, held out {_share(read['held_out'])}"
            others = read["held_out"]["value"] if read["held_out"] else 0.0
            own = read["ci95"][0] > max(read["chance"] + 3 * read["chance_sd"], others)
            reading = f"of {read['tokens']} tokens; {'its own can be told' if own else 'hardly more than any such text'}"
            yield f"{whose} tokens", _percent(read["recall"]), control, _interval(read["ci95"]), reading
        if "reason" in told:
            yield f"{whose} membership", "-", "-", "", told["reason"]
        else:
            reading = _above(told["auc_ci95"], 0.5, "tells the client's records from others", "not clearly better than a coin")
            yield f"{whose} membership AUC", f"{told['auc']:.3f}", "0.5", _interval(told["auc_ci95"], scale=1), reading


def _synthesis(synthesis: Mapping[str, Any]) -> Iterator[Row]:
    clients = synthesis.get("clients", {})
    if not clients:
        return
    count = sum(c["examples"] for c in clients.values())

    def mean(key: str) -> float:
        return float(sum(c[key] * c["examples"] for c in clients.values()) / count)

    near = sum(c["near"]["hits"] for c in clients.values())
    yield (
        "synthetic: ROUGE-L to the closest private", _percent(mean("mean")), f"held out {_percent(mean('held_out'))}",
        f"max {_percent(max(c['max'] for c in clients.values()))}", f"{near} of {count} are near-copies",
    )  # fmt: skip


def _one_run(bound: Mapping[str, Any]) -> Iterator[Row]:
    if "reason" in bound:
        return
    yield (
        "epsilon, approximate lower bound", f"{bound['epsilon']:.2f}", "0", "",
        f"{bound['correct']} of {bound['guesses']} guesses right",
    )  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _share(part: Mapping[str, Any] | None) -> str:
    return "-" if part is None else f"{100 * part['value']:.1f}%"


def _interval(ci95: Any, *, scale: float = 100) -> str:
    if ci95 is None:
        return ""
    digits, unit = (1, "%") if scale == 100 else (3, "")
    return f"{scale * ci95[0]:.{digits}f} to {scale * ci95[1]:.{digits}f}{unit}"


def _above(ci95: Any, level: float, yes: str, no: str) -> str:
    return yes if ci95 is not None and ci95[0] > level else no
