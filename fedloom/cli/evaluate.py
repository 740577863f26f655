"""fedloom evaluate: measure a run's adapter again, perhaps on other data."""

from __future__ import annotations

from fedloom.cli.arguments import Overrides, RunFolder, load_finished, look_at_data
from fedloom.cli.console import out, say


def command(run: RunFolder, overrides: Overrides = None) -> None:
    """Measure a finished run's adapter beside its base, on its held-out examples or on other data.

    Settings may be changed, for example: fedloom evaluate RUN seed=1 evaluation.answers=200
    """
    experiment = load_finished(run, overrides)
    look_at_data(experiment)
    from fedloom.cli.display import metrics_table, prompts_cut
    from fedloom.experiment.commands import evaluate
    from fedloom.storage.files import EVALUATION

    result = evaluate(experiment, run)
    out.print(metrics_table({row: found["metrics"] for row, found in result["rows"].items()}))
    if cut := result["prompts_cut"]:
        say(prompts_cut(cut))
    say(f"Wrote {run / EVALUATION}")
