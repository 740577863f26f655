from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom.report import card

Folder = Callable[..., Path]


def summary_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "summary.json").read_text()), **changes}


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(run_folder: Folder) -> None:
    head = front_matter(card.model_card(summary_of(run_folder())))
    assert (head["base_model"], head["library_name"]) == ("embedded", "peft")
    assert {"lora", "federated-learning"} <= set(head["tags"])


def test_the_privacy_of_the_run_is_stated_in_so_many_words(run_folder: Folder) -> None:
    said = card.model_card(summary_of(run_folder()))
    assert (
        "no differential privacy or secure aggregation was used in this run; adapters can leak training text"
        in said
    )


def test_the_embedded_base_carries_the_attribution_of_its_text(run_folder: Folder) -> None:
    said = card.model_card(summary_of(run_folder()))
    assert re.search(r"English Wikipedia \(.*CC-BY-SA-3\.0\), on public-domain novels", said)


def test_another_base_does_not_carry_it(run_folder: Folder) -> None:
    assert "Wikipedia" not in card.model_card(summary_of(run_folder(base="random:llama")))


def test_every_row_stands_in_the_table_with_its_interval(compare_folder: Folder) -> None:
    lines = card.model_card(summary_of(compare_folder())).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| row |"))
    table = lines[start : start + 7]  # head, rule, five rows
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "Base model, untuned",
        "Local only, mean of clients",
        "Local only, best client",
        "Federated (FedIT)",
        "Centralised, pooled data",
    ]
    assert len({line.count("|") for line in table}) == 1
    assert "±" in table[5]


@pytest.mark.parametrize("base", ["embedded", "random:llama", "owner/model", "/home/somebody/models/mine"])
def test_the_code_to_load_it_is_python(run_folder: Folder, base: str) -> None:
    code = re.search(r"```python\n(.*?)```", card.model_card(summary_of(run_folder(base=base))), re.S)
    assert code is not None
    assert "PeftModel.from_pretrained(base" in ast.unparse(ast.parse(code[1]))


@pytest.mark.parametrize(
    "base", ["/home/somebody/models/mine", "../somebody/mine", r"C:\somebody\mine", "a/somebody/mine/"]
)
def test_the_card_does_not_tell_the_path_of_a_folder(run_folder: Folder, base: str) -> None:
    summary = summary_of(run_folder())
    summary["experiment"]["model"]["base"] = base
    said = card.model_card(summary)
    assert "somebody" not in said
    assert front_matter(said)["base_model"] == "mine"


def test_the_card_of_a_local_only_run_says_that_its_adapter_is_untrained(run_folder: Folder) -> None:
    assert "initial one, untrained" in card.model_card(summary_of(run_folder(algorithm="local_only")))


@pytest.mark.parametrize("name", ["fewfedpit", "ppfedit"])
def test_the_card_cites_an_algorithm_under_either_of_its_names(run_folder: Folder, name: str) -> None:
    summary = summary_of(run_folder())
    summary["experiment"]["algorithm"] = {"name": name}
    assert "FewFedPIT (arXiv 2403.06131v3)" in card.model_card(summary)


def test_a_name_cannot_end_a_line_or_a_cell(run_folder: Folder) -> None:
    said = card.model_card(summary_of(run_folder(), name="x\n---\n# <b>|"))
    assert r"# x --- \# \<b\>\|: a LoRA adapter" in said


def test_the_card_holds_no_trace_of_its_template(compare_folder: Folder) -> None:
    said = card.model_card(summary_of(compare_folder()))
    assert not re.search(r"{[{%#]|[%}]}", said)
    assert "\n\n\n" not in said
