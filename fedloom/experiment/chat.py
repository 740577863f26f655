"""Talk to a run's model: every instruction stands alone, as in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedloom.engine.generation import stream
from fedloom.engine.lora_engine import LoraEngine
from fedloom.experiment.finished import adapter_of, finished
from fedloom.experiment.machine import Machine, load_here
from fedloom.experiment.settings import Experiment
from fedloom.state import AdapterState
from fedloom.storage import folders


@dataclass(frozen=True)
class Piece:
    """The next characters of an answer. `tokens` counts all tokens so far, the end token included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Chat:
    """A tuned model and its base, loaded."""

    run: Path
    experiment: Experiment
    machine: Machine
    engine: LoraEngine
    adapter: AdapterState

    def answer(
        self,
        instruction: str,
        context: str = "",
        *,
        base: bool = False,
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Stream the answer piece by piece as it is generated; with `base`, the untuned model's.

        A character that spans several tokens arrives whole. An answer of `max_new_tokens` tokens was cut.
        """
        template, said, shown = self.machine.template, list[int](), ""
        for token in stream(
            self.engine.served,
            template.prompt_ids(instruction, context, room=max_new_tokens),
            None if base else self.adapter,
            max_new_tokens=max_new_tokens,
            stop=template.stop,
            temperature=temperature,
            seed=seed,
        ):
            said.append(token)
            text = template.decode(said)
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield Piece(text[len(shown) :], len(said))
                shown = text
        yield Piece(template.decode(said)[len(shown) :], len(said))

    def cut(self, instruction: str, context: str = "", *, max_new_tokens: int = 128) -> str:
        """The part of a question whose end does not fit the base model: "none" where all of it fits."""
        return self.machine.template.prompt_cut(instruction, context, room=max_new_tokens)

    def whose(self, *, base: bool = False) -> str:
        """Whose model answers, in words."""
        experiment = self.experiment
        if base:
            return f"The base model {experiment.model.base}, untuned"
        count = experiment.data.clients
        clients = f" of {count:,} client{'' if count == 1 else 's'}" if count else ""
        several = experiment.compare.seeds if folders.kind(self.run) == "compare" else 1
        seed = f"seed {experiment.seed}" + (f", the first of {several}" if several > 1 else "")
        return (
            f"{self.run}: the adapter{clients} tuned by {experiment.algorithm.title} on {experiment.model.base}, "
            f"{seed}"
        )


def chat(run: Path | str) -> Chat:
    """Load a finished run's model. Raises: FedloomError."""
    run = Path(run)
    experiment = finished(run)
    machine, engine = load_here(experiment)
    return Chat(run, experiment, machine, engine, adapter_of(run, machine))
