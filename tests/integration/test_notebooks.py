"""The notebooks of the documentation run, and say what their text says."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows: streams by name, data by type; warnings of other packages (stderr) come and go."""
    kinds = {kind for output in cell.outputs for kind in output.get("data", {output.get("name"): ""})}
    return kinds - {"stderr"}


def _printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for cell in _code(notebook) for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_outputs_is_small_and_whole(path: Path) -> None:
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(output.output_type == "error" for cell in _code(notebook) for output in cell.outputs)
    assert any("image/jpeg" in _kinds(cell) for cell in _code(notebook))
    names = {output.get("name") for cell in _code(notebook) for output in cell.outputs}
    assert "stderr" not in names, "warnings of other packages, with paths of one machine"
    assert "\x1b" not in _printed(notebook), "bars of a terminal"
    assert all("execution" not in cell.metadata for cell in notebook.cells), "times of one machine"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    kept, run = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in _code(run):
        cell.outputs = []
    NotebookClient(run, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [_kinds(cell) for cell in _code(run)] == [_kinds(cell) for cell in _code(kept)]
    assert not list(tmp_path.iterdir()), "it leaves files where it stands"
    printed = _printed(run)
    if path.stem == "pretraining":
        before, after = (float(text) for text in re.findall(r"([\d.]+) in the (?:first|last) 20", printed))
        assert after < before / 5
        mean, first = (float(re.findall(rf"{name} +([\d.]+)", printed)[0]) for name in ("mean colour", "first step"))
        assert first < 0.7 * mean
    elif path.stem == "removal":
        ball, alone, others = (float(text) for text in re.findall(r"([\d.]+) dB", printed))
        assert ball < alone < others - 5
        assert int(re.findall(r"true one: (\d+)%", printed)[0]) > 60
        assert "0% from other frames, 100% painted" in printed
    else:
        probed = [float(text) for text in re.findall(r"val_top1 ([\d.]+), val_top5 [\d.]+, penalty", printed)]
        assert len(probed) == 2
        assert min(probed) > 0.2  # chance is 0.125
