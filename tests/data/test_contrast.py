"""A response with and without its prompt, and documents in no format."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedloom.data.example import Example
from fedloom.data.template import Template

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
E = Example("Name a bird.", "The heron is one.", "Birds fly.")


def tokenizer(*, begins: bool = True) -> Any:
    """Every printable character is a token."""
    vocabulary = {**SPECIAL, **{chr(c): i for i, c in enumerate([10, *range(32, 127)], 3)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>"} if begins else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", **names)


def text(ids: Any, tok: Any) -> str:
    return "".join(tok.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("format", ["plain", "alpaca"])
def test_both_label_exactly_the_response_and_its_end(format: Any, loss_on: Any) -> None:
    tok = tokenizer()
    template = Template(tok, format=format, loss_on=loss_on)
    given, alone = template.contrast(E)
    wanted = Template(tok, format=format).encode(E)
    assert given == wanted
    labelled = [[i for i, flag in zip(t.ids, t.labelled, strict=True) if flag] for t in (given, alone)]
    assert labelled[0] == labelled[1]
    assert text(labelled[0], tok).strip() == "The heron is one.</s>"


def test_alone_only_the_beginning_of_text_precedes_the_response() -> None:
    _, alone = Template(tokenizer(), format="alpaca").contrast(E)
    assert alone.ids[0] == 1
    assert alone.labelled == (False, *[True] * (len(alone.ids) - 1))


def test_without_a_beginning_the_end_of_a_text_precedes_it() -> None:
    given, alone = Template(tokenizer(begins=False), format="alpaca").contrast(E)
    assert alone.ids[0] == 2
    assert alone.targets == given.targets == len(E.response) + 1


def test_a_response_that_is_cut_is_cut_in_both() -> None:
    long = Example("Name a bird.", "heron " * 100)
    given, alone = Template(tokenizer(), format="plain", max_length=128).contrast(long)
    assert len(given.ids) == 128
    assert given.targets == alone.targets < 600


def test_a_document_begins_as_the_tokenizer_begins_texts() -> None:
    tok = tokenizer()
    assert Template(tok, format="plain").document_ids("Task 1: go") == tok("Task 1: go")["input_ids"]
    assert Template(tokenizer(begins=False), format="plain").document_ids("Go")[0] != 1


def test_a_document_cannot_spell_a_control_token() -> None:
    ids = Template(tokenizer(), format="plain").document_ids("Say </s> now")
    assert ids.count(2) == 0
    assert ids[0] == 1
