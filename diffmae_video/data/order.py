"""The order of samples: a pure function of (table, seed, epoch), cut by rank. Nothing here depends on workers."""

from __future__ import annotations

import numpy as np


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash integers (broadcast against each other) to uint64: splitmix64's finaliser over a running sum.

    Constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(number) for number in numbers)), np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = state + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def clip_seeds(seed: int, epoch: int | np.ndarray, sample: np.ndarray, repeat: int | np.ndarray) -> np.ndarray:
    """Seed of every random draw for a clip, int64 >= 0: depends on (seed, epoch, sample, repeat) and nothing else."""
    return (mix(seed, epoch, sample, repeat) >> np.uint64(1)).astype(np.int64)


def epoch_order(shards: np.ndarray, seed: int, epoch: int, block: int) -> np.ndarray:
    """Order of the samples of one epoch.

    Shards are permuted and cut into blocks of `block`; the samples of a block are permuted together. Reading goes
    through few shards at a time, and a sample travels anywhere its block goes.

    Args:
        shards: shard number of each sample, ascending, shape (samples,).
        seed, epoch: what the permutation depends on.
        block: shards that are shuffled together; all of them makes a full shuffle.

    Returns:
        int64 (samples,), each index once.
    """
    generator = np.random.Generator(np.random.Philox(key=[int(mix(seed, 0x5A)), epoch]))
    names, starts, counts = np.unique(shards, return_index=True, return_counts=True)
    visit = generator.permutation(len(names))
    order = np.empty(len(shards), np.int64)
    position = 0
    for first in range(0, len(visit), block):
        chosen = visit[first : first + block]
        samples = np.concatenate(
            [np.arange(int(starts[one]), int(starts[one] + counts[one])) for one in chosen.tolist()]
        )
        order[position : position + len(samples)] = generator.permutation(samples)
        position += len(samples)
    return order


def label_subset(labels: np.ndarray, fraction: float, most: int, seed: int) -> np.ndarray | None:
    """Which samples are used where few labels are asked for.

    Args:
        labels: class of each sample, -1 for none.
        fraction: share of each class, above 0; at least one sample.
        most: samples of a class at most; 0 for any number.
        seed: of the choice. Less of the same seed is a part of more.

    Returns:
        Indices, ascending, without unlabelled samples; None for all samples.
    """
    if fraction >= 1 and not most:
        return None
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        rank = np.argsort(mix(seed, 0xC1A55, members), kind="stable")
        count = max(1, round(fraction * len(members)))
        chosen.append(members[rank[: min(count, most) if most else count]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
