"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard, pictures/, Weights & Biases."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video.errors import UsageError
from diffmae_video.files import replacing, write_atomic


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


class RunLog:
    """Writes what a run reports.

    Args:
        directory: of the run.
        step: the step the run continues from; later lines, of work that was lost, are dropped.
        wandb: also log to Weights & Biases.
        settings: shown there.
    """

    def __init__(self, directory: Path, step: int, wandb: bool = False, settings: dict[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        self.path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1, flush_secs=30)
        self._wandb = _start_wandb(directory, settings or {}) if wandb else None

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (written at once), and its numbers elsewhere."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Images uint8 (H, W, 3) become pictures/NAME-STEP.png; videos uint8 (T, H, W, 3) go to TensorBoard."""
        import torch
        from PIL import Image

        folder = self.directory / "pictures"
        folder.mkdir(exist_ok=True)
        for name, array in pictures.items():
            if array.ndim == 4:
                video = torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)[None]  # (1, T, C, H, W)
                _add_video(self._board, name, video, step)
                continue
            path = folder / f"{name}-{step:08d}.png"
            with replacing(path) as temporary:
                Image.fromarray(array).save(temporary, format="PNG")
            self._board.add_image(name, array, step, dataformats="HWC")
            if self._wandb is not None:
                import wandb  # pyright: ignore[reportMissingImports] - an extra

                self._wandb.log({name: wandb.Image(array)}, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _add_video(board: Any, name: str, video: Any, step: int, fps: int = 4) -> None:
    """A GIF in TensorBoard. `add_video` itself needs moviepy; the summary it writes is this one."""
    import io

    from PIL import Image
    from tensorboard.compat.proto import summary_pb2

    summary: Any = summary_pb2  # its names are made when it is imported

    frames = [Image.fromarray(frame) for frame in video[0].permute(0, 2, 3, 1).numpy()]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    image = summary.Summary.Image(
        height=video.shape[3], width=video.shape[4], colorspace=3, encoded_image_string=buffer.getvalue()
    )
    board._get_file_writer().add_summary(summary.Summary(value=[summary.Summary.Value(tag=name, image=image)]), step)


def _start_wandb(directory: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise UsageError("train.wandb = true needs Weights & Biases: pip install 'diffmae-video[wandb]'.") from error
    name = directory / "wandb.id"  # one run there, however often it is interrupted here
    if not name.exists():
        write_atomic(name, secrets.token_hex(8))
    identity = name.read_text(encoding="utf-8")
    return wandb.init(
        project="diffmae-video", name=directory.name, id=identity, dir=str(directory), config=settings, resume="allow"
    )
