"""Statistics of patches: taken from the data before the first step, in every process, kept with the weights."""

from __future__ import annotations

import safetensors.torch
import torch

from diffmae_video.models.weights import load_model


def test_pretraining_takes_statistics_from_the_shards(runs, tmp_path):
    options = ("model.space=pca:16", "train.steps=2", "train.batch_size=8")
    runs.here(tmp_path / "one", *options)
    assert runs.child(tmp_path / "two", *options, world=2) == [0, 0]
    one, two = (safetensors.torch.load_file(tmp_path / run / "weights.safetensors") for run in ("one", "two"))
    statistics = {name for name in one if name.startswith("space.")}
    assert statistics == {"space.mean", "space.basis", "space.deviation", "space.counted"}
    assert int(one["space.counted"]) == 256 * 8  # clips x tokens
    deviation, basis = one["space.deviation"], one["space.basis"]
    assert bool((deviation.diff() <= 1e-6).all())
    assert float(deviation[0]) > 1  # the mean colour of 384 values
    torch.testing.assert_close(basis.mT @ basis, torch.eye(384), atol=1e-4, rtol=0)
    for name in statistics:  # batches of four a rank add up in another order
        if name != "space.basis":
            torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
    model = load_model(tmp_path / "two")
    assert not model.space.missing
    assert model.decoder.noisy_embed.in_features == 16
