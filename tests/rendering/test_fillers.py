"""Fillers without a model: taken from other frames, and a classical fill for the rest."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from diffmae_video.errors import UsageError
from diffmae_video.rendering.fillers import WAIT, Classical, Propagation, Taken
from diffmae_video.rendering.frames import Frame
from diffmae_video.rendering.propagate import PropagateSettings

HEIGHT, WIDTH, COUNT = 48, 64, 10
QUICK = PropagateSettings(window=6, candidates=4)


def scene() -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (20, 40, 3)).astype(np.float32)
    return cv2.resize(noise, (160, 80), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def frames(hide: slice = slice(12, 28)) -> Iterator[Frame]:
    """A pan of two pixels a frame under a hole that stands still."""
    hidden = np.zeros((HEIGHT, WIDTH), dtype=bool)
    hidden[hide, 20:34] = True
    for n in range(COUNT):
        rgb = np.ascontiguousarray(scene()[10 : 10 + HEIGHT, 10 + 4 * n : 10 + 4 * n + WIDTH])
        rgb[hidden] = (255, 0, 255)
        yield Frame(n, rgb, hidden, n)


class Kept(dict[int, Taken]):
    """A store in memory."""

    def load(self, number: int) -> Taken | None:
        return self.get(number)

    def save(self, number: int, taken: Taken) -> None:
        self[number] = taken


def test_what_other_frames_show_is_taken_and_the_rest_is_left() -> None:
    filler = Propagation(QUICK)
    done = list(filler.stream(frames()))
    assert [frame.number for frame in done] == list(range(COUNT))
    taken = 0
    for frame in done:
        assert frame.seen is not None
        np.testing.assert_array_equal(frame.unfilled, frame.hidden & ~frame.seen)
        np.testing.assert_array_equal(frame.result()[~frame.seen], frame.source[~frame.seen])
        np.testing.assert_array_equal(frame.result(3), frame.result())  # the same in all samples
        assert (frame.source[frame.hidden] == (255, 0, 255)).all()
        assert (frame.from_others()[frame.unfilled] == 127).all()
        truth = scene()[10 : 10 + HEIGHT, 10 + 4 * frame.number : 10 + 4 * frame.number + WIDTH]
        assert np.abs(frame.result()[frame.seen].astype(int) - truth[frame.seen]).mean() < 3
        taken += int(frame.seen.sum())
    assert filler.pixels == taken > 0.5 * COUNT * 16 * 14
    assert 0.3 < filler.confidence / taken <= 1


def test_frames_of_the_store_are_not_computed_again() -> None:
    store = Kept()
    whole = list(Propagation(QUICK, store=store).stream(frames()))
    assert len(store) == COUNT
    for number in (0, 1, 5):
        del store[number]
    again = Propagation(QUICK, store=store)
    for frame, first in zip(again.stream(frames()), whole, strict=True):
        np.testing.assert_array_equal(frame.result(), first.result())
        np.testing.assert_array_equal(frame.unfilled, first.unfilled)
    assert again.restored == COUNT - 3
    assert len(store) == COUNT


def test_a_stop_between_frames_ends_the_stream() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Propagation(QUICK, between_frames=stop).stream(frames()))


def test_classical_fills_everything_and_reads_nothing_hidden() -> None:
    filler = Classical()
    for frame in filler.stream(frames()):
        assert not frame.unfilled.any()
        np.testing.assert_array_equal(frame.result()[~frame.hidden], frame.source[~frame.hidden])
        assert not (frame.result()[frame.hidden] == (255, 0, 255)).all(-1).any()
    assert filler.pixels == COUNT * 16 * 14


def test_classical_before_a_model_fills_specks_alone() -> None:
    hidden = np.zeros((HEIGHT, WIDTH), dtype=bool)
    hidden[4:7, 4:7] = hidden[20:40, 20:40] = True
    (frame,) = Classical(largest=9).stream([Frame(0, np.full((HEIGHT, WIDTH, 3), 90, np.uint8), hidden)])
    assert not frame.unfilled[:10].any()
    assert frame.unfilled[20:40, 20:40].all()
    assert np.abs(frame.result().astype(int) - 90).max() <= 3


def test_frames_hidden_whole_repeat_what_is_nearest_before_them() -> None:
    def stream(blank: set[int], count: int) -> Iterator[Frame]:
        for n in range(count):
            yield Frame(n, np.full((4, 4, 3), n, np.uint8), np.full((4, 4), n in blank))

    shown = [int(frame.result()[0, 0, 0]) for frame in Classical().stream(stream({0, 1, 4}, 6))]
    assert shown == [2, 2, 2, 3, 3, 5]
    with pytest.raises(UsageError, match="hidden whole"):
        list(Classical().stream(stream(set(range(WAIT + 1)), WAIT + 2)))
