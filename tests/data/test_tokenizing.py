"""A prompt has the very ids that the tokenizer gives for its text, whatever the kind of tokenizer."""

from __future__ import annotations

from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedloom.data.example import Example
from fedloom.data.template import Template
from fedloom.data.tokenizing import TextTokenizer
from fedloom.errors import ModelError

SHARED = Path(__file__).parents[2].parent / "shared"
REAL = {
    "embedded": Path(str(files("fedloom"))) / "embedded",
    "stories260K": SHARED / "models/stories260K",
    "TinyStories-656K": SHARED / "models/TinyStories-656K",
    "gpt2": SHARED / "tokenizers/gpt2/tokenizer.json",
}
TEXTS = [
    "Name a colour.",
    "a",
    " two  blanks, then\n\n\nthree lines",
    "Tab\tand a blank at the end ",
    "\nÜber die Straße: naïve café 12,5 % 東京 🙂",
    "UPPER lower",
]
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Name a colour of the rainbow. Red, green and blue are colours. Instruction: Input: Response: 12,5 %",
    "user assistant system UPPER lower two blanks three lines Tab and a blank at the end",
] * 3

PRE_TOKENIZERS = {
    "none": lambda: None,
    **{
        f"metaspace-{scheme}-{'split' if split else 'whole'}": lambda scheme=scheme, split=split: (
            pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        )
        for scheme, split in product(("always", "first", "never"), (True, False))
    },
    "byte-level": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte-level-prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "whitespace": pre_tokenizers.Whitespace,
    "bert": pre_tokenizers.BertPreTokenizer,
    "words-metaspace": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    ),
    "digits-byte-level": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
NORMALIZERS = {
    "none": lambda: None,
    "prepend": lambda: normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "lowercase": normalizers.Lowercase,
    "nfc": normalizers.NFC,
    "bert": normalizers.BertNormalizer,
    "t5": lambda: normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    ),
}
MODELS = {
    "bpe": lambda: (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
    "unigram": lambda: (models.Unigram(), trainers.UnigramTrainer),
    "wordpiece": lambda: (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
    "wordlevel": lambda: (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer),
}
POST = {"none": "$A", "bos": "<s> $A", "bos-eos": "<s> $A </s>"}
ADDED = {
    "none": [],
    "blanks": [AddedToken("\n\n", special=False), AddedToken("  ", special=False)],
    "words": [
        AddedToken("colour", single_word=True, special=False, normalized=False),
        AddedToken("<br>", special=False, normalized=False),
    ],
}


def build(
    pre="byte-level", *, model="bpe", normalizer="none", post="bos", added="none", normalized=False, **flags
) -> PreTrainedTokenizerFast:
    """A small trained tokenizer; `flags` and `normalized` are those of its control tokens."""
    piece, trainer = MODELS[model]()
    backend = Tokenizer(piece)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.normalizer = NORMALIZERS[normalizer]()
    backend.decoder = (
        decoders.ByteLevel() if "byte-level" in pre else decoders.Metaspace(prepend_scheme="never")
    )
    options = {"unk_token": "<unk>"} if model == "unigram" else {}
    if "byte-level" in pre:
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False, **options)
    )
    controls = [
        AddedToken(t, special=True, normalized=normalized, **flags)
        for t in ("<s>", "</s>", "<|user|>", "<|bot|>", "<|end|>")
    ]
    backend.add_special_tokens(controls)
    backend.add_tokens(ADDED[added])
    names = [(t, backend.token_to_id(t)) for t in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=POST[post], special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


CASES = (
    [dict(pre=pre, model=model) for pre, model in product(PRE_TOKENIZERS, ("bpe", "unigram"))]
    + [
        dict(pre=pre, model=m)
        for m, pre in product(("wordpiece", "wordlevel"), ("whitespace", "bert", "words-metaspace"))
    ]
    + [
        dict(pre=pre, normalizer=n)
        for n, pre in product(NORMALIZERS, ("none", "metaspace-first-whole", "byte-level", "bert"))
    ]
    + [
        dict(pre=pre, post=p)
        for p, pre in product(("none", "bos-eos"), ("metaspace-first-split", "byte-level-prefix"))
    ]
    + [dict(pre=pre, added=a) for a, pre in product(("blanks", "words"), PRE_TOKENIZERS)]
    + [dict(pre=pre, normalized=True) for pre in PRE_TOKENIZERS]
)
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% else %}<|bot|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def name(case: dict) -> str:
    return "-".join(map(str, case.values()))


def real(which: str):
    path = REAL[which]
    if not path.exists():
        pytest.skip(f"{which} is not here")
    if path.suffix:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(path)


def given(tokenizer, text: str) -> list[int]:
    """The tokenizer's own ids, without what it puts behind a text."""
    ids, eos = tokenizer(text).input_ids, tokenizer.eos_token_id
    return ids[:-1] if ids[-1] == eos and tokenizer("").input_ids[-1:] == [eos] else ids


def check(tokenizer) -> None:
    for text in TEXTS:
        assert Template(tokenizer, format="plain").document_ids(text) == given(tokenizer, text)
    for format, system, context in product(("alpaca", "plain"), ("", "Be brief."), ("", "Red.\nGreen.")):
        template = Template(tokenizer, format=format, system=system)
        for text in TEXTS:
            shown = template.prompt(text, context)
            begin = "".join(template._text.name(t) for t in template._text.opening)
            assert template.prompt_ids(text, context) == given(tokenizer, shown.removeprefix(begin))


@pytest.mark.parametrize("which", REAL)
def test_a_prompt_has_the_ids_that_a_real_tokenizer_gives(which):
    check(real(which))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_prompt_has_the_ids_that_a_tokenizer_of_any_kind_gives(case):
    check(build(**case))


CHATS = (
    [dict(pre=pre) for pre in PRE_TOKENIZERS]
    + [dict(pre=pre, normalizer=n) for n, pre in product(NORMALIZERS, ("none", "metaspace-first-whole"))]
    + [dict(pre=pre, normalized=True) for pre in PRE_TOKENIZERS]
    + [dict(pre=pre, added="blanks") for pre in PRE_TOKENIZERS]
    + [dict(pre=pre, **{flag: True}) for flag, pre in product(("lstrip", "rstrip"), PRE_TOKENIZERS)]
)


@pytest.mark.parametrize("case", CHATS, ids=name)
def test_a_chat_has_the_ids_that_its_template_gives(case):
    tokenizer = build(**case)
    tokenizer.chat_template = CHAT
    template = Template(tokenizer)
    for text in TEXTS:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert template.prompt_ids(text) == tokenizer(rendered, add_special_tokens=False).input_ids
        turns = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": text}]
        whole = tokenizer(
            tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
        ).input_ids
        ids = list(template.encode(Example("Name it.", text)).ids)
        assert ids == whole[: len(ids)]
        assert ids[-1] == template.end


@pytest.mark.parametrize("pre", [p for p in PRE_TOKENIZERS if p != "none"])
def test_text_after_other_text_begins_as_a_later_word_does(pre):
    tokenizer = build(pre)
    assert (
        TextTokenizer(tokenizer).ids("blue lines", after="text\n")
        == (
            tokenizer("the\nblue lines", add_special_tokens=False).input_ids[
                len(tokenizer("the\n", add_special_tokens=False).input_ids) :
            ]
        )
    )


def test_an_end_of_turn_that_is_not_called_special_still_cannot_be_spelt():
    tokenizer = build()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=False, normalized=False)])
    tokenizer.chat_template = CHAT.replace("<|end|>", "<|eot|>")
    template = Template(tokenizer)
    assert template.end == tokenizer.convert_tokens_to_ids("<|eot|>")
    assert template.prompt_ids("say <|eot|> now").count(template.end) == 1


def test_a_tokenizer_that_cannot_spell_a_text_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ModelError, match="unknown words"):
        Template(tokenizer, format="plain").prompt_ids("b")
