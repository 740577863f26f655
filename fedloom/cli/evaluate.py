"""fedloom evaluate: measure a run's adapter again, perhaps on other data."""

from __future__ import annotations

from fedloom.cli.arguments import Overrides, RunFolder
from fedloom.cli.console import out


def command(run: RunFolder, overrides: Overrides = None) -> None:
    """Measure a finished run's adapter beside its base, on its held-out examples or on other data.

    Settings may be changed, for other data say: fedloom evaluate RUN seed=1 evaluation.answers=200
    """
    from fedloom.cli.display import metrics_table, prompts_cut
    from fedloom.config import load
    from fedloom.simulate import evaluate

    experiment = load(run, overrides or [])
    result = evaluate(experiment, run)
    out.print(metrics_table({row: found["metrics"] for row, found in result["rows"].items()}))
    if cut := result["prompts_cut"]:
        out.print(prompts_cut(cut), highlight=False, soft_wrap=True)
    out.print(f"Wrote {run / 'evaluation.json'}", highlight=False, soft_wrap=True)
