"""Videos with a mask of every frame, in the layout of DAVIS 2017 (https://davischallenge.org).

`JPEGImages/480p/VIDEO/00000.jpg`, `Annotations/480p/VIDEO/00000.png` (values are numbers of objects, 0 is background)
and `ImageSets/2017/val.txt`, a name of a video a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from diffmae_video.data.images import open_image, read_image
from diffmae_video.errors import DataError, UsageError

VOID = 255
"""Value of pixels that belong to nothing in particular; they count as background."""


@dataclass(frozen=True)
class MaskedVideo:
    """Files of one video: frames in their order, and the mask of each, None where it has none."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]

    def frame(self, index: int) -> Tensor:
        """uint8 (C, H, W)."""
        return read_image(self.frames[index])

    def mask(self, index: int) -> np.ndarray | None:
        """int64 (H, W): 0 is background, objects count from 1.

        Raises:
            DataError: it cannot be read, or has colours where numbers should be.
        """
        path = self.masks[index]
        if path is None:
            return None
        with open_image(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise DataError(
                    f"{path} is a picture of mode {image.mode}; a mask holds one number a pixel (a palette)."
                )
            values = np.asarray(image).astype(np.int64)
        return np.where(values == VOID, 0, values)


def list_davis(folder: str | Path, split: str = "val", resolution: str = "480p") -> list[MaskedVideo]:
    """The videos of a split.

    Raises:
        UsageError: the folder is not laid out like DAVIS, or has no such split.
        DataError: a video without frames or without the mask of its first one.
    """
    root = Path(folder)
    lists = sorted(root.glob(f"ImageSets/*/{split}.txt"))
    if not (root / "JPEGImages" / resolution).is_dir() or not (root / "Annotations" / resolution).is_dir():
        raise UsageError(
            f"--data {folder} has no JPEGImages/{resolution} and Annotations/{resolution}; give that of DAVIS."
        )
    if not lists:
        known = ", ".join(sorted({path.stem for path in root.glob("ImageSets/*/*.txt")})) or "none"
        raise UsageError(
            f"--data {folder} has no ImageSets/2017/{split}.txt (it has lists for: {known}); set data.eval_split."
        )
    videos = []
    try:
        names = dict.fromkeys(lists[-1].read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{lists[-1]} cannot be read ({error}); write it as text in UTF-8.") from error
    for name in names:
        if "/" in name or name.startswith("."):
            raise DataError(f"{lists[-1]} names {name!r}, which is no name of a video; correct it.")
        frames = tuple(sorted((root / "JPEGImages" / resolution / name).glob("*.jpg")))
        masks = [root / "Annotations" / resolution / name / f"{frame.stem}.png" for frame in frames]
        if not frames or not masks[0].is_file():
            missing = masks[0] if frames else root / "JPEGImages" / resolution / name
            raise DataError(f"{missing} is missing; {lists[-1]} names that video: copy it again.")
        videos.append(MaskedVideo(name, frames, tuple(path if path.is_file() else None for path in masks)))
    if not videos:
        raise DataError(f"{lists[-1]} names no video; give the list of DAVIS.")
    return videos
