"""Progress without a terminal: plain lines that do not become thousands."""

from __future__ import annotations

import time

import pytest

from diffmae_video.pipelines.console import progress


def test_plain_lines_come_further_apart_the_longer_the_work_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = []
    with progress(48 * 3600, "work", "steps") as line:
        for _hour in range(48):
            for _ in range(720):
                now += 5.0
                line.update(5)
            shown.append(capsys.readouterr().out.count("work: "))
    assert 50 < shown[0] < 200
    assert 1 <= shown[-1] <= 2
    assert sum(shown) < 500
