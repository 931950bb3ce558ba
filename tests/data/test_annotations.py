"""Annotation in any usual dialect says the same; what is not understood is counted; no file stands in for another."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmae_video.data.annotations import read_annotation
from diffmae_video.data.layouts import list_samples
from diffmae_video.data.listing import Tree
from diffmae_video.errors import DataError
from diffmae_video.registry import layouts

FILES = ("a/1.mp4", "a/two words.mp4", "b/1.mp4", "b/3.MKV", "c/x.y.mp4", "c/ünï.webm")
NAMES = ("run", "jump", "play guitar", "sit", "run", "cut, chop")
NUMBERS = ("10", "2", "0", "-1", "10", "7")


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(root)


def found(source: str, **options: object) -> dict[str, tuple[str, str | None]]:
    return {item.path: (item.split, item.label) for item in list_samples(source, **options).items}


@st.composite
def dialects(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A text that labels FILES, and the labels."""
    sign, labels = draw(st.sampled_from(["\t", ",", ";", " "])), draw(st.sampled_from([NAMES, NUMBERS]))
    prefix = draw(st.sampled_from(["", "/data/somewhere/", "./"]))
    quoted, header = draw(st.booleans()), draw(st.booleans())
    total = labels is NUMBERS and not header and draw(st.booleans())
    named = st.sampled_from(["path,label", "video,action", "filename,class", "File_Name,Target", "video_path,whatever"])
    columns = draw(named).split(",")
    lines = []
    for path, label in zip(FILES, labels, strict=True):
        cells = [prefix + path, *(["300"] if total else []), label]
        if quoted or sign in cells[-1] or (sign == " " and header):
            cells = [f'"{cell}"' for cell in cells]
        lines.append(sign.join(cells))
    if header:
        lines.insert(0, sign.join(columns))
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), "# made by hand")
    if draw(st.booleans()):
        lines.insert(draw(st.integers(1, len(lines))), "")
    text = draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    return draw(st.sampled_from(["", "\ufeff"])) + text + draw(st.sampled_from(["", "\n"])), labels


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dialects(), st.sampled_from(["train.txt", "train.csv", "labels.csv", "annotations/train_list.tsv"]))
def test_every_dialect_says_the_same(tmp_path_factory: pytest.TempPathFactory, made: tuple, name: str) -> None:
    text, labels = made
    root = tmp_path_factory.mktemp("set")
    source = tree(root, dict.fromkeys(FILES, "") | {name: text})
    expected = [None if label == "-1" else label for label in labels]
    assert found(source) == {path: ("train", label) for path, label in zip(FILES, expected, strict=True)}, text
    listing = list_samples(source)
    assert not listing.rejected
    if labels is NUMBERS:  # numbers keep their value, whoever is absent
        assert listing.classes == [str(number) for number in range(11)]
    else:
        assert listing.classes == sorted(set(NAMES))


def test_a_line_that_is_not_understood_is_counted(tmp_path: Path) -> None:
    text = "a/1.mp4 0\na/two words.mp4\nb/1.mp4 1 2 3\nb/3.MKV 1\nc/x.y.mp4 2\nc/ünï.webm 2\n"
    listing = list_samples(tree(tmp_path, dict.fromkeys(FILES, "") | {"val.txt": text}))
    assert {item.path: item.split for item in listing.items} == dict.fromkeys((FILES[0], *FILES[3:]), "val")
    told = [(one.reason, one.detail) for one in listing.rejected]
    assert told == [
        ("annotation", "val.txt, line 2: no path and label"),
        ("annotation", "val.txt, line 3: 3 numbers, of which one would be the label"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("train.csv", "path,x,y2,z\na/1.mp4,1,2,3\nb/1.mp4,1,2,3\n", "which column is the label"),
        ("labels.csv", "a/1.mp4,1,2,3\nb/1.mp4,4,5,6\n", "which column is the label"),
        ("train.txt", "clip one is 0\nclip two is 1\n", "names no file"),
        ("train.json", '[{"video": "a/1.mp4", "label": 1}]', "CSV of path,label"),
        ("labels.json", '[{"video": "a/1.mp4", "label": 1}]', "CSV of path,label"),
        ("labels.xlsx", "PK", "CSV of path,label"),
        ("classes.csv", "path,label\nsomewhere/else,1\nor/there,2\n", "names no file of the folder"),
    ],
)
def test_annotation_that_cannot_be_used_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    source = tree(tmp_path, dict.fromkeys(FILES, "") | {name: text})
    with pytest.raises(DataError, match=said):
        list_samples(source)
    assert set(found(source, layout="folders").values()) == {("train", label) for label in "abc"}


ROWS = (("a/1.mp4", "run"), ("a/two words.mp4", "jump"), ("b/1.mp4", "run"), ("c/ünï.webm", "sit"))


def table(sign: str, *, header: str = "", end: str = "\n") -> str:
    return end.join([*([header] if header else []), *(sign.join(row) for row in ROWS)]) + end


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("labels.csv", table(";", header="path;label").encode("cp1252"), id="cp1252, as Excel saves it"),
        pytest.param("labels.txt", table("\t", header="path\tlabel").encode("utf-16"), id="utf-16"),
        pytest.param("labels.csv", ("sep=;\n" + table(";", header="path;label")).encode(), id="Excel's first line"),
        pytest.param("labels.csv", (table(";;", header="path;;label") + ";;;\n").encode(), id="an emptied row"),
        pytest.param("labels.csv", table("|", header="path|label").encode(), id="bars"),
        pytest.param("labels.csv", table(",", header="path,label", end="\r").encode(), id="line ends of an old Mac"),
        pytest.param(
            "labels.csv", unicodedata.normalize("NFD", table(",", header="path,label")).encode(), id="accents apart"
        ),
    ],
)
def test_tables_of_other_programs_say_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    source = tree(tmp_path, dict.fromkeys(FILES, ""))
    (tmp_path / name).write_bytes(content)
    assert found(source) == {path: ("train", label) for path, label in ROWS}
    assert not list_samples(source).rejected


@pytest.mark.parametrize(
    ("said", "meant"), [("3.0", "3"), ("3.", "3"), ("nan", None), ("NaN", None), ("2 # good", "2")]
)
def test_labels_as_tables_of_numbers_write_them(tmp_path: Path, said: str, meant: str | None) -> None:
    sign = " " if "#" in said else ","
    text = f"a/1.mp4{sign}{said}\n{FILES[1]}{sign}1\n"
    assert found(tree(tmp_path, dict.fromkeys(FILES, "") | {"train.txt": text}))["a/1.mp4"] == ("train", meant)


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        ("1:02", "1:03.5", (62.0, 63.5)),
        ("0:01:00", "61", (60.0, 61.0)),
        ("0.5", "2", (0.5, 2.0)),
        ("", "", (None, None)),
    ],
)
def test_times_of_spans(tmp_path: Path, start: str, end: str, span: tuple) -> None:
    text = f"path,label,start,end\na/1.mp4,run,{start},{end}\n"
    (item,) = list_samples(tree(tmp_path, dict.fromkeys(FILES, "") | {"labels.csv": text})).items
    assert (item.start, item.end) == span


@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        ("5", "1", "it ends before it starts"),
        ("nan", "inf", "no times in seconds"),
        ("1:2:3:4", "", "no times"),
        ("-1", "2", "no times"),
    ],
)
def test_rows_without_a_usable_span_are_counted_and_folders_do_not_replace_them(
    tmp_path: Path, start: str, end: str, why: str
) -> None:
    text = f"path,label,start,end\na/1.mp4,run,{start},{end}\n"
    listing = list_samples(tree(tmp_path, dict.fromkeys(FILES, "") | {"labels.csv": text}))
    assert not listing.items
    assert [one.reason for one in listing.rejected] == ["annotation"]
    assert why in listing.rejected[0].detail


@pytest.mark.parametrize("split", ["dev", "eval", "evaluation", "Validation"])
def test_other_words_for_validation(tmp_path: Path, split: str) -> None:
    text = f"path,label,split\na/1.mp4,run,train\nb/1.mp4,run,{split}\n"
    source = tree(tmp_path / "column", dict.fromkeys(FILES, "") | {"labels.csv": text})
    assert found(source) == {"a/1.mp4": ("train", "run"), "b/1.mp4": ("val", "run")}
    lists = {"train.txt": "a/1.mp4 0\n", f"{split.lower()}.txt": f"{FILES[1]} 1\n"}
    assert found(tree(tmp_path / "list", dict.fromkeys(FILES, "") | lists))[FILES[1]] == ("val", "1")


def test_a_table_beside_lists_of_splits_is_named(tmp_path: Path) -> None:
    texts = {"train.txt": "a/1.mp4 0\n", "more.csv": "path,label\nb/1.mp4,1\n"}
    listing = list_samples(tree(tmp_path, dict.fromkeys(FILES, "") | texts))
    assert [item.path for item in listing.items] == ["a/1.mp4"]
    assert any("more.csv was not read" in note for note in listing.notes)


def test_texts_that_are_no_annotation_are_left_alone(tmp_path: Path) -> None:
    notes = {"README.txt": "Clips of a and b.\nSee a/1.mp4\n", "md5.txt": "d41d8cd98f  a/1.mp4\n", "LICENSE": "mine"}
    assert set(found(tree(tmp_path, dict.fromkeys(FILES, "") | notes)).values()) == {("train", x) for x in "abc"}


def test_several_annotation_files_are_not_guessed_between(tmp_path: Path) -> None:
    texts = {"first.csv": "path,label\na/1.mp4,x\n", "second.csv": "path,label\na/1.mp4,y\n"}
    source = tree(tmp_path, dict.fromkeys(FILES, "") | texts)
    with pytest.raises(DataError, match=r"first\.csv, second\.csv"):
        list_samples(source)
    assert found(f"{source}/second.csv") == {"a/1.mp4": ("train", "y")}


def test_lists_of_paths_tell_splits_and_folders_tell_labels(tmp_path: Path) -> None:
    source = tree(tmp_path, dict.fromkeys(FILES, "") | {"train.txt": "a/1.mp4\nb/1.mp4\n", "val.txt": "b/3.MKV\n"})
    assert found(source) == {"a/1.mp4": ("train", "a"), "b/1.mp4": ("train", "b"), "b/3.MKV": ("val", "b")}


def test_names_without_extension(tmp_path: Path) -> None:
    source = tree(tmp_path, {"v1.mp4": "", "v2.mp4": "", "train.csv": "id,label\nv1,x\nv2,y\nv3,y\n"})
    assert found(source) == {"v1.mp4": ("train", "x"), "v2.mp4": ("train", "y")}


# -- which file is meant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "split", "meant"),
    [
        ("run/1.mp4", None, "train/run/1.mp4"),  # another split has it too: the split of the list decides
        ("train/run/1.mp4", "val", "train/run/1.mp4"),  # the path as it stands is what is meant
        ("run/2.mp4", "train", "train/run/2.mp4"),
        ("run/2.mp4", "val", None),  # only the other split has it
        ("jump/2.mp4", "train", None),  # only another class has it
        ("/elsewhere/k400/train/run/2.mp4", "train", "train/run/2.mp4"),
        ("/elsewhere/2.mp4", "train", None),
        ("2.mp4", "train", "train/run/2.mp4"),
        ("train\\run\\2.mp4", "train", "train/run/2.mp4"),
        ("../run/2.mp4", "train", None),
        ("other/top.mp4", "train", None),
    ],
)
def test_a_listed_file_is_never_replaced(tmp_path: Path, listed: str, split: str | None, meant: str | None) -> None:
    files = ("train/run/1.mp4", "val/run/1.mp4", "train/run/2.mp4", "top.mp4")
    there = Tree(tree(tmp_path, dict.fromkeys(files, "")), "video")
    assert there.resolve(listed, split or "train") == meant


def test_published_lists_take_no_file_of_another_class(tmp_path: Path) -> None:
    hmdb = {"splits/wave_test_split1.txt": "a.avi 1\n", "splits/run_test_split1.txt": "b.avi 1\n", "v/run/a.avi": ""}
    listing = list_samples(tree(tmp_path / "hmdb", hmdb | {"v/run/b.avi": ""}))
    assert [(item.path, item.label) for item in listing.items] == [("v/run/b.avi", "run")]
    assert [one.reason for one in listing.rejected] == ["missing"]


def test_what_is_said_twice_or_against_itself(tmp_path: Path) -> None:
    rows = "path,label,split\na/1.mp4,x,train\na/1.mp4,x,train\nb/1.mp4,x,train\nb/1.mp4,y,train\n"
    rows += "b/3.MKV,x,train\nb/3.MKV,x,val\n"
    listing = list_samples(tree(tmp_path, dict.fromkeys(FILES, "") | {"labels.csv": rows}))
    assert sorted((item.path, item.split) for item in listing.items) == [
        ("a/1.mp4", "train"),
        ("b/3.MKV", "train"),
        ("b/3.MKV", "val"),
    ]
    assert sorted(one.reason for one in listing.rejected) == ["conflict", "conflict", "duplicate"]
    assert any("1 clips stand in more than one split" in note for note in listing.notes)


# -- folders -------------------------------------------------------------------------------------------------------


def test_numbered_folders_are_ordered_by_value(tmp_path: Path) -> None:
    listing = list_samples(tree(tmp_path, {f"{number}/x.mp4": "" for number in range(12)}))
    assert listing.classes == [str(number) for number in range(12)]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = tree(tmp_path / "a", {f"{name}/{n}.mp4": "" for name in ("bus", "car", "train") for n in (1, 2)})
    assert set(found(source).values()) == {("train", name) for name in ("bus", "car", "train")}
    source = tree(tmp_path / "b", {f"{s}/{name}/1.mp4": "" for s in ("train", "val") for name in ("bus", "test")})
    assert set(found(source).values()) == {(s, name) for s in ("train", "val") for name in ("bus", "test")}
    source = tree(tmp_path / "c", {"train/bus/1.mp4": "", "extra/2.mp4": ""})
    with pytest.raises(DataError, match="may be splits or classes"):
        list_samples(source)


def test_folders_that_cannot_be_listed_end_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = tree(tmp_path, {"a/1.mp4": "", "b/1.mp4": ""}), os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"folder .*/b cannot be read \(Permission denied\)"):
        list_samples(source)


def test_links_are_followed_but_never_upwards(tmp_path: Path) -> None:
    source = tree(tmp_path / "set", {"a/1.mp4": ""})
    tree(tmp_path / "far", {"1.mp4": ""})
    (tmp_path / "set/b").symlink_to(tmp_path / "far")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/out").symlink_to(tmp_path)
    assert set(found(source)) == {"a/1.mp4", "b/1.mp4"}


def test_a_layout_from_outside_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffmae_video.data.listing import Item, Listing

    def mine(there: Tree, fold: int) -> Listing | None:
        return (
            Listing("mine", [Item(path, "train", "own") for path in there.media]) if "mine.cfg" in there.paths else None
        )

    monkeypatch.setitem(layouts._parts, "mine", mine)
    source = tree(tmp_path, {"a/1.mp4": "", "mine.cfg": ""})
    assert list_samples(source).layout == "mine"  # guessed before the general ones
    assert found(source) == {"a/1.mp4": ("train", "own")}


def test_rows_keep_spans(tmp_path: Path) -> None:
    there = Tree(tree(tmp_path, {"a.mp4": "", "t.csv": "a.mp4,x,train,1.5,3\na.mp4,y,,3,4\n"}), "video")
    rows = read_annotation(there, "t.csv") or []
    assert [(row.label, row.split, row.start, row.end) for row in rows] == [
        ("x", "train", 1.5, 3.0),
        ("y", None, 3.0, 4.0),
    ]
