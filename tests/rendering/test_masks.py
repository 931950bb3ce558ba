"""Masks of a video, through the public function `build_mask`."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffmae_video.errors import DataError, UsageError
from diffmae_video.mask_text import MaskRequest
from diffmae_video.masking import make_mask
from diffmae_video.rendering.drawn import mask_of_array
from diffmae_video.rendering.masks import ClipShape, build_mask
from diffmae_video.rendering.source import list_images

SHAPE = ClipShape(height=50, width=90, frames=40, fps=10.0, grid=(4, 5, 9), span=16, seed=3)


def test_box_in_pixels_and_percent_hide_the_same() -> None:
    mask = build_mask(["box:9,5,18,10"], SHAPE)(0)
    expected = np.zeros((50, 90), dtype=bool)
    expected[5:15, 9:27] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(build_mask(["box:10%,10%,20%,20%"], SHAPE)(0), expected)


def test_a_box_keeps_its_size_wherever_half_pixels_fall() -> None:
    for left in (0.5, 1.5, 2.5, 3.25):
        mask = build_mask([f"box:{left},{left},3,2"], SHAPE)(0)
        assert (mask.any(0).sum(), mask.any(1).sum()) == (3, 2)


@pytest.mark.parametrize(("span", "first", "last"), [("4-9", 4, 9), ("0.4s-1s", 4, 9), ("30", 30, 39), ("30-", 30, 39)])
def test_box_span_in_frames_and_seconds(span: str, first: int, last: int) -> None:
    mask = build_mask([f"box:0,0,10,10@{span}"], SHAPE)
    assert [n for n in range(40) if mask(n).any()] == list(range(first, last + 1))


def test_track_moves_linearly_between_key_frames() -> None:
    mask = build_mask(MaskRequest(track="10:0,0,10,10;20:40,20,10,10"), SHAPE)
    assert not mask(9).any()
    assert not mask(21).any()
    for number, (left, top) in {10: (0, 0), 15: (20, 10), 20: (40, 20)}.items():
        rows, columns = np.nonzero(mask(number))
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (left, top, left + 9, top + 9)


def test_generated_masks_lie_on_the_model_grid() -> None:
    mask = build_mask(["random:0.75"], SHAPE)
    for number in (0, 5, 15, 16, 39):
        grid = make_mask("random", 0.75, SHAPE.grid, [SHAPE.seed + number // 16]).grid.view(SHAPE.grid)
        expected = grid[number % 16 // 4].numpy().repeat(10, 0).repeat(10, 1)  # cells of 10 x 10 pixels, 4 frames
        np.testing.assert_array_equal(mask(number), expected)


def test_tube_hides_the_same_places_for_ever() -> None:
    mask = build_mask(["tube:0.5"], SHAPE)
    assert all(np.array_equal(mask(0), mask(n)) for n in range(40))


def test_frames_and_future_hide_whole_frames() -> None:
    assert [n for n in range(40) if build_mask(["frames:8-15"], SHAPE)(n).all()] == list(range(8, 16))
    assert [n for n in range(40) if build_mask(["future:0.25"], SHAPE)(n).all()] == list(range(30, 40))


def test_several_masks_unite_then_invert_then_dilate() -> None:
    two = ["box:0,0,10,10", "box:40,20,10,10"]
    united = build_mask(two, SHAPE)(0)
    assert united.sum() == 200
    np.testing.assert_array_equal(build_mask(MaskRequest(tuple(two), invert=True), SHAPE)(0), ~united)
    grown = build_mask(MaskRequest(("box:40,20,10,10",), dilate=3), SHAPE)(0)
    rows, columns = np.nonzero(grown)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (37, 52, 17, 32)


def _draw(path: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (90, 50)) -> None:
    image = np.zeros((size[1], size[0]), dtype=np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(image).save(path)


def test_drawn_masks_for_all_frames_and_for_each(tmp_path: Path) -> None:
    _draw(tmp_path / "one.png", (5, 6, 20, 30))
    mask = build_mask([str(tmp_path / "one.png")], SHAPE)
    assert mask(0).sum() == mask(39).sum() == 15 * 24
    folder = tmp_path / "each"
    folder.mkdir()
    for n in range(40):
        _draw(folder / f"{n}.png", (n, 0, n + 2, 50))
    mask = build_mask([str(folder)], SHAPE)
    assert all(np.array_equal(np.nonzero(mask(n))[1].min(), n) for n in range(40))  # 2.png before 10.png


def test_masks_from_numpy_arrays(tmp_path: Path) -> None:
    each = np.random.default_rng(0).random((40, 50, 90)) < 0.3
    np.save(tmp_path / "each.npy", each)
    np.save(tmp_path / "one.npy", each[7])
    mask, same = (build_mask([str(tmp_path / f"{name}.npy")], SHAPE) for name in ("each", "one"))
    assert all(np.array_equal(mask(number), each[number]) for number in (0, 7, 39, 3))
    assert np.array_equal(same(0), each[7])
    assert np.array_equal(same(39), each[7])
    both = build_mask(MaskRequest((str(tmp_path / "each.npy"), "box:0,0,90,50@2-2"), invert=True), SHAPE)
    assert not both(2).any()
    assert np.array_equal(both(3), ~each[3])


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [
        (np.zeros((40, 50, 90), np.uint8), UsageError, r"is bool \(40, 50, 90\) or \(50, 90\), not uint8"),
        (np.zeros((39, 50, 90), bool), UsageError, r"not bool \(39, 50, 90\)"),
        (np.array([{"a": 1}], dtype=object), DataError, "no NumPy array"),  # a pickle: never loaded
        (b"nothing of the kind", DataError, "no NumPy array"),
    ],
)
def test_arrays_that_are_no_masks(tmp_path: Path, content: np.ndarray | bytes, error: type, part: str) -> None:
    file = tmp_path / "mask.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(error, match=part):
        build_mask([str(file)], SHAPE)


def test_mask_videos(tmp_path: Path) -> None:
    hidden = np.zeros((40, 50, 90), dtype=bool)
    for number in range(40):
        hidden[number, 5:15, number : number + 20] = True
    with av.open(str(tmp_path / "mask.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 90, 50, "yuv444p"
        for frame in hidden:
            picture = np.repeat(frame[..., None], 3, 2).astype(np.uint8) * 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    mask = build_mask([str(tmp_path / "mask.mkv")], SHAPE)
    for number in (0, 1, 5, 39, 2):  # going back opens it again
        np.testing.assert_array_equal(mask(number), hidden[number])
    short = ClipShape(height=50, width=90, frames=41, fps=10.0, grid=(4, 5, 9), span=16)
    with pytest.raises(UsageError, match="40 frames for a clip of 41"):
        build_mask([str(tmp_path / "mask.mkv")], short)


def test_list_images_orders_numbers_by_value(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "b.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["9.png", "10.png"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nonsense", "no mask and no file"),
        ("random:1.5", "between 0 and 1"),
        ("random:x", "between 0 and 1"),
        ("box:1,2,3", "x,y,width,height"),
        ("box:80,0,20,10", "90x50 pixels"),
        ("box:0,0,0,10", "90x50 pixels"),
        ("box:0,0,9,9@50-60", "frames 0 to 39"),
        ("box:0,0,9,9@1-x", "frame numbers"),
        ("frames:8-50", "frames 0 to 39"),
        ("frames:9-8", "frames 0 to 39"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_sentence(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        build_mask([text], SHAPE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--mask {text}")


@pytest.mark.parametrize("track", ["5:0,0,10,10", "5:0,0,10,10;5:1,1,10,10", "5:0,0,10,10;90:0,0,10,10", "oops"])
def test_a_track_that_does_not_fit(track: str) -> None:
    with pytest.raises(UsageError, match="--track"):
        build_mask(MaskRequest(track=track), SHAPE)


def test_drawn_masks_of_wrong_size_count_or_kind(tmp_path: Path) -> None:
    _draw(tmp_path / "small.png", (0, 0, 5, 5), size=(30, 20))
    with pytest.raises(UsageError, match="30x20 pixels for a clip of 90x50"):
        build_mask([str(tmp_path / "small.png")], SHAPE)
    folder = tmp_path / "few"
    folder.mkdir()
    _draw(folder / "0.png", (0, 0, 5, 5))
    with pytest.raises(UsageError, match="1 pictures for a clip of 40 frames"):
        build_mask([str(folder)], SHAPE)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png"):
        build_mask([str(tmp_path / "text.png")], SHAPE)


def test_tensor_masks_are_checked() -> None:
    assert mask_of_array(torch.ones(4, 5, dtype=torch.bool), 3, (4, 5))(2).all()
    assert mask_of_array(np.arange(3)[:, None, None] == np.full((1, 4, 5), 1), 3, (4, 5))(1).all()
    with pytest.raises(ValueError, match="bool"):
        mask_of_array(torch.ones(4, 6, dtype=torch.bool), 3, (4, 5))
