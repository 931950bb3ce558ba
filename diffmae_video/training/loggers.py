"""Where numbers and pictures of a run also go, by `train.log_to`: TensorBoard, Weights & Biases, Trackio, MLflow.

A logger is called with what a run is, and returns something with three methods: `metrics(step, numbers)`,
`picture(step, name, array)` and `close()`. Its package is imported when a run starts that names it.
"""

from __future__ import annotations

import importlib
import io
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffmae_video.errors import UsageError
from diffmae_video.files import write_atomic
from diffmae_video.registry import loggers


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run."""

    directory: Path
    step: int
    """The step it continues from; what was logged later is of work that was lost."""
    project: str
    settings: dict[str, Any]

    @property
    def settings_flat(self) -> dict[str, Any]:
        """Settings by dotted names."""
        flat: dict[str, Any] = {}
        for section, table in self.settings.items():
            flat |= (
                {f"{section}.{key}": value for key, value in table.items()}
                if isinstance(table, dict)
                else {section: table}
            )
        return flat

    def saved(self, file: str) -> str | None:
        """What `save` kept in the run's folder under that name, so that an interrupted run stays one run there."""
        path = self.directory / file
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None

    def save(self, file: str, text: str) -> str:
        """Keep a name that the other side gave or gets; returns it."""
        write_atomic(self.directory / file, text)
        return text


class Logger(Protocol):
    """What `RunLog` calls."""

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step."""
        ...

    def picture(self, step: int, name: str, array: np.ndarray) -> None:
        """A picture uint8 (H, W, 3) or a video uint8 (T, H, W, 3)."""
        ...

    def close(self) -> None:
        """Flush and end; called once."""
        ...


def need(module: str, name: str) -> Any:
    """The package of a logger, imported now.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"train.log_to names {name}, whose package is not installed ({error}): pip install 'diffmae-video[{name}]'."
        ) from error


@loggers.register("tensorboard")
class TensorBoard:
    """Event files in tensorboard/ of the run's folder: `tensorboard --logdir RUN`."""

    def __init__(self, run: LoggedRun) -> None:
        board = need("torch.utils.tensorboard", "tensorboard")
        self._writer = board.SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.step + 1, flush_secs=30)

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """One scalar a name."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, or a GIF."""
        if array.ndim == 4:
            _add_gif(self._writer, name, array, step)
        else:
            self._writer.add_image(name, array, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class _Wandb:
    """Weights & Biases, and Trackio, which has its interface."""

    module = "wandb"

    def __init__(self, run: LoggedRun) -> None:
        self._library = need(self.module, self.module)
        identity = run.saved(f"{self.module}.id") or run.save(f"{self.module}.id", secrets.token_hex(8))
        self._run = self._start(run, identity)

    def _start(self, run: LoggedRun, identity: str) -> Any:
        return self._library.init(
            project=run.project,
            name=run.directory.name,
            id=identity,
            dir=str(run.directory),
            config=run.settings,
            resume="allow",
        )

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """One line."""
        self._run.log(numbers, step=step)

    def picture(self, step: int, name: str, array: np.ndarray) -> None:
        """An image; videos stay on disk."""
        if array.ndim == 3:
            self._run.log({name: self._library.Image(array)}, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


@loggers.register("wandb")
class WeightsAndBiases(_Wandb):
    """Weights & Biases; one run there, however often it is interrupted here."""


@loggers.register("trackio")
class Trackio(_Wandb):
    """Trackio, Hugging Face's tracker on this machine: `trackio show --project NAME`."""

    module = "trackio"

    def _start(self, run: LoggedRun, identity: str) -> Any:
        return self._library.init(
            project=run.project, name=f"{run.directory.name}-{identity[:4]}", config=run.settings_flat, resume="allow"
        )


@loggers.register("mlflow")
class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI; the project is its experiment."""

    def __init__(self, run: LoggedRun) -> None:
        self._library = need("mlflow", "mlflow")
        self._library.set_experiment(run.project)
        known = run.saved("mlflow.id")
        began = self._library.start_run(run_id=known, run_name=None if known else run.directory.name)
        if known is None:
            run.save("mlflow.id", began.info.run_id)
            self._library.log_params({name: str(value)[:500] for name, value in run.settings_flat.items()})

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """One number a name; names may hold what MLflow allows."""
        self._library.log_metrics(numbers, step=step)

    def picture(self, step: int, name: str, array: np.ndarray) -> None:
        """An artifact; videos stay on disk."""
        if array.ndim == 3:
            self._library.log_image(array, artifact_file=f"{name}-{step:08d}.png")

    def close(self) -> None:
        """End the run there; a later try continues it."""
        self._library.end_run()


def _add_gif(writer: Any, name: str, array: np.ndarray, step: int, fps: int = 4) -> None:
    """A video uint8 (T, H, W, 3). `add_video` itself needs moviepy; the summary it writes is this one."""
    from PIL import Image
    from tensorboard.compat.proto import summary_pb2

    summary: Any = summary_pb2  # its names are made when it is imported
    frames = [Image.fromarray(frame) for frame in np.ascontiguousarray(array)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    image = summary.Summary.Image(
        height=array.shape[1], width=array.shape[2], colorspace=3, encoded_image_string=buffer.getvalue()
    )
    writer._get_file_writer().add_summary(summary.Summary(value=[summary.Summary.Value(tag=name, image=image)]), step)
