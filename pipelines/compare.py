"""`diffmae compare A B`: are two evaluations of the same videos different, and where."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.metrics import PairedTest, paired_test, top_k_hits
from diffmae_video.evaluation.predictions import Predictions, class_difference, read_predictions, write_json
from diffmae_video.files import read_json
from diffmae_video.pipelines import console
from diffmae_video.rendering.report import Report


@dataclass(frozen=True)
class ClassDifference:
    """Top-1 of one class under both models."""

    name: str
    videos: int
    a: float
    b: float


@dataclass(frozen=True)
class CompareResult:
    """Paired comparison of two evaluations."""

    views_a: str
    views_b: str
    top1_a: float
    top1_b: float
    test: PairedTest
    classes: tuple[ClassDifference, ...]  # largest absolute difference first
    out: Path | None
    seed: int = 0
    """Of the bootstrap."""


def compare_evaluations(
    a: Path,
    b: Path,
    *,
    views: str | None = None,
    common: bool = False,
    bootstrap: int = 10_000,
    seed: int = 0,
    out: Path | None = None,
) -> CompareResult:
    """Compare two `diffmae eval` folders video by video.

    Args:
        views: protocol to compare, e.g. `7x3`; the last of each evaluation by default.
        common: compare on the videos both have instead of refusing when the sets differ.
        bootstrap: resamples of the paired interval.
        out: folder for compare.json and report.html; nothing is written without it.

    Raises:
        DataError: a folder holds no predictions, or the two do not have the same videos, labels or classes.
        UsageError: a protocol that an evaluation does not have, or `out` holds something.
    """
    left, right = read_predictions(a), read_predictions(b)
    views_a, views_b = _choose(left, views, a), _choose(right, views, b)
    rows_a, rows_b = _align(left, right, a, b, common)
    labels = left.labels[rows_a]
    hits_a = top_k_hits(left.probabilities[views_a][rows_a], labels, 1)
    hits_b = top_k_hits(right.probabilities[views_b][rows_b], labels, 1)
    test = paired_test(hits_a, hits_b, bootstrap=bootstrap, seed=seed)
    differences = []
    for index, name in enumerate(left.classes):
        of_class = labels == index
        if count := int(of_class.sum()):
            of_a, of_b = hits_a[of_class].double().mean().item(), hits_b[of_class].double().mean().item()
            differences.append(ClassDifference(name, count, of_a, of_b))
    differences.sort(key=lambda one: (-abs(one.b - one.a), one.name))
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} already holds something; name another folder or remove it.")
    result = CompareResult(
        views_a,
        views_b,
        hits_a.double().mean().item(),
        hits_b.double().mean().item(),
        test,
        tuple(differences),
        out,
        seed,
    )
    if out is not None:
        _write(result, a, b, out)
    return result


def print_comparison(result: CompareResult, name_a: str, name_b: str, most: int = 10) -> None:
    """Print the comparison as two tables and one sentence."""
    test = result.test
    rows = [
        [f"A  {name_a}", _tested(name_a), result.views_a, result.top1_a * 100],
        [f"B  {name_b}", _tested(name_b), result.views_b, result.top1_b * 100],
    ]
    console.table(f"Top-1 on the same {test.videos} videos", ["evaluation", "of", "views", "top-1 %"], rows)
    console.say(verdict(result))
    shown = [[one.name, one.videos, one.a * 100, one.b * 100, (one.b - one.a) * 100] for one in result.classes[:most]]
    console.table("Largest differences by class", ["class", "videos", "A %", "B %", "B - A"], shown)


def _tested(name: str) -> str:
    """What an evaluation's folder says that it tested; empty where it says nothing."""
    return str(read_json(Path(name) / "eval.json").get("checkpoint") or "")


def verdict(result: CompareResult) -> str:
    """The comparison in one sentence."""
    test = result.test
    return (
        f"B - A = {test.difference * 100:+.2f} points (95% interval {test.interval.low * 100:+.2f} to "
        f"{test.interval.high * 100:+.2f}); only A right on {test.only_a}, only B on {test.only_b}; McNemar's exact "
        f"p = {test.p_value:.3g}."
    )


def _choose(predictions: Predictions, views: str | None, where: Path) -> str:
    names = list(predictions.probabilities)
    if views is None:
        return names[-1]
    if views not in names:
        raise UsageError(f"--views {views}: {where} was evaluated with {', '.join(names)}; choose one of them.")
    return views


def _align(left: Predictions, right: Predictions, a: Path, b: Path, common: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the same videos in both, (n,) each."""
    if difference := class_difference(left.classes, right.classes):
        raise DataError(f"{a} and {b} have different classes: {difference}; compare evaluations of one data set.")
    place = {key: row for row, key in enumerate(right.keys)}
    if not common and set(left.keys) != set(place):
        key = min(set(left.keys) ^ set(place))
        where = "the first" if key in left.keys else "the second"
        raise DataError(
            f"{a} and {b} do not hold the same videos: {key} is only in {where}; evaluate both on one split, or "
            "compare what they share with --common."
        )
    rows_a = [row for row, key in enumerate(left.keys) if key in place]
    if not rows_a:
        raise DataError(f"{a} and {b} share no video; compare evaluations of one split.")
    rows_b = [place[left.keys[row]] for row in rows_a]
    index_a, index_b = torch.tensor(rows_a), torch.tensor(rows_b)
    if not torch.equal(left.labels[index_a], right.labels[index_b]):
        row = int((left.labels[index_a] != right.labels[index_b]).nonzero()[0])
        raise DataError(
            f"{a} and {b} give {left.keys[rows_a[row]]} different labels; compare evaluations of one split."
        )
    return index_a, index_b


def _write(result: CompareResult, a: Path, b: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    facts = asdict(result) | {"a": str(a), "b": str(b), "out": str(out)}
    write_json(out / "compare.json", facts)
    report = Report("Comparison of two evaluations")
    report.text(f"A: `{a}` ({result.views_a}), B: `{b}` ({result.views_b}).\n\n**{verdict(result)}**")
    test = result.test
    report.table(
        "Videos by who has them right",
        ["", "B right", "B wrong"],
        [["A right", test.both, test.only_a], ["A wrong", test.only_b, test.neither]],
    )
    rows = [[one.name, one.videos, one.a * 100, one.b * 100, (one.b - one.a) * 100] for one in result.classes]
    report.table("Top-1 by class, %", ["class", "videos", "A", "B", "B - A"], rows)
    report.write(out / "report.html")
