"""A run from its first check to its export: what is knowable is said at the start, what was trained is never lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from fedloom.data.prompt_form import chat_template
from fedloom.engine.models import load_base
from fedloom.errors import ConfigError, DataError, ModelError, RunError
from fedloom.experiment import commands, comparison, preflight
from fedloom.experiment.commands import evaluate, export, run
from fedloom.experiment.datasets import load_data
from fedloom.experiment.finished import adapter_of
from fedloom.experiment.machine import Machine, load_machine, load_skeleton
from fedloom.experiment.toml import load
from fedloom.steps import Generate
from tests.cli.test_cli import TINY, refused, type_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of PEFT's import

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rounds(folder: Path) -> int:
    """Rounds that were begun: the journal's lines, the one before any training included."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("metrics.jsonl"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template of its own, whose end of turn is not the end of text, and whose generation
    settings know the latter alone."""
    folder = tmp_path_factory.mktemp("chatml")
    model, tokenizer = load_base("embedded")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight.data
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows[end], rows[start] = rows[tokenizer.eos_token_id] * 1.05, rows[tokenizer.bos_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that reads 128 tokens."""
    folder = tmp_path_factory.mktemp("short")
    _, tokenizer = load_base("embedded")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, chatml: Path) -> Path:
    """Six responses, equal for all: their end is learnt in a few steps."""
    home = tmp_path_factory.mktemp("learnt")
    lines = [
        json.dumps(
            {"instruction": f"Name the colour of ticket {i}.", "response": "It is blue.", "category": "a"}
        )
        for i in range(24)
    ]
    (home / "same.jsonl").write_text("\n".join(lines))
    run(
        load(
            "quickstart",
            [
                f"model.base={chatml}",
                "data.source=table",
                f"data.path={home / 'same.jsonl'}",
                "data.private_facts=0",
                "data.clients=2",
                "data.partition=iid",
                "data.hold_out=4",
                "prompt.format=chat",
                "rounds=6",
                "local.learning_rate=1e-2",
            ],
        ),
        home / "run",
    )
    return home / "run"


# --- before round 1 --------------------------------------------------------------------------------------


def test_answers_that_cannot_fit_end_a_run_before_its_first_round(tmp_path: Path) -> None:
    said = refused("run", *TINY, "evaluation.max_new_tokens=4000", "--out", tmp_path / "x")
    assert "evaluation.max_new_tokens = 4000" in said
    assert rounds(tmp_path) == 0


def test_answers_that_cannot_fit_end_a_comparison_before_any_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "load_workers", lambda *_, **__: pytest.fail("a worker was started"))
    assert "evaluation.max_new_tokens" in refused(
        "compare", *TINY, "evaluation.max_new_tokens=4000", "--out", tmp_path / "x"
    )


def test_describe_shows_its_table_and_then_what_would_end_the_run() -> None:
    done = type_in("describe", *TINY, "evaluation.max_new_tokens=4000")
    assert done.code == 2
    assert "parameters to train" in done.out
    assert "evaluation.max_new_tokens = 4000" in done.err


def test_describe_fails_where_the_data_cannot_be_read(tmp_path: Path) -> None:
    done = type_in(
        "describe",
        *TINY,
        "data.source=table",
        f"data.path={tmp_path / 'nothing.jsonl'}",
        "data.private_facts=0",
    )
    assert done.code == 2
    assert "nothing.jsonl" in done.err


def long_data(folder: Path) -> list[str]:
    records = [
        {"instruction": f"Say it {i} times.", "response": "word " * (400 if i == 7 else 3), "category": "a"}
        for i in range(24)
    ]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [
        "data.source=table",
        f"data.path={folder / 'long.jsonl'}",
        "data.private_facts=0",
        "data.examples=24",
        "data.partition=iid",
    ]


def test_a_record_longer_than_the_base_reads_does_not_end_a_run_rounds_later(
    short: Path, tmp_path: Path
) -> None:
    base = [*TINY, f"model.base={short}", "adapter.targets=all-linear", *long_data(tmp_path)]
    done = type_in("run", *base, "--out", tmp_path / "x")
    if done.code:  # else it is cut to what the base reads
        assert done.code == 2
        assert "reads 128 tokens, but 1 example has more" in done.err
        assert "Set prompt.max_length=128" in done.err
        assert rounds(tmp_path) == 0
    assert type_in("run", *base, "prompt.max_length=128", "--out", tmp_path / "y").code == 0


def checked(*settings: str) -> None:
    experiment = load("quickstart", [*TINY, *settings])
    preflight.check(experiment, [load_data(experiment)], load_skeleton(experiment))


def test_what_an_experiment_may_have_is_not_refused() -> None:
    checked()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["cohort.kind=uniform", "cohort.count=9"], "count=9"),
        (["algorithm=fewfedpit", "synthesis.response_tokens=1024"], "no room"),
        (["compare.methods.A=fewfedpit", "synthesis.response_tokens=1024"], "no room"),
        (["algorithm=fewfedpit", "synthesis=held_back"], "data.pool"),
        (["algorithm=fewfedpit", "prompt.max_length=4096"], "prompt.max_length"),
        (["machine.vllm.python=/no/such/python"], "machine.vllm.python"),
    ],
)
def test_what_a_late_stage_could_not_do_is_refused_at_the_start(settings: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)):
        checked(*settings)


def test_a_token_that_the_base_does_not_embed_is_found_before_training(chatml: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatml, tmp_path / "odd")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|x|>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"has token \d+, but the base model .* embeds \d+"):
        checked(f"model.base={folder}", "adapter.targets=all-linear", "prompt.format=chat")


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path: Path) -> None:
    preflight.check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(RunError, match="MB free, and this may take"):
        preflight.check_disk(tmp_path / "not" / "there", 1 << 60)


def test_workers_below_one_are_a_mistake_and_no_bug(tmp_path: Path) -> None:
    for workers in ("0", "-2", "many"):
        assert "machine.workers" in refused("compare", *TINY, f"machine.workers={workers}")
    assert not (tmp_path / "x").exists()


def test_a_gate_on_exposure_without_canaries_is_refused_before_any_attack(learnt: Path) -> None:
    said = refused("audit", learnt, "--max-exposure", "2")
    assert "--max-exposure needs planted canaries, and this run has none" in said


# --- the product comes first -----------------------------------------------------------------------------


def test_a_measurement_that_fails_leaves_the_adapter_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise DataError("the last stage failed")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "measure", broken)
        said = refused("run", *TINY, "--out", tmp_path / "run")
    assert "the last stage failed" in said
    assert f"fedloom run --resume --out {tmp_path / 'run'} evaluation.max_new_tokens=32" in said
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    done = type_in("run", "--resume", "--out", tmp_path / "run", "evaluation.max_new_tokens=8")
    assert done.code == 0, done
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["experiment"]["evaluation"]["max_new_tokens"] == 8
    assert "not measured" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_comparison_has_its_adapter_although_no_seed_could_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, small = tmp_path / "table", [*TINY, "compare.seeds=1"]

    def broken(*_: Any, **__: Any) -> Any:
        raise DataError("the last stage failed")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "measure", broken)
        said = refused("compare", *small, "--out", folder)
    assert f"fedloom compare --resume --out {folder}" in said
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert type_in("compare", "--resume", "--out", folder, "evaluation.max_new_tokens=2").code == 0
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    result = json.loads((folder / "seed-0" / "result.json").read_text())
    assert type_in("compare", "--resume", "--out", folder, "evaluation.max_new_tokens=3").code == 0
    again = json.loads((folder / "seed-0" / "result.json").read_text())
    assert (
        result["settings"]["evaluation"]["max_new_tokens"],
        again["settings"]["evaluation"]["max_new_tokens"],
    ) == (2, 3)
    assert again["rows"]["federated"]["metrics"]["loss"] == result["rows"]["federated"]["metrics"]["loss"]


def test_a_finished_run_is_measured_again_with_other_settings_and_not_trained_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert type_in("run", *TINY, "--out", folder).code == 0

    def journal() -> list[Any]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    before, weights = journal(), (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    done = type_in(
        "run",
        "--resume",
        "--out",
        folder,
        "evaluation.answers=1",
        "machine.clients_per_batch=1",
        "machine.tokens_per_pass=512",
        "name=other",
    )
    assert done.code == 0, done
    assert journal() == before
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert json.loads((folder / "summary.json").read_text())["name"] == "other"
    assert load(folder).evaluation.answers == 1


def test_what_decides_the_training_cannot_be_changed_afterwards(learnt: Path) -> None:
    for change, key in (
        ("local.epochs=3", "local.epochs"),
        ("adapter.alpha=32", "adapter.alpha"),
        ("seed=1", "seed"),
    ):
        assert f"{key} differs" in refused("run", "--resume", "--out", learnt, change)
        assert f"{key} differs" in refused("export", learnt, change, "--out", learnt / "x")


def test_the_length_of_answers_decides_a_training_that_generates() -> None:
    def prints(*settings: str) -> set[str]:
        return {
            load("quickstart", [*settings, f"evaluation.max_new_tokens={n}"]).fingerprint() for n in (8, 9)
        }

    assert len(prints()) == 1
    assert len(prints("algorithm=fewfedweight")) == 2
    assert len(prints("compare.methods.A=fewfedweight")) == 2


@pytest.mark.parametrize(
    "change",
    [
        "name=x",
        "evaluation.every=3",
        "leakage.every=2",
        "compare.seeds=9",
        "compare.leakage=true",
        "machine.device=cpu",
        "machine.tokens_per_pass=9",
        "machine.kernels=reference",
        "machine.clients_per_batch=3",
        "model.base=elsewhere",
        "data.path=elsewhere",
    ],
)
def test_what_decides_no_training_is_not_in_the_fingerprint(change: str) -> None:
    assert load("quickstart", [change]).fingerprint() == load("quickstart").fingerprint()


# --- what training taught is exported --------------------------------------------------------------------


def greedy(model: Any, tokenizer: Any, question: str, **options: Any) -> list[int]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    return model.generate(**prompt, max_new_tokens=24, **options)[0, prompt["input_ids"].shape[1] :].tolist()


def ours(machine: Machine, adapter: Any, question: str) -> list[int]:
    ids = machine.template.prompt_ids(question, room=24)
    return machine.engine.answer(
        {0: Generate([ids], adapter, max_new_tokens=24, stop=machine.template.stop)}
    )[0][0]


@pytest.mark.parametrize("form", ["merged", "peft", "run"])
def test_an_export_ends_where_the_engine_ends_token_for_token(
    learnt: Path, chatml: Path, tmp_path: Path, form: str
) -> None:
    machine = load_machine(load(learnt))
    adapter, question = adapter_of(learnt, machine), "Name the colour of ticket 3."
    said = ours(machine, adapter, question)
    assert 0 < len(said) < 24  # it ended by itself
    folder = tmp_path / form
    if form == "run":
        folder = learnt / "adapter"
    else:
        export(learnt, folder, merged=form == "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatml), folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    found = greedy(model, tokenizer, question)
    assert found[:-1] == said
    assert found[-1] in machine.template.stop
    assert "README.md" in {p.name for p in folder.iterdir()}


def test_the_code_of_the_cards_runs(
    learnt: Path, chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(learnt, tmp_path / "merged", merged=True)
    for folder in (learnt / "adapter", tmp_path / "merged"):
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
        assert code is not None
        assert str(chatml.parent) not in code[1]  # a card is for others
        exec(
            code[1].replace("path/to/this/folder", str(folder)).replace(f'"{chatml.name}"', f'"{chatml}"'), {}
        )
        assert capsys.readouterr().out.strip() == "It is blue."


@pytest.mark.parametrize(
    "base", ["embedded", "chatml", "../shared/models/stories260K", "../shared/models/TinyStories-656K"]
)
@pytest.mark.parametrize("form", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("system", ["", "Be 'kind'.\n\\ é ☃ 😀"])
def test_the_exported_tokenizer_gives_the_prompts_of_the_training(
    base: str, form: str, system: str, chatml: Path, tmp_path: Path
) -> None:
    where = str(chatml) if base == "chatml" else base
    if where.startswith("..") and not Path(where).is_dir():
        pytest.skip("needs the shared models")
    if form == "chat" and base != "chatml":
        pytest.skip("has no chat template")
    skeleton = load_skeleton(
        load("quickstart", [f"model.base={where}", f"prompt.format={form}"]).with_(
            prompt={"format": form, "system": system}
        )
    )
    tokenizer = skeleton.tokenizer
    tokenizer.chat_template = chat_template(skeleton.template, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)

    def ids(**words: str) -> list[int]:
        return list(
            read.apply_chat_template(
                [{"role": "user", **words}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )

    assert ids(content="What is this?") == skeleton.template.prompt_ids("What is this?")
    own = form == "chat" and not system
    with_context = {"content": "What?\n\nA text."} if own else {"content": "What?", "context": "A text."}
    assert ids(**with_context) == skeleton.template.prompt_ids("What?", "A text.")
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    lead, end = skeleton.template.around
    bos = tokenizer.bos_token or ""  # after which some tokenizers need a blank to give the same ids
    said = read.apply_chat_template(turns, tokenize=False).removeprefix(bos).lstrip(" ")
    assert said.startswith(f"{skeleton.template.prompt('A?').removeprefix(bos)}{lead}B.{end}")


# --- does an answer end? ---------------------------------------------------------------------------------


def test_every_row_says_how_many_answers_ended_and_what_the_end_costs(learnt: Path) -> None:
    summary = json.loads((learnt / "summary.json").read_text())
    found = {(r["row"], r["metric"]): r["mean"] for r in summary["rows"]}
    assert found["federated", "ended"] == 1.0
    assert found["federated", "end_loss"] < 0.5 < found["base", "end_loss"]
    assert summary["engine"]["end"] == "<|im_end|>"
    assert summary["engine"]["end_reachable"] is True


def test_an_end_that_the_frozen_head_cannot_say_is_told_before_and_after(
    chatml: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chatml, tmp_path / "untrained")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    rows = model.get_output_embeddings().weight.data
    rows[end] = rows.mean(0) + 0.01 * torch.randn(rows.shape[1])
    model.save_pretrained(folder)
    done = type_in(
        "run",
        *TINY,
        f"model.base={folder}",
        "adapter.targets=all-linear",
        "prompt.format=chat",
        "rounds=1",
        "--out",
        tmp_path / "x",
    )
    assert done.code == 0, done
    assert "warning: the end of an answer, <|im_end|>, looks untrained" in done.err
    assert 'prompt.format = "alpaca"' in done.err
    for page in ("report.html", "adapter/README.md"):
        assert "the end is not learnt" in (tmp_path / "x" / page).read_text()


# --- whose base is this? ---------------------------------------------------------------------------------


@pytest.fixture
def moved(learnt: Path, chatml: Path, tmp_path: Path) -> Path:
    """The base of `learnt` with other weights, of the same shapes."""
    folder = shutil.copytree(chatml, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_not_put_on_another_base(
    learnt: Path, moved: Path, chatml: Path, tmp_path: Path
) -> None:
    for command in (
        ("export", learnt, f"model.base={moved}", "--to", "merged", "--out", tmp_path / "x"),
        ("export", learnt, f"model.base={moved}", "--out", tmp_path / "x"),
        ("evaluate", learnt, f"model.base={moved}"),
        ("judge", learnt, f"model.base={moved}"),
        ("audit", learnt, f"model.base={moved}"),
    ):
        assert "trained on another base model" in refused(*command), command
    assert not (tmp_path / "x").exists()
    with pytest.raises(ModelError, match="another base model"):
        adapter_of(learnt, load_machine(load(learnt, [f"model.base={moved}"])))
    copy = shutil.copytree(learnt, tmp_path / "without a summary")
    (copy / "summary.json").unlink()
    assert "base model is not what this run began with" in refused(
        "run", "--resume", "--out", copy, f"model.base={moved}"
    )
    same = shutil.copytree(chatml, tmp_path / "a copy elsewhere")
    evaluate(load(learnt, [f"model.base={same}"]), learnt)  # the same weights are the same base


def test_the_same_base_in_another_precision_is_the_same_base(learnt: Path) -> None:
    adapter_of(learnt, load_machine(load(learnt, ["model.dtype=bfloat16"])))


def test_an_adapter_is_not_scaled_otherwise(learnt: Path) -> None:
    assert "trained with a scale of 2" in refused("evaluate", learnt, "adapter.alpha=64")


def test_a_run_begun_with_relative_paths_is_read_from_another_folder(
    learnt: Path, chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(chatml.parent)
    shutil.copy(learnt.parent / "same.jsonl", tmp_path / "same.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = [
        *TINY,
        f"model.base=models/{chatml.name}",
        "adapter.targets=all-linear",
        "data.source=table",
        "data.path=same.jsonl",
        "data.private_facts=0",
        "data.partition=iid",
        "rounds=1",
    ]
    assert type_in("run", *settings, "--out", "x").code == 0
    saved = load(tmp_path / "x")
    assert (saved.model.base, saved.data.path) == (
        str(tmp_path / "models" / chatml.name),
        str(tmp_path / "same.jsonl"),
    )
    assert (
        json.loads((tmp_path / "x" / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == saved.model.base
    )
    assert str(tmp_path) not in (tmp_path / "x" / "adapter" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "x")
    assert type_in("evaluate", tmp_path / "x").code == 0


def test_names_that_are_no_paths_stay_as_they_are() -> None:
    for base in ("embedded", "random:llama", "owner/model"):
        assert load("quickstart", [f"model.base={base}"]).anchored().model.base == base
    hub = load("quickstart", ["data.source=hub", "data.path=owner/data", "data.private_facts=0"]).anchored()
    assert hub.data.path == "owner/data"
    files = load("quickstart", ["data.source=table", 'data.path=["a.csv", "~/b.csv"]']).anchored()
    assert files.data.path == [os.path.abspath("a.csv"), os.path.expanduser("~/b.csv")]


def test_what_looks_like_a_path_is_never_to_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for base in ("models/mine", "./models/mine", "/models/mine", "models/mine/", "~/mine"):
        said = refused("describe", *TINY[1:], f"model.base={base}")
        assert "There is no folder" in said
        assert "allow_download" not in said
    said = refused("describe", *TINY[1:], "model.base=elsewhere/mine")
    assert f"There is no folder 'elsewhere/mine' in {tmp_path}" in said.replace("\n", " ")
    assert "If a folder is meant, give its whole path." in said
