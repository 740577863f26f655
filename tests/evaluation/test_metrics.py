"""Which way a metric is better."""

from __future__ import annotations

from fedloom.evaluation.metrics import best, better


def test_loss_is_better_when_lower_and_all_else_when_higher() -> None:
    assert better("loss", 1.0, 2.0)
    assert better("rule", 2.0, 1.0)
    assert not better("rouge_l", 1.0, 1.0)


def test_an_auc_is_judged_by_its_distance_from_a_coin() -> None:
    assert better("auc", 0.45, 0.7)
    assert better("auc", 0.55, 0.1)  # an attack that is always wrong is always right once turned round
    assert not better("auc", 0.1, 0.9)


def test_the_best_of_losses_is_the_lowest_and_of_aucs_the_one_nearest_to_a_coin() -> None:
    assert best("loss", [2.0, 1.0]) == 1.0
    assert best("auc", [0.1, 0.6]) == 0.6
