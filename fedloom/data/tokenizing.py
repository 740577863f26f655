"""Text to exactly the ids that its tokenizer gives, but a user cannot spell a control token.

Some tokenizers put a space before the first word. Where they do depends on their kind: before a whole text
only (Metaspace, scheme "first"), after every control token too (Metaspace "always", ByteLevel with
`add_prefix_space`, the normalizer Prepend), or before every word. So a piece of text is tokenised according
to its place: at the beginning, after a control token, or after other text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

from fedloom.errors import ModelError

Part = int | str  # a control token, or text with slots


class TextTokenizer:
    """Plain text to ids, given what comes before it; and format text split at its control tokens.

    Control tokens are a tokenizer's added tokens, except those of white space alone: a user's own spaces may
    merge with those of the format, so they stay part of the text.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer; fedloom needs a tokenizer.json beside the "
                "model. Convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        self._backend = tokenizer.backend_tokenizer
        self._described = json.loads(self._backend.to_str())
        self._set_places()

        added = {
            token: entry for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip()
        }
        self._added = added
        self._controls = {entry.content: token for token, entry in added.items()}
        # Longest first, so that no control token hides another; the tokenizer says which adjacent spaces go.
        patterns = [
            (r"\s*" if entry.lstrip else "")
            + (r"(?<!\w)" if entry.single_word else "")
            + f"({re.escape(entry.content)})"
            + (r"(?!\w)" if entry.single_word else "")
            + (r"\s*" if entry.rstrip else "")
            for entry in sorted(added.values(), key=lambda entry: -len(entry.content))
        ]
        self._control = re.compile("|".join(patterns)) if patterns else None
        # The beginning of text, if the tokenizer adds one.
        self.opening: list[int] = _opening(self._first)

    def _set_places(self) -> None:
        described = self._described
        self._first = _plain(described)
        self._after_control = _plain(_without_blanks(described, schemes=("first",)))
        # A normalizer sees the whole text before it is searched for control tokens that are normalized.
        self._after_normalized = _plain(_without_blanks(described, schemes=("first",), prepended=True))
        bare = _plain(_without_blanks(described, schemes=("first", "always"), prepended=True, spaced=True))
        # If every word gets a space, so does the first word after other text.
        self._later = bare if _spelt(self._first, "a\na b").endswith(_spelt(bare, "a b")) else self._first

    def protect(self, token: int) -> None:
        """Keep users' words from spelling this token, although the tokenizer does not call it special."""
        for entry in self._described["added_tokens"]:
            if entry["id"] == token and not entry["special"]:
                entry["special"] = True
                self._set_places()

    def ids(self, text: str, *, after: Part | None, before: Part | None = None) -> list[int]:
        """Ids of plain text that follows `after`: nothing, a control token, or more text.

        Spaces that a neighbouring control token absorbs are dropped.
        """
        if isinstance(before, int) and self._added[before].lstrip:
            text = text.rstrip()
        if isinstance(after, int) and self._added[after].rstrip:
            text = text.lstrip()
        if not text:
            return []
        return _ids(self._place(after), text)

    def _place(self, after: Part | None) -> Tokenizer:
        if after is None:
            return self._first
        if isinstance(after, str):
            return self._later
        return self._after_normalized if self._added[after].normalized else self._after_control

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `text` begins and ends, in characters."""
        return list(self._later.encode(text, add_special_tokens=False).offsets)

    def name(self, token: int) -> str:
        """How the tokenizer spells a control token."""
        entry = self._added.get(token)
        return entry.content if entry else str(self._backend.id_to_token(token))

    def split(self, text: str) -> list[Part]:
        """Format text as control tokens and the text between them."""
        parts: list[Part] = []
        place = 0
        for match in self._control.finditer(text) if self._control else ():
            if text[place : match.start()]:
                parts.append(text[place : match.start()])
            parts.append(self._controls[next(name for name in match.groups() if name)])
            place = match.end()
        return [*parts, text[place:]] if text[place:] else parts


def _plain(described: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text: a user cannot spell a control token
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception as unknown:  # tokenizers has no class of its own
        raise ModelError(
            "the tokenizer has no token for some of the text, and none for unknown words; "
            "choose another base model, or set unk_token in its tokenizer.json."
        ) from unknown


def _without_blanks(
    described: dict[str, Any], *, schemes: tuple[str, ...], prepended: bool = False, spaced: bool = False
) -> dict[str, Any]:
    """The same tokenizer without the spaces that it puts before words: those of Metaspace in these schemes,
    the normalizer's Prepend (`prepended`), and ByteLevel's `add_prefix_space` (`spaced`)."""

    def strip(node: Any) -> Any:
        if isinstance(node, list):
            return [item for item in map(strip, node) if item is not None]
        if not isinstance(node, dict):
            return node
        if prepended and node.get("type") == "Prepend":
            return None
        node = {key: strip(value) for key, value in node.items()}
        if node.get("prepend_scheme") in schemes:
            node["prepend_scheme"] = "never"
        if spaced and "add_prefix_space" in node:
            node["add_prefix_space"] = False
        return node

    return described | {name: strip(described[name]) for name in ("normalizer", "pre_tokenizer")}


def _spelt(tokenizer: Tokenizer, text: str) -> str:
    """The text as a tokenizer's model receives it, normalized and split."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text; its vocabulary may lack "a", so others are tried."""
    for text in ("a", *sorted(tokenizer.get_vocab(with_added_tokens=False), key=len)[:1000]):
        bare = _ids(tokenizer, text)
        if bare:
            whole = tokenizer.encode(text).ids
            return list(whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)])
    return []
