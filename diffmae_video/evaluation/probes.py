"""Probes of frozen features: linear (convex, full batch), attentive (a trained query) and k nearest neighbours.

n videos, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm that the linear probe tries."""

ITERATIONS = 300
"""Of L-BFGS, at most, for each penalty."""


@dataclass(frozen=True)
class LinearProbe:
    """Logits = features @ weight.T + bias, for features as they come from the encoder."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    penalty: float
    held_out_top1: float  # of the chosen penalty, on a fifth of the training features


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    advance: Callable[[int, float], None] = lambda iterations, loss: None,
) -> LinearProbe:
    """Logistic regression of features (n, D), standardised inside and folded back, so that it fits a plain head.

    The penalty is chosen on a held-out fifth (by seed) and the fit repeated on everything. The problem is convex: the
    result does not depend on a learning rate, batch size or schedule.

    Args:
        advance: told the iterations since it was last called, and the loss; they add up to ITERATIONS for each penalty
            and for the last fit, also where a fit needs fewer.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    scaled = ((features - mean) / std).double()  # (n, D)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    best = (-1.0, penalties[0])
    if len(penalties) > 1 and len(held):
        start = None
        for penalty in sorted(penalties, reverse=True):  # from strong to weak, each from the one before: fast
            start = _logistic(scaled[kept], labels[kept], classes, penalty, start, advance)
            top1 = (scaled[held] @ start[0].T + start[1]).argmax(dim=1).eq(labels[held]).double().mean().item()
            best = max(best, (top1, penalty))
    weight, bias = _logistic(scaled, labels, classes, best[1], None, advance)
    weight = weight / std
    return LinearProbe(weight.float(), (bias - weight @ mean.double()).float(), best[1], max(best[0], 0.0))


def _logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None,
    advance: Callable[[int, float], None],
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross entropy + penalty / 2 * |weight|^2 by L-BFGS; weight (K, D), bias (K,)."""
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype) if start is None else start[0].clone()
    bias = torch.zeros(classes, dtype=features.dtype) if start is None else start[1].clone()
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-7
    )
    told = 0

    def objective() -> Tensor:
        nonlocal told
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        part = int(told < ITERATIONS)  # a line search evaluates more than once in an iteration
        told += part
        advance(part, loss.detach().item())
        return loss

    with torch.enable_grad():
        last = optimizer.step(objective)
    advance(ITERATIONS - told, last.detach().item())
    return weight.detach(), bias.detach()


def knn_probabilities(
    queries: Tensor,
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    neighbours: int,
    temperature: float = 0.07,
    advance: Callable[[int], None] = lambda queries: None,
) -> Tensor:
    """Class probabilities (q, K) of queries (q, D) from their nearest features (n, D) by cosine similarity.

    Each of the k neighbours votes with weight exp(similarity / temperature). `advance` is told how many more queries
    have their answer.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (CVPR 2018), 3.4.
    """
    bank = F.normalize(features.float(), dim=1)
    neighbours = min(neighbours, len(bank))
    rows = []
    for part in F.normalize(queries.float(), dim=1).split(1024):
        similarity, index = (part @ bank.T).topk(neighbours, dim=1)  # (q, k)
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        rows.append(torch.zeros(len(part), classes).scatter_add_(1, labels[index], votes))
        advance(len(part))
    scores = torch.cat(rows)
    return scores / scores.sum(dim=1, keepdim=True)


def fit_head(
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    tokens: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train a head on cached tokens (n, N, D) (any float type, may be memory-mapped) with AdamW and a cosine.

    Args:
        head: tokens float32 (B, N, D) on the device -> logits (B, K).
        parameters: what is trained.
        advance: told the loss of every step.

    Returns:
        The mean loss of the last epoch.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(labels) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    last = math.nan
    for epoch in range(epochs):
        losses = []
        for rows in _batches(len(labels), batch_size, seed=seed * 1_000_003 + epoch):
            with torch.enable_grad():
                logits = head(tokens[rows].to(device, torch.float32))
                loss = F.cross_entropy(logits, labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach().item())
            advance(losses[-1])
        last = sum(losses) / len(losses)
    return last


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
    yield from order.split(size)
