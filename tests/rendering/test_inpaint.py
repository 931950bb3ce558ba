"""The streaming inpainter with a small model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from diffmae_video.config import DiffusionSettings, ModelSettings, RenderSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.inpaint import Inpainter, Sampled, inpaint

FAST = RenderSettings(steps=2)


@pytest.fixture(scope="module")
def model() -> DiffMAE:
    settings = ModelSettings(
        preset="nano", width=32, depth=1, heads=2, frames=4, size=(16, 16), tubelet=2, patch=4,
        decoder_depth=1, decoder_width=32, decoder_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return DiffMAE(settings, DiffusionSettings()).eval()


def video(frames: int, height: int = 40, width: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def box(frames: int, height: int = 40, width: int = 60) -> torch.Tensor:
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    mask[:, 10:21, 13:29] = True
    return mask


@pytest.mark.parametrize("mode", ["auto", "whole", "tiles"])
@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (3, 1), (4, 1), (11, 1), (19, 2), (21, 3)])
def test_outside_the_mask_every_pixel_is_the_source(model: DiffMAE, frames: int, stride: int, mode: str) -> None:
    clip, mask = video(frames), box(frames)
    settings = RenderSettings(steps=1, window=mode)
    result = inpaint(model, clip, mask, settings=settings, stride=stride)
    hidden = mask.unsqueeze(1).expand_as(clip)
    assert torch.equal(result[~hidden], clip[~hidden])
    assert (result[hidden] != clip[hidden]).float().mean() > 0.9


@pytest.mark.parametrize("text", ["random:0.75", "tube:0.5", "block:0.5", "center", "frames:3-5", "future:0.5"])
def test_what_is_hidden_has_no_influence(model: DiffMAE, text: str) -> None:
    from diffmae_video.rendering.masks import ClipShape, build_mask

    frames, clip = 12, video(12)
    mask_of = build_mask([text], ClipShape(40, 60, frames, 25.0, (2, 4, 4), 4))
    mask = torch.from_numpy(np.stack([mask_of(n) for n in range(frames)]))
    other = torch.where(mask.unsqueeze(1), video(12, seed=9), clip)
    assert not torch.equal(clip, other)
    results = [inpaint(model, one, mask, settings=FAST) for one in (clip, other)]
    assert torch.equal(*results)


def test_generated_masks_reach_the_model_as_drawn(model: DiffMAE) -> None:
    """A mask drawn on the token grid hides exactly its tokens, whatever the frame's size."""
    seen = []
    sample = model.sample_steps

    def spy(clips: torch.Tensor, mask, **options):
        seen.append(mask.grid.float().mean().item())
        return sample(clips, mask, **options)

    model.sample_steps = spy
    try:
        inpaint(model, video(4, 41, 67), "random:0.75", settings=RenderSettings(steps=1, overlap=0))
    finally:
        del model.sample_steps
    assert seen == [0.75]


def test_same_seed_same_result_and_another_seed_another(model: DiffMAE) -> None:
    clip, mask = video(9), box(9)
    one, two, other = (inpaint(model, clip, mask, settings=FAST, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_batch_size_changes_nothing(model: DiffMAE) -> None:
    clip, mask = video(16), box(16)
    results = [
        inpaint(model, clip, mask, settings=RenderSettings(steps=2, batch=batch), stride=4).int() for batch in (1, 4)
    ]
    assert (results[0] - results[1]).abs().max() <= 1  # float sums in another order


def test_samples_are_drawn_apart(model: DiffMAE) -> None:
    clip, mask = video(7), box(7)
    several = inpaint(model, clip, mask, settings=RenderSettings(steps=2, samples=3))
    assert several.shape == (3, 7, 3, 40, 60)
    assert torch.equal(several[0], inpaint(model, clip, mask, settings=FAST))
    assert not torch.equal(several[0], several[1])


def frames_of(clip: torch.Tensor, mask: torch.Tensor) -> Iterator[Frame]:
    for n, (rgb, hidden) in enumerate(zip(clip.permute(0, 2, 3, 1).numpy(), mask.numpy(), strict=True)):
        yield Frame(n, np.ascontiguousarray(rgb), hidden, n)


def test_streaming_holds_a_few_windows_whatever_the_length(model: DiffMAE) -> None:
    inpainter = Inpainter(model, RenderSettings(steps=1), stride=2)
    taken, most, out = 0, 0, 0

    def counted() -> Iterator[Frame]:
        nonlocal taken
        for frame in frames_of(video(90, 20, 20), torch.ones(90, 20, 20, dtype=torch.bool) & (torch.arange(20) < 9)):
            taken += 1
            yield frame

    for frame in inpainter.stream(counted()):
        assert frame.number == out
        assert not frame.unfilled.any()
        out += 1
        most = max(most, taken - out)
    assert out == 90
    assert most <= 2 * inpainter.span


def test_what_one_window_filled_is_context_of_the_next(model: DiffMAE) -> None:
    """With overlap, most of a later window's tokens are visible; without, none of the hidden place is."""
    shares = {}
    for overlap in (0.0, 0.5):
        seen = []
        sample = model.sample_steps

        def spy(clips: torch.Tensor, mask, seen=seen, sample=sample, **options):
            seen.append(mask.grid.float().mean().item())
            return sample(clips, mask, **options)

        model.sample_steps = spy
        try:
            inpaint(model, video(12), box(12), settings=RenderSettings(steps=1, overlap=overlap))
        finally:
            del model.sample_steps
        shares[overlap] = seen
    assert shares[0.0][0] == shares[0.0][1] == shares[0.5][0]
    assert shares[0.5][1] == pytest.approx(shares[0.5][0] / 2)


def test_a_gap_is_seen_from_both_sides(model: DiffMAE) -> None:
    mask = torch.zeros(12, 40, 60, dtype=torch.bool)
    mask[6:8] = True
    seen = []
    sample = model.sample_steps

    def spy(clips: torch.Tensor, given, **options):
        seen.append(given.grid.view(2, 16).all(1).tolist())
        return sample(clips, given, **options)

    model.sample_steps = spy
    try:
        inpaint(model, video(12), mask, settings=RenderSettings(steps=1))
    finally:
        del model.sample_steps
    assert len(seen) == 1
    assert sum(seen[0]) == 1


def test_the_trajectory_goes_from_noise_to_the_sample(model: DiffMAE) -> None:
    clip, mask = video(12, 16, 16), torch.zeros(12, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    settings = RenderSettings(steps=20, feather=0, blend=False, samples=2)
    inpainter = Inpainter(model, settings)
    assert inpainter.trajectory is None
    frames = list(inpainter.stream(frames_of(clip, mask)))
    trajectory = inpainter.trajectory
    assert trajectory.steps == tuple(range(20))  # of one window and one sample only
    assert trajectory.states.shape == (20, 2, 4, 16, 16, 3)
    hidden = mask[:4].numpy()
    source = clip[:4].permute(0, 2, 3, 1).numpy()
    sample = np.stack([frame.result() for frame in frames[:4]])
    np.testing.assert_array_equal(trajectory.states[-1, 1], sample)
    for noisy, x0 in trajectory.states:
        np.testing.assert_array_equal(noisy[~hidden], source[~hidden])
        np.testing.assert_array_equal(x0[~hidden], source[~hidden])
    away = [float(np.abs(noisy[hidden].astype(float) - sample[hidden]).mean()) for noisy, _ in trajectory.states]
    assert away[0] > 60
    assert away[-1] < away[0] / 2


def test_nothing_visible_to_go_by_is_one_sentence(model: DiffMAE) -> None:
    with pytest.raises(UsageError, match="hidden whole"):
        inpaint(model, video(8), torch.ones(8, 40, 60, dtype=torch.bool), settings=FAST)


class Store(dict):
    """Keeps batches in memory; breaks once it holds `room` of them."""

    room = 10**9

    def load(self, key: str) -> Sampled | None:
        return self.get(key)

    def save(self, key: str, sampled: Sampled) -> None:
        self[key] = sampled
        if len(self) == self.room:
            raise InterruptedError


def test_a_store_replaces_sampling(model: DiffMAE) -> None:
    clip, mask, store = video(12), box(12), Store()
    first = Inpainter(model, FAST, store=store)
    one = [frame.result() for frame in first.stream(frames_of(clip, mask))]
    again = Inpainter(model, FAST, store=store)
    two = [frame.result() for frame in again.stream(frames_of(clip, mask))]
    assert (first.restored, again.restored) == (0, len(store))
    np.testing.assert_array_equal(one, two)


def test_the_trajectory_is_the_same_wherever_a_render_was_interrupted(model: DiffMAE) -> None:
    """Several samples, holes and interleaved clips: the first batch is not all of the first window."""
    clip, mask = video(8), box(8)
    mask[:, 30:34, 50:54] = True
    settings = RenderSettings(steps=3, samples=2, batch=1, margin=0)
    whole, store = Inpainter(model, settings, stride=2), Store()
    whole.store = store
    expected = [frame.result(1) for frame in whole.stream(frames_of(clip, mask))]
    assert len(store) >= 8
    for room in range(1, len(store)):
        kept = Store()
        kept.room = room
        broken = Inpainter(model, settings, stride=2, store=kept)
        with pytest.raises(InterruptedError):
            list(broken.stream(frames_of(clip, mask)))
        kept.room = 10**9
        again = Inpainter(model, settings, stride=2, store=kept)
        results = [frame.result(1) for frame in again.stream(frames_of(clip, mask))]
        assert again.restored == room
        assert again.trajectory.steps == whole.trajectory.steps == (0, 1, 2)
        np.testing.assert_array_equal(again.trajectory.states, whole.trajectory.states)
        np.testing.assert_array_equal(results, expected)


def test_a_filler_before_leaves_less_to_fill(model: DiffMAE) -> None:
    """Pixels that an earlier filler has put in stay as they are, and are context for the model."""
    clip, mask = video(4), box(4)
    frames = list(frames_of(clip, mask))
    for frame in frames:
        frame.open_samples(1)
        frame.filled[0][10:15] = 7
        frame.unfilled[10:15] = False
    result = np.stack([frame.result() for frame in Inpainter(model, FAST).stream(frames)])
    assert (result[:, 10:15, 13:29] == 7).all()
    assert not any(frame.unfilled.any() for frame in frames)
    source = clip.permute(0, 2, 3, 1).numpy()
    assert (result[:, 15:21, 13:29] != source[:, 15:21, 13:29]).mean() > 0.9


def test_answers_that_are_not_finite_are_refused(model: DiffMAE) -> None:
    broken = DiffMAE(model.settings, DiffusionSettings()).eval()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        inpaint(broken, video(4), box(4), settings=FAST)


def test_wrong_tensors_are_refused(model: DiffMAE) -> None:
    with pytest.raises(ValueError, match="uint8"):
        inpaint(model, video(4).float(), box(4))


def test_a_label_is_followed_by_name(model: DiffMAE) -> None:
    told = DiffMAE(model.settings.model_copy(update={"labels": 2})).eval()
    told.info["classes"] = ["left", "right"]
    with torch.no_grad():
        told.decoder.label_embed.weight.normal_(generator=torch.Generator().manual_seed(0))
    clip, mask = video(4), box(4)
    free, left, right, far = (
        inpaint(told, clip, mask, settings=RenderSettings(steps=2, label=label, guidance=guidance))
        for label, guidance in ((None, 1.0), ("left", 1.0), ("right", 1.0), ("right", 3.0))
    )
    assert not any(torch.equal(one, other) for one, other in ((free, left), (left, right), (right, far)))
    with pytest.raises(UsageError, match="did you mean right"):
        inpaint(told, clip, mask, settings=RenderSettings(label="rihgt"))
    with pytest.raises(UsageError, match="trained without labels"):
        inpaint(model, clip, mask, settings=RenderSettings(label="left"))
