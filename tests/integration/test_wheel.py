"""The wheel holds everything, puts one name into site-packages, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("diffmae_video", "pipelines", "cli", "manifests", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_one_top_level_name_and_its_data_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"diffmae_video"}
    assert {"diffmae_video/py.typed", "diffmae_video/manifests/recipes/smoke.toml"} <= set(names)
    assert any(name.startswith("diffmae_video/manifests/datasets/") and name.endswith(".toml") for name in names)
    in_tree = {path.name for path in (ROOT / "manifests" / "recipes").glob("*.toml")}
    assert {Path(name).name for name in names if "manifests/recipes/" in name and name.endswith(".toml")} == in_tree
    assert any(name.endswith("LICENSE") for name in names)


def test_an_installed_wheel_runs_a_stage(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import sys, diffmae_video\n"
        f"assert diffmae_video.__file__.startswith({str(site)!r}), diffmae_video.__file__\n"
        "from diffmae_video.cli.app import run\nsys.exit(run(sys.argv[1:]))"
    )
    for arguments in (["recipes"], ["demo-data", "clips", "--train", "8", "--val", "8"], ["shard", "clips", "shards"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "shards" / "manifest.json").is_file()
