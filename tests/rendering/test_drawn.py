"""Masks as tools write them: what hides, and what the note says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffmae_video.errors import DataError, UsageError
from diffmae_video.rendering.drawn import is_soft
from diffmae_video.rendering.masks import ClipMask, ClipShape, build_mask
from diffmae_video.rendering.writers import VideoWriter

HEIGHT, WIDTH = 48, 64
OBJECT = np.zeros((HEIGHT, WIDTH), dtype=bool)
OBJECT[10:30, 20:44] = True
OTHER = np.zeros((HEIGHT, WIDTH), dtype=bool)
OTHER[34:44, 4:16] = True


def clip_mask(path: Path, frames: int = 3) -> ClipMask:
    return build_mask([str(path)], ClipShape(HEIGHT, WIDTH, frames, 10.0, (1, 3, 4), 2))


@pytest.mark.parametrize("old", [b"'fortran_order'", b"}", b"(3, 48", b"|b1", b"NUMPY"])
@pytest.mark.parametrize("new", [b"(", b"'", b"99999999999", b"\x00", b"\xff"])
def test_damaged_arrays_are_one_sentence(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "mask.npy"
    np.save(path, np.repeat(OBJECT[None], 3, axis=0))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new.ljust(len(old))[: len(old)], 1))
    with pytest.raises(DataError, match=r"mask\.npy is no NumPy array"):
        clip_mask(path)


def labels(*values: int) -> np.ndarray:
    """A label map with the two objects."""
    picture = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    picture[OBJECT], picture[OTHER] = values
    return picture


def coloured(first: tuple[int, int, int], second: tuple[int, int, int]) -> Image.Image:
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[OBJECT], picture[OTHER] = first, second
    return Image.fromarray(picture)


def davis(black_first: bool = True) -> Image.Image:
    image = Image.fromarray(labels(1, 2) if black_first else np.where(labels(1, 1) > 0, 0, 1).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] if black_first else [255, 255, 255, 0, 0, 0])
    return image


def layer(colour: tuple[int, int, int]) -> Image.Image:
    picture = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    picture[OBJECT | OTHER] = (*colour, 255)
    return Image.fromarray(picture, "RGBA")


KINDS = {
    "white": (lambda: Image.fromarray(labels(255, 255)), "not black"),
    "one bit": (lambda: Image.fromarray(labels(255, 255)).convert("1"), "not black"),
    "zero and one": (lambda: Image.fromarray(labels(1, 1)), "brightest value 1"),
    "labels": (lambda: Image.fromarray(labels(3, 200)), "not black"),
    "labels of 16 bits": (lambda: Image.fromarray(labels(1, 2).astype(np.uint16) * 300), "not black"),
    "yellow and red": (lambda: coloured((255, 255, 0), (255, 0, 0)), "not black"),
    "dark colours": (lambda: coloured((0, 0, 64), (128, 0, 0)), "not black"),
    "palette": (davis, "every index but 0"),
    "palette with white first": (lambda: davis(black_first=False), "every colour but black"),
    "black on transparent": (lambda: layer((0, 0, 0)), "alpha"),
    "white on transparent": (lambda: layer((255, 255, 255)), "alpha"),
    "opaque alpha": (lambda: coloured((255, 0, 0), (0, 255, 0)).convert("RGBA"), "not black"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_object_is_hidden_however_it_is_written(tmp_path: Path, kind: str) -> None:
    make, note = KINDS[kind]
    make().save(tmp_path / "mask.png")
    mask = clip_mask(tmp_path / "mask.png")
    np.testing.assert_array_equal(mask(0), OBJECT | OTHER)
    assert len(mask.notes) == 1
    assert note in mask.notes[0]


def test_a_folder_of_palette_masks_reads_each_picture(tmp_path: Path) -> None:
    for number in range(3):
        image = Image.fromarray(np.roll(labels(1, 2), number, axis=1), "P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        image.save(tmp_path / f"{number:05d}.png")
    mask = clip_mask(tmp_path)
    for number in range(3):
        np.testing.assert_array_equal(mask(number), np.roll(OBJECT | OTHER, number, axis=1))
    assert len(mask.notes) == 1


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (128, 0, 0)])
def test_a_jpeg_hides_its_objects_to_the_pixel_beside_the_edge(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    coloured(colour, colour).save(tmp_path / "mask.jpg", quality=75)
    mask = clip_mask(tmp_path / "mask.jpg")
    assert "above 63 of 255" in mask.notes[0]
    different = np.argwhere(mask(0) != (OBJECT | OTHER))
    edges = np.argwhere(edge_of(OBJECT | OTHER))
    assert all(np.abs(edges - place).max(1).min() <= 2 for place in different)
    assert len(different) < 0.15 * OBJECT.sum()


def edge_of(hidden: np.ndarray) -> np.ndarray:
    return hidden & ~(np.roll(hidden, 1, 0) & np.roll(hidden, -1, 0) & np.roll(hidden, 1, 1) & np.roll(hidden, -1, 1))


def test_soft_edges_are_cut_at_a_threshold_that_is_said(tmp_path: Path) -> None:
    soft = Image.fromarray(labels(255, 255)).filter(ImageFilter.GaussianBlur(2))
    soft.save(tmp_path / "mask.png")
    mask = clip_mask(tmp_path / "mask.png")
    assert "soft edges, above 63 of 255 hides" in mask.notes[0]
    np.testing.assert_array_equal(mask(0), np.asarray(soft) > 63)


def test_flat_areas_are_labels_and_slopes_are_not() -> None:
    assert not is_soft(labels(1, 2).astype(np.float32))
    assert not is_soft(labels(255, 0).astype(np.float32))
    ramp = np.broadcast_to(np.linspace(0, 255, WIDTH, dtype=np.float32), (HEIGHT, WIDTH))
    assert is_soft(ramp)


def test_a_mask_of_another_size_is_scaled_with_a_warning_or_refused(tmp_path: Path) -> None:
    Image.fromarray(labels(255, 255)).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST).save(tmp_path / "2.png")
    mask = clip_mask(tmp_path / "2.png")
    np.testing.assert_array_equal(mask(0), OBJECT | OTHER)
    assert "Warning: 128x96 pixels are scaled for a clip of 64x48" in mask.notes[0]
    Image.fromarray(labels(255, 255).T.copy()).save(tmp_path / "turned.png")
    with pytest.raises(UsageError, match="48x64 pixels for a clip of 64x48"):
        clip_mask(tmp_path / "turned.png")


@pytest.mark.parametrize(("codec", "pixels", "exact"), [("ffv1", "bgr0", True), ("libx264", "yuv420p", False)])
def test_mask_videos_in_colours(tmp_path: Path, codec: str, pixels: str, exact: bool) -> None:
    picture = np.asarray(coloured((255, 255, 0), (64, 0, 0) if exact else (200, 0, 0)))
    with av.open(str(tmp_path / "mask.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    mask = clip_mask(tmp_path / "mask.mkv")
    wrong = (mask(0) != (OBJECT | OTHER)).sum()
    assert wrong == 0 if exact else wrong < 0.15 * OBJECT.sum()
    mask(1)
    assert len(mask.notes) == 1
    assert ("not black" if exact else "above 63") in mask.notes[0]


def test_pipes_and_devices_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no plain file"):
        clip_mask(Path("/dev/zero"))


def write_masks(path: Path, masks: list[np.ndarray], fps: int) -> None:
    writer = VideoWriter(path, (HEIGHT, WIDTH), Fraction(1, fps), Fraction(fps), crf=1)
    for number, hidden in enumerate(masks):
        writer.write(np.repeat(hidden[..., None] * np.uint8(255), 3, axis=2), number)
    writer.close()


def test_a_mask_video_of_another_rate_is_matched_by_time(tmp_path: Path) -> None:
    masks = [np.roll(OBJECT, number, axis=1) for number in range(12)]
    write_masks(tmp_path / "mask.mp4", masks, fps=4)  # 3 seconds
    mask = build_mask([str(tmp_path / "mask.mp4")], ClipShape(HEIGHT, WIDTH, 30, 10.0, (1, 3, 4), 2))
    for number in (0, 1, 2, 3, 5, 7, 8, 29, 4):
        np.testing.assert_array_equal(mask(number), masks[int(number / 10 * 4)])
    assert "12 frames at 4 a second are matched by time to 30 at 10" in mask.notes[0]
    with pytest.raises(UsageError, match="lasts as long as the clip"):
        build_mask([str(tmp_path / "mask.mp4")], ClipShape(HEIGHT, WIDTH, 50, 10.0, (1, 3, 4), 2))


def test_a_file_may_hide_in_some_frames_only(tmp_path: Path) -> None:
    for name in ("mask.png", "mask@2x.png"):
        Image.fromarray(OBJECT).save(tmp_path / name)
    shape = ClipShape(HEIGHT, WIDTH, 20, 10.0, (1, 3, 4), 2)
    for span, frames in (("4-6", range(4, 7)), ("0.4s-0.7s", range(4, 7)), ("18", range(18, 20))):
        mask = build_mask([f"{tmp_path / 'mask.png'}@{span}"], shape)
        assert [n for n in range(20) if mask(n).any()] == list(frames)
    assert all(build_mask([str(tmp_path / "mask@2x.png")], shape)(n).any() for n in range(20))
    with pytest.raises(UsageError, match="does not lie in the clip"):
        build_mask([f"{tmp_path / 'mask.png'}@30"], shape)
