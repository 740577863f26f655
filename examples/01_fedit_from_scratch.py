"""FedIT by hand: federated instruction tuning in one flat file, to be read from top to bottom.

    python examples/01_fedit_from_scratch.py

Several clients own instructions that must not leave them. A server owns a LoRA adapter for a base model that
everybody has. In every round it sends the adapter to some clients, each trains it on its own instructions,
and the server averages the results, weighted by each client's number of examples. That is all of FedIT
(Zhang et al. 2023, arXiv 2305.05644), which is FedAvg (McMahan et al. 2017, arXiv 1602.05629) on LoRA.

Nothing here is fast or secure. `02_python_api.py` runs the same algorithm with the library, many clients in
one pass, and tests/examples/ checks that both end in the same adapter.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import fedloom
from fedloom import rng  # named random streams, so that two implementations can draw the same numbers
from fedloom.data import microworld

SETTINGS = dict(
    base=str(Path(fedloom.__file__).parent / "embedded"),  # any folder with a causal language model
    clients=8,
    cohort=4,  # clients in a round
    rounds=8,
    epochs=2,  # passes over a client's examples in a round
    batch_size=8,
    learning_rate=3e-3,
    rank=8,
    examples=400,
    held_out=64,  # examples that nobody trains on
    seed=0,
    dtype="float32",
)
parser = argparse.ArgumentParser(description="FedIT by hand.")
for name, value in SETTINGS.items():
    parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
settings = parser.parse_args()
seed = settings.seed

# The base model. It is frozen; get_peft_model puts two small factors beside every linear layer, which
# then computes W x + (alpha / r) B A x. Only A and B are ever trained, sent or averaged.
disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers has changed
tokenizer = AutoTokenizer.from_pretrained(settings.base)
base = AutoModelForCausalLM.from_pretrained(settings.base, dtype=getattr(torch, settings.dtype))
lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
model = get_peft_model(base, lora)
factors = {name: p for name, p in model.named_parameters() if p.requires_grad}

# The data. Every client gets whole categories, so none can learn from its own examples alone to answer
# the others': the situation FedIT was made for.
examples = microworld.corpus(examples=settings.examples, seed=seed)
order = rng.numpy_stream(seed, "example", "hold-out").permutation(len(examples)).tolist()
test = [examples[i] for i in order[: settings.held_out]]
train = sorted((examples[i] for i in order[settings.held_out :]), key=lambda e: e.category)
edges = [k * len(train) // settings.clients for k in range(settings.clients + 1)]
clients = {f"client-{k:03d}": train[edges[k] : edges[k + 1]] for k in range(settings.clients)}


def prompt(example) -> str:
    context = f"Input: {example.context}\n" if example.context else ""
    return f"Instruction: {example.instruction}\n{context}Response:"


def tokens(example) -> tuple[list[int], list[int]]:
    """Prompt + response + end of text, with labels where the loss counts: on the response and its end."""
    given = tokenizer(prompt(example)).input_ids
    learnt = [*tokenizer(f" {example.response}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return given + learnt, [-100] * len(given) + learnt


def loss_sum(batch) -> tuple[torch.Tensor, int]:
    """The sum of nats over a batch's labelled tokens, and the number of those tokens."""
    encoded = [tokens(example) for example in batch]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded])  # (B, L)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in encoded])
    logits = model(input_ids=ids, attention_mask=mask).logits  # (B, L, V)
    # Token i is predicted from the tokens before it, so its logits are at position i - 1.
    next_token = labels[:, 1:].flatten()
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), next_token, reduction="sum", ignore_index=-100)
    return nats, int((next_token != -100).sum())


def set_factors(adapter: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(adapter[name])


@torch.no_grad()
def held_out_loss(adapter: dict[str, torch.Tensor]) -> float:
    set_factors(adapter)
    parts = [loss_sum(test[i : i + 16]) for i in range(0, len(test), 16)]
    return sum(float(nats) for nats, _ in parts) / sum(count for _, count in parts)


def train_locally(adapter: dict[str, torch.Tensor], client: str, taken: int) -> dict[str, torch.Tensor]:
    """A client's work in one round. `taken` earlier rounds have used up the start of its order."""
    own = clients[client]
    set_factors(adapter)
    model.train()
    # Adam's moments start from zero in every round: they belong to no particular adapter.
    optimizer = torch.optim.AdamW(factors.values(), lr=settings.learning_rate, weight_decay=0.0)
    for epoch in range(taken * settings.epochs, (taken + 1) * settings.epochs):
        order = rng.numpy_stream(seed, "order", client, "local", epoch).permutation(len(own)).tolist()
        for start in range(0, len(own), settings.batch_size):
            nats, count = loss_sum([own[i] for i in order[start : start + settings.batch_size]])
            optimizer.zero_grad()
            (nats / count).backward()
            torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
            optimizer.step()
    model.eval()
    return {name: factor.detach().clone() for name, factor in factors.items()}


# Round 0: A random, B zero, so the adapter changes nothing yet and everybody starts from the base.
adapter = {}
for name, factor in factors.items():
    adapter[name] = torch.zeros_like(factor)
    if ".lora_A." in name:
        module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
        bound = 1 / math.sqrt(factor.shape[1])
        start = rng.numpy_stream(seed, "adapter", module).uniform(-bound, bound, tuple(factor.shape))
        adapter[name] = (
            torch.from_numpy(start).float().to(factor.dtype)
        )  # float32 first, so that both dtypes start alike
print(f"base model: held-out loss {held_out_loss(adapter):.3f} nats a token")

taken = dict.fromkeys(clients, 0)
for round in range(settings.rounds):
    # 1. The server picks this round's clients.
    drawn = rng.numpy_stream(seed, "select", round).choice(len(clients), settings.cohort, replace=False)
    cohort = [sorted(clients)[i] for i in sorted(drawn)]

    # 2. Each starts from the server's adapter and trains it on its own examples. Only the result leaves.
    trained = {}
    for client in cohort:
        trained[client] = train_locally(adapter, client, taken[client])
        taken[client] += 1

    # 3. The server averages, weighted by n_k / sum n. A and B are averaged separately: the mean of the
    #    products B_k A_k is not the product of the means, and FedIT accepts the difference.
    total = sum(len(clients[c]) for c in cohort)
    for name in adapter:
        mean = sum(len(clients[c]) / total * trained[c][name].double() for c in cohort)
        adapter[name] = mean.to(adapter[name].dtype)
    print(f"round {round + 1}: {' '.join(cohort)}: held-out loss {held_out_loss(adapter):.3f}")

# The adapter at work: how does it answer instructions that nobody trained on?
set_factors(adapter)
for example in test[:4]:
    given = tokenizer(prompt(example), return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answer = tokenizer.decode(ids[0, given.input_ids.shape[1] :], skip_special_tokens=True).strip()
    verdict = "right" if microworld.check(example, answer) else "wrong"
    print(f"\n{example.instruction}\n  {answer}   ({verdict})")
