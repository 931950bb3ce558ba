"""An object followed by SAM 2 (arXiv 2408.00714) or EdgeTAM (arXiv 2501.07256), by transformers' code.

Their weights are none of ours: a folder in Hugging Face's form, or a name on its hub (extra `sam`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401 - before transformers, which imports torchvision

import cv2
import numpy as np
import torch

from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.hub import download, is_hub_name
from diffmae_video.rendering.follow import Followed, resized
from diffmae_video.rendering.frame_store import shrunk

SIDE = 1024
"""Longer side of the frames that the network is given, pixels; it scales them to its own size."""
MEMORY = 64
"""Frames whose answers are kept, at least; the networks look back at 16."""
_CLASSES = {
    "sam2": "Sam2VideoModel",
    "sam2_video": "Sam2VideoModel",
    "edgetam": "EdgeTamVideoModel",
    "edgetam_video": "EdgeTamVideoModel",
}
"""`model_type` of a config.json -> class of transformers."""


@dataclass(frozen=True)
class Sam:
    """A network that follows objects, and what prepares its inputs."""

    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device


def load_sam(name: str, device: torch.device | str = "cpu") -> Sam:
    """Load weights of SAM 2 or EdgeTAM for videos: safetensors and JSON alone, no code of theirs.

    Args:
        name: a folder, or a name on a hub, `hf:facebook/sam2.1-hiera-tiny`.

    Raises:
        UsageError: there is no such folder or model, it is another kind of model, or transformers is missing.
        StorageError: the hub cannot be reached.
        DataError: weights or settings that cannot be read.
    """
    folder = download(name) if is_hub_name(name) else Path(name)
    if not folder.is_dir():
        raise UsageError(f"--sam {name}: there is no such folder; give one with config.json and model.safetensors.")
    try:
        kind = str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"--sam {name}: config.json cannot be read ({error}); download the folder again.") from error
    if kind not in _CLASSES:
        raise UsageError(
            f"--sam {name} is a {kind}, which follows nothing; give SAM 2 or EdgeTAM, such as "
            "hf:facebook/sam2.1-hiera-tiny."
        )
    try:
        import transformers

        network, processor = getattr(transformers, _CLASSES[kind]), transformers.Sam2VideoProcessor
    except (ImportError, AttributeError) as error:
        raise UsageError("--sam needs transformers 5: pip install 'diffmae-video[sam]'.") from error
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True}
    try:
        model = network.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **options)
        made = Sam(model.eval().requires_grad_(False).to(device), processor.from_pretrained(folder, **options))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"--sam {name} cannot be loaded ({reason}); download the folder again.") from error
    return made


class _Frames:
    """Frames of a session, prepared when they are asked for: a long clip is never held at the network's size."""

    def __init__(self, frames: Sequence[np.ndarray], sam: Sam) -> None:
        self.frames, self.sam = frames, sam

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> torch.Tensor:
        video = np.ascontiguousarray(shrunk(self.frames[number], SIDE))[None]  # (1, h, w, 3)
        made = self.sam.processor.video_processor(videos=[video], device=self.sam.device, return_tensors="pt")
        return made.pixel_values_videos[0][0]  # (3, S, S)


@torch.inference_mode()
def follow_with_sam(
    sam: Sam,
    frames: Sequence[np.ndarray],
    keys: Mapping[int, np.ndarray],
    boxes: Mapping[int, np.ndarray] | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Followed:
    """Follow what is marked in one or more frames through a clip, forwards and backwards.

    Args:
        sam: see `load_sam`.
        frames: uint8 (h, w, 3) each, of one size; larger ones than SIDE are made smaller.
        keys: frame number -> all of the object in it, bool (H, W) at the clip's size. It is taken as it is.
        boxes: frame number -> a rectangle around the object, bool (H, W); the network finds the object in it.
        progress: called with the number of frames just done.

    Returns:
        The masks, at the size of those given.

    Raises:
        ValueError: nothing is marked, or a frame that is not there.
    """
    boxes = {number: box for number, box in (boxes or {}).items() if number not in keys}
    marked = sorted({*keys, *boxes})
    if not marked or not 0 <= marked[0] <= marked[-1] < len(frames):
        raise ValueError(f"marked frames {marked} of {len(frames)}; mark one among them")
    height, width = shrunk(frames[marked[0]], SIDE).shape[:2]
    found = Followed(next(iter({**keys, **boxes}.values())).shape, len(frames))
    session = sam.processor.init_video_session(inference_device=sam.device, dtype=torch.float32)
    session.processed_frames = _Frames(frames, sam)
    session.video_height, session.video_width = height, width

    def keep(output: Any) -> None:
        masks = sam.processor.post_process_masks([output.pred_masks], original_sizes=[[height, width]])[0]
        if output.frame_idx not in keys:
            found.set(output.frame_idx, resized(masks[0, 0].cpu().numpy().astype(bool), found.shape))

    for number in marked:
        if number in keys:
            found.set(number, keys[number])
            given: dict[str, Any] = {"input_masks": resized(keys[number], (height, width))}
        else:
            given = {"input_boxes": [[_corners(resized(boxes[number], (height, width)))]]}
        if not (keys[number] if number in keys else boxes[number]).any():
            continue
        sam.processor.add_inputs_to_inference_session(
            session, frame_idx=number, obj_ids=1, original_size=(height, width), **given
        )
        keep(sam.model(session, frame_idx=number))
    for reverse in (False, True):
        for output in sam.model.propagate_in_video_iterator(session, start_frame_idx=marked[0], reverse=reverse):
            keep(output)
            for outputs in session.output_dict_per_obj.values():
                past = outputs["non_cond_frame_outputs"]
                for number in [one for one in past if abs(one - output.frame_idx) > MEMORY]:
                    del past[number]  # it would be kept for good, two megabytes a frame
            progress(1)
    return found


def _corners(box: np.ndarray) -> list[float]:
    """Left, top, right and bottom of what is marked in bool (H, W)."""
    left, top, width, height = cv2.boundingRect(box.view(np.uint8))
    return [float(left), float(top), float(left + width), float(top + height)]
