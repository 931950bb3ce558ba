"""Each cure of compat.py, in a fresh interpreter where the module it cures has not been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def plain_import_fails(module: str) -> bool:
    return run(f"import {module}").returncode != 0


def test_torchvision_imports_and_transforms_work() -> None:
    done = run(
        "import diffmae_video.compat, torch\n"
        "from torchvision.transforms import v2\n"
        "from torchvision import tv_tensors\n"
        "video = tv_tensors.Video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))\n"
        "print(tuple(v2.Resize(4)(video).shape))"
    )
    assert done.stdout.strip() == "(2, 3, 4, 4)", done.stderr


def test_pytorchvideo_imports() -> None:
    done = run("import diffmae_video.compat, pytorchvideo.transforms, pytorchvideo.data.clip_sampling; print('ok')")
    assert done.stdout.strip() == "ok", done.stderr


def test_torchvision_cure_acts_only_where_the_plain_import_fails() -> None:
    done = run(
        "import sys\nfrom diffmae_video import compat\n"
        "print(bool(compat._libraries), compat.cure_torchvision(), compat.cure_pytorchvideo())"
    )
    needed = plain_import_fails("torchvision")
    assert done.stdout.split() == [str(needed), "False", "False"], done.stderr


def test_pytorchvideo_fails_without_the_cure() -> None:
    if not plain_import_fails("torchvision.transforms.functional_tensor"):
        pytest.skip("this torchvision still has functional_tensor")
    assert (
        "functional_tensor"
        in run(
            "import diffmae_video.compat, sys\n"
            "del sys.modules['torchvision.transforms.functional_tensor']\n"
            "import pytorchvideo.transforms"
        ).stderr
    )
