"""Where numbers and pictures of a run go: metrics.jsonl, pictures/, and the loggers that `train.log_to` names."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmae_video.errors import DiffmaeError, UsageError
from diffmae_video.files import replacing, write_atomic
from diffmae_video.registry import loggers

if TYPE_CHECKING:
    from diffmae_video.training.loggers import LoggedRun, Logger


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
        log_to: names of loggers (training/loggers.py).
        project: under which trackers keep it.
        settings: shown there.
        say: tells the user one line.

    A logger that fails later (its server is gone) is left out from then on, and told once: the training does not end
    for it.

    Raises:
        UsageError: the package of a logger is not installed, or it does not start.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        log_to: Sequence[str] = ("tensorboard",),
        project: str = "diffmae-video",
        settings: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        from diffmae_video.training.loggers import LoggedRun

        self.directory = directory
        self.path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        run = LoggedRun(directory, step, project, settings or {})
        self._say = say
        self._loggers: dict[str, Logger] = {}
        try:
            for name in log_to:
                self._loggers[name] = self._start(name, run)
        except BaseException:
            self._close_loggers()
            raise
        self._file = self.path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (written at once), and its numbers elsewhere."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        self._tell(lambda logger: logger.metrics(step, numbers))

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Images uint8 (H, W, 3) become pictures/NAME-STEP.png; they and videos uint8 (T, H, W, 3) go to loggers."""
        from PIL import Image

        folder = self.directory / "pictures"
        folder.mkdir(exist_ok=True)
        for name, array in pictures.items():
            if array.ndim == 3:
                with replacing(folder / f"{name}-{step:08d}.png") as temporary:
                    Image.fromarray(array).save(temporary, format="PNG")
            self._tell(lambda logger, name=name, array=array: logger.picture(step, name, array))

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._close_loggers()

    def _close_loggers(self) -> None:
        self._tell(lambda logger: logger.close())
        self._loggers = {}

    @staticmethod
    def _start(name: str, run: LoggedRun) -> Logger:
        made = loggers.get(name)
        try:
            return made(run)
        except DiffmaeError:
            raise
        except Exception as error:
            told = " ".join(str(error).split())
            raise UsageError(
                f"train.log_to names {name}, which does not start ({type(error).__name__}: {told.rstrip('.')}); set "
                "it up or leave it out."
            ) from error

    def _tell(self, call: Callable[[Logger], None]) -> None:
        """Call every logger; one that fails is left out from then on."""
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                del self._loggers[name]
                told = " ".join(str(error).split())
                self._say(
                    f"Warning: {name} gets no more of this run ({type(error).__name__}: {told}); metrics.jsonl and "
                    "report.html go on."
                )
