"""Classification metrics with the uncertainty that a finite test set leaves in them.

n videos, K classes, R bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import diffmae_video.compat  # noqa: F401  (torchmetrics imports torchvision)

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval of a fraction."""

    low: float
    high: float


@dataclass(frozen=True)
class ClassificationScores:
    """What a labelled test set says about a classifier; accuracies are fractions in [0, 1]."""

    videos: int
    top1: float
    top5: float
    top5_rank: int  # 5, or K where there are fewer classes
    mean_class_accuracy: float  # mean over the classes that occur in the labels
    top1_interval: Interval | None  # None without bootstrap
    top5_interval: Interval | None
    per_class: Tensor  # (K,) top-1 per class, nan for classes without a video
    support: Tensor  # (K,) videos per class, int64
    confusion: Tensor  # (K, K) counts, rows = true class, columns = prediction, int64


def top_k_hits(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest probabilities, (n,) bool.

    Ties are broken by class index, lowest first, so that equal inputs always give equal scores.
    """
    order = torch.sort(probabilities, dim=1, descending=True, stable=True).indices  # (n, K)
    return (order[:, :k] == labels[:, None]).any(dim=1)


def classification_scores(
    probabilities: Tensor, labels: Tensor, *, bootstrap: int = 1000, seed: int = 0
) -> ClassificationScores:
    """Score class probabilities (n, K) against labels (n,) int64 in [0, K).

    Args:
        probabilities: any scores that rank the classes; larger is more likely.
        bootstrap: R, resamples of the confidence intervals; 0 leaves them out.
        seed: seed of the resampling.

    Raises:
        ValueError: no video, or a label outside [0, K).
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    n, classes = probabilities.shape
    if n == 0:
        raise ValueError("no video to score")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes})")
    top5_rank = min(5, classes)
    first = top_k_hits(probabilities, labels, 1)  # (n,)
    fifth = top_k_hits(probabilities, labels, top5_rank)  # (n,)
    prediction = torch.sort(probabilities, dim=1, descending=True, stable=True).indices[:, 0]
    if classes > 1:
        confusion = multiclass_confusion_matrix(prediction, labels, num_classes=classes).long()  # (K, K)
    else:
        confusion = torch.tensor([[n]])
    support = confusion.sum(dim=1)  # (K,)
    per_class = confusion.diagonal().double() / support  # 0/0 = nan where a class has no video
    return ClassificationScores(
        videos=n,
        top1=first.double().mean().item(),
        top5=fifth.double().mean().item(),
        top5_rank=top5_rank,
        mean_class_accuracy=per_class.nanmean().item(),
        top1_interval=bootstrap_interval(first, bootstrap, seed) if bootstrap else None,
        top5_interval=bootstrap_interval(fifth, bootstrap, seed) if bootstrap else None,
        per_class=per_class,
        support=support,
        confusion=confusion,
    )


def bootstrap_interval(values: Tensor, resamples: int, seed: int) -> Interval:
    """95% percentile bootstrap interval of the mean of hits (bool) or paired differences (-1, 0, 1), (n,).

    Drawing n videos with replacement only changes how often each distinct value occurs, and those counts are
    multinomial; so R resamples cost R draws of the counts rather than R x n of the videos.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    distinct, counts = np.unique(values.cpu().numpy().astype(np.float64), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)  # (R, distinct)
    low, high = np.quantile(draws @ distinct / n, [0.025, 0.975])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class PairedTest:
    """Two classifiers on the same videos."""

    videos: int
    both: int  # videos both have right
    only_a: int
    only_b: int
    neither: int
    difference: float  # top-1 of B minus top-1 of A, fraction
    interval: Interval  # 95% paired bootstrap interval of the difference
    p_value: float  # McNemar's exact test, two-sided


def paired_test(hits_a: Tensor, hits_b: Tensor, *, bootstrap: int = 1000, seed: int = 0) -> PairedTest:
    """Compare two classifiers by their hits (n,) bool on the same videos in the same order."""
    if hits_a.shape != hits_b.shape or hits_a.numel() == 0:
        raise ValueError("two equally long, non-empty rows of hits are needed")
    difference = hits_b.long() - hits_a.long()  # (n,)
    only_a, only_b = int((difference < 0).sum()), int((difference > 0).sum())
    both = int((hits_a & hits_b).sum())
    return PairedTest(
        videos=hits_a.numel(),
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=hits_a.numel() - both - only_a - only_b,
        difference=difference.double().mean().item(),
        interval=bootstrap_interval(difference, bootstrap, seed),
        p_value=mcnemar_exact(only_a, only_b),
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts, in whole numbers until the division.

    Under the null hypothesis each discordant video falls to either side with probability 1/2.

    Source: McNemar, Psychometrika 12 (1947); exact form as in Agresti, Categorical Data Analysis, section 11.1.
    """
    n, smaller = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # binomial coefficients C(n, 0), and their running sum up to C(n, smaller)
    for k in range(1, smaller + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def mistakes(probabilities: Tensor, labels: Tensor, most: int = 8) -> list[int]:
    """Rows of the wrongly classified videos, the most confident first.

    Args:
        probabilities: float (N, classes).
        labels: int (N,).
    """
    confidence, prediction = probabilities.max(dim=1)
    wrong = (prediction != labels).nonzero().flatten()
    order = torch.argsort(confidence[wrong], descending=True, stable=True)
    return wrong[order][:most].tolist()
