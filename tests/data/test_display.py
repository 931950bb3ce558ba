"""What a player shows is what training, prediction and rendering see: colours, geometry and times of any stream."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmae_video.data.decode import Video, VideoReader, probe
from diffmae_video.data.display import tone_map
from diffmae_video.data.transcode import TranscodeOptions, even_size, transcode
from diffmae_video.errors import DataError
from diffmae_video.rendering.source import VideoSource

COLOURS = np.asarray([[(230, 40, 30), (40, 200, 60)], [(50, 70, 220), (200, 190, 180)]], np.uint8)
"""One for each quarter of the picture: no turn and no mirroring leaves it as it is."""
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS |= {9: (0.2627, 0.0593), 2: (0.299, 0.114)}  # Kr and Kb of ISO 23091-2; untagged is BT.601
ONE = 1 << 16
TURNS = {  # a, b, c, d of the display matrix, and what it does to a picture
    "plain": ((ONE, 0, 0, ONE), lambda x: x),
    "quarter": ((0, ONE, -ONE, 0), lambda x: np.rot90(x, -1)),
    "half": ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
    "three quarters": ((0, -ONE, ONE, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda x: x[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda x: x[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda x: x.transpose(1, 0, 2)),
    "transposed about the other diagonal": ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
}


@dataclass(frozen=True)
class Kind:
    """The properties of a stream."""

    matrix: int = 1
    full: bool = False
    layout: str = "yuv420p"
    aspect: Fraction = Fraction(1)
    turn: str = "plain"
    container: str = "mp4"
    times: tuple[int, ...] = (0, 100, 200, 300)
    """Milliseconds."""
    transfer: int = 1
    codec: str = "libx264"


def planes(rgb: np.ndarray, kind: Kind) -> list[np.ndarray]:
    """Y, Cb and Cr of a picture by the equations of the standard, not by FFmpeg."""
    bits = 10 if "10" in kind.layout else 8
    red, green, blue = (rgb[..., c] / 255 for c in range(3))
    kr, kb = WEIGHTS[kind.matrix]
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    if kind.full:
        levels = [y * (2**bits - 1), *(c * (2**bits - 1) + 2 ** (bits - 1) for c in (cb, cr))]
    else:
        levels = [(16 + 219 * y) * 2 ** (bits - 8), *((128 + 224 * c) * 2 ** (bits - 8) for c in (cb, cr))]
    return [np.rint(level).astype(np.uint16 if bits > 8 else np.uint8) for level in levels]


def stream(kind: Kind, width: int = 96, height: int = 64) -> bytes:
    """A file whose frames show four colours."""
    rgb = COLOURS.repeat(height // 2, 0).repeat(width // 2, 1)
    values, sink = planes(rgb, kind), io.BytesIO()
    with av.open(sink, "w", format=kind.container) as out:
        options = {"qp": "0", "bf": "2"} if kind.codec == "libx264" else {}
        track = out.add_stream(kind.codec, rate=10, options=options)
        track.width, track.height, track.pix_fmt = width, height, kind.layout
        context = track.codec_context
        context.time_base, context.thread_count = Fraction(1, 1000), 1
        context.colorspace, context.color_range = kind.matrix, 2 if kind.full else 1
        context.color_primaries = 9 if kind.transfer in (16, 18) else kind.matrix if kind.matrix in (1, 6) else 2
        context.color_trc = kind.transfer if kind.matrix != 2 else 2
        if kind.aspect != 1:
            context.sample_aspect_ratio = kind.aspect
        for time in kind.times:
            frame = av.VideoFrame(width, height, kind.layout)
            for plane, level in zip(frame.planes, values, strict=True):
                part = level[:: height // plane.height, :: width // plane.width]
                row = np.zeros((plane.height, plane.line_size), np.uint8)
                raw = np.ascontiguousarray(part).view(np.uint8).reshape(plane.height, -1)
                row[:, : raw.shape[1]] = raw
                plane.update(row.tobytes())
            frame.colorspace, frame.color_range = kind.matrix, 2 if kind.full else 1
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(track.encode(frame))
        out.mux(track.encode())
    data = bytearray(sink.getvalue())
    if kind.turn != "plain":
        a, b, c, d = TURNS[kind.turn][0]
        place = data.find(b"tkhd") + 44
        data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


def quarters(picture: np.ndarray) -> np.ndarray:
    """The colour in the middle of each quarter of a picture (H, W, 3)."""
    height, width = picture.shape[:2]
    return picture[height // 4 :: height // 2, width // 4 :: width // 2].astype(int)


def close(found: np.ndarray, expected: np.ndarray, levels: int) -> bool:
    return found.shape == expected.shape and bool((np.abs(found - expected) <= levels).all())


KINDS = st.builds(
    Kind,
    matrix=st.sampled_from(sorted(WEIGHTS)),
    full=st.booleans(),
    layout=st.sampled_from(["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"]),
    aspect=st.sampled_from([Fraction(1), Fraction(4, 3), Fraction(10, 11), Fraction(16, 11)]),
    turn=st.sampled_from(sorted(TURNS)),
    times=st.lists(st.integers(1, 400), min_size=1, max_size=4).map(lambda gaps: (0, *np.cumsum(gaps).tolist())),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(KINDS)
def test_every_reader_shows_what_was_painted(kind: Kind) -> None:
    data, (width, height) = stream(kind), (96, 64)
    turned = TURNS[kind.turn][1](COLOURS)
    shown = (round(width * kind.aspect), height)
    shown = shown[::-1] if "quarter" in kind.turn or "transposed" in kind.turn else shown
    info = probe(data)
    assert (info.width, info.height, info.frames) == (*shown, len(kind.times))
    with Video(data) as video:
        clip = video.clips([list(range(len(kind.times)))])[0]
        crop = video.clips([[0]], [(0, 0, shown[0] // 2, shown[1] // 2)], (16, 16))[0].frames[0]
    assert clip.frames.shape[1:] == (3, shown[1], shown[0])
    assert close(quarters(clip.frames[-1].permute(1, 2, 0).numpy()), turned, 3)
    assert close(crop[:, 8, 8].numpy().astype(int), turned[0, 0], 3)
    assert clip.pts.tolist() == pytest.approx([time / 1000 for time in kind.times], abs=2e-3)
    (rgb, _), *_ = VideoReader(data)
    assert close(quarters(rgb), turned, 3)

    made, _, meta = transcode(data, TranscodeOptions(crf=4, short_side=48))
    assert (meta["width"], meta["height"]) == even_size(*shown, 48)
    with Video(made, known=True) as video:
        again = video.clips([list(range(len(kind.times)))])[0]
    assert close(quarters(again.frames[-1].permute(1, 2, 0).numpy()), turned, 5)
    assert again.pts.tolist() == pytest.approx([time / 1000 for time in kind.times], abs=2e-3)
    with av.open(io.BytesIO(made)) as container:  # and says so, for every other reader
        tagged = container.streams.video[0].codec_context
        assert (tagged.colorspace in WEIGHTS and tagged.colorspace != 2, tagged.color_range) == (True, 1)
        assert close(quarters(next(container.decode(video=0)).to_ndarray(format="rgb24")), turned, 5)


@pytest.mark.parametrize("turn", sorted(TURNS))
def test_rendering_turns_frames_and_keeps_the_grid_of_pixels(tmp_path, turn: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(stream(Kind(turn=turn, aspect=Fraction(4, 3), full=True)))
    source = VideoSource(path)
    frames = list(source)
    source.close()
    across = "quarter" in turn or "transposed" in turn
    assert (source.width, source.height) == ((64, 96) if across else (96, 64))
    assert source.pixel_aspect == (Fraction(3, 4) if across else Fraction(4, 3))
    assert close(quarters(frames[0].rgb), TURNS[turn][1](COLOURS), 3)


def test_pixels_beyond_four_to_one_are_taken_for_square() -> None:
    assert (probe(stream(Kind(aspect=Fraction(64, 1)))).width) == 96


@pytest.mark.parametrize(("transfer", "grey"), [(16, 0.5807), (18, 0.75)])
def test_hdr_white_is_diffuse_white(transfer: int, grey: float) -> None:
    """Diffuse white, 203 cd/m2 in PQ and HLG (BT.2408, table 1), lies just below the white of standard range; more
    light is never darker, and grey stays grey."""
    value = round(grey * 65535)
    white = tone_map(np.full((1, 1, 3), value, np.uint16), transfer)
    assert white.min() == white.max()
    assert 235 <= white.max() <= 250
    ramp = tone_map(np.arange(0, 65536, 257, dtype=np.uint16)[None, :, None].repeat(3, 2), transfer)[0, :, 1]
    assert all(a <= b for a, b in pairwise(ramp.tolist()))
    assert (ramp[0], ramp[-1]) == (0, 255)


def test_pq_light_is_that_of_the_standard() -> None:
    """20.3 cd/m2 is PQ 0.3584 (ST 2084), a tenth of diffuse white: 255 * 0.1 ** (1 / 2.4) on a display of gamma 2.4."""
    found = tone_map(np.full((1, 1, 3), round(0.3584 * 65535), np.uint16), 16)
    assert abs(int(found[0, 0, 0]) - 98) <= 1


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_becomes_standard_range_everywhere(transfer: int) -> None:
    kind = Kind(matrix=9, layout="yuv420p10le", transfer=transfer)
    data = stream(kind)
    with Video(data) as video:
        assert video.display.transfer == transfer
        shown = quarters(video.clips([[0]])[0].frames[0].permute(1, 2, 0).numpy())
    made, _, _ = transcode(data, TranscodeOptions(crf=4))
    with Video(made) as video:
        assert video.display.plain
        assert close(quarters(video.clips([[0]])[0].frames[0].permute(1, 2, 0).numpy()), shown, 6)
    with av.open(io.BytesIO(made)) as container:
        tagged = container.streams.video[0].codec_context
        assert (tagged.colorspace, tagged.color_primaries, tagged.color_trc) == (1, 1, 1)


def test_colours_that_are_not_read_are_refused() -> None:
    data = bytearray(stream(Kind(matrix=1)))
    place = data.find(b"nclx") + 4  # primaries, transfer, matrix: two bytes each
    data[place + 4 : place + 6] = (8).to_bytes(2, "big")  # YCgCo
    with pytest.raises(DataError, match="matrix 8"), Video(bytes(data)) as video:
        video.clips([[0]])


def with_box(data: bytes, box: bytes) -> bytes:
    """An MP4 whose sample entry holds one more box at its end; media data come before the header."""
    grown = bytearray(data)
    end = 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = grown.index(name, data.index(b"moov")) - 4
        size = int.from_bytes(grown[place : place + 4], "big")
        end = place + size
        grown[place : place + 4] = (size + len(box)).to_bytes(4, "big")
    return bytes(grown[:end] + box + grown[end:])


@pytest.mark.parametrize(("profile", "base", "refused"), [(5, 0, True), (8, 1, False), (8, 4, False), (7, 6, False)])
def test_dolby_vision_without_another_base_is_refused(tmp_path, profile: int, base: int, refused: bool) -> None:
    flags = (profile << 9 | 1 << 3 | 0b101).to_bytes(2, "big")  # profile, level 1, with metadata and base layer
    record = bytes([1, 0]) + flags + bytes([base << 4]) + bytes(19)
    data = with_box(stream(Kind(times=(0,))), (32).to_bytes(4, "big") + (b"dvcC" if profile < 8 else b"dvvC") + record)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    for read in (
        lambda: probe(data).frames,
        lambda: Video(data).clips([[0]])[0].frames.shape[0],
        lambda: transcode(data, TranscodeOptions())[2]["frames"],
        lambda: transcode(data, TranscodeOptions(copy=True))[2]["frames"],
        lambda: len(list(VideoSource(path))),
    ):
        if refused:
            with pytest.raises(DataError, match=r"Dolby Vision alone .* convert it"):
                read()
        else:
            assert read() == 1


@pytest.mark.parametrize("params", ["tff=1", "bff=1", ""])
def test_interlaced_streams_are_told_and_decoded_frame_by_frame(tmp_path, params: str) -> None:
    sink = io.BytesIO()
    lines = np.zeros((64, 96, 3), np.uint8)
    lines[::2] = 200  # the fields show different pictures
    with av.open(sink, "w", format="mp4") as out:
        track = out.add_stream("libx264", rate=25, options={"qp": "0", "x264-params": params})
        track.width, track.height, track.pix_fmt = 96, 64, "yuv444p"
        for _ in range(4):
            out.mux(track.encode(av.VideoFrame.from_ndarray(lines, "rgb24")))
        out.mux(track.encode())
    path = tmp_path / "clip.mp4"
    path.write_bytes(sink.getvalue())
    made, _, meta = transcode(sink.getvalue(), TranscodeOptions(crf=1))
    assert (probe(path).interlaced, meta.get("interlaced", False), VideoSource(path).interlaced) == (bool(params),) * 3
    assert not probe(made).interlaced
    for rgb in (
        Video(path).clips([[1]])[0].frames[0].permute(1, 2, 0).numpy(),
        Video(made).clips([[1]])[0].frames[0].permute(1, 2, 0).numpy(),
        list(VideoSource(path))[1].rgb,
    ):
        assert abs(int(rgb[::2].mean()) - 200) < 8
        assert rgb[1::2].mean() < 8


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_times_of_avi_with_reordered_frames(codec: str) -> None:
    """AVI has no times, only an order: 25 frames a second are 0.04 s apart however they are stored."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="avi") as out:
        track = out.add_stream(codec, rate=25, options={"bf": "2"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        track.codec_context.thread_count = 1
        for number in range(30):
            out.mux(track.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number, np.uint8), "rgb24")))
        out.mux(track.encode())
    made, _, meta = transcode(sink.getvalue(), TranscodeOptions())
    assert (meta["frames"], meta["fps"]) == (30, 25.0)
    for data in (sink.getvalue(), made):
        with Video(data) as video:
            assert np.diff(video.clips([list(range(30))])[0].pts.numpy()) == pytest.approx(0.04, abs=1e-6)


def test_pictures_in_rgb_and_grey_keep_their_values() -> None:
    for layout, codec, picture in (
        ("bgr0", "ffv1", COLOURS),
        ("gray", "ffv1", COLOURS[..., :1].repeat(3, 2)),
        ("gray16le", "ffv1", COLOURS[..., :1].repeat(3, 2)),
    ):
        sink = io.BytesIO()
        with av.open(sink, "w", format="matroska") as out:
            track = out.add_stream(codec, rate=10)
            track.width, track.height, track.pix_fmt = 96, 64, layout
            rgb = np.ascontiguousarray(picture.repeat(32, 0).repeat(48, 1))
            out.mux(track.encode(av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=layout)))
            out.mux(track.encode())
        made, _, _ = transcode(sink.getvalue(), TranscodeOptions(crf=4))
        for data in (sink.getvalue(), made):
            with Video(data) as video:
                assert close(quarters(video.clips([[0]])[0].frames[0].permute(1, 2, 0).numpy()), picture, 5), layout
