"""Clusters stand in for categories: same seed, same clusters, named by size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

from fedloom.data import clusters, sources
from fedloom.data.example import Example
from fedloom.errors import ConfigError

SUBJECTS = {"heart": 6, "tree": 4, "engine": 2}  # subject -> texts about it


def corpus() -> list[Example]:
    """Twelve texts on three subjects in turn, each with words that no other subject has."""
    return [
        Example(f"{subject} {subject}s question", f"{subject} {subject}s answer", category="old", id=str(n))
        for n in range(6)
        for subject, count in SUBJECTS.items()
        if n < count
    ]


def texts(examples: list[Example]) -> list[str]:
    return [f"{e.instruction} {e.response}" for e in examples]


def features() -> np.ndarray:
    return clusters.tfidf(texts(corpus()))


def blobs(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Points around corners far from each other."""
    noise = np.random.default_rng(seed).normal(0, 0.01, (sum(sizes), 4))
    return noise + 10 * np.eye(4)[np.repeat(np.arange(len(sizes)), sizes)]


def test_texts_with_common_words_point_the_same_way() -> None:
    vectors = clusters.tfidf(["red apple", "red apple pie", "blue sea"])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert vectors[0] @ vectors[1] > 0.5
    assert vectors[0] @ vectors[2] == 0


def test_texts_of_a_script_without_blanks_have_words() -> None:
    vectors = clusters.tfidf(["发烧去看医生", "咳嗽去看医生", "卖掉旧汽车"])
    assert vectors[0] @ vectors[1] > 0.3
    assert vectors[0] @ vectors[2] == 0


def test_a_blank_to_fill_in_is_a_word_of_ascii_text() -> None:
    vectors = clusters.tfidf(["____ a_b", "____", "a"])
    assert vectors[0] @ vectors[1] > 0
    assert vectors[0] @ vectors[2] == 0


def test_many_texts_are_reduced_to_few_dimensions() -> None:
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    vectors = clusters.tfidf([" ".join(draw.choice(words, 12)) for _ in range(200)])
    assert vectors.shape == (200, clusters.DIMENSIONS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_text_without_words_is_no_error_among_others() -> None:
    assert (clusters.tfidf(["...", "a word"])[0] == 0).all()


@pytest.mark.parametrize("texts", [[], ["...", "?!"]])
def test_texts_without_any_word_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"no word in any of the {len(texts)} texts"):
        clusters.tfidf(texts)


def test_huge_coordinates_do_not_decide_once_standardized() -> None:
    # One coordinate is a thousand times larger and says nothing; the other tells the two groups apart.
    loud = 1000 + 500 * np.random.default_rng(0).normal(size=20)
    vectors = np.stack([loud, np.repeat([0.0, 1.0], 10), np.full(20, 3.0)], axis=1)
    rows = clusters.standardized(vectors)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert (np.sign(rows[:, 1]) == np.repeat([-1, 1], 10)).all()
    assert (np.abs(rows[:, 1]) > 0.3).all()  # raw, at most 1 / 1000 of a row's length
    assert (rows[:, 2] == 0).all()  # constant: no division by its spread of zero


def test_examples_alike_fall_into_one_cluster() -> None:
    labels = clusters.cluster(features(), count=3, seed=0)
    subjects = [e.instruction.split()[0] for e in corpus()]
    assert len(set(zip(subjects, labels.tolist(), strict=True))) == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_cluster_comes_first_whatever_the_seed(seed: int) -> None:
    labels = clusters.cluster(blobs([2, 9, 5]), count=3, seed=seed)
    assert labels.tolist() == [2] * 2 + [0] * 9 + [1] * 5


@pytest.mark.parametrize("seed", range(5))
def test_of_clusters_alike_in_size_the_one_met_first_comes_first(seed: int) -> None:
    assert clusters.cluster(blobs([4, 4, 4]), count=3, seed=seed).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_same_seed_gives_the_same_clusters_and_another_seed_others() -> None:
    cloud = np.random.default_rng(1).normal(size=(300, 8))
    one, again, other = (clusters.cluster(cloud, count=12, seed=seed) for seed in (7, 7, 8))
    assert (one == again).all()
    assert (one != other).any()


def test_clustering_does_not_touch_the_global_random_state() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    clusters.cluster(features(), count=3, seed=0)
    assert np.random.get_state()[1].tolist() == before


def test_the_number_of_threads_is_put_back() -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    with threadpoolctl.threadpool_limits(2):
        before = threads()
        clusters.cluster(features(), count=3, seed=0)
        assert threads() == before


@pytest.mark.parametrize("count", [0, 13])
def test_more_clusters_than_examples_or_none_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and 12, the number of examples, got {count}"):
        clusters.cluster(features(), count=count, seed=0)


def test_as_many_clusters_as_examples_are_singletons() -> None:
    assert clusters.cluster(blobs([1, 1, 1]), count=3, seed=0).tolist() == [0, 1, 2]


def test_examples_too_much_alike_for_so_many_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="Expected 3 clusters, but the 5 examples form only 2"):
        clusters.cluster(np.array([[0.0], [0.0], [0.0], [1.0], [1.0]]), count=3, seed=0)


def test_features_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        clusters.cluster(np.array([[0.0], [np.nan]]), count=1, seed=0)


def test_the_category_becomes_the_clusters_name_and_nothing_else_changes() -> None:
    found = clusters.clustered(corpus(), features(), count=3, seed=0)
    names = {"heart": "cluster-000", "tree": "cluster-001", "engine": "cluster-002"}  # 6, 4 and 2 texts
    for before, after in zip(corpus(), found, strict=True):
        assert after.category == names[before.instruction.split()[0]]
        assert (after.instruction, after.response, after.id) == (
            before.instruction,
            before.response,
            before.id,
        )


def test_features_of_other_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="each of 12 examples, got 11"):
        clusters.clustered(corpus(), features()[1:], count=3, seed=0)


def test_clusters_of_medquad_follow_the_kind_of_question() -> None:
    file = Path(__file__).parents[2].parent / "shared" / "data" / "medquad.jsonl.xz"
    if not file.exists():
        pytest.skip(f"{file.name} is not here")
    examples = list(sources.medquad(file))[::16]
    found = clusters.clustered(examples, clusters.tfidf(texts(examples)), count=10, seed=0)
    # Purity: the share of examples whose kind is the commonest of their cluster.
    kinds: dict[str, Counter[str]] = {}
    for before, after in zip(examples, found, strict=True):
        kinds.setdefault(after.category, Counter())[before.category] += 1
    apart = sum(max(counts.values()) for counts in kinds.values()) / len(examples)
    together = max(Counter(e.category for e in examples).values()) / len(examples)
    assert apart > together + 0.15
