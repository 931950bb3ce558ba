"""How long a model of one clip is trained, as text: `auto`, `off`, `90s`, `10m`, `1h`, `400steps`."""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMS = "auto, off, a time (90s, 10m, 1h) or a number of steps (400steps)"
"""What may be written."""
SECONDS = {"cpu": 180.0, "mps": 60.0, "cuda": 30.0}
"""What `auto` means on a kind of device."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 7 * 24 * 3600.0


@dataclass(frozen=True)
class FitLength:
    """How long to train: seconds or optimizer steps, one of them."""

    seconds: float | None = None
    steps: int | None = None

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        seconds = self.seconds or 0.0
        return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def fit_length_on(asked: FitLength | None, device: str) -> FitLength:
    """The length that was asked for, or what `auto` means on a kind of device, `cpu`, `cuda` or `mps`."""
    return asked or FitLength(seconds=SECONDS[device])


def read_fit_length(text: str) -> FitLength | None:
    """The length that a text names; None for `auto` and `off`.

    Raises:
        ValueError: it is none of FORMS, or longer than a week.
    """
    if text in ("auto", "off"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)|([1-9]\d{0,8})steps?", text)
    if match is None:
        raise ValueError(f"{text!r} is no length of a fit; write {FORMS}")
    if match[3]:
        return FitLength(steps=int(match[3]))
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 1 <= seconds <= _LONGEST:
        raise ValueError(f"{text!r} is not between a second and a week")
    return FitLength(seconds=seconds)
