"""Comparing texts in any script: their words, and how much two texts have in common.

A word is a run of letters, digits and combining marks. In scripts without spaces between words (Han, kana,
Thai, Lao, Khmer, Burmese, ...) each character, with its marks, is a word: finding their real words needs
a dictionary for every language. Korean and Tibetan mark where words or syllables end, and are split there. An
emoji is a word, too. Case, canonical forms (NFC, NFD), widths and other shapes of a letter, and invisible
characters make no difference. Superscripts and fractions are kept: 10² is not 102.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import regex
from rapidfuzz.distance import LCSseq

CHARACTERS_PER_WORD = 2  # in a script without spaces, roughly: this many count as one word

_SCRIPTS = (
    "Han",
    "Hiragana",
    "Katakana",
    "Bopomofo",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
    "Tai_Le",
    "New_Tai_Lue",
    "Tai_Tham",
    "Tai_Viet",
    "Ahom",
    "Javanese",
    "Balinese",
    "Yi",
    "Nushu",
    "Tangut",
)
# With the long vowel mark.
_UNSPACED = "[" + "".join(rf"\p{{{script}}}" for script in _SCRIPTS) + "\u30fc]"
_LETTER = r"[\p{L}\p{N}\p{Mn}\p{Mc}]"
_WORD = regex.compile(
    rf"[{_UNSPACED}&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    rf"|[{_LETTER}--{_UNSPACED}]+"
    r"|\p{Extended_Pictographic}|\p{Regional_Indicator}",
    regex.V1,
)
_ASCII_WORD = regex.compile("[a-z0-9]+")  # the same in ASCII, much faster
_ONE = regex.compile(_UNSPACED, regex.V1)
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Other shapes of one letter. Folding compatibility forms beyond these would turn 10² into 102.
_SHAPES = regex.compile(
    r"[\p{InHalfwidth_and_Fullwidth_Forms}\p{InAlphabetic_Presentation_Forms}\p{InArabic_Presentation_Forms_A}"
    r"\p{InArabic_Presentation_Forms_B}\p{InMathematical_Alphanumeric_Symbols}]+"
)


def folded(text: str) -> str:
    """The text without differences of case, of white space, and of how Unicode writes the same letter."""
    if text.isascii():
        return " ".join(text.lower().split())
    text = _SHAPES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Folded words, numbers and emoji, without punctuation and without stemming."""
    plain = folded(text)
    found: list[str] = (_ASCII_WORD if plain.isascii() else _WORD).findall(plain)
    return found


def length(said: Sequence[str]) -> float:
    """The length of a text in words: a character of a script without spaces counts as part of one."""
    return sum(map(_weight, said))


def runs(said: Sequence[str], least: float) -> Iterator[tuple[str, ...]]:
    """The shortest runs of words with a length of at least `least`, one from each starting place."""
    weights = [_weight(word) for word in said]
    end, reached = 0, 0.0
    for start, weight in enumerate(weights):
        while reached < least and end < len(said):
            reached += weights[end]
            end += 1
        if reached < least:
            return
        yield tuple(said[start:end])
        reached -= weight


def _weight(word: str) -> float:
    return 1 / CHARACTERS_PER_WORD if not word.isascii() and _ONE.match(word) else 1.0


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of ROUGE-L over `words` (Lin 2004). If neither text has a word: whether they are the same."""
    one, other = words(reference), words(answer)
    return overlap(one, other) if one or other else float(folded(reference) == folded(answer))


def overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """`rouge_l` of texts already split into words."""
    if not one or not other:
        return float(not one and not other)
    common = LCSseq.similarity(one, other)
    return 2 * common / (len(one) + len(other))  # harmonic mean of common/len(one) and common/len(other)
