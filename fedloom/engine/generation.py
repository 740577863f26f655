"""Answers Generate: prompts under different adapters continued in one batch, with a key-value cache.

Prompts are sorted by length; each row has its own adapter, limit, stop tokens and temperature. decoding.py reads
and continues them. Finished rows leave the batch once enough have finished. A prompt's answer does not depend on
its neighbours, up to the rounding of sums; this holds for sampled answers too, since the random number of a token
is a function of its name alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom import rng
from fedloom.engine.bank import Tuning
from fedloom.engine.decoding import decoding
from fedloom.engine.packing import DENSE_COLUMNS
from fedloom.engine.planner import out_of_memory
from fedloom.engine.serving import Rows, ServedModel
from fedloom.errors import ModelError
from fedloom.state import AdapterState
from fedloom.steps import Generate

TOKENS_PER_BATCH = 16_384  # rows times length of prompt and answer: bounds the keys and values that are kept
CACHE_SHARE = 0.25  # of a GPU's memory, where more tokens fit into it
ROWS = 1024  # of a batch: bounds the logits
LEAVE_SHARE = 0.25  # of a batch's rows; when so many have finished, the rest moves to a smaller batch


@dataclass(frozen=True)
class _Prompt:
    """One prompt and everything that decides its answer."""

    key: Hashable  # of the request
    index: int  # in the request
    ids: Sequence[int]
    row: int  # of the adapter; -1: the base model
    limit: int  # most tokens to answer with
    stop: frozenset[int]
    temperature: float
    seed: int
    stream: tuple[rng.Name, ...]
    penalty: float  # on tokens the answer holds already
    top_k: int | None


def generate_all(
    served: ServedModel, requests: Mapping[Hashable, Generate]
) -> dict[Hashable, list[list[int]]]:
    """Answer every prompt of every request. An answer also ends where the model's positions do.

    Raises ModelError for a prompt that is empty or longer than the model reads.
    """
    longest = positions(served.model)
    answers: dict[Hashable, list[list[int]]] = {
        key: [[] for _ in request.prompts] for key, request in requests.items()
    }
    tunings = _shared(requests)
    for wave in _waves(tunings, width=max(1, DENSE_COLUMNS // served.layout.spec.rank)):
        with served.rows({id(tunings[key]): tunings[key] for key in wave}) as rows:
            row_of = {key: rows.index[id(tunings[key])] for key in wave}
            prompts = [p for key in wave for p in _prompts(key, requests[key], row_of[key], longest)]
            for batch in _batches(prompts, _tokens_per_batch(served.model)):
                for prompt, answer in zip(batch, _answered(served, rows, batch), strict=True):
                    answers[prompt.key][prompt.index] = answer
    return answers


def stream(
    served: ServedModel,
    prompt_ids: Sequence[int],
    adapter: AdapterState | None,
    *,
    max_new_tokens: int = 256,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of one answer as they come, the stop token left out.

    They are the answer to a `Generate` of this prompt alone with this seed. The engine may answer other requests
    between two tokens.
    """
    request = Generate([prompt_ids], adapter, max_new_tokens, stop, temperature, seed=seed)
    with served.rows({"": Tuning.of(request)}) as rows:
        prompts = _prompts("", request, rows.index[""], positions(served.model))
    if prompts:
        for tokens in _continued(served, rows, prompts):
            yield from (token for _, token in tokens)


def _answered(served: ServedModel, rows: Rows, batch: Sequence[_Prompt]) -> list[list[int]]:
    """The answers to a batch; when memory runs out, to one half and then the other."""
    answers: list[list[int]] = [[] for _ in batch]
    try:
        for tokens in _continued(served, rows, batch):
            for place, token in tokens:
                answers[place].append(token)
        return answers
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ModelError(
                f"Out of memory while answering one prompt of {len(batch[0].ids)} tokens: shorten it, or ask "
                "for fewer new tokens."
            ) from error
    middle = len(batch) // 2
    return _answered(served, rows, batch[:middle]) + _answered(served, rows, batch[middle:])


def _continued(
    served: ServedModel, rows: Rows, prompts: Sequence[_Prompt]
) -> Iterator[list[tuple[int, int]]]:
    """Step by step, the new tokens as (place in `prompts`, token); stop tokens are not among them.

    Nothing is in force between two steps, so the model may serve others meanwhile.
    """
    ids, owners = [prompt.ids for prompt in prompts], [prompt.row for prompt in prompts]
    under_way = decoding(served, rows, ids, owners, new=max(prompt.limit for prompt in prompts))
    logits = under_way.read()  # (B, V)
    places = list(range(len(prompts)))  # which prompt each row of the batch is
    finished: set[int] = set()
    said: list[set[int]] = [set() for _ in prompts]  # the tokens of each answer
    step = 0
    while True:
        logits = _penalised(logits, [(prompts[place].penalty, said[place]) for place in places])
        tokens = _chosen(logits, [prompts[place] for place in places], step)
        step += 1
        new: list[tuple[int, int]] = []
        for place, token in zip(places, tokens, strict=True):
            if place in finished:
                continue
            if token in prompts[place].stop:
                finished.add(place)
                continue
            new.append((place, token))
            said[place].add(token)
            if step == prompts[place].limit:
                finished.add(place)
        if new:
            yield new
        if len(finished) == len(prompts):
            return
        going = [row for row, place in enumerate(places) if place not in finished]
        if len(going) <= (1 - LEAVE_SHARE) * len(places):
            under_way.keep(going)
            tokens = [tokens[row] for row in going]
            places = [places[row] for row in going]
        logits = under_way.append(tokens)


def _penalised(logits: Tensor, rows: Sequence[tuple[float, set[int]]]) -> Tensor:
    """Logits (B, V) with each row's repeated tokens made less likely, as in CTRL (Keskar et al. 2019).

    Only what the answer itself has said counts: a prompt's own words may be needed again.
    """
    if all(penalty == 1 or not said for penalty, said in rows):
        return logits
    logits = logits.clone()
    for row, (penalty, said) in enumerate(rows):
        again = torch.tensor(sorted(said), dtype=torch.long, device=logits.device)
        before = logits[row, again]
        logits[row, again] = torch.where(before > 0, before / penalty, before * penalty)
    return logits


def _chosen(logits: Tensor, prompts: Sequence[_Prompt], step: int) -> list[int]:
    """The next token of each row: the likeliest, or one drawn by the row's own random number."""
    tokens: list[int] = logits.argmax(-1).tolist()  # (B, V) -> (B,)
    drawn = [row for row, prompt in enumerate(prompts) if prompt.temperature > 0]
    if drawn:
        heat = torch.tensor([prompts[row].temperature for row in drawn], dtype=torch.float64)[:, None]
        share = torch.tensor(
            [
                rng.key(prompts[row].seed, "sample", *prompts[row].stream, prompts[row].index, step) / 2**63
                for row in drawn
            ],
            dtype=torch.float64,
        )[:, None]
        place = "cpu" if logits.device.type == "mps" else logits.device  # which has no float64
        scores = logits[drawn].to(place).double() / heat.to(place)
        for mine, k in zip(scores, (prompts[row].top_k for row in drawn), strict=True):
            if k is not None and k < len(mine):
                mine[mine < mine.topk(k).values[-1]] = -torch.inf  # ties with the last stay
        below = torch.softmax(scores, -1).cumsum(-1)  # (drawn, V)
        picked = torch.searchsorted(below, share.to(place) * below[:, -1:], right=True)
        for row, token in zip(drawn, picked[:, 0].clamp_max(logits.shape[-1] - 1).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _prompts(key: Hashable, request: Generate, row: int, longest: int | None) -> list[_Prompt]:
    """The prompts of a request that need an answer."""
    found = []
    for index, ids in enumerate(request.prompts):
        if not len(ids):
            raise ModelError(f"Prompt {index} of {key!r} is empty; a model continues one token at least.")
        if longest is not None and len(ids) > longest:
            raise ModelError(
                f"Prompt {index} of {key!r} has {len(ids)} tokens and the model reads {longest}; shorten it."
            )
        # The last token of an answer needs no position: nothing is predicted from it.
        limit = (
            request.max_new_tokens if longest is None else min(request.max_new_tokens, longest - len(ids) + 1)
        )
        if limit > 0:
            found.append(
                _Prompt(
                    key,
                    index,
                    ids,
                    row,
                    limit,
                    request.stop,
                    request.temperature,
                    request.seed,
                    request.stream,
                    request.repetition_penalty,
                    request.top_k,
                )
            )
    return found


def _shared(requests: Mapping[Hashable, Generate]) -> dict[Hashable, Tuning]:
    """One object for equal tunings: a cohort that generates with what it received needs one row."""
    seen: dict[Hashable, Tuning] = {}
    found: dict[Hashable, Tuning] = {}
    for key, request in requests.items():
        adapter = None if request.adapter is None else request.adapter.sha256()
        frozen = request.frozen and (request.frozen.factors.sha256(), request.frozen.scale)
        found[key] = seen.setdefault((adapter, request.scale, frozen), Tuning.of(request))
    return found


def _waves(tunings: Mapping[Hashable, Tuning], *, width: int) -> list[list[Hashable]]:
    """Keys of requests answered over one set of at most `width` tunings.

    An adapter that has diverged goes alone: the product of its NaN with another row's zero is NaN.
    """
    keys: dict[int, list[Hashable]] = {}  # by tuning
    for key, tuning in tunings.items():
        keys.setdefault(id(tuning), []).append(key)
    waves: list[list[Hashable]] = []
    sound: list[list[Hashable]] = []
    for mine in keys.values():
        (sound if tunings[mine[0]].is_finite() else waves).append(mine)
    for start in range(0, len(sound), width):
        waves.append([key for mine in sound[start : start + width] for key in mine])
    return waves


def _batches(prompts: Sequence[_Prompt], budget: int) -> Iterator[list[_Prompt]]:
    """Prompts of similar length together, within the budget; a prompt that exceeds it goes alone."""
    batch: list[_Prompt] = []
    limit = 0  # of the longest answer of the batch
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        limit = max(limit, prompt.limit)
        rows = len(batch) + 1
        if batch and (rows > ROWS or (len(prompt.ids) + limit) * rows > budget):
            yield batch
            batch, limit = [], prompt.limit
        batch.append(prompt)
    if batch:
        yield batch


def _tokens_per_batch(model: Any) -> int:
    """As many as a GPU's memory allows, whatever it holds now: a batch that does not fit is halved later."""
    if model.device.type != "cuda":
        return TOKENS_PER_BATCH
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize  # bytes
    memory = torch.cuda.get_device_properties(model.device).total_memory
    return max(TOKENS_PER_BATCH, int(CACHE_SHARE * memory) // token)


def positions(model: Any) -> int | None:
    """How many tokens the model reads; None: no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
