"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run in parallel processes

import diffmae_video.compat  # noqa: F401 - before timm and transformers, which import torchvision

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real clips (clips/, hostile/, tennis7/); tests that need it skip where it is missing."""
    folder = Path(os.environ.get("DIFFMAE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real clips here: set DIFFMAE_TEST_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def no_user_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see no DIFFMAE_ variable of the person who runs them, nor the width of their terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith("DIFFMAE_") and name != "DIFFMAE_TEST_DATA"]:
        monkeypatch.delenv(name)
