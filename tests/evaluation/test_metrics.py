"""Metrics against scikit-free references: scipy, brute force and hand-made cases."""

from __future__ import annotations

import math

import diffmae_video.compat  # noqa: F401

import numpy as np
import pytest
import torch
from scipy import stats

from diffmae_video.evaluation.metrics import (
    bootstrap_interval,
    classification_scores,
    mcnemar_exact,
    paired_test,
    top_k_hits,
)


def random_case(n: int = 200, classes: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1
    return logits.softmax(1), labels


def test_scores_equal_torchmetrics_accuracy() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    probabilities, labels = random_case()
    scores = classification_scores(probabilities, labels, bootstrap=0)
    kwargs = {"num_classes": 8}
    assert scores.top1 == pytest.approx(multiclass_accuracy(probabilities, labels, average="micro", **kwargs).item())
    top5 = multiclass_accuracy(probabilities, labels, top_k=5, average="micro", **kwargs).item()
    assert scores.top5 == pytest.approx(top5)
    macro = multiclass_accuracy(probabilities, labels, average="macro", **kwargs).item()
    assert scores.mean_class_accuracy == pytest.approx(macro)
    assert scores.confusion.sum() == 200
    assert torch.equal(scores.support, torch.bincount(labels, minlength=8))


def test_classes_without_videos_do_not_count() -> None:
    probabilities = torch.eye(4)[[0, 1, 1]]
    scores = classification_scores(probabilities, torch.tensor([0, 1, 0]), bootstrap=0)
    assert scores.per_class[:2].tolist() == [0.5, 1.0]
    assert scores.per_class[2:].isnan().all()
    assert scores.mean_class_accuracy == 0.75
    assert scores.confusion[0].tolist() == [1, 1, 0, 0]
    assert (scores.top5, scores.top5_rank) == (1.0, 4)


def test_ties_go_to_the_lowest_class() -> None:
    assert top_k_hits(torch.full((2, 3), 1 / 3), torch.tensor([0, 2]), 1).tolist() == [True, False]


def test_one_class_and_bad_labels() -> None:
    assert classification_scores(torch.ones(3, 1), torch.zeros(3, dtype=torch.long), bootstrap=10).top1 == 1
    with pytest.raises(ValueError, match="labels"):
        classification_scores(torch.ones(1, 2), torch.tensor([2]))
    with pytest.raises(ValueError, match="no video"):
        classification_scores(torch.ones(0, 2), torch.tensor([], dtype=torch.long))


def test_interval_equals_resampling_the_videos() -> None:
    """The shortcut through multinomial counts has the distribution of drawing videos one by one."""
    values = torch.tensor([-1] * 20 + [0] * 50 + [1] * 30)
    interval = bootstrap_interval(values, 20_000, seed=1)
    rng = np.random.default_rng(2)
    means = values.numpy()[rng.integers(100, size=(20_000, 100))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.011)  # the statistic moves in steps of 0.01
    assert interval.high == pytest.approx(high, abs=0.011)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        interval = bootstrap_interval(torch.from_numpy(rng.random(400) < 0.3), 400, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.91 <= covered / 300 <= 0.985


def test_interval_is_a_function_of_the_seed() -> None:
    hits = torch.tensor([True] * 30 + [False] * 20)
    assert bootstrap_interval(hits, 500, 3) == bootstrap_interval(hits, 500, 3)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 9), (9, 3), (10, 10), (120, 170), (900, 1100)])
def test_mcnemar_equals_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert math.isclose(mcnemar_exact(only_a, only_b), expected, rel_tol=1e-9)


def test_paired_test_counts_by_hand() -> None:
    a = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
    b = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool)
    result = paired_test(a, b)
    assert (result.both, result.only_a, result.only_b, result.neither) == (2, 1, 2, 1)
    assert result.difference == pytest.approx(1 / 6)
    assert result.interval.low <= 1 / 6 <= result.interval.high
    assert result.p_value == 1.0
    with pytest.raises(ValueError, match="equally long"):
        paired_test(a, b[:3])
