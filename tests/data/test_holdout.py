"""Validation clips for a source without a split."""

from __future__ import annotations

import pytest

from diffmae_video.cli.app import run
from diffmae_video.data.holdout import hold_out, source_video
from diffmae_video.data.layouts import list_samples
from diffmae_video.data.listing import Item, Listing
from diffmae_video.errors import UsageError
from tests.data.test_layouts import tree


@pytest.mark.parametrize(
    ("path", "video"),
    [
        ("run/abcdefghij-_000010_000020.mp4", "abcdefghij-"),
        ("v_Run_g01_c02.avi", "v_Run_g01"),
        ("talk-Scene-003.mp4", "talk"),
        ("a/talk_part2.mp4", "talk"),
        ("a/clip_0001.mp4", "a/clip_0001.mp4"),
        ("a/0001.mp4", "a/0001.mp4"),
    ],
)
def test_source_video(path, video):
    assert source_video(Item(path, "train", None)) == video


def listing_of(videos: int, classes: int = 4, clips: int = 3) -> Listing:
    items = [
        Item(f"c{v % classes}/{v:011d}_{10 * c:06d}_{10 * c + 10:06d}.mp4", "train", f"c{v % classes}")
        for v in range(videos)
        for c in range(clips)
    ]
    return Listing("folders", items)


def held(listing: Listing) -> set[str]:
    return {source_video(item) for item in listing.items if item.split == "val"}


def test_clips_of_a_video_stay_together_and_the_choice_stays_when_videos_are_added():
    small, large = hold_out(listing_of(400), 0.1), hold_out(listing_of(800), 0.1)
    assert not held(small) & {source_video(item) for item in small.items if item.split == "train"}
    assert 20 <= len(held(small)) <= 60  # 40 of 400, give or take three standard deviations
    assert held(small) == {video for video in held(large) if int(video) < 400}
    assert [item.split for item in small.items] == sorted(item.split for item in small.items)
    assert len(small.items) == 1200


def test_every_class_of_two_videos_is_tested():
    found = hold_out(listing_of(22, classes=11), 0.01)
    assert {item.label for item in found.items if item.split == "val"} == {f"c{number}" for number in range(11)}
    assert {item.label for item in found.items if item.split == "train"} == {f"c{number}" for number in range(11)}


def test_what_is_divided_or_small_stays(tmp_path):
    files = {f"c{n % 2}/{n}.mp4": "" for n in range(30)}
    whole = list_samples(tree(tmp_path / "a", files))
    assert {item.split for item in hold_out(whole, 0.2).items} == {"train", "val"}
    assert "--val-fraction 0" in hold_out(whole, 0.2).notes[-1]
    assert hold_out(whole, 0) is whole
    few = list_samples(tree(tmp_path / "b", {f"c/{n}.mp4": "" for n in range(19)}))
    assert hold_out(few, 0.2) is few
    told = list_samples(tree(tmp_path / "c", {f"train/{path}": "" for path in files}))
    assert hold_out(told, 0.2) is told
    with pytest.raises(UsageError, match="--val-fraction 1"):
        hold_out(whole, 1.0)


def test_images_are_told_from_videos(tmp_path):
    images = {f"train/cat/{n}.webp": "" for n in range(3)} | {"README.md": "", "train/cat/notes.txt": ""}
    assert list_samples(tree(tmp_path / "a", images), kind="auto").kind == "image"
    assert list_samples(tree(tmp_path / "b", images | {"train/cat/x.mp4": ""}), kind="auto").kind == "video"
    assert list_samples(tree(tmp_path / "c", {"a.mp4": ""}), kind="auto").kind == "video"


@pytest.mark.parametrize(
    ("words", "told"), [("", True), ("--layout flat", False), ("--layout folders", False), ("--dataset mine", False)]
)
def test_folders_that_may_be_no_classes_are_told(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "clips", {f"c{n % 2}/{n}.mp4": "" for n in range(30)})
    assert run(f"shard clips shards --dry-run {words}".split()) == 0
    assert ("if they are no classes, give --layout flat" in capsys.readouterr().out) == told
