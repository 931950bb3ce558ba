"""Every pin of constraints.txt can be installed on every Python that the project names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LANGUAGE = "Programming Language :: Python :: "
PYTHONS = [text.removeprefix(LANGUAGE) for text in PROJECT["classifiers"] if text.startswith(f"{LANGUAGE}3.")]
SOURCE_ONLY = {"pytorchvideo"}  # published as source, pure Python


def _pins(python: str) -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate(here)]


def test_every_pin_lies_in_the_range_that_the_project_states() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    ranges = {Requirement(text).name.lower().replace("_", "-"): Requirement(text) for group in groups for text in group}
    for python in PYTHONS:
        for pin in _pins(python):
            stated = ranges.get(pin.name.lower().replace("_", "-"))
            version = next(iter(pin.specifier)).version
            assert stated is None or stated.specifier.contains(Version(version)), pin


def _resolve(python: str, pins: list[str], target: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
    ]
    command += ["--ignore-installed", "--only-binary=:all:", "--python-version", python, "--target", str(target)]
    return subprocess.run([*command, *pins], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_has_a_wheel(python: str, tmp_path: Path) -> None:
    if _resolve(PYTHONS[0], ["pip"], tmp_path).returncode:
        pytest.skip("the package index does not answer")
    pins = [f"{pin.name}{pin.specifier}" for pin in _pins(python) if pin.name not in SOURCE_ONLY]
    done = _resolve(python, pins, tmp_path)
    assert done.returncode == 0, done.stderr
