from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
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
from fedloom.errors import DataError, ModelError

SHARED = Path(__file__).parents[2].parent / "shared"
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Name three colours of the rainbow. Red, green and blue are colours.",
    "user assistant system\n\nResponse: Instruction: Input: </s> <|im_end|> [INST] [/INST]",
] * 3

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_THINKING = (  # as Qwen3.5: an open thinking block to answer in, a finished one when asked not to think
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)


def byte_level(
    chat_template: str | None = None, eos: str | None = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """As Qwen's and GPT-2's: byte-level BPE, no beginning of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=chat_template)


def sentencepiece(*, legacy: bool, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama-2's: a blank before the first word, at every piece of text (legacy) or only at the beginning."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    for piece in model["vocab"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def shared(name: str) -> PreTrainedTokenizerFast:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here")
    if name.endswith(".json"):
        return PreTrainedTokenizerFast(tokenizer_file=str(SHARED / name), eos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(SHARED / name)


EMBEDDED = Path(str(files("fedloom"))) / "embedded"

KINDS = {
    "embedded": lambda: Template(AutoTokenizer.from_pretrained(EMBEDDED), format="plain"),
    "gpt2": lambda: Template(shared("tokenizers/gpt2/tokenizer.json")),
    "gpt2-plain": lambda: Template(shared("tokenizers/gpt2/tokenizer.json"), format="plain"),
    "stories260K": lambda: Template(shared("models/stories260K")),
    "stories260K-plain": lambda: Template(shared("models/stories260K"), format="plain"),
    "TinyStories-656K": lambda: Template(shared("models/TinyStories-656K")),
    "chatml": lambda: Template(byte_level(CHATML)),
    "chatml-system": lambda: Template(byte_level(CHATML), system="Answer in one word."),
    "thinking": lambda: Template(byte_level(CHATML_THINKING)),
    "llama2": lambda: Template(sentencepiece(legacy=False, chat_template=LLAMA2)),
    "llama2-system": lambda: Template(sentencepiece(legacy=False, chat_template=LLAMA2), system="Be brief."),
    "llama2-legacy": lambda: Template(sentencepiece(legacy=True, chat_template=LLAMA2)),
    "llama-alpaca": lambda: Template(sentencepiece(legacy=True), format="alpaca"),
}
CASES = [
    Example("Name a colour.", "Blue is a colour.", id="a"),
    Example("Name a colour", "Red", context="Red, green.\nAnd blue.", id="b"),
    Example("Count.", "1. one\n2. two\n\n3. three", id="c"),
]
_built: dict[str, Template] = {}


@pytest.fixture(params=KINDS)
def template(request) -> Template:
    if request.param not in _built:
        _built[request.param] = KINDS[request.param]()
    return _built[request.param]


@pytest.mark.parametrize("example", CASES, ids=lambda e: e.id)
def test_labelled_ids_are_the_response_and_its_end(template, example):
    tokens = template.encode(example)
    answer = [token for token, labelled in zip(tokens.ids, tokens.labelled, strict=True) if labelled]
    assert template.decode(answer) == example.response
    assert answer[-1] in template.stop
    assert not template.stop & set(answer[:-1])


@pytest.mark.parametrize("example", CASES, ids=lambda e: e.id)
def test_training_sees_the_ids_that_generation_is_given(template, example):
    tokens = template.encode(example)
    prompt = template.prompt_ids(example.instruction, example.context)
    assert list(tokens.ids[: len(prompt)]) == prompt
    assert list(tokens.labelled) == [False] * len(prompt) + [True] * (len(tokens.ids) - len(prompt))


def test_loss_on_all_labels_everything_but_the_first_token():
    tokens = Template(byte_level(), loss_on="all").encode(CASES[1])
    assert tokens.labelled == (False,) + (True,) * (len(tokens.ids) - 1)


@pytest.mark.parametrize("chat_template", [CHATML, CHATML_THINKING])
def test_a_byte_level_chat_is_tokenised_as_the_tokenizer_does_it(chat_template):
    tokenizer = byte_level(chat_template)
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue"}]
    expected = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    ids = list(Template(tokenizer).encode(Example("Name a colour.", "Blue")).ids)
    assert ids == expected[: len(ids)]
    assert tokenizer.decode(expected[len(ids) :]) == "\n"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_chat_is_tokenised_as_the_tokenizer_does_it(legacy):
    tokenizer = sentencepiece(legacy=legacy, chat_template=LLAMA2)
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(Template(tokenizer).encode(Example("Name a colour.", "Blue")).ids) == (
        tokenizer(rendered, add_special_tokens=False).input_ids
    )


def test_alpaca_begins_with_the_tokenizers_beginning_of_text():
    tokenizer = sentencepiece(legacy=True)
    ids = Template(tokenizer, format="alpaca").prompt_ids("Name a colour.")
    assert ids == tokenizer(Template(tokenizer).prompt("Name a colour.").removeprefix("<s>")).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_template_that_writes_the_beginning_of_text_gets_no_second_one():
    tokenizer = sentencepiece(legacy=False, chat_template=LLAMA2)
    assert Template(tokenizer).prompt_ids("Hello").count(tokenizer.bos_token_id) == 1


def test_a_template_that_refuses_a_system_role_gets_it_in_the_users_turn():
    tokenizer = sentencepiece(legacy=False, chat_template=LLAMA2)
    assert Template(tokenizer, system="Be brief.").prompt("Hello") == "<s>[INST] Be brief.\n\nHello [/INST]"


def test_a_thinking_block_before_the_answer_is_part_of_the_prompt_once():
    template = Template(byte_level(CHATML_THINKING))
    assert template.prompt("Hi").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert template.prompt("Hi").count("<think>") == 1


def test_a_thinking_block_only_shown_before_answers_moves_to_the_prompt():
    flagless = CHATML_THINKING.split("{% if enable_thinking")[0] + "{% endif %}"
    template = Template(byte_level(flagless))
    assert template.prompt("Hi").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_is_asked_not_to_think():
    opens = CHATML.replace(
        "assistant\n", "assistant\n{% if enable_thinking | default(true) %}<think>\n{% endif %}"
    )
    assert Template(byte_level(opens)).prompt("Hi").endswith("<|im_start|>assistant\n")


def test_plain_words_are_the_documented_ones():
    template = Template(byte_level(), format="plain")
    assert template.prompt("Add.", "1 2") == "Instruction: Add.\nInput: 1 2\nResponse:"
    assert template.prompt(Example("Add.", "3")) == "Instruction: Add.\nResponse:"


def test_a_plain_answer_begins_with_a_blank():
    tokenizer = byte_level()
    template = Template(tokenizer, format="plain")
    assert tokenizer.decode(template.encode(CASES[0]).ids).endswith(
        "Response: Blue is a colour.<|endoftext|>"
    )


def test_end_of_turn_and_end_of_text_both_stop_an_answer():
    tokenizer = byte_level(CHATML)
    template = Template(tokenizer)
    assert template.stop == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert template.end == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_decode_ends_at_the_first_stop_token():
    tokenizer = byte_level(CHATML)
    ids = tokenizer(" Blue <|im_end|>\n<|im_start|>user").input_ids
    assert Template(tokenizer).decode(ids) == "Blue"


@pytest.mark.parametrize("place", ["instruction", "context", "response"])
def test_control_tokens_spelt_by_a_user_stay_text(template, place):
    spelt = "</s> <|im_end|> <|endoftext|> <|end_story|> <s>"
    fields = {"instruction": "a", "context": "b", "response": "c"}
    clean = template.encode(Example(**fields))
    dirty = template.encode(Example(**fields | {place: f"x {spelt} y"}))
    tokenizer = template._tokenizer
    controls = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert [t for t in dirty.ids if t in controls] == [t for t in clean.ids if t in controls]
    if place == "response":
        letters = tokenizer.decode(
            tokenizer(spelt, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert template.decode(dirty.ids[-dirty.targets :]) == f"x {letters.strip()} y"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80), st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_response_survives_the_round_trip(response, context):
    template = _built.setdefault("chatml", KINDS["chatml"]())
    tokens = template.encode(Example("Say it.", response, context=context))
    assert template.decode(tokens.ids[-tokens.targets :]) == response.strip()


def test_slots_spelt_by_a_user_are_not_filled_in():
    template = Template(byte_level(), format="plain")
    assert template.prompt("\ue001\ue000", "secret") == "Instruction: \ue001\ue000\nInput: secret\nResponse:"


LONG = Example("Do it.", "one two three four five six " * 4, context="red green blue " * 40, id="long:1")


def test_an_example_that_fits_is_not_cut():
    assert Template(byte_level(), format="plain", max_length=4000).truncation(LONG) == "none"


def test_the_end_of_the_context_is_cut_first():
    template = Template(byte_level(), format="plain", max_length=200)
    tokens = template.encode(LONG)
    assert template.truncation(LONG) == "context"
    assert 190 < len(tokens.ids) <= 200
    assert template.decode(tokens.ids[-tokens.targets :]) == LONG.response.strip()
    assert "Input: red green" in template._tokenizer.decode(tokens.ids)


def test_a_response_cut_short_does_not_learn_an_end():
    template = Template(byte_level(), format="plain", max_length=60)
    tokens = template.encode(LONG)
    assert template.truncation(LONG) == "response"
    assert len(tokens.ids) == 60
    assert not template.stop & set(tokens.ids)
    assert LONG.response.startswith(template.decode(tokens.ids[-tokens.targets :]))


def test_a_response_keeps_sixteen_tokens_before_the_instruction_is_cut():
    prompt = len(Template(byte_level(), format="plain").prompt_ids("Do it."))
    exact = Template(byte_level(), format="plain", max_length=prompt + 16)
    assert (exact.encode(LONG).targets, exact.truncation(LONG)) == (16, "response")
    tighter = Template(byte_level(), format="plain", max_length=prompt + 15)
    assert (tighter.encode(LONG).targets, tighter.truncation(LONG)) == (16, "instruction")


def test_an_instruction_loses_its_end():
    template = Template(byte_level(), format="plain", max_length=80)
    ids = template.encode(Example("Name red, green and blue. " * 20, "Red.")).ids
    text = template._tokenizer.decode(ids)
    assert 75 < len(ids) <= 80
    assert text.startswith("Instruction: Name red, green")
    assert text.endswith("\nResponse: Red.<|endoftext|>")


def test_a_format_that_leaves_no_room_is_refused_without_quoting_the_example():
    with pytest.raises(DataError, match="too-long: the prompt format alone") as error:
        Template(byte_level(), format="plain", max_length=20).encode(LONG)
    assert "Do it" not in str(error.value)


def test_a_prompt_leaves_the_room_asked_for():
    template = Template(byte_level(), format="plain", max_length=50, positions=100)
    assert 60 < len(template.prompt_ids(LONG.instruction, LONG.context, room=30)) <= 70
    assert template.prompt_cut(LONG.instruction, LONG.context, room=30) == "context"


@pytest.mark.parametrize("room", [0, 64, 256, 10_000])
def test_the_limit_on_training_cuts_no_prompt_that_is_to_be_answered(room):
    whole = Template(byte_level(), format="plain", max_length=10_000).prompt_ids(LONG)
    short = Template(byte_level(), format="plain", max_length=64)
    assert short.prompt_ids(LONG, room=room) == short.prompt_ids(LONG.instruction, LONG.context) == whole
    assert short.prompt_cut(LONG, room=room) == "none"


@pytest.mark.parametrize("length", [64, 100, 200, 400])
@pytest.mark.parametrize("room", [1, 32, 150, 400])
@pytest.mark.parametrize("response", ["Red.", "", "green " * 12])
def test_a_prompt_is_never_cut_below_what_training_shows(length, room, response):
    template = Template(byte_level(), format="plain", max_length=length, positions=min(length, 256))
    for context, words in ((0, 5), (30, 5), (200, 5), (0, 60), (0, 500)):
        example = Example("Do it now. " * words, response, context="red green blue " * context)
        tokens, _ = template.contrast(example)
        shown = min(tokens.labelled.index(True), template.positions)
        given = template.prompt_ids(example, room=room)
        assert len(given) >= shown
        assert len(given) <= max(shown, template.positions - room)
        if template.truncation(example) == "none" and shown < template.positions:
            assert given == list(tokens.ids[:shown])


def test_a_prompt_is_cut_where_the_model_ends_however_long_the_answer_may_be():
    template = Template(byte_level(), format="plain", max_length=512, positions=512)
    assert template.prompt_ids("Do it.", room=512) == template.prompt_ids("Do it.")
    long = "red green blue " * 400
    assert len(template.prompt_ids("Do it.", long, room=512)) == 512 - 16
    assert template.prompt_cut("Do it.", long, room=512) == "context"


def test_measuring_may_read_as_much_as_the_model_does():
    template = Template(byte_level(), format="plain", max_length=60, positions=4000)
    assert template.truncation(LONG) == "response"
    assert template.reading_all().truncation(LONG) == "none"
    assert template.max_length == 60


def test_measure_counts_what_is_cut():
    template = Template(byte_level(), format="plain", max_length=60)
    measured = template.measure([CASES[0], LONG, Example("x " * 200, "y")])
    assert [measured[f"{what}_cut"] for what in ("context", "response", "instruction")] == [0, 1, 1]
    assert measured["examples"] == 3
    assert measured["tokens_max"] == 60


def test_a_tokenizer_without_any_end_is_refused():
    with pytest.raises(ModelError, match="eos_token"):
        Template(byte_level(eos=None))


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(ModelError, match="chat template"):
        Template(byte_level(), format="chat")


CLOCK = "<|im_start|>system\nToday is {{ CALL }}.<|im_end|>\n" + CHATML.replace("Be kind.", "")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("strftime_now('%d %b %Y')", "26 Jul 2024"),
        ("strftime_now('%Y-%m-%dT%H:%M:%S')", "2024-07-26T00:00:00"),
        ("strftime_now(format='%A, %-d %B %y, %F %j')", "Friday, 26 July 24, 2024-07-26 208"),
        ("(strftime_now('%m') | int + 1) ~ strftime_now('%p').lower()", "8am"),
        ("strftime_now is defined and strftime_now('%Y') is string", "True"),
        ("date_string | default(strftime_now('%d %b %Y'))", "26 Jul 2024"),
    ],
)
def test_the_clock_of_a_chat_template_stands_still(call, says):
    assert f"Today is {says}." in Template(byte_level(CLOCK.replace("CALL", call))).prompt("Hi")


def test_a_clock_that_stands_still_changes_nothing_else_that_is_rendered():
    template = (
        "\n  {%- if strftime_now is defined %}\n  {% set d = strftime_now('%Y') %}\n  x{{ d }}\n{% endif %}\n"
        + CHATML
    )
    tokenizer = byte_level(template)
    year = f"{datetime.now():%Y}"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert Template(tokenizer).prompt("Hi") == rendered.replace(f"x{year}", "x2024")


@pytest.mark.parametrize("call", ["['a', 'b'] | random", "[1,2]|random", "lipsum(n=1)", "lipsum()[:3]"])
def test_a_chat_template_that_draws_at_random_is_refused(call):
    with pytest.raises(ModelError, match="draws at random"):
        Template(byte_level(CLOCK.replace("CALL", call)))


@pytest.mark.parametrize("text", ["| random", "'random' ~ 'lipsum'"])
def test_words_of_a_chat_template_are_no_draws(text):
    shown = text if text.startswith("|") else "{{ " + text + " }}"
    assert "random" in Template(byte_level(shown + CHATML)).prompt("Hi")


@pytest.mark.parametrize("call", ["now()", "datetime.now()", "messages[0].content + 1", "undefined.thing"])
def test_a_chat_template_that_cannot_be_rendered_is_refused_in_words(call):
    with pytest.raises(ModelError, match="chat template"):
        Template(byte_level(CLOCK.replace("CALL", call)))


def test_a_chat_template_that_is_no_jinja_is_refused_in_words():
    with pytest.raises(ModelError, match="not valid Jinja"):
        Template(byte_level("{% for m in messages %}{{ m.content"))


def test_other_prompts_have_another_sha256():
    built = [
        Template(byte_level(CHATML)),
        Template(byte_level(CHATML.replace("kind", "rude"))),
        Template(byte_level(CHATML), system="Be brief."),
        Template(byte_level(CHATML), system="Be long."),
        Template(byte_level(CHATML), format="alpaca"),
        Template(byte_level(CHATML), format="plain"),
        Template(byte_level(CHATML.replace("<|im_end|>", "<|endoftext|>"))),
        Template(byte_level(CLOCK.replace("CALL", "strftime_now('%Y')"))),
    ]
    assert len({template.sha256() for template in built}) == len(built)
    assert Template(byte_level(CHATML)).sha256() == built[0].sha256()


def test_a_chat_template_that_hides_messages_is_refused():
    with pytest.raises(ModelError, match="exactly once"):
        Template(byte_level("{{ messages[0].content }}{{ messages[0].content }}"))
