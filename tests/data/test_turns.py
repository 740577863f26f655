"""Conversations as tokens: the ids of the tokenizer's own chat template, and the mask by construction."""

from __future__ import annotations

import pytest

from fedloom.data.example import Example, Turn
from fedloom.data.template import Template
from fedloom.errors import ModelError
from tests.data.test_template import CHATML, CHATML_THINKING, KINDS, LLAMA2, byte_level, sentencepiece
from tests.data.test_tokenizing import build

LLAMA2_SYSTEM = (  # as Meta's: the system's words inside the first question
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CONTROLS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}


def tokenizers():
    def with_template(tokenizer, template, controls=()):
        tokenizer.add_special_tokens({"additional_special_tokens": list(controls)})
        tokenizer.chat_template = template
        return tokenizer

    return {
        "chatml": lambda: byte_level(CHATML),
        "thinking": lambda: byte_level(CHATML_THINKING),
        "llama2": lambda: sentencepiece(legacy=False, chat_template=LLAMA2_SYSTEM),
        "llama2-legacy": lambda: sentencepiece(legacy=True, chat_template=LLAMA2_SYSTEM),
        "llama2-without-system": lambda: sentencepiece(legacy=True, chat_template=LLAMA2),
        "llama3": lambda: with_template(build("byte-level"), LLAMA3, CONTROLS["llama3"]),
        "gemma": lambda: with_template(build("metaspace-never-whole"), GEMMA, CONTROLS["gemma"]),
        "zephyr": lambda: with_template(sentencepiece(legacy=True), ZEPHYR),
        "zephyr-byte-level": lambda: with_template(byte_level(), ZEPHYR),
    }


TOKENIZERS = tokenizers()
_made: dict[str, object] = {}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    if request.param not in _made:
        _made[request.param] = TOKENIZERS[request.param]()
    return _made[request.param]


SYSTEM = Turn("system", "Be kind and brief.")
HISTORY = (Turn("user", "Name a colour."), Turn("assistant", "Red is a colour."))
MORE = (Turn("user", " Another, please.\n"), Turn("assistant", "Red, blue."))
CONVERSATIONS = {
    "single": Example("Say it again.", "Blue is a colour."),
    "system": Example("Say it again.", "Blue is a colour.", turns=(SYSTEM,)),
    "two": Example("Say it again.", "Blue is a colour.", turns=HISTORY),
    "three-system": Example(" Say it\n\nagain. ", "Blue is a colour.", turns=(SYSTEM, *HISTORY, *MORE)),
    "context": Example("Say it again. ", "Blue.", context=" The text.\nOf two lines. ", turns=HISTORY),
}


def messages(tokenizer, e: Example) -> list[dict[str, str]]:
    asked = f"{e.instruction}\n\n{e.context}" if e.context else e.instruction
    told = [{"role": t.role, "content": t.text} for t in e.turns] + [{"role": "user", "content": asked}]
    try:
        tokenizer.apply_chat_template(told, tokenize=False)
    except Exception:  # knows no system role
        system, first, *others = told
        told = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]
    return told


def ids_of(tokenizer, told, **options) -> list[int]:
    text = tokenizer.apply_chat_template(told, tokenize=False, enable_thinking=False, **options)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_a_conversation_has_the_ids_of_the_chat_template(tokenizer, case, loss_on):
    e = CONVERSATIONS[case]
    template = Template(tokenizer, loss_on=loss_on)
    told = messages(tokenizer, e)
    if (
        "<think>" not in tokenizer.chat_template
    ):  # there a finished answer begins with what the question ends with
        assert template.prompt_ids(e) == ids_of(tokenizer, told, add_generation_prompt=True)
    whole = ids_of(tokenizer, [*told, {"role": "assistant", "content": e.response}])
    ids = list(template.encode(e).ids)
    assert ids == whole[: len(ids)]
    assert ids[-1] == template.end


@pytest.mark.parametrize("case", ["two", "three-system"])
def test_every_answer_and_its_end_is_learnt_where_that_is_wanted(tokenizer, case):
    e = CONVERSATIONS[case]
    template = Template(tokenizer, loss_on="assistant")
    tokens = template.encode(e)
    runs: list[list[int]] = []
    for before, now, token in zip((False, *tokens.labelled), tokens.labelled, tokens.ids, strict=False):
        if now:
            runs += [] if before else [[]]
            runs[-1].append(token)
    answers = [t.text for t in e.turns if t.role == "assistant"] + [e.response]
    assert [template.decode(run) for run in runs] == answers
    assert all(run[-1] == template.end for run in runs)
    assert Template(tokenizer).encode(e).targets == len(runs[-1])


@pytest.mark.parametrize("format", ["alpaca", "plain"])
@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_words_alone_repeat_the_question_for_every_turn(format, loss_on):
    tokenizer = byte_level()
    template = Template(tokenizer, format=format, loss_on=loss_on)
    e = CONVERSATIONS["three-system"]
    shown = {
        "alpaca": "Be kind and brief.\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\nRed is a colour.<|endoftext|>\n\n### Instruction:\n Another, "
        "please.\n\n\n### Response:\nRed, blue.<|endoftext|>\n\n### Instruction:\n Say it\n\nagain. \n\n### Response:\n",
        "plain": "Be kind and brief.\n\nInstruction: Name a colour.\nResponse: Red is a colour.<|endoftext|>\nInstruction:  Another, "
        "please.\n\nResponse: Red, blue.<|endoftext|>\nInstruction:  Say it\n\nagain. \nResponse:",
    }[format]
    assert template.prompt(e) == shown
    tokens = template.encode(e)
    assert tokenizer.decode(tokens.ids[: len(template.prompt_ids(e))]) == shown
    if loss_on == "response":
        assert template.prompt_ids(e) == tokenizer(shown).input_ids
    learnt = tokenizer.decode([t for t, learn in zip(tokens.ids, tokens.labelled, strict=True) if learn])
    lead = " " if format == "plain" else ""
    early = (
        f"{lead}Red is a colour.<|endoftext|>{lead}Red, blue.<|endoftext|>" if loss_on == "assistant" else ""
    )
    assert learnt == f"{early}{lead}Blue is a colour.<|endoftext|>"


def test_a_conversations_own_system_turn_stands_for_that_of_the_settings():
    template = Template(byte_level(CHATML), system="Be rude.")
    assert "Be rude." in template.prompt("Hi")
    own = template.prompt(CONVERSATIONS["system"])
    assert "Be kind and brief." in own
    assert "Be rude." not in own


@pytest.mark.parametrize("kind", ["chatml", "llama2", "llama-alpaca", "embedded"])
@pytest.mark.parametrize("place", range(3))
def test_control_tokens_spelt_in_earlier_turns_stay_text(kind, place):
    template = KINDS[kind]()
    texts = ["Be kind.", "Hi", "Hello"]
    clean = Example("a", "b", turns=tuple(map(Turn, ("system", "user", "assistant"), texts)))
    texts[place] = "x </s> <|im_end|> <|endoftext|> <s> <|end|> y"
    dirty = Example("a", "b", turns=tuple(map(Turn, ("system", "user", "assistant"), texts)))
    controls = set(template._tokenizer.added_tokens_decoder) - {template._tokenizer.unk_token_id}
    assert [t for t in template.encode(dirty).ids if t in controls] == [
        t for t in template.encode(clean).ids if t in controls
    ]


LONG = Example(
    "Say it.",
    "Blue.",
    context="red green " * 5,
    turns=(
        Turn("system", "Be kind."),
        *(Turn(("user", "assistant")[i % 2], f"turn {i} is red") for i in range(20)),
    ),
)


@pytest.mark.parametrize("format", ["chat", "alpaca", "plain"])
def test_the_earliest_turns_go_first_and_the_system_stays(format):
    whole = Template(byte_level(CHATML), format=format, max_length=10_000)
    length = len(whole.encode(LONG).ids)
    template = Template(byte_level(CHATML), format=format, max_length=length - 5)
    ids = template.encode(LONG).ids
    assert template.truncation(LONG) == "turns"
    text = template._tokenizer.decode(ids)
    assert "turn 0 " not in text
    assert "turn 1 " not in text
    assert all(f"turn {i} is red" in text for i in range(2, 20))
    assert all(kept in text for kept in ("Be kind.", LONG.context.strip(), "Blue."))
    few = Template(
        byte_level(CHATML),
        format=format,
        max_length=len(whole.encode(Example("Say it.", "Blue.", LONG.context)).ids) + 20,
    )
    assert few.truncation(LONG) == "turns"
    assert "turn" not in few._tokenizer.decode(few.encode(LONG).ids)
    assert few.measure([LONG, CONVERSATIONS["single"]])["turns_cut"] == 1


def test_a_prompt_of_a_conversation_goes_up_to_what_the_model_reads():
    template = Template(byte_level(CHATML), max_length=200, positions=4000)
    assert template.truncation(LONG) == "turns"
    assert template.prompt_cut(LONG, room=256) == "none"


def test_a_template_that_shows_the_last_question_alone_is_refused_for_conversations():
    shown = "{% for m in messages %}{% if m.role == 'assistant' or loop.revindex <= 2 %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    template = Template(byte_level(shown))
    assert template.prompt("Hi") == "Hi<|im_end|>"
    with pytest.raises(ModelError, match="each of 4 messages exactly once"):
        template.encode(CONVERSATIONS["two"])
    assert len(template.sha256()) == 64
