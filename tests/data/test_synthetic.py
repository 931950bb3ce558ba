"""The embedded data set: files, determinism, and that the class lies in the motion and nowhere else."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from fractions import Fraction

import av
import numpy as np
import pytest

from diffmae_video.data.synthetic import CLASSES, MOTIONS, Look, encode_mp4, motion_clip, removal_clip, write_demo_data
from diffmae_video.errors import UsageError

PLAIN = Look(object_texture=0, background_texture=0, pattern=0, contrast=60, drift=0)


def decode(data: bytes) -> tuple[np.ndarray, Fraction]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate  # read while the container is open: its memory goes with it


def hashes(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    result = write_demo_data(folder, train=16, val=9, frames=6, seed=3, workers=1)
    return folder, result


def test_layout_is_that_of_kinetics(written):
    folder, result = written
    assert result.counts == {"train": 16, "val": 9}
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "train", "val"]
    for split, count in result.counts.items():
        with open(folder / "annotations" / f"{split}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
        names = [f"{r['youtube_id']}_{int(r['time_start']):06d}_{int(r['time_end']):06d}.mp4" for r in rows]
        assert len(set(names)) == count
        assert sorted(names) == sorted(path.name for path in (folder / split).iterdir())
        assert {len(row["youtube_id"]) for row in rows} == {11}
        assert {row["split"] for row in rows} == {split}
        labels = [row["label"] for row in rows]
        assert max(labels.count(c) for c in CLASSES) - min(labels.count(c) for c in CLASSES) <= 1
    assert result.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_files_show_the_clips(written):
    folder, _ = written
    with open(folder / "annotations" / "val.csv", newline="") as file:
        row = list(csv.DictReader(file))[4]
    path = next((folder / "val").glob(f"{row['youtube_id']}_*.mp4"))
    seen, rate = decode(path.read_bytes())
    drawn = motion_clip(CLASSES.index(row["label"]), seed=3, split="val", index=4, frames=6)
    assert seen.shape == drawn.shape == (6, 32, 32, 3)
    assert rate == 10
    error = np.mean((seen.astype(float) - drawn) ** 2)
    assert 10 * math.log10(255**2 / error) > 30


def test_same_seed_gives_the_same_bytes_with_any_number_of_processes(written, tmp_path):
    folder, _ = written
    write_demo_data(tmp_path / "again", train=16, val=9, frames=6, seed=3, workers=2)
    assert hashes(tmp_path / "again") == hashes(folder)


def test_no_two_clips_are_alike(written, tmp_path):
    folder, _ = written
    write_demo_data(tmp_path / "other", train=16, val=9, frames=6, seed=4, workers=1)
    contents = [*hashes(folder).items(), *hashes(tmp_path / "other").items()]
    videos = [content for name, content in contents if name.endswith(".mp4")]
    assert len(videos) == len(set(videos)) == 50


def test_more_clips_extend_the_set(written, tmp_path):
    folder, _ = written
    write_demo_data(tmp_path / "more", train=20, val=9, frames=6, seed=3, workers=1)
    more = hashes(tmp_path / "more")
    assert all(more[name] == value for name, value in hashes(folder).items() if name.endswith(".mp4"))


@pytest.mark.parametrize("label", range(4), ids=CLASSES[:4])
def test_directions_move_the_object_as_named(label):
    sign_x, sign_y, _, _ = MOTIONS[CLASSES[label]]
    clip = motion_clip(label, seed=1, index=label, frames=9, size=64, look=PLAIN).astype(float)
    for steps in (1, 4, 8):
        # On the torus a translation is a circular shift: its correlation peaks at the displacement.
        spectrum = np.fft.fft2(clip[steps, ..., 0]) * np.conj(np.fft.fft2(clip[0, ..., 0]))
        peak = np.unravel_index(np.argmax(np.fft.ifft2(spectrum).real), (64, 64))
        down, right = ((value + 32) % 64 - 32 for value in peak)
        reach = np.array([0.75, 1.25]) * PLAIN.speed * 2 * steps  # twice as many pixels as in a 32-pixel frame
        assert reach[0] - 1 <= max(abs(down), abs(right)) <= reach[1] + 1
        assert (np.sign(right), np.sign(down)) == (sign_x, sign_y)


@pytest.mark.parametrize("name", ["turning clockwise", "turning counterclockwise"])
def test_rotations_turn_the_object_as_named(name):
    look = Look(object_texture=0, background_texture=0, pattern=0, contrast=60, drift=0, radius=(0.35, 0.35))
    turned = []
    for index in range(20):
        clip = motion_clip(CLASSES.index(name), seed=2, index=index, frames=4, size=64, look=look)[..., 0].astype(float)
        values, counts = np.unique(clip, return_counts=True)
        ground = values[np.argsort(counts)[-2:]]  # the two flat colours: background and object
        near = np.abs(clip - ground[0]) < np.abs(clip - ground[1])
        inside = near if near.mean() < 0.5 else ~near
        if inside[:, [0, -1]].any() or inside[:, :, [0, -1]].any():
            continue  # cut by the border of the frame
        axes = []
        for mask in inside:
            y, x = np.nonzero(mask)
            covariance = np.cov(x, y)
            if np.linalg.eigvalsh(covariance)[1] / np.linalg.eigvalsh(covariance)[0] < 1.15:
                break  # too round to have an axis
            axes.append(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1]))
        if len(axes) == 4:
            step = (np.diff(axes) + np.pi / 2) % np.pi - np.pi / 2
            turned.append(np.degrees(step.mean()))
    assert turned, "no clip shows a whole oval"
    sign = MOTIONS[name][2]  # y points down, so growing angles turn clockwise as seen
    assert all(0.6 * look.turn < sign * value < 1.4 * look.turn for value in turned)


@pytest.mark.parametrize("name", ["zooming in", "zooming out"])
def test_zooms_grow_the_texture_as_named(name):
    """Under a zoom by z, the frame z times larger about the object's centre is the next frame."""
    import cv2

    look = Look(object_texture=0, background_texture=0, pattern=30, drift=0, radius=(0.45, 0.45))
    label, votes = CLASSES.index(name), []
    for index in range(12):
        clip = motion_clip(label, seed=5, index=index, frames=2, size=96, look=look)[..., 0].astype(np.float32)
        # The centre is where the object's outline is balanced: torus means of the squared change between frames.
        change = (clip[1] - clip[0]) ** 2
        phase = np.exp(2j * np.pi * np.arange(96) / 96)
        centre = [np.angle((change.sum(axis) * phase).sum()) / (2 * np.pi) * 96 % 96 for axis in (0, 1)]
        shift = [round(48 - value) for value in centre]
        first, second = (np.roll(frame, (shift[1], shift[0]), (0, 1)) for frame in clip)
        inner = (slice(24, 72), slice(24, 72))
        error = {}
        for factor in (look.zoom, 1 / look.zoom):
            matrix = cv2.getRotationMatrix2D((48, 48), 0, factor)
            error[factor > 1] = np.abs(cv2.warpAffine(first, matrix, (96, 96))[inner] - second[inner]).mean()
        votes.append(error[True] < error[False])
    assert np.mean(votes) >= 0.9 if name == "zooming in" else np.mean(votes) <= 0.1


def test_the_class_changes_the_motion_and_nothing_else():
    first = [motion_clip(label, seed=0, index=7, frames=3) for label in range(len(CLASSES))]
    for clip in first[1:]:
        np.testing.assert_array_equal(clip[0], first[0][0])
        assert np.abs(clip[2].astype(int) - first[0][2]).max() > 20


def test_single_frames_do_not_tell_the_class():
    """Frames at one fixed time: class means of brightness, contrast and gradients differ no more than chance allows."""
    features, labels = [], []
    for index in range(480):
        frame = motion_clip(index % 8, seed=11, index=index, frames=12)[11].astype(float).mean(-1)
        down, right = np.gradient(frame)
        mass = np.abs(frame - np.median(frame))
        phase = np.exp(2j * np.pi * np.arange(32) / 32)
        place = [(mass.sum(axis) * phase).sum() / mass.sum() for axis in (0, 1)]
        scale = np.abs(np.fft.rfft2(frame - frame.mean()))
        features.append(
            [frame.mean(), frame.std(), np.abs(down).mean(), np.abs(right).mean(), scale[:3, :3].sum() / scale.sum()]
            + [part for value in place for part in (value.real, value.imag)]
        )
        labels.append(index % 8)
    x, y = np.array(features), np.array(labels)
    means = np.stack([x[y == label].mean(0) for label in range(8)])
    spread = x.std(0) / math.sqrt((y == 0).sum())
    z = (means - x.mean(0)) / spread  # 72 values, standard normal if frames do not depend on the class
    assert np.abs(z).max() < 4.2  # p = 0.002 for the largest of 72
    assert 0.6 < (z**2).mean() < 1.5


def test_encoder_refuses_odd_sizes():
    with pytest.raises(ValueError, match="even"):
        encode_mp4(np.zeros((2, 31, 32, 3), np.uint8), 10)


@pytest.mark.parametrize(
    ("bad", "word"),
    [({"size": 31}, "--size"), ({"size": 8}, "--size"), ({"train": 0}, "--train"), ({"fps": 0}, "--fps")],
)
def test_numbers_out_of_range_make_nothing(tmp_path, bad, word):
    with pytest.raises(UsageError, match=word):
        write_demo_data(tmp_path / "data", **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds something"):
        write_demo_data(tmp_path / "data", train=1, val=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail(count: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_demo_data(tmp_path / "data", train=2, val=1, frames=2, workers=1, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_to_clean_shows_what_is_behind_the_ball():
    clip = removal_clip(seed=1, frames=5, height=48, width=64)
    np.testing.assert_array_equal(clip.rgb[~clip.hidden], clip.truth[~clip.hidden])
    assert (clip.rgb[clip.hidden] != clip.truth[clip.hidden]).any(-1).mean() > 0.5
    assert 0.05 < clip.hidden.mean() < 0.2
    np.testing.assert_array_equal(clip.rgb, removal_clip(seed=1, frames=5, height=48, width=64).rgb)
    assert (clip.rgb != removal_clip(seed=2, frames=5, height=48, width=64).rgb).any()
