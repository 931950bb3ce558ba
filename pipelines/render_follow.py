"""A mask that follows an object through a clip, for `render_inpaint.render`: keys read, frames followed, `mask.mp4`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffmae_video.data.media import read_head, sniff
from diffmae_video.errors import UsageError
from diffmae_video.mask_text import Extent, MaskRequest, Region, file_of, read_frame, read_mask_text
from diffmae_video.pipelines.console import progress, say
from diffmae_video.rendering.drawn import FrameMask, read_object
from diffmae_video.rendering.follow import SIDE, Followed, follow_object, resized
from diffmae_video.rendering.follower import object_in_box
from diffmae_video.rendering.frame_store import FrameStore, shrunk
from diffmae_video.rendering.masks import ClipMask, ClipShape
from diffmae_video.rendering.motion import one_thread
from diffmae_video.rendering.moving import Scene
from diffmae_video.rendering.sam import SIDE as SAM_SIDE
from diffmae_video.rendering.sam import follow_with_sam, load_sam
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter
from diffmae_video.training.hardware import pick_device

MASK_VIDEO = "mask.mp4"
"""Where a followed mask is written for review, in the folder of the render."""
MASK_CRF = 1
"""Quality at which an edge of black and white comes back to the pixel."""


def follow_mask(clip: Path, request: MaskRequest, shape: ClipShape, fps: float, device: str = "auto") -> ClipMask:
    """Follow what a request marks in single frames of a clip.

    Args:
        clip: video, image, or folder of images.
        request: its texts are `PICTURE@FRAME` or `box:X,Y,W,H@FRAME`; frame 0 without `@`.
        fps: frame rate of a folder of images.
        device: where `request.sam` computes.

    Raises:
        UsageError: a text that marks no object, or does not fit the clip.
        DataError: a picture that cannot be read.
        UsageError, StorageError, DataError: see `sam.load_sam`.
    """
    if not request.texts or request.track:
        raise UsageError("--follow takes an object marked in one frame: --mask PICTURE@FRAME or box:X,Y,W,H@FRAME.")
    notes = list[str]()
    marked = [(text, *_mark(text, shape.extent, notes)) for text in request.texts]
    sam = None if request.sam is None else load_sam(request.sam, pick_device(device))
    with closing(VideoSource(clip, fps)) as source:
        frames = read_frames(source, SIDE if sam is None else SAM_SIDE)
    with closing(frames):
        keys: dict[int, np.ndarray] = {}
        boxes: dict[int, np.ndarray] = {}
        for text, number, hidden, boxed in marked:
            if number >= len(frames):
                raise UsageError(f"--mask {text}: only {len(frames)} frames can be read; mark one of them.")
            if boxed and sam is not None:
                boxes[number] = boxes.get(number, False) | hidden
                continue
            if boxed:
                found = find_in_box(frames, number, hidden)
                what = "nothing stands out in the box, so all of it is followed" if found is hidden else "the object"
                notes.append(f"Mask {text}: {what} in frame {number}.")
                hidden = found
            keys[number] = keys.get(number, False) | hidden
        if sam is None:
            again = "mark it there with one more --mask, box:X,Y,W,H@FRAME or PICTURE@FRAME"
            followed = follow_clip(frames, keys, fps=shape.fps, again=again)
        else:
            with progress(len(frames), "follow", "frames") as line:
                followed = follow_with_sam(sam, frames, keys, boxes, progress=line.update)
            followed.notes.append(f"It was followed by {request.sam}.")
    mask = ClipMask(request, shape, followed)
    seen = len(followed.packed)
    mask.notes += [*notes, f"The object was followed to {seen} of {len(frames)} frames.", *followed.notes]
    return mask


def _mark(text: str, extent: Extent, notes: list[str]) -> tuple[int, np.ndarray, bool]:
    """Frame and mask bool (H, W) of one text, and whether it is a box."""
    path, when = file_of(text)
    if text.startswith("box:"):
        path, when = Path(text.partition("@")[0]), text.partition("@")[2]
    try:
        number = read_frame(when, extent) if when else 0
        if not 0 <= number < extent.frames:
            raise ValueError(f"the clip has frames 0 to {extent.frames - 1}; name one of them")
        region = read_mask_text(str(path), extent)
    except ValueError as error:
        raise UsageError(f"--mask {text}: {error}.") from error
    if isinstance(region, Region):
        hidden = np.zeros((extent.height, extent.width), dtype=bool)
        hidden[region.rows, region.columns] = True
        return number, hidden, text.startswith("box:")
    if region is None and not path.exists():
        raise UsageError(f"--mask {text}: there is no such file; check the path.")
    if region is not None or path.is_dir() or not (sniff(read_head(path)) or "").startswith("image:"):
        raise UsageError(
            f"--mask {text}: --follow takes an object marked in one frame; write PICTURE@FRAME or box:X,Y,W,H@FRAME."
        )
    return number, read_object(path, extent, notes), False


def read_frames(source: VideoSource, side: int) -> FrameStore:
    """All frames of a clip, with progress; the longer side at most `side` pixels."""
    frames = FrameStore(side)
    with progress(source.frames, "read", "frames") as line:
        for frame in source:
            frames.add(frame.rgb)
            line.update(1)
    return frames


def find_in_box(frames: FrameStore, number: int, hidden: np.ndarray) -> np.ndarray:
    """The object in a box of a frame: bool (H, W) as `hidden`; the frames may be smaller."""
    small = shrunk(frames[number], SIDE)
    box = resized(hidden, small.shape[:2])
    if not box.any():
        return hidden
    with one_thread():
        moving = Scene(frames).moving(number, box.shape)
    found = object_in_box(small, box, moving)
    return hidden if found is box else resized(found, hidden.shape) & hidden


def follow_clip(frames: FrameStore, keys: dict[int, np.ndarray], *, fps: float, again: str) -> Followed:
    """`follow_object` over a whole clip, with progress."""
    with progress(len(frames), "follow", "frames") as line:
        return follow_object(frames, keys, again=again, fps=fps, progress=line.update)


def write_mask_video(path: Path, masks: Iterable[np.ndarray], size: tuple[int, int], fps: float) -> None:
    """Write masks bool (H, W) as a video that plays anywhere and can be given back as a mask."""
    rate = Fraction(fps).limit_denominator(100_000)
    writer = VideoWriter(path, size, 1 / rate, rate, crf=MASK_CRF)
    with contextlib.ExitStack() as undo:
        undo.callback(writer.abort)
        for number, hidden in enumerate(masks):
            writer.write(np.repeat(hidden[..., None], 3, axis=2).view(np.uint8) * np.uint8(255), number)
        writer.close()
        undo.pop_all()


def save_followed(mask: ClipMask, folder: Path, frames: int, size: tuple[int, int], fps: float) -> None:
    """Write what was followed beside a render, before it begins, and say so."""
    drawn: FrameMask = mask.parts[0]
    write_mask_video(folder / MASK_VIDEO, (drawn(number) for number in range(frames)), size, fps)
    grown = f" --dilate {mask.request.growth}" * (mask.request.growth > 0)
    say(
        f"What was followed is in {folder / MASK_VIDEO}: look at it now, and stop with Ctrl-C where it is wrong; "
        f"--mask {folder / MASK_VIDEO}{grown} takes it again."
    )
