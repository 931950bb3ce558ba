"""Sources and writers: times, size, sound and pixels, checked with PyAV and Pillow."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from diffmae_video.errors import DataError
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import GifWriter, VideoWriter, open_writer

RNG = np.random.default_rng(0)
TIMES = [0, 3, 4, 9, 15, 16]  # a variable rate


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def make_video(path: Path, pictures: list[np.ndarray], audio: str | None = None, **options: object) -> Path:
    """A small FFV1 or H.264 file with a tone."""
    with av.open(str(path), "w") as output:
        codec = str(options.get("codec", "libx264"))
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p" if codec == "libx264" else "bgr0"
        sound = output.add_stream(audio, rate=16000) if audio else None
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = n
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound is not None:
            wave = (np.sin(np.arange(1600 * len(pictures)) / 9) * 9000).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            resampler = av.AudioResampler(format=sound.format, layout="mono", rate=16000, frame_size=1024)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(sound.encode(part))
            output.mux(sound.encode())
    return path


def decode(path: Path) -> tuple[list[np.ndarray], list[Fraction]]:
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    return [f.to_ndarray(format="rgb24") for f in decoded], [f.pts * f.time_base for f in decoded]


@pytest.mark.parametrize("size", [(48, 64), (33, 21), (2, 2)])
def test_ffv1_is_bit_equal(tmp_path: Path, size: tuple[int, int]) -> None:
    pictures = frames(len(TIMES), *size)
    writer = VideoWriter(tmp_path / "a.mkv", size, Fraction(1, 10), Fraction(10), codec="ffv1")
    for picture, pts in zip(pictures, TIMES, strict=True):
        writer.write(picture, pts)
    writer.close()
    back, times = decode(tmp_path / "a.mkv")
    np.testing.assert_array_equal(back, pictures)
    assert times == [Fraction(pts, 10) for pts in TIMES]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


@pytest.mark.parametrize(("size", "pixels"), [((48, 64), "yuv420p"), ((33, 21), "yuv444p")])
def test_h264_keeps_size_times_and_colours(tmp_path: Path, size: tuple[int, int], pixels: str) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", size, Fraction(1001, 30000), Fraction(30000, 1001), crf=4)
    colour = np.full((*size, 3), (200, 60, 30), dtype=np.uint8)
    for pts in TIMES:
        writer.write(colour, pts)
    writer.close()
    back, times = decode(tmp_path / "a.mp4")
    assert times == [pts * Fraction(1001, 30000) for pts in TIMES]
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.height, context.width, context.pix_fmt) == (*size, pixels)
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, narrow
    assert np.abs(back[0].astype(int) - colour).max() <= 4


@pytest.mark.parametrize(("codec", "name"), [("h264", "a.mp4"), ("ffv1", "a.mkv")])
def test_bytes_depend_on_frames_alone(tmp_path: Path, codec: str, name: str) -> None:
    """With AVX-512 x264's macroblock tree read memory that it had not written, and Matroska draws identifiers."""
    draw, made = random.Random(0), set()
    texture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for _ in range(12):
        writer = VideoWriter(tmp_path / name, (144, 176), Fraction(1, 30), Fraction(30), codec=codec)
        for number in range(20):  # a view that pans over the texture
            writer.write(texture[2 * number :, 3 * number :][:144, :176], number)
        writer.close()
        made.add((tmp_path / name).read_bytes())
        held = [draw.randbytes(draw.randrange(512, 1 << 17)) for _ in range(40)]
        del held[::2]  # the next encoder finds leftovers on the heap
    assert len(made) == 1


def test_an_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    source = VideoSource(make_video(tmp_path / "in.mp4", frames(3)))
    out = tmp_path / "out"
    for codec in ("h264", "ffv1", "gif", "png"):
        writer = open_writer(out, "x", source, codec, 20)
        writer.write(frames(1)[0], 0)
        writer.abort()
    assert list(out.iterdir()) == []


def gif_durations(path: Path) -> list[int]:
    """Milliseconds of each frame."""
    with Image.open(path) as image:
        durations = []
        for n in range(image.n_frames):
            image.seek(n)
            durations.append(image.info["duration"])
    return durations


def test_gif_keeps_times_without_drift(tmp_path: Path) -> None:
    writer = GifWriter(tmp_path / "a.gif", (48, 64), Fraction(1, 30), Fraction(30))
    for n in range(31):
        writer.write(frames(1)[0], n)
    writer.close()
    durations = gif_durations(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (31, (64, 48), 0)
    assert sum(durations) == 1030
    assert set(durations) == {30, 40}


def test_gif_makes_up_for_frames_that_are_too_short(tmp_path: Path) -> None:
    writer = GifWriter(tmp_path / "a.gif", (48, 64), Fraction(1, 100), Fraction(25))
    for pts in (0, 1, 2, 3, 40, 80):  # hundredths; a GIF shows each for two at least
        writer.write(frames(1)[0], pts)
    writer.close()
    assert gif_durations(tmp_path / "a.gif") == [20, 20, 20, 340, 400, 40]


@pytest.mark.parametrize(("container", "audio"), [("mp4", "aac"), ("mkv", "flac"), ("avi", "pcm_s16le")])
def test_sound_is_kept(tmp_path: Path, container: str, audio: str) -> None:
    source = VideoSource(make_video(tmp_path / f"in.{container}", frames(10), audio))
    for codec, name in (("h264", "out.mp4"), ("ffv1", "out.mkv")):
        writer = open_writer(tmp_path, "out", source, codec, 20)
        for frame in source:
            writer.write(frame.rgb, frame.pts)
        writer.close()
        with av.open(str(tmp_path / name)) as made, av.open(str(source.path)) as given:
            assert len(made.streams.audio) == 1
            copied = made.streams.audio[0].codec_context.name == given.streams.audio[0].codec_context.name
            assert copied == (codec == "ffv1" or audio in ("aac", "flac"))
            lengths = [sum(f.samples for f in c.decode(audio=0)) for c in (made, given)]
            assert lengths[0] == pytest.approx(lengths[1], abs=2048)


def test_a_folder_and_an_image_are_sources(tmp_path: Path) -> None:
    pictures = frames(3)
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{n}.png")
    folder = VideoSource(tmp_path, fps=12)
    assert (folder.frames, folder.fps, folder.kind) == (3, 12, "folder")
    np.testing.assert_array_equal([frame.rgb for frame in folder], pictures)
    image = VideoSource(tmp_path / "1.png")
    assert (image.frames, image.kind) == (1, "image")
    np.testing.assert_array_equal(next(iter(image)).rgb, pictures[1])
    Image.fromarray(frames(1, 20, 20)[0]).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"3\.png is 20x20"):
        list(VideoSource(tmp_path))


def test_clips_from_the_wild_keep_frames_and_times(shared_data: Path) -> None:
    """Against PyAV's own reading of files with B-frames, edit lists, late starts and rotation."""
    for name, count, start in (
        ("vfr.mp4", 42, None), ("start_time_1000s.mkv", 90, 0), ("edit_list_cut_no_reencode.mp4", 60, None),
        ("raw_annexb_no_pts.h264", 90, 0), ("h264_bframes_in_avi.avi", 90, 0), ("stts_delta_zero.mp4", 56, 0),
    ):  # fmt: skip
        source = VideoSource(shared_data / "hostile" / name)
        times = [frame.pts for frame in source]
        assert len(times) == count, name
        assert all(a < b for a, b in pairwise(times)), name
        if start is not None:
            assert times[0] == start, name
        if name == "vfr.mp4":
            expected = decode(source.path)[1]
            assert [pts * source.time_base for pts in times] == [time - expected[0] for time in expected]
        source.close()
    rotated = VideoSource(shared_data / "hostile" / "rotated_90_display_matrix.mp4")
    assert (rotated.height, rotated.width) == (320, 240) == next(iter(rotated)).rgb.shape[:2]
