"""Categories for data that has none: k-means over features of the texts.

PPFedIT splits its data by clusters, since neither Alpaca nor MedInstruct is labelled. Features come
from words (`tfidf`) or from the base model itself (`engine.embedding.embed`, then `standardized`).
The result depends on the features and the seed alone: one thread computes it, so that sums have one
order. Another processor may round differently and move a text that lies between two clusters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from fedloom import rng
from fedloom.data.example import Example
from fedloom.data.text import words
from fedloom.errors import ConfigError

WORDS = 20_000  # `tfidf` counts the most frequent
DIMENSIONS = 100  # of vectors from `tfidf`


def tfidf(texts: Sequence[str]) -> np.ndarray:
    """(n, d) float32, rows of length 1: words weighted by rarity, reduced to at most DIMENSIONS.

    Truncated SVD (latent semantic analysis) reduces them: k-means over thousands of texts then takes about
    a second and finds clusters of similar size; over plain word counts, many clusters hold a single text.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: slow to import, and rarely needed
    from sklearn.utils.extmath import randomized_svd

    vectors = TfidfVectorizer(analyzer=_terms, sublinear_tf=True, max_features=WORDS, dtype=np.float32)
    try:
        weights = vectors.fit_transform(texts)  # (n, words), sparse
    except ValueError:  # an empty vocabulary
        raise ConfigError(f"There is no word in any of the {len(texts)} texts to cluster.") from None
    if min(weights.shape) <= DIMENSIONS:
        return _unit(weights.toarray())
    with _one_thread():
        left, strengths, _ = randomized_svd(weights, DIMENSIONS, random_state=0)
    return _unit((left * strengths).astype(np.float32))


def _terms(text: str) -> list[str]:
    """Words; in ASCII underscores count, too, as in blanks to fill in."""
    return re.findall(r"\w+", text.lower()) if text.isascii() else words(text)


def standardized(vectors: np.ndarray) -> np.ndarray:
    """(n, d): every coordinate scaled to mean 0 and variance 1, then every row to length 1.

    The mean hidden states of a language model all point in nearly the same direction, and a few coordinates
    are hundreds of times larger than the others; unscaled, those few would decide everything.
    """
    spread = vectors.std(axis=0)
    return _unit((vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1))


def cluster(features: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """(n,) cluster of each row, numbered from 0, the largest; ties by first appearance. None is empty.

    Raises ConfigError if fewer than `count` rows differ.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= count <= len(features):
        raise ConfigError(
            f"Expected a number of clusters between 1 and {len(features)}, the number of examples, got {count}."
        )
    if not np.isfinite(features).all():
        raise ConfigError("The features to cluster hold NaN or infinite numbers.")
    kmeans = KMeans(count, n_init=1, random_state=rng.key(seed, "clusters") % 2**32)
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # too few different rows: refused below
        found = kmeans.fit(features).labels_
    _, first, names, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    if len(sizes) < count:
        raise ConfigError(
            f"Expected {count} clusters, but the {len(features)} examples form only {len(sizes)}: "
            "too many are alike. Ask for fewer clusters."
        )
    rank = np.empty(count, dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(count)
    return rank[names]


def clustered(examples: Sequence[Example], features: np.ndarray, *, count: int, seed: int) -> list[Example]:
    """The examples, each with the name of its cluster as category: "cluster-000" is the largest."""
    if len(features) != len(examples):
        raise ConfigError(
            f"Expected a row of features for each of {len(examples)} examples, got {len(features)}."
        )
    labels = cluster(features, count=count, seed=seed)
    width = max(3, len(str(count - 1)))
    return [
        replace(e, category=f"cluster-{label:0{width}d}") for e, label in zip(examples, labels, strict=True)
    ]


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _one_thread() -> AbstractContextManager[object]:
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits
