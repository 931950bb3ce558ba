"""Annotation files as people write them: which file has which label, in any of the usual dialects.

Separators are tabs, commas, semicolons or spaces; a header, comments (`#`), quotes and blank lines may be there; labels
are numbers or names. A line that cannot be understood is told, never left out; where columns are not clear, the file is
refused.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass

from diffmae_video.data.listing import IMAGE_EXTENSIONS, SPLITS, VIDEO_EXTENSIONS, Tree, seconds_of
from diffmae_video.errors import DataError
from diffmae_video.files import printable

SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".list")
MOST_CLASSES = 100_000
"""A number above is no label (a size, an id): a class is made for every number below the highest."""
_EXTENSIONS = "|".join(sorted(VIDEO_EXTENSIONS | IMAGE_EXTENSIONS, key=len, reverse=True))
_MEDIA = re.compile(rf".*\.(?:{_EXTENSIONS})", re.IGNORECASE)
_SPACED = re.compile(rf"\"?(.+?\.(?:{_EXTENSIONS}))\"?\s+(\S.*)", re.IGNORECASE)
_EXCEL = re.compile(r"sep=.")
_COLUMNS = {
    "path": "path file filename file_name filepath file_path video video_path video_name clip clip_path image img "
    "image_path img_path image_name",
    "label": "label class action category target label_name class_name classname labels gesture activity "
    "label_id class_id class_index label_index labelid classid y",
    "split": "split subset set partition fold_name",
    "start": "start time_start start_time begin start_sec",
    "end": "end time_end end_time stop end_sec",
}
_NAMES = {name: (column, place) for column, names in _COLUMNS.items() for place, name in enumerate(names.split())}


@dataclass(frozen=True)
class Row:
    """One line: the path as it is written, and what is said of it."""

    path: str
    label: str | None = None
    """As written, with numbers in plain form; None for none and for negative numbers."""
    split: str | None = None
    start: float | None = None
    end: float | None = None
    alone: bool = False
    """The file lists paths and nothing else."""
    problem: str = ""
    """Why the line cannot be used; `path` is then the line itself."""


def read_annotation(tree: Tree, name: str, certain: bool = False) -> list[Row] | None:
    """The rows of a file of the tree, or None where it does not look like annotation.

    Args:
        certain: the user named it, so that None is no answer.

    Raises:
        DataError: it looks like annotation, and which column is what cannot be told.
    """
    lines = [
        (number, line.strip())
        for number, line in enumerate(re.split(r"\r\n|\r|\n", tree.text(name)), 1)
        if line.strip() and (not line.lstrip().startswith("#") or _is_media(tree, line.split(",")[0].strip()))
    ]
    lines = lines[_EXCEL.fullmatch(lines[0][1]) is not None :] if lines else lines
    file = _File(tree, name, lines)
    if not lines:
        if certain:
            raise DataError(f"{tree.root}/{name} is empty; give a table with the columns path,label.")
        return None
    tables = {sign: file.cells(sign) for sign in ("\t", ",", ";", "|")}
    score = {
        sign: sum(len(row) > 1 and any(_is_media(tree, cell) for cell in row) for row in rows)
        for sign, rows in tables.items()
    }
    score["spaced"] = sum(_SPACED.fullmatch(line) is not None for _, line in lines)
    if not any(score.values()):  # names without an extension
        tables[" "] = file.cells(" ")
        score |= {sign: sum(len(row) > 1 and tree.has_stem(row[0]) for row in rows) for sign, rows in tables.items()}
    score["alone"] = sum(_is_media(tree, line.strip('"')) for _, line in lines)
    sign = max(score, key=lambda one: score[one])
    if score[sign] * 2 < len(lines) - 1 or score[sign] == 0:
        if not certain:
            for rows in tables.values():  # a header like path,label says what it is
                if {"path", "label"} <= {_NAMES.get(cell.lower(), ("",))[0] for cell in rows[0]}:
                    raise DataError(
                        f"{file.where} names no file of the folder; correct it, or name --layout folders to go by "
                        "folders instead."
                    )
            return None
        sign = next((one for one, rows in tables.items() if _is_header([cell.lower() for cell in rows[0]])), ",")
    if sign == "alone":
        return file.alone()
    return file.spaced() if sign == "spaced" else file.table(tables[sign])


class _File:
    """The lines of one annotation file."""

    def __init__(self, tree: Tree, name: str, lines: list[tuple[int, str]]):
        self.tree, self.lines, self.where = tree, lines, f"{tree.root}/{name}"

    def cells(self, sign: str) -> list[list[str]]:
        """Every line cut at a separator, quotes respected."""
        try:
            rows = csv.reader([line for _, line in self.lines], delimiter=sign, skipinitialspace=True)
            cells = [[cell.strip() for cell in row] for row in rows]
        except csv.Error:
            cells = []
        return cells if len(cells) == len(self.lines) else [[line] for _, line in self.lines]

    def must(self, condition: bool, number: int, why: str) -> bool:
        """True, or the error that names the line."""
        if not condition:
            raise DataError(
                f"{self.where}, line {number}: {why}; correct it, or name --layout folders to go by folders instead."
            )
        return True

    def alone(self) -> list[Row]:
        """Lines that are paths and nothing else."""
        paths = [(number, line.strip('"')) for number, line in self.lines]
        good = [_is_media(self.tree, path) for _, path in paths]
        return [
            Row(path, alone=True) if fine else _bad(number, path, "no path, though the others are")
            for fine, (number, path) in zip(good, paths, strict=True)
        ]

    def spaced(self) -> list[Row]:
        """Lines of `path label` or `path total label`; labels that are names may hold spaces."""
        rows = []
        for place, (number, line) in enumerate(self.lines):
            match = _SPACED.fullmatch(line)
            if match is None:
                if place or not _is_header(line.lower().split()):
                    rows.append(_bad(number, line, "no path and label"))
                continue
            said = re.sub(r"^((?:[+-]?[0-9]+\s+)+)#.*", r"\1", match[2]).split()  # a number, then a comment
            if all(_is_number(word) for word in said):
                if len(said) > 2:
                    rows.append(_bad(number, line, f"{len(said)} numbers, of which one would be the label"))
                    continue
                said = said[-1:]
            rows.append(Row(match[1], _label(" ".join(said).strip('"'))))
        return rows

    def table(self, cells: list[list[str]]) -> list[Row]:
        """Rows of cells, with a header or without."""
        first, lines = [cell.lower() for cell in cells[0]], self.lines
        header = _is_header(first) or not any(_is_media(self.tree, cell) or _is_number(cell) for cell in cells[0])
        if header:
            cells, lines = cells[1:], lines[1:]
        width = len(first) if header else max(len(row) for row in cells)
        full = [row + [""] * (width - len(row)) for row in cells]
        path = self._path_column(first if header else [], full, width)
        columns = _named(first, path) if header else self._guessed(full, path, width)
        if columns is None:
            raise DataError(
                f"{self.where}, line {self.lines[0][0]}: which column is the label? Give it a header like "
                "path,label,split, or name --layout folders to go by folders."
            )
        rows = []
        for row, (number, line) in zip(full, lines, strict=True):
            values = {column: row[place] for column, place in columns.items()}
            if not any(row):  # Excel keeps rows that were emptied
                continue
            if len(row) > width:
                rows.append(_bad(number, line, f"{len(row)} cells, the header has {width}"))
            elif not row[path] or not (header or values["label"]):
                rows.append(_bad(number, line, "no path and label"))
            else:
                label = _label(values.get("label", ""))
                try:
                    start, end = (seconds_of(values.get(name)) for name in ("start", "end"))
                except ValueError:
                    rows.append(_bad(number, line, "start and end are no times in seconds", label))
                    continue
                if start is not None and end is not None and end <= start:
                    rows.append(_bad(number, line, "it ends before it starts", label))
                    continue
                rows.append(Row(row[path], label, values.get("split") or None, start, end))
        return rows

    def _path_column(self, header: list[str], cells: list[list[str]], width: int) -> int:
        known = [place for place, name in enumerate(header) if _NAMES.get(name, ("",))[0] == "path"]
        if known:
            return min(known, key=lambda place: _NAMES[header[place]][1])
        return max(range(width), key=lambda place: sum(_is_media(self.tree, row[place]) for row in cells))

    def _guessed(self, cells: list[list[str]], path: int, width: int) -> dict[str, int] | None:
        """Columns of a table without a header, from what stands in them: label, split, start and end."""
        rest = [place for place in range(width) if place != path]
        numbers = [all(_is_number(row[place]) or not row[place] for row in cells) for place in rest]
        splits = [all(row[place].lower() in SPLITS or not row[place] for row in cells) for place in rest]
        if len(rest) == 1:
            return {"label": rest[0]}
        if len(rest) == 2 and all(numbers):
            return {"label": rest[1]}  # path, total, label
        if len(rest) == 2 and (splits[1] or splits[0]):
            return dict(zip(("label", "split") if splits[1] else ("split", "label"), rest, strict=True))
        if len(rest) == 4 and splits[1] and numbers[2] and numbers[3]:
            return dict(zip(("label", "split", "start", "end"), rest, strict=True))
        if len(rest) == 3 and not numbers[0] and numbers[1] and numbers[2]:
            return dict(zip(("label", "start", "end"), rest, strict=True))
        return None


def _named(header: list[str], path: int) -> dict[str, int] | None:
    """Columns by the names of a header; one that nobody knows is the label if it is the only one."""
    columns: dict[str, int] = {}
    for column in ("label", "split", "start", "end"):
        known = [place for place, name in enumerate(header) if _NAMES.get(name, ("",))[0] == column and place != path]
        if known:
            columns[column] = min(known, key=lambda place: _NAMES[header[place]][1])
    if "label" not in columns:
        rest = [place for place in range(len(header)) if place not in (path, *columns.values())]
        if len(rest) > 1:
            return None
        if rest:
            columns["label"] = rest[0]
    return columns


def numeric_classes(labels: Iterable[str]) -> list[str] | None:
    """Class names for labels that are all numbers: every number up to the highest, so that each keeps its value.

    Raises:
        DataError: one is too high to be a label.
    """
    found = set(labels)
    if not found or not all(label.isdecimal() for label in found):
        return None
    most = max(int(label) for label in found)
    if most >= MOST_CLASSES:
        raise DataError(f"The label {most} is above {MOST_CLASSES - 1}; labels are counted from 0, correct it.")
    return [str(number) for number in range(most + 1)]


def by_value(names: Iterable[str]) -> list[str]:
    """Class names in order: by value where all are numbers, else as text."""
    found = sorted(set(names))
    return sorted(found, key=int) if found and all(name.isdecimal() for name in found) else found


def _bad(number: int, line: str, why: str, label: str | None = None) -> Row:
    return Row(line, label, problem=f"line {number}: {why}")


def _label(text: str) -> str | None:
    if number := re.fullmatch(r"([+-]?[0-9]{1,15})(?:\.0*)?", text):  # pandas writes 3.0 where some are missing
        return str(int(number[1])) if int(number[1]) >= 0 else None
    if text in ("nan", "NaN"):  # and this for what is missing
        return None
    return printable(text).strip() or None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]*)?", text) is not None


def _is_header(words: list[str]) -> bool:
    return bool(words) and sum(word in _NAMES for word in words) * 2 >= len(words)


def _is_media(tree: Tree, text: str) -> bool:
    return _MEDIA.fullmatch(text) is not None or text in tree.present
