"""Every layout lists each input once; what an annotation names and no file holds is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffmae_video.data.datasets import dataset_info, dataset_names, is_directional
from diffmae_video.data.layouts import list_samples
from diffmae_video.errors import DataError, UsageError


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def facts(root: str, **arguments: object) -> tuple[dict[str, tuple[str, str | None]], dict[str, str]]:
    listing = list_samples(root, **arguments)
    items = {item.path: (item.split, item.label) for item in listing.items}
    return items, {one.path: one.reason for one in listing.rejected}


HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


@pytest.mark.parametrize("place", ["train/{}", "train/arm wrestling/{}", "videos_train/arm_wrestling/{}"])
def test_kinetics_folders(tmp_path: Path, place: str) -> None:
    first, second = "-a_b-c_d-e0_000010_000020.mp4", "0wR5jVB-WPk_000417_000427.mp4"
    table = f'{HEADER}"arm wrestling",-a_b-c_d-e0,10,20,train,0\narm wrestling,0wR5jVB-WPk,417,427,train,0\n'
    table += "archery,MISSING0000,1,11,train,0\n"
    extra = "train/zzzzzzzzzzz_000001_000011.mp4"
    root = tree(
        tmp_path, {place.format(first): "", place.format(second): "", extra: "", "annotations/train.csv": table}
    )
    items, rejected = facts(root)
    assert items == {place.format(name): ("train", "arm wrestling") for name in (first, second)}
    assert rejected == {"MISSING0000_000001_000011.mp4": "missing", extra: "unannotated"}
    keys = {item.key for item in list_samples(root).items}
    assert keys == {first[:-4], second[:-4]}


def test_kinetics_replacements_and_uncut_files(tmp_path: Path) -> None:
    table = HEADER + "a,aaaaaaaaaaa,1,11,val,0\nb,bbbbbbbbbbb,2,12,val,0\n"
    better = "replacement/replacement_for_corrupted_k400/aaaaaaaaaaa_000001_000011.mp4"
    files = {
        "val/aaaaaaaaaaa_000001_000011.mp4": "",
        better: "",
        "val/bbbbbbbbbbb.mp4": "",
        "annotations/val.csv": table,
    }
    listing = list_samples(tree(tmp_path, files))
    items = {item.path: item for item in listing.items}
    assert set(items) == {better, "val/bbbbbbbbbbb.mp4"}
    assert (items["val/bbbbbbbbbbb.mp4"].start, items["val/bbbbbbbbbbb.mp4"].end) == (2.0, 12.0)
    assert items[better].start is None


def test_kinetics_spans_of_one_video_and_links_by_class(tmp_path: Path) -> None:
    """An uncut file serves several rows; the class links that arrange_by_classes.py makes are the same clips."""
    table = HEADER + "a,aaaaaaaaaaa,1,11,train,0\nb,aaaaaaaaaaa,30,40,train,0\nc,ccccccccccc,0,10,train,0\n"
    table += "c,ccccccccccc,0,10,train,0\n"
    link = "videos/train/c/ccccccccccc_000000_000010.mp4"
    files = {"train/aaaaaaaaaaa.mp4": "", "train/ccccccccccc_000000_000010.mp4": "", link: "", "train.csv": table}
    listing = list_samples(tree(tmp_path, files))
    assert sorted((i.path, i.label, i.start) for i in listing.items if i.start is not None) == [
        ("train/aaaaaaaaaaa.mp4", "a", 1.0),
        ("train/aaaaaaaaaaa.mp4", "b", 30.0),
    ]
    assert len({item.key for item in listing.items}) == 3
    assert sorted(one.reason for one in listing.rejected) == ["duplicate", "duplicate"]


def test_lists_of_mmaction_and_slowfast(tmp_path: Path) -> None:
    files = {
        "videos_train/arm_wrestling/x.mp4": "",
        "videos_val/zumba/y z.mp4": "",
        "kinetics400_train_list_videos.txt": "arm_wrestling/x.mp4 0\narm_wrestling/gone.mp4 0\n",
        "kinetics400_val_list_videos.txt": "zumba/y z.mp4 1\n",
    }
    items, rejected = facts(tree(tmp_path, files))
    assert items == {
        "videos_train/arm_wrestling/x.mp4": ("train", "arm wrestling"),
        "videos_val/zumba/y z.mp4": ("val", "zumba"),
    }
    assert rejected == {"arm_wrestling/gone.mp4": "missing"}


def test_ssv2(tmp_path: Path) -> None:
    prefix = "something-something-v2-"
    files = {
        f"{prefix}labels.json": json.dumps({"Pushing something left": "0", "Holding something": "1"}),
        f"{prefix}train.json": json.dumps(
            [{"id": "7", "template": "Holding [something]"}, {"id": "8", "template": "?"}]
        ),
        f"{prefix}validation.json": json.dumps([{"id": "9", "template": "Pushing [something] left"}]),
        "videos/7.webm": "",
        "videos/8.webm": "",
    }
    items, rejected = facts(tree(tmp_path, files))
    assert items == {"videos/7.webm": ("train", "Holding something")}
    assert rejected == {"videos/8.webm": "label", "9.webm": "missing"}
    assert list_samples(str(tmp_path)).classes == ["Pushing something left", "Holding something"]


def test_ucf101_and_hmdb51_folds(tmp_path: Path) -> None:
    ucf = tree(
        tmp_path / "ucf",
        {
            "classInd.txt": "1 Archery\n2 Bowling\n",
            "trainlist01.txt": "Archery/v_Archery_g01_c01.avi 1\n",
            "testlist01.txt": "Bowling/v_Bowling_g01_c01.avi\n",
            "trainlist02.txt": "Bowling/v_Bowling_g01_c01.avi 2\n",
            "videos/Archery/v_Archery_g01_c01.avi": "",
            "videos/Bowling/v_Bowling_g01_c01.avi": "",
        },
    )
    items, _ = facts(ucf)
    assert items["videos/Archery/v_Archery_g01_c01.avi"] == ("train", "Archery")
    assert items["videos/Bowling/v_Bowling_g01_c01.avi"] == ("val", "Bowling")
    assert facts(ucf, fold=2)[0] == {"videos/Bowling/v_Bowling_g01_c01.avi": ("train", "Bowling")}
    hmdb = tree(
        tmp_path / "hmdb",
        {
            "splits/wave_test_split1.txt": "a.avi 1 \nb b.avi 2 \nc.avi 0 \n",
            "videos/wave/a.avi": "",
            "videos/wave/b b.avi": "",
            "videos/wave/c.avi": "",
        },
    )
    assert facts(hmdb)[0] == {"videos/wave/a.avi": ("train", "wave"), "videos/wave/b b.avi": ("val", "wave")}


def test_imagenet_with_flat_val(tmp_path: Path) -> None:
    files = {
        "train/n00000001/a.JPEG": "",
        "train/n00000002/b.JPEG": "",
        "val/ILSVRC2012_val_00000001.JPEG": "",
        "val/ILSVRC2012_val_00000002.JPEG": "",
        "ILSVRC2012_validation_ground_truth.txt": "1\n2\n",
    }
    with pytest.raises(DataError, match=r"map_clsloc\.txt"):  # the kit's numbers are in no order that one could guess
        list_samples(tree(tmp_path, files), kind="image")
    files["map_clsloc.txt"] = "n00000002 1 fox\nn00000001 2 setter\n"
    items, rejected = facts(tree(tmp_path, files), kind="image")
    assert items["val/ILSVRC2012_val_00000001.JPEG"] == ("val", "n00000002")
    assert items["val/ILSVRC2012_val_00000002.JPEG"] == ("val", "n00000001")
    assert items["train/n00000001/a.JPEG"] == ("train", "n00000001")
    assert not rejected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_val_solution.csv", "ImageId,PredictionString\nx_1,n00000002 1 2 3 4\nx_2,n00000001 5 6 7 8\n"),
        ("val.txt", "x_1.JPEG 1\nx_2.JPEG 0\n"),
        ("val_labels.txt", "n00000002\nn00000001\n"),
    ],
)
def test_imagenet_truth_of_kaggle_caffe_and_wnids(tmp_path: Path, name: str, text: str) -> None:
    files = {"train/n00000001/a.JPEG": "", "train/n00000002/b.JPEG": "", "val/x_1.JPEG": "", "val/x_2.JPEG": ""}
    items, _ = facts(tree(tmp_path, files | {name: text}), kind="image")
    assert (items["val/x_1.JPEG"][1], items["val/x_2.JPEG"][1]) == ("n00000002", "n00000001")


def test_imagenet_truth_of_the_kits_mat_file(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    files = {"train/n00000001/a.JPEG": "", "train/n00000002/b.JPEG": "", "val/x_1.JPEG": ""}
    root = tree(tmp_path, files | {"data/ILSVRC2012_validation_ground_truth.txt": "1\n"})
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    rows = np.array([(1, "n00000002"), (2, "n00000001")], dtype=kind)
    savemat(tmp_path / "data/meta.mat", {"synsets": rows})
    assert facts(root, kind="image")[0]["val/x_1.JPEG"] == ("val", "n00000002")


def test_table_with_spans_and_awkward_names(tmp_path: Path) -> None:
    name = "a, b & ünï 视频.mp4"
    text = f'path,label,split,start,end\n"{name}",x,val,1.5,3\n../out.mp4,y,train,,\nnone.mp4,y,train,,\n'
    root = tree(tmp_path, {name: "", "list.csv": text})
    for source in (root, f"{root}/list.csv"):
        listing = list_samples(source)
        assert [(i.path, i.split, i.label, i.start, i.end) for i in listing.items] == [(name, "val", "x", 1.5, 3.0)]
        why = {one.reason: one.detail for one in listing.rejected}
        assert set(why) == {"outside", "missing"}
        assert "shard the folder that holds both, or put a link to the file into this one" in why["outside"]
    assert "." not in listing.items[0].key
    assert listing.items[0].key.isascii()


def test_lists_of_videomae(tmp_path: Path) -> None:
    """`path 0 -1` has no label; ids of absolute paths elsewhere are found by their tail."""
    files = {"a/x 1.mp4": "", "a/y.mp4": "", "pretrain.csv": "a/x 1.mp4 0 -1\n/data/k400/a/y.mp4 0 -1\n"}
    items, rejected = facts(tree(tmp_path, files))
    assert items == {"a/x 1.mp4": ("train", None), "a/y.mp4": ("train", None)}
    assert not rejected


def test_tables_name_files_once_and_splits_are_names(tmp_path: Path) -> None:
    text = "path,label,split\na.mp4,x,../../up\na.mp4,x,../../up\nb.mp4,y,val\n"
    listing = list_samples(tree(tmp_path, {"a.mp4": "", "b.mp4": "", "t.csv": text}))
    assert [item.split for item in listing.items] == ["______up", "val"]
    assert [one.reason for one in listing.rejected] == ["duplicate"]


def test_folders_and_unlabelled(tmp_path: Path) -> None:
    root = tree(tmp_path / "a", {"train/x/1.mp4": "", "validation/x/1.mp4": "", "test/y/2.mp4": ""})
    assert set(facts(root)[0].values()) == {("train", "x"), ("val", "x"), ("test", "y")}
    root = tree(tmp_path / "b", {"x/1.mp4": "", "y/1.mp4": ""})
    assert facts(root)[0] == {"x/1.mp4": ("train", "x"), "y/1.mp4": ("train", "y")}
    tree(tmp_path / "b", {"README": "", "LICENSE": ""})  # no clips, though names without a suffix may be
    assert facts(root)[0] == {"x/1.mp4": ("train", "x"), "y/1.mp4": ("train", "y")}
    assert len({item.key for item in list_samples(root).items}) == 2
    root = tree(tmp_path / "c", {"train/1.mp4": "", "val/2.mp4": ""})
    assert facts(root)[0] == {"train/1.mp4": ("train", None), "val/2.mp4": ("val", None)}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty or missing"):
        list_samples(str(tmp_path))
    with pytest.raises(DataError, match="no video"):
        list_samples(tree(tmp_path, {"readme.txt": "x"}))
    with pytest.raises(UsageError, match="--layout"):
        list_samples(str(tmp_path), layout="kinetic")


def test_datasets_are_described(tmp_path: Path) -> None:
    assert {"k400", "ssv2", "ucf101", "hmdb51", "imagenet", "demo"} <= set(dataset_names())
    assert is_directional("ssv2")
    assert not is_directional("k400")
    assert not is_directional("somebody's own")
    own = tmp_path / "mine.toml"
    own.write_text('name = "mine"\ndirectional = true\nlayout = "folders"\n')
    assert dataset_info(str(own)).directional
    own.write_text('name = "mine"\nclases = 3\n')
    with pytest.raises(UsageError, match="clases"):
        dataset_info(str(own))
    with pytest.raises(UsageError, match="k400"):
        dataset_info("k4000")
