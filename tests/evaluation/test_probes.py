"""Probes against scipy, brute force, and problems with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import nn

from diffmae_video.evaluation.probes import ITERATIONS, PENALTIES, fit_head, fit_linear, knn_probabilities


def blobs(n: int = 120, width: int = 6, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator) * 0.9 + 5, labels


def test_linear_probe_is_the_minimum_that_scipy_finds() -> None:
    features, labels = blobs()
    probe = fit_linear(features, labels, 3, penalties=[1e-2])
    x = features.double().numpy()
    mean, std = x.mean(0), x.std(0)
    scaled, one_hot = (x - mean) / std, np.eye(3)[labels.numpy()]

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = scaled @ weight.T + bias
        return -(one_hot * special.log_softmax(logits, axis=1)).sum(1).mean() + 0.005 * (weight**2).sum()

    found = optimize.minimize(objective, np.zeros(21), method="BFGS", options={"gtol": 1e-8})
    weight, bias = found.x[:18].reshape(3, 6), found.x[18:]
    expected = special.softmax(scaled @ weight.T + bias, axis=1)
    logits = features @ probe.weight.T + probe.bias  # on features as they are: standardisation is folded in
    assert np.abs(logits.softmax(1).numpy() - expected).max() < 1e-4


def test_linear_probe_generalises_and_is_deterministic() -> None:
    features, labels = blobs(300)
    probe = fit_linear(features[:200], labels[:200], 3, seed=3)
    again = fit_linear(features[:200], labels[:200], 3, seed=3)
    assert torch.equal(probe.weight, again.weight)
    top1 = (features[200:] @ probe.weight.T + probe.bias).argmax(1).eq(labels[200:]).float().mean()
    assert top1 > 0.75
    assert 0.5 < probe.held_out_top1 <= 1


def test_probes_tell_how_far_they_are() -> None:
    features, labels = blobs(60)
    told: list[tuple[int, float]] = []
    fit_linear(features, labels, 3, advance=lambda count, loss: told.append((count, loss)))
    assert sum(count for count, _ in told) == (len(PENALTIES) + 1) * ITERATIONS
    assert len(told) > 2 * len(PENALTIES)  # within a fit as well
    assert told[0][1] == pytest.approx(np.log(3), abs=1e-6)  # all weights are zero
    answered: list[int] = []
    knn_probabilities(features, features, labels, 3, neighbours=5, advance=answered.append)
    assert sum(answered) == 60


def test_linear_probe_survives_constant_features_and_absent_classes() -> None:
    features, labels = blobs(30)
    features[:, 0] = 7
    probe = fit_linear(features, labels.clamp(max=1), 4)
    assert probe.weight.isfinite().all()
    assert (features @ probe.weight.T + probe.bias).argmax(1).max() <= 1


def test_knn_equals_brute_force() -> None:
    features, labels = blobs(60)
    queries, _ = blobs(9, seed=0)
    got = knn_probabilities(queries, features, labels, 3, neighbours=5, temperature=0.1)
    for row, query in zip(got, queries, strict=True):
        similarity = [float(query @ one / query.norm() / one.norm()) for one in features]
        votes = [0.0] * 3
        for index in sorted(range(60), key=lambda i: -similarity[i])[:5]:
            votes[labels[index]] += np.exp(similarity[index] / 0.1)
        assert row.tolist() == pytest.approx([vote / sum(votes) for vote in votes], abs=1e-5)


def test_knn_with_fewer_samples_than_neighbours() -> None:
    got = knn_probabilities(torch.randn(2, 4), torch.eye(4)[:2], torch.tensor([0, 1]), 2, neighbours=20)
    assert torch.allclose(got.sum(1), torch.ones(2))


class FirstToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = (tokens @ self.query).softmax(-1)
        return self.head((tokens * weights[..., None]).sum(1))


def test_head_on_cached_tokens_learns_and_repeats() -> None:
    features, labels = blobs(90)
    tokens = torch.stack([features - 5, torch.zeros_like(features)], dim=1).half()  # (n, 2, D)
    settings = {"epochs": 20, "batch_size": 16, "lr": 0.03, "weight_decay": 0.0, "seed": 1}
    heads = [FirstToken(), FirstToken()]
    heads[1].load_state_dict(heads[0].state_dict())
    losses = [fit_head(head, list(head.parameters()), tokens, labels, **settings) for head in heads]
    assert losses[0] == losses[1] < 0.7
    assert torch.equal(heads[0].query, heads[1].query)
    assert heads[0](tokens.float()).argmax(1).eq(labels).float().mean() > 0.8
