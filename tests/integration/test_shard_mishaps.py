"""What goes wrong around the files of a data set costs what it must and no more, and is told in one sentence."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffmae_video.cli.app import run
from diffmae_video.data import media, remote
from diffmae_video.data.images import read_image
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.media import Limits, read_bytes, read_head
from diffmae_video.data.shards import ShardReader
from diffmae_video.data.stream import build_stream
from diffmae_video.data.transcode import TranscodeOptions, transcode
from diffmae_video.errors import DataError, StorageError, UsageError
from diffmae_video.pipelines.index import index, read_tar
from diffmae_video.pipelines.shard import ShardJob, parse_limits, shard
from diffmae_video.pipelines.shard_folder import hold

from ..data.clips import make_folders, make_video
from ..data.test_stream import settings, write_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("source"), each=2, frames=4)


@pytest.fixture(autouse=True)
def own_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def child(program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120, **options
    )


def test_sigterm_is_one_sentence_and_a_rerun_goes_on(source: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from diffmae_video.data.workers import Worker\n"
        "real, calls = Worker.run, [0]\n"
        "def run(self, *args, **kwargs):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(self, *args, **kwargs)\n"
        "Worker.run = run\n"
        "from diffmae_video.cli.app import run\n"
        f"sys.exit(run(['shard', {str(source)!r}, 'out', '--samples-per-shard', '1', '--workers', '1']))"
    )
    done = child(program)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines() == [
        "diffmae: Stopped by SIGTERM; run the same command again, finished shards are kept."
    ]
    result = shard(ShardJob(source, tmp_path / "out", samples_per_shard=1))
    assert result.written == 6
    assert result.done_before >= 1
    assert not (tmp_path / "out/.parts").exists()


def test_two_runs_into_one_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold(str(out)), pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"):
        shard(ShardJob(source, out))
    assert not (out / ".parts").exists()
    assert shard(ShardJob(source, out)).written == 6
    assert shard(ShardJob(source, out)).unchanged
    assert not (out / ".parts").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on address space")
def test_a_batch_systems_limit_on_memory_is_no_crash(source: Path, tmp_path: Path) -> None:
    """`ulimit -v` below --memory: workers take what they get."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    program = (
        "from diffmae_video.data.workers import Worker; from diffmae_video.data.transcode import TranscodeOptions\n"
        f"one = Worker(memory=6 << 30).run({str(next(source.rglob('*.mp4')))!r}, TranscodeOptions())\n"
        "print(one.kind or 'good', one.error)"
    )
    assert child(program, preexec_fn=bound).stdout == "good \n"


def test_nothing_of_the_folder_one_stands_in_is_run(source: Path, tmp_path: Path) -> None:
    for name in ("av", "numpy", "json", "diffmae_video", "multiprocessing"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name}')\n")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from diffmae_video.pipelines.shard import ShardJob, shard\n"
        f"print(shard(ShardJob({str(source)!r}, 'out')).written)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = child(program, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": root})
    assert done.stdout.splitlines()[-1] == "6", done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "call",
    [
        "from pathlib import Path\n"
        "    from diffmae_video.data.synthetic import write_demo_data\n"
        "    write_demo_data(Path('demo'), train=2, val=2, workers=2)",
        "from diffmae_video.training.distributed import launch, ranks_from_environment\n"
        "    assert launch(ranks_from_environment, 2)[1] == 2",
    ],
)
def test_processes_of_a_script_run_nothing_of_the_folder_it_is_called_in(call: str, tmp_path: Path) -> None:
    for name in ("av", "json", "multiprocessing", "pickle", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name}')\n")
    script = tmp_path / "elsewhere/script.py"
    script.parent.mkdir()
    script.write_text(f"if __name__ == '__main__':\n    {call}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    make_video(folder / "a/plain.mp4", frames=3)
    os.rename(make_video(folder / "a/x.mp4", frames=3) and folder / "a/x.mp4", os.fsencode(folder) + b"/a/caf\xe9.mp4")
    (folder / "a" / os.fsdecode(b"caf\xe8.mp4")).write_bytes(b"no clip")
    result = shard(ShardJob(folder, tmp_path / "out"))
    assert (result.found, result.written, result.rejected) == (3, 2, {"not media": 1})
    (line,) = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["path"] == "a/caf\\udce8.mp4"
    with ShardReader(Manifest.load(tmp_path / "out")) as reader:
        assert {reader.read("train", n).meta["source"] for n in (0, 1)} == {"a/plain.mp4", "a/caf\\udce9.mp4"}


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_video(tmp_path / "odd/\x1b[31mred/a.mp4", frames=3)
    assert run(["shard", "odd", "out"]) == 0
    assert run(["stats", "out"]) == 0
    assert run(["shard", "no\x1b[31mwhere", "out2"]) == 3
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert Manifest.load("out").classes == ["\\x1b[31mred"]


# -- stores --------------------------------------------------------------------------------------------------------


def test_an_outage_of_the_store_is_no_verdict_on_a_clip(source: Path, tmp_path: Path) -> None:
    """The third clip meets a disk that does not answer: exit 1, nothing rejected, and the rerun takes all."""
    program = (
        "import sys, errno\n"
        "from diffmae_video.data.workers import Worker, Outcome\n"
        "real, calls = Worker.run, [0]\n"
        "def run(self, *args, **kwargs):\n"
        "    calls[0] += 1\n"
        "    away = Outcome(kind='storage', error='The server is away.')\n"
        "    return away if calls[0] == 3 else real(self, *args, **kwargs)\n"
        "Worker.run = run\n"
        "from diffmae_video.cli.app import run\n"
        f"sys.exit(run(['shard', {str(source)!r}, 'out', '--samples-per-shard', '1', '--workers', '1']))"
    )
    done = child(program)
    assert (done.returncode, done.stderr) == (1, "diffmae: The server is away.\n")
    assert not (tmp_path / "out/manifest.json").exists()
    assert shard(ShardJob(source, tmp_path / "out", samples_per_shard=1)).written == 6


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StorageError), (errno.ESTALE, StorageError)])
def test_errors_of_a_disk_are_told_from_errors_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    (tmp_path / "a").write_bytes(b"x")

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(DataError) as caught:
        read_bytes(tmp_path / "gone")
    assert not isinstance(caught.value, StorageError)
    monkeypatch.setattr(media.os, "open", failing)
    with pytest.raises(kind):
        read_bytes(tmp_path / "a")


def test_remote_failures_are_tried_again_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def failing() -> None:
        raise RuntimeError("503")

    with pytest.raises(StorageError, match="Reading x failed 4 times"):
        remote.retry(failing, "Reading x")
    assert waits == [0.5, 1.5, 4.5]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_where_the_store_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    root = write_shards(tmp_path / "shards")

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("diffmae_video.data.shards._read_at", failing)
    with (
        build_stream(settings(root, workers=workers), split="train", batch_size=2, training=True) as stream,
        pytest.raises(StorageError, match="Input/output error"),
    ):
        next(iter(stream))


def test_a_bad_batch_of_one_pass_is_left_out_and_counted(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", samples=10, bad=(8, 9))
    with build_stream(settings(root), split="train", batch_size=2, training=False) as stream:
        keys = [key for batch in stream for key in batch.keys]
    assert keys == [f"s{number:03d}" for number in range(8)]
    assert stream.bad == {"unreadable": 2}


def test_a_place_in_the_data_that_is_none(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", samples=4)
    with build_stream(settings(root), split="train", batch_size=2, training=True) as stream:
        for state in ({"epoch": -1, "consumed": 0}, {"epoch": 0, "consumed": 1e12}, {"epoch": "a", "consumed": 0}, {}):
            with pytest.raises(UsageError, match="place in the data"):
                stream.load_state_dict(state)


# -- files ---------------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), tmp_path):
        for read in (read_bytes, read_head):
            with pytest.raises(DataError, match=r"no plain file|Is a directory"):
                read(path)
    make_video(tmp_path / "set/a/1.mp4", frames=3)
    os.mkfifo(tmp_path / "set/a/pipe.mp4")
    result = shard(ShardJob(tmp_path / "set", tmp_path / "out", timeout=60))
    assert (result.written, result.found) == (1, 2)


def test_limits_can_be_raised(tmp_path: Path) -> None:
    make_video(tmp_path / "set/a/1.mp4", frames=30)
    make_video(tmp_path / "set/a/2.mp4", frames=3)
    result = shard(ShardJob(tmp_path / "set", tmp_path / "out", TranscodeOptions(limits=parse_limits(["frames=20"]))))
    assert result.rejected == {"limit": 1}
    assert "--limit" in (tmp_path / "out/rejected.jsonl").read_text()
    assert run(["shard", "set", "out2", "--limit", "frames=30"]) == 0
    assert Manifest.load("out2").splits == {"train": 2}
    for bad in ("frame=3", "frames=many", "frames"):
        with pytest.raises(UsageError, match="frames"):
            parse_limits([bad])


def test_a_span_of_a_video_beyond_the_limits_is_cut_out() -> None:
    """What counts is what becomes a sample; frames before the span are not even decoded."""
    data = make_video(frames=300, options={"bf": "2"})
    limits = Limits(frames=100, seconds=5.0)
    made, _, meta = transcode(data, TranscodeOptions(trim=True, limits=limits, crf=4), (25.0, 26.0))
    assert meta["frames"] == 10
    whole, _, _ = transcode(data, TranscodeOptions(trim=True, crf=4, limits=Limits(frames=10_000)), (25.0, 26.0))
    assert made == whole
    with pytest.raises(DataError, match="above the limit of 5 s"):
        transcode(data, TranscodeOptions(trim=True, limits=limits), (1.0, 26.0))


@pytest.mark.parametrize("size", [(8192, 16), (60_000, 1)])
def test_long_and_thin_pictures_take_no_memory(size: tuple[int, int]) -> None:
    sink = io.BytesIO()
    Image.new("L", size).save(sink, "PNG")
    with pytest.raises(DataError, match="longer than 64:1"):
        read_image(sink.getvalue())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 257], [128 * 257, 65535]], np.uint16), "PNG"),
        (np.array([[0, 257], [128 * 257, 65535]], np.uint16), "TIFF"),
        (np.array([[0, 1 / 255], [128 / 255, 1]], np.float32), "TIFF"),
        (np.array([[0, 257], [128 * 257, 65535]], np.int32), "TIFF"),
    ],
)
def test_deep_pictures_are_scaled(tmp_path: Path, values: np.ndarray, kind: str) -> None:
    sink = io.BytesIO()
    Image.fromarray(values).resize((20, 20), Image.Resampling.NEAREST).save(sink, kind)
    expected = np.array([[0, 1], [128, 255]]).repeat(10, 0).repeat(10, 1)
    assert (read_image(sink.getvalue()).numpy() == expected).all()
    made, _, _ = transcode(sink.getvalue(), TranscodeOptions(kind="image", quality=100))
    assert np.abs(read_image(made).numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("top", [1000.0, float("nan"), -1.0])
def test_pictures_of_no_known_scale_are_rejected(tmp_path: Path, top: float) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    Image.fromarray(np.full((20, 20), top, np.float32)).save(tmp_path / "set/a/1.tiff")
    Image.new("RGB", (20, 20)).save(tmp_path / "set/a/2.png")
    for copy in (False, True):
        options = TranscodeOptions(kind="image", copy=copy)
        assert shard(ShardJob(tmp_path / "set", tmp_path / f"out{copy}", options)).rejected == {"unreadable": 1}


def test_clips_that_are_there_twice_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/a/1.mp4", "val/a/other.mp4", "train/b/same.mp4"):
        make_video(tmp_path / "set" / name, frames=3)
    shard(ShardJob(tmp_path / "set", tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "1 clips stand in more than one split" in shown
    assert "1 clips stand there under two labels" in shown


# -- tars of strangers ---------------------------------------------------------------------------------------------


def tars(folder: Path, members: list[tuple[str, bytes]]) -> str:
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder)


def pairs(suffix: str, texts: list[str | bytes]) -> list[tuple[str, bytes]]:
    """Samples of a clip and one more member."""
    clip, members = make_video(frames=3), []
    for number, text in enumerate(texts):
        members += [
            (f"s{number}.mp4", clip),
            (f"s{number}.{suffix}", text if isinstance(text, bytes) else text.encode()),
        ]
    return members


def test_labels_of_foreign_tars(tmp_path: Path) -> None:
    labels = ["10", "2", "-1", "0", "99999999", "7"]
    result = index(tars(tmp_path / "numbers", pairs("cls", labels)))
    assert result.classes == [str(number) for number in range(11)]
    assert result.rejected == {"label": 1}
    assert Manifest.load(tmp_path / "numbers").samples("train").label.tolist() == [10, 2, -1, 0, 7]
    assert index(tars(tmp_path / "names", pairs("cls", ["run", "-1", "jump"]))).classes == ["jump", "run"]


@pytest.mark.parametrize(
    "odd", [b"[" * 100_000, b'{"label": 1e999}', b'{"label": "\\ud800"}', b"\xff\xfe", b'{"label": [1]}']
)
def test_odd_json_costs_its_sample_at_most(tmp_path: Path, odd: bytes) -> None:
    plain = '{"label": "a"}'
    result = index(tars(tmp_path / "odd", pairs("json", [plain, odd, plain])))
    assert result.indexed + sum(result.rejected.values()) == 3
    assert result.indexed >= 2
    assert len(Manifest.load(tmp_path / "odd").samples("train")) == result.indexed


def test_headers_of_tars_are_bounded(tmp_path: Path) -> None:
    """A long name that claims 6 GB: tarfile would take that much memory where the file is large, if only of holes."""
    folder, clip = tmp_path / "long", make_video(frames=3)
    tars(folder, [("a.mp4", clip)])
    path = folder / "train-0.tar"
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 6 << 30
    place = 512 + (len(clip) + 511) // 512 * 512
    with open(path, "r+b") as file:
        file.truncate(place)
        file.seek(place)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(place + (64 << 20))
    info, rows, bad = read_tar(str(path), "train-0.tar", "train")
    assert ([row["key"] for row in rows], info.samples) == (["a"], 1)
    assert [one["reason"] for one in bad] == ["cut"]
    assert "a header of 6442450944 bytes" in bad[0]["detail"]


def test_dots_in_names_of_foreign_tars_are_explained(tmp_path: Path) -> None:
    clip = make_video(frames=3)
    index(tars(tmp_path / "dots", [("a.mp4", clip), ("b.v2.mp4", clip)]))
    (line,) = (tmp_path / "dots/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "dots"


def test_what_comes_after_a_damaged_header_is_told(tmp_path: Path) -> None:
    clip = make_video(frames=3)
    folder = tars(tmp_path / "cut", [(f"s{n}.mp4", clip) for n in range(4)])
    size = 512 + (len(clip) + 511) // 512 * 512
    with open(tmp_path / "cut/train-0.tar", "r+b") as file:
        file.seek(2 * size)
        file.write(b"\xaa" * 512)
    result = index(folder)
    assert (result.indexed, result.rejected) == (2, {"cut": 1})


def test_splits_of_index_are_plain_names(tmp_path: Path) -> None:
    folder = tars(tmp_path / "x", [("a.mp4", make_video(frames=3))])
    with pytest.raises(UsageError, match="no plain name"):
        index(folder, split="../up")
