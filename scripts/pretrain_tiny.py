"""Pretrain the embedded base model and its tokenizer: a tiny Llama, on CPU in under an hour, from a seed.

    python scripts/pretrain_tiny.py --english FOLDER --out fedloom/embedded

It reads ordinary English (Wikipedia articles as `wiki_en_*.jsonl.xz` with a `text` field, novels as
`novels.tar.xz`) and generates the rest: prose about the microworld, numbered lists of worked tasks in
varying formats and styles, and lists of instructions without answers. The model never sees the prompt
format of fine-tuning, nor a bare instruction followed by its answer. So, like a real base model, it
does not follow a bare instruction, but it continues a list with another task of the same kind and
answers a task when shown a few.

Articles that share an eight-word run with a text in `--exclude` (databricks-dolly-15k) are left out,
so that perplexity on those texts stays meaningful.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.data import microworld as mw
from fedloom.data.microworld import FAMILIES, KINDS, WORLD, Task, a
from fedloom.rng import numpy_stream

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
VOCAB, LENGTH = 4096, 512
SHAPE = dict(
    hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, intermediate_size=512
)

Rng = np.random.Generator


# --- the generated part of the text ------------------------------------------------------------------


def worked_list(rng: Rng) -> str:
    """A numbered list of tasks with answers: mostly one family, one format, and one style per family."""
    mixing = rng.random()
    names = (
        list(FAMILIES)
        if mixing < 0.2
        else [str(n) for n in rng.choice(list(FAMILIES), 1 if mixing < 0.7 else 2)]
    )
    style: dict[str, float] = {}  # the same style throughout the list, so that it can be picked up in context
    layout = rng.choice(3, p=[0.6, 0.2, 0.2])
    lines = [str(rng.choice(["Here is a list of tasks.", "Tasks with answers", "Some worked tasks:", ""]))]
    for i in range(1, int(rng.integers(3, 12))):
        task = FAMILIES[names[rng.integers(len(names))]](rng)
        answer = styled(task, style, rng)
        if layout == 0:
            context = f"\nInput: {task.context}" if task.context else ""
            lines.append(f"Task {i}\nInstruction: {task.instruction}{context}\nOutput: {answer}")
        elif layout == 1:
            lines.append(f"{i}. {task.context + ' ' if task.context else ''}{task.instruction}\n{answer}")
        else:
            lines.append(f"Q: {task.context + ' ' if task.context else ''}{task.instruction}\nA: {answer}")
    return "\n\n".join(line for line in lines if line)


def styled(task: Task, style: dict[str, float], rng: Rng) -> str:
    if task.category not in style:
        style[task.category] = 0.0 if rng.random() < 0.3 else rng.random()
    return task.answers[int(style[task.category] * len(task.answers))]


def instruction_list(rng: Rng) -> str:
    """Instructions without answers: numbered tasks, or a list of questions."""
    names = list(FAMILIES) if rng.random() < 0.3 else [str(rng.choice(list(FAMILIES)))]
    numbered = rng.random() < 0.7
    lines = [
        str(
            rng.choice(
                [
                    "Come up with a list of tasks.",
                    "Here is a list of instructions.",
                    "Questions for later",
                    "",
                ]
            )
        )
    ]
    for i in range(1, int(rng.integers(4, 20))):
        instruction = FAMILIES[names[rng.integers(len(names))]](rng).instruction
        lines.append(f"Task {i}: {instruction}" if numbered else f"Instruction: {instruction}")
    return "\n".join(line for line in lines if line)


def prose(rng: Rng) -> str:
    """Statements about the world and its people, from which the facts are learnt."""
    out: list[str] = []
    things = list(WORLD)
    for _ in range(int(rng.integers(4, 10))):
        thing = things[rng.integers(len(things))]
        facts = WORLD[thing]
        kind, (plural, members) = facts.kind, KINDS[facts.kind]
        match rng.integers(10):
            case 0:
                out.append(f"The {thing} is {a(facts.colour)} {kind}. It is found at the {facts.place}.")
            case 1:
                out.append(f"At the {facts.place} there is {a(thing)}, which is {facts.colour}.")
            case 2:
                out.append(f"The colour of the {thing} is {facts.colour}, and the {thing} is {a(kind)}.")
            case 3:
                order = rng.permutation(len(members))
                out.append(f"Among the {plural} are the {', the '.join(members[j] for j in order[:5])}.")
            case 4:
                i, days = int(rng.integers(7)), mw.DAYS
                out.append(f"After {days[i]} comes {days[(i + 1) % 7]}, then {days[(i + 2) % 7]}.")
            case 5:
                i, months = int(rng.integers(12)), mw.MONTHS
                out.append(
                    f"{months[i]} is followed by {months[(i + 1) % 12]} and then by {months[(i + 2) % 12]}."
                )
            case 6:
                x, y = sorted(int(n) for n in rng.choice(np.arange(2, 100), 2, replace=False))
                out.append(f"{y} is larger than {x}." if rng.random() < 0.5 else f"{x} is smaller than {y}.")
            case 7:
                out.append(mw.biography(rng))
            case 8:
                other = things[rng.integers(len(things))]
                out.append(
                    f"{a(thing).capitalize()} met {a(other)} at the {facts.place}. The {thing} is {facts.colour}, the {other} is {WORLD[other].colour}."
                )
            case _:
                out.append(
                    f"Where is the {thing}? Everybody knows that the {thing} is found at the {facts.place}."
                )
    return " ".join(out)


# --- the English part ----------------------------------------------------------------------------------


def shingles(text: str) -> set[int]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)}


def english(folder: Path, exclude: Path | None, rng: Rng, characters: int) -> Iterator[str]:
    """Pieces of about 1,500 characters: two thirds encyclopaedia, one third novels, until `characters`."""
    banned: set[int] = set()
    if exclude:
        with lzma.open(exclude, "rt", encoding="utf-8") as lines:
            for line in lines:
                banned |= shingles(json.loads(line)["context"])
    left, dropped = int(characters * 0.67), 0
    for file in sorted(folder.glob("wiki_en_*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                article = json.loads(line)
                head = article["text"][:6000]  # openings define the subject; long tails are lists
                if banned and not banned.isdisjoint(shingles(head)):
                    dropped += 1
                    continue
                for piece in pieces(f"{article['title']}\n{head}"):
                    left -= len(piece)
                    yield piece
                if left < 0:
                    break
        if left < 0:
            break
    print(f"encyclopaedia: {dropped} articles left out for overlap", flush=True)
    left = int(characters * 0.33)
    with tarfile.open(folder / "novels.tar.xz") as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".txt")]
        share = left // max(1, len(members))
        for member in members:
            data = tar.extractfile(member)
            if data is None:
                continue
            text = data.read().decode("utf-8", "replace")
            start = int(rng.integers(0, max(1, len(text) - share)))
            yield from pieces(re.sub(r"(?<!\n)\n(?!\n)", " ", text[start : start + share]))


def pieces(text: str, size: int = 1500) -> Iterator[str]:
    for start in range(0, len(text), size):
        if len(text) - start > 200:
            yield text[start : start + size]


# --- tokenizer, packing, training ------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    # Digits are separate tokens, so that a code of four digits is four tokens whatever surrounds it.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[PAD, BEGIN, END], initial_alphabet=sorted(alphabet)
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token=PAD, bos_token=BEGIN, eos_token=END, model_max_length=LENGTH
    )


def pack(documents: Iterator[list[int]], begin: int, end: int) -> np.ndarray:
    """Documents one after another in rows of LENGTH + 1 tokens; a document that does not fit is cut."""
    rows, row = [], []
    for ids in documents:
        row += [begin, *ids, end]
        while len(row) >= LENGTH + 1:
            rows.append(row[: LENGTH + 1])
            row = []  # the rest of a cut document is dropped: a row never starts in the middle of a list
    return np.asarray(rows, dtype=np.uint16)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--english", type=Path, required=True, help="folder with wiki_en_*.jsonl.xz and novels.tar.xz"
    )
    p.add_argument("--exclude", type=Path, help="a .jsonl.xz whose `context` texts must not be read")
    p.add_argument("--out", type=Path, default=Path("fedloom/embedded"))
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=16, help="rows of 512 tokens a step")
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(args.threads)

    rng = numpy_stream(args.seed, "pretrain", "text")
    rows_wanted = args.steps * args.batch
    world_share = 0.62
    texts = list(
        english(args.english, args.exclude, rng, int(rows_wanted * LENGTH * (1 - world_share) * 5.5))
    )
    makers = [worked_list, instruction_list, prose]
    sample = [makers[i % 3](rng) for i in range(6000)]
    order = rng.permutation(len(texts))
    tokenizer = train_tokenizer(iter([*sample, *(texts[i] for i in order[:6000])]))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encode = lambda docs: (e.ids for e in tokenizer._tokenizer.encode_batch(docs, add_special_tokens=False))  # noqa: E731

    rows = [pack(encode([texts[i] for i in order]), begin, end)]
    made = len(rows[0])
    while made < rows_wanted:
        docs = [makers[i](rng) for i in rng.choice(3, p=[0.56, 0.12, 0.32], size=4000)]
        rows.append(pack(encode(docs), begin, end))
        made += len(rows[-1])
    data = np.concatenate(rows)[:]
    data = data[rng.permutation(len(data))][:rows_wanted]
    print(
        f"{len(data)} rows, {data.size / 1e6:.1f} M tokens, English {len(rows[0]) / len(data):.0%}",
        flush=True,
    )

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        attn_implementation="eager",
        **SHAPE,
    )
    model = LlamaForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decay = [q for q in model.parameters() if q.dim() > 1]
    plain = [q for q in model.parameters() if q.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        lr=0.0,
    )
    started, total = time.time(), args.steps
    for step in range(total):
        rate = min(1.0, (step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        batch = torch.from_numpy(data[step * args.batch : (step + 1) * args.batch].astype(np.int64)).to(
            args.device
        )
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == total - 1:
            spent = time.time() - started
            speed = (step + 1) * args.batch * LENGTH / spent
            print(
                f"step {step:5d}  loss {loss.item():.3f}  {speed:,.0f} tokens/s  {spent / 60:.1f} min of {spent / (step + 1) * total / 60:.0f}",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step == total - 1:
            save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({k: v.to(torch.bfloat16).cpu() for k, v in model.state_dict().items()})
    half.config.use_cache = True
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
