"""A mix of masks: each micro-batch takes one, as often as its weight says, and the same one after a resume."""

from __future__ import annotations

import collections

import torch

from diffmae_video.config import MaskChoice, MaskSettings
from diffmae_video.training.pretraining import choose_mask

MIX = MaskSettings(
    kind="random",
    ratio=0.75,
    mix=(MaskChoice(kind="tube", ratio=0.7), MaskChoice(kind="center", ratio=0.25, weight=2.0)),
)


def test_one_mask_is_always_taken():
    plain = MaskSettings(kind="tube", ratio=0.6)
    assert choose_mask(plain, torch.tensor([1, 2])) is plain


def test_masks_take_turns_by_weight():
    kinds = [choose_mask(MIX, torch.tensor([seed, 7])).kind for seed in range(4000)]
    counts = collections.Counter(kinds)
    for kind, share in (("random", 0.25), ("tube", 0.25), ("center", 0.5)):
        assert abs(counts[kind] / 4000 - share) < 0.03
    assert kinds[:50] == [choose_mask(MIX, torch.tensor([seed])).kind for seed in range(50)]


def test_a_run_with_a_mix_resumes_bit_for_bit(runs, kill_at, tmp_path):
    options = ("mask.ratio=0.5", 'mask.mix=[{kind = "tube", ratio = 0.5}, {kind = "center", ratio = 0.25}]')
    runs.here(tmp_path / "straight", *options)
    assert runs.child(tmp_path / "killed", *options, before=kill_at(5)) == [-9]
    runs.here(tmp_path / "killed", *options)
    runs.assert_same(tmp_path / "straight", tmp_path / "killed")
