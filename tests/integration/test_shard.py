"""The shard stage: counts that add up, bytes that repeat, crashes that cost one clip, kills that cost nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from typer.testing import CliRunner

from diffmae_video.cli.app import app, run
from diffmae_video.data.decode import probe, read_clips
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.shards import ShardReader
from diffmae_video.data.transcode import TranscodeOptions, transcode
from diffmae_video.errors import DataError, UsageError
from diffmae_video.pipelines import shard_job
from diffmae_video.pipelines.console import Step, listen
from diffmae_video.pipelines.index import index
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.pipelines.verify import verify

from ..data.clips import make_folders, make_video, read_number

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def own_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sums(folder: Path) -> dict[str, str]:
    """Checksum of every file of a finished folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["shard", str(source), "shards", "--samples-per-shard", "3"])
    assert result.exit_code == 0, result.output
    manifest = Manifest.load("shards")
    assert manifest.splits == {"train": 8, "val": 4}
    assert manifest.classes == ["hop", "run"]
    assert [info.name for info in manifest.shards][:2] == ["train-000000.tar", "train-000001.tar"]
    assert runner.invoke(app, ["verify", "shards", "--decode"]).exit_code == 0
    assert runner.invoke(app, ["stats", "shards", "--out", "pictures"]).exit_code == 0
    assert {path.name for path in Path("pictures").iterdir()} == {"stats.png", "sheet.png"}
    assert json.loads(Path(".diffmae/workspace.json").read_text())["entries"][0]["facts"]["media"] == "video"


def test_samples_hold_what_the_source_held(source: Path, tmp_path: Path) -> None:
    shard(ShardJob(source, tmp_path / "out"))
    manifest = Manifest.load(tmp_path / "out")
    with ShardReader(manifest) as reader:
        for number in range(8):
            sample = reader.read("train", number)
            assert sample.key.startswith(f"-{manifest.classes[sample.label]}")
            assert sample.meta["source"] == f"train/{manifest.classes[sample.label]}/{sample.key}.mp4"
            assert sample.meta["frames"] == 12
            original = (source / sample.meta["source"]).read_bytes()
            frames = [read_clips(data, [[3]])[0].frames[0] for data in (original, sample.data)]
            numbers = [read_number(frame.permute(1, 2, 0).numpy()) for frame in frames]
            assert numbers[0] == numbers[1]


def test_webdataset_reads_them_and_tars_are_plain(source: Path, tmp_path: Path) -> None:
    shard(ShardJob(source, tmp_path / "out"))
    path = tmp_path / "out" / "train-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(samples) == 8
    assert all({"mp4", "json"} <= set(sample) for sample in samples)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert not any(member.pax_headers for member in members)
        assert {member.mtime for member in members} == {0}
        assert {member.uname for member in members} == {"diffmae"}


def test_counts_add_up_and_reasons_are_named(source: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "train/hop/empty.mp4").write_bytes(b"")
    (mixed / "train/hop/list.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    (mixed / "val/run/cut.mp4").write_bytes(make_video()[:700])
    result = shard(ShardJob(mixed, tmp_path / "out"))
    assert result.found == 15 == result.written + sum(result.rejected.values())
    assert result.rejected == {"not media": 2, "unreadable": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {"train/hop/empty.mp4", "train/hop/list.mp4", "val/run/cut.mp4"}
    assert all(line["detail"] for line in lines)


def test_same_bytes_again_and_nothing_to_do(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(ShardJob(source, tmp_path / "a", workers=1))
    shard(ShardJob(source, tmp_path / "b", workers=3))
    assert sums(tmp_path / "a") == sums(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert shard(ShardJob(source, tmp_path / "a")).unchanged
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}


def test_other_input_or_options_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(ShardJob(source, out))
    before = sums(out)
    with pytest.raises(UsageError, match="crf was 23, is 30"):
        shard(ShardJob(source, out, options=TranscodeOptions(crf=30)))
    more = tmp_path / "more"
    shutil.copytree(source, more)
    make_video(more / "train/hop/new.mp4")
    with pytest.raises(UsageError, match=r"12 files of \d+ bytes then, 13 files"):
        shard(ShardJob(more, out))
    other = tmp_path / "other"  # the same names, another content
    shutil.copytree(source, other)
    (other / "train/hop/-hop_train_0.mp4").write_bytes((source / "train/run/-run_train_0.mp4").read_bytes() + b"x")
    with pytest.raises(UsageError, match="the input changed"):
        shard(ShardJob(other, out))
    assert sums(out) == before
    (out / "mine.tar").write_bytes(b"")
    assert shard(ShardJob(more, out, overwrite=True)).written == 13
    assert (out / "mine.tar").exists()  # only what a run made is replaced
    (out / "mine.tar").unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="did not make"):
        shard(ShardJob(source, foreign))


def test_bad_requests_have_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["shard", "empty", "out"]) == 3
    assert run(["shard", "gone", "out"]) == 3
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.mp4").write_text("no video")
    assert run(["shard", "text", "out2"]) == 3
    assert not list(tmp_path.glob("out2/*.tar"))
    kinetics = tmp_path / "k"
    make_video(kinetics / "train/aaaaaaaaaaa_000000_000001.mp4")
    rows = "label,youtube_id,time_start,time_end,split,is_cc\nx,aaaaaaaaaaa,0,1,train,0\nx,bbbbbbbbbbb,0,1,train,0\n"
    (kinetics / "train.csv").write_text(rows)
    assert run(["shard", "k", "out3"]) == 0
    assert "missing" in (tmp_path / "out3/rejected.jsonl").read_text()
    assert run(["shard", "k", "out3", "--crf", "11"]) == 2
    assert run(["shard", "k", "out3", "--layout", "kinetic"]) == 2
    assert run(["shard", "k", "out4", "--copy", "--trim"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("transcode", marks=slow),
        "publish",
        pytest.param("report", marks=slow),
        pytest.param("manifest", marks=slow),
    ],
)
def test_kill_at_any_moment_and_rerun(source: Path, tmp_path: Path, moment: str) -> None:
    """A child kills itself (SIGKILL) at the third call of one step; the rerun equals an uninterrupted run."""
    arguments = {"samples_per_shard": 3, "workers": 1}
    program = f"""
import os, signal
from diffmae_video.pipelines import shard as stage, shard_job as job
from diffmae_video.data.workers import Worker
def dying(function, calls):
    def wrapper(*args, **kwargs):
        calls[0] -= 1
        if calls[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
moment = {moment!r}
if moment == "transcode": Worker.run = dying(Worker.run, [5])
if moment == "publish": job.publish = dying(job.publish, [3])
if moment == "report": job.write_file = dying(job.write_file, [2])
if moment == "manifest": stage.write_manifest = dying(stage.write_manifest, [1])
stage.shard(stage.ShardJob({str(source)!r}, {str(tmp_path / "killed")!r}, **{arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "killed/manifest.json").exists()
    result = shard(ShardJob(source, tmp_path / "killed", **arguments))
    assert result.written == 12
    shard(ShardJob(source, tmp_path / "whole", **arguments))
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


def test_ctrl_c_leaves_a_resumable_state(source: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from diffmae_video.data.workers import Worker\n"
        "real, calls = Worker.run, [0]\n"
        "def slow(self, *args, **kwargs):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(self, *args, **kwargs)\n"
        "Worker.run = slow\n"
        "from diffmae_video.cli.app import run\n"
        f"sys.exit(run(['shard', {str(source)!r}, 'out', '--samples-per-shard', '3', '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=120)
    assert done.returncode == 130, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not list((tmp_path / "out/.parts").glob("*.tmp"))
    result = shard(ShardJob(source, tmp_path / "out", samples_per_shard=3))
    assert result.written == 12
    assert result.done_before >= 1


def test_full_disk_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_job.HashingFile, "write", full)
    with pytest.raises(DataError, match=r"disk of .* is full"):
        shard(ShardJob(source, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.undo()
    assert shard(ShardJob(source, tmp_path / "out")).written == 12


# -- workers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saboteur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes crash, hang or eat memory when a file says so."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if '_DIFFMAE_WORKER_MEMORY' in os.environ:\n"
        "    import diffmae_video.data.worker_process as t\n"
        "    real = t.transcode\n"
        "    def transcode(data, options, span=None):\n"
        "        if data == b'crash': os.abort()\n"
        "        if data == b'hang':\n"
        "            while True: os.read(os.pipe()[0], 1)\n"
        "        if data == b'memory': bytearray(64 << 30)\n"
        "        return real(data, options, span)\n"
        "    t.transcode = transcode\n"
        "    import sys; sys.modules['saboteur'] = t\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(
        "diffmae_video.data.workers.COMMAND",
        [sys.executable, "-c", "import sitecustomize, saboteur; saboteur.main()"],
    )


@pytest.mark.parametrize(
    ("deed", "kind"), [("crash", "crash"), ("hang", "timeout"), pytest.param("memory", "memory", marks=slow)]
)
def test_a_bad_worker_costs_one_clip(source: Path, tmp_path: Path, saboteur: None, deed: str, kind: str) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "train/hop/deed.mp4").write_bytes(deed.encode())
    result = shard(ShardJob(mixed, tmp_path / "out", workers=1, timeout=3.0, memory=3 << 30))
    assert result.written == 12
    assert result.rejected == {kind: 1}


def test_worker_stops_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys; from diffmae_video.data.workers import Worker; from diffmae_video.data.transcode import *\n"
        "w = Worker(); w.run('gone', TranscodeOptions()); print(w.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < deadline:
        os.sched_yield()
    assert not Path(f"/proc/{int(done.stdout)}").exists()


# -- what is made of an input --------------------------------------------------------------------------------------


def test_transcode_scales_down_only_and_keeps_rate_and_count() -> None:
    data = make_video(frames=20, size=(128, 96))
    for short, size in ((48, (64, 48)), (256, (128, 96))):
        out, suffix, meta = transcode(data, TranscodeOptions(short_side=short))
        info = probe(out, exact=True)
        assert (suffix, info.frames, info.width, info.height) == ("mp4", 20, *size)
        assert info.fps == pytest.approx(10, rel=0.06)
        assert (meta["frames"], meta["width"], meta["height"]) == (20, *size)
    out, _, meta = transcode(data, TranscodeOptions(fps=5))
    assert probe(out, exact=True).frames == 10 == meta["frames"]


def test_trim_cuts_the_span() -> None:
    out, _, meta = transcode(make_video(frames=30), TranscodeOptions(trim=True), (0.5, 1.3))
    assert meta["frames"] == 8
    first = read_clips(out, [[0]])[0].frames[0]
    assert read_number(first.permute(1, 2, 0).numpy()) == 5
    with pytest.raises(DataError, match="cut already"):
        transcode(make_video(frames=30), TranscodeOptions(trim=True), (60, 70))


def test_times_of_a_variable_rate_survive() -> None:
    times = [0, 40, 50, 300, 310, 900, *range(1000, 2800, 100)]
    out, _, _ = transcode(make_video(times=times), TranscodeOptions())
    assert read_clips(out, [list(range(24))])[0].pts.tolist() == pytest.approx([t / 1000 for t in times], abs=1e-3)


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=slow)])
def test_encoded_bytes_depend_on_frames_alone(rounds: int) -> None:
    """With AVX-512 x264's macroblock tree read memory that it had not written: most of these encodes differed."""
    draw, held, made = random.Random(0), [], set()
    texture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for number in range(40):  # a view that pans over the texture
            view = np.ascontiguousarray(texture[2 * number :, 3 * number :][:144, :176])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode())
    for _ in range(rounds):
        made.add(hashlib.sha256(transcode(sink.getvalue(), TranscodeOptions())[0]).hexdigest())
        held = [draw.randbytes(draw.randrange(512, 1 << 17)) for _ in range(40)]
        del held[::2]  # the next encoder finds leftovers on the heap
    assert len(made) == 1


@slow
def test_copy_keeps_bytes(source: Path, tmp_path: Path) -> None:
    shard(ShardJob(source, tmp_path / "out", options=TranscodeOptions(copy=True)))
    with ShardReader(Manifest.load(tmp_path / "out")) as reader:
        sample = reader.read("val", 0)
        assert sample.data == (source / sample.meta["source"]).read_bytes()


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("n00000001", "n00000002"):
        (tmp_path / "images/train" / name).mkdir(parents=True)
        for number, size in enumerate([(40, 30), (600, 400)]):
            noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / f"images/train/{name}/{number}.JPEG")
    assert run(["shard", "images", "out", "--image", "--short-side", "100"]) == 0
    ahead = "Next: diffmae pretrain --image; the name of its labels is --task images.\n"
    assert capsys.readouterr().out.endswith(ahead)
    assert run(["shard", "images", "out", "--image", "--short-side", "100"]) == 0  # all of it is there
    assert capsys.readouterr().out.endswith(ahead)
    manifest = Manifest.load("out")
    assert (manifest.kind, manifest.dataset) == ("image", "images")
    table = manifest.samples("train")
    assert sorted(zip(table.width.tolist(), table.height.tolist(), strict=True)) == [(40, 30)] * 2 + [(150, 100)] * 2
    assert not verify("out", decode=True).problems


# -- verify and index ----------------------------------------------------------------------------------------------


def test_verify_names_the_damage(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(ShardJob(source, out, samples_per_shard=3))
    table = Manifest.load(out).samples("train")
    place = int(table.offset[4]) + 100
    name = Manifest.load(out).shards[int(table.shard[4])].name
    raw = bytearray((out / name).read_bytes())
    raw[place] ^= 1
    (out / name).write_bytes(raw)
    (out / "stray.tar").write_bytes(b"")
    (out / "val-000000.tar").unlink()
    told: list[Step] = []
    with listen(told.append):
        problems = verify(str(out)).problems
    checked = [step for step in told if step.label == "checksums"]
    assert checked[-1].done == checked[-1].total == len(Manifest.load(out).shards)
    assert any(problem.startswith(f"{name}/{table.key(4)}:") for problem in problems)
    assert "stray.tar: not in the manifest" in problems
    assert "val-000000.tar: missing" in problems
    assert run(["verify", "out"]) == 3
    raw = (out / "train-000000.tar").read_bytes()
    (out / "train-000000.tar").write_bytes(raw[: len(raw) // 2])
    assert any(problem.startswith("train-000000.tar:") for problem in verify(str(out)).problems)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    tar.addfile(member, io.BytesIO(data))


def test_index_of_foreign_shards(tmp_path: Path) -> None:
    folder, clip = tmp_path / "foreign", make_video(frames=4)
    folder.mkdir()
    with tarfile.open(folder / "val-0.tar", "w") as tar:
        add(tar, "a.mp4", clip)
        add(tar, "a.cls", b"1")
        add(tar, "b.json", b"{}")  # half a sample
        add(tar, "c.mp4", clip)
        add(tar, "c.pyd", b"cposix\nsystem\n(S'touch owned'\ntR.")  # never read
        add(tar, "../../d.mp4", kind=tarfile.SYMTYPE)
        add(tar, "e.mp4", clip)
        add(tar, "f.json", b"{}")
        add(tar, "e.json", b"{}")  # not beside e.mp4
        add(tar, "g.mp4", clip)
    raw = (folder / "val-0.tar").read_bytes()
    (folder / "val-0.tar").write_bytes(raw[: raw.rindex(clip) + len(clip) // 2])  # cut inside g
    result = index(str(folder))
    assert result.splits == {"val": 3}
    assert result.rejected["incomplete"] >= 2
    assert result.rejected["not a file"] == 1
    assert sum(count for reason, count in result.rejected.items() if reason in ("cut", "scattered")) >= 1
    with ShardReader(Manifest.load(folder)) as reader:
        samples = [reader.read("val", number) for number in range(3)]
    assert [sample.key for sample in samples] == ["a", "c", "e"]
    assert [sample.label for sample in samples] == [1, -1, -1]
    assert all(sample.data == clip for sample in samples)
    assert not (tmp_path / "owned").exists()


@slow
def test_index_rebuilds_what_shard_wrote(source: Path, tmp_path: Path) -> None:
    shard(ShardJob(source, tmp_path / "out", samples_per_shard=5))
    before = Manifest.load(tmp_path / "out")
    for name in ("manifest.json", "samples.parquet"):
        (tmp_path / "out" / name).unlink()
    index(str(tmp_path / "out"))
    after = Manifest.load(tmp_path / "out")
    assert (after.classes, after.splits, after.shards) == (before.classes, before.splits, before.shards)
    for split in before.splits:
        for column in ("offset", "size", "label", "frames", "crc"):
            assert np.array_equal(getattr(after.samples(split), column), getattr(before.samples(split), column))


# -- many machines -------------------------------------------------------------------------------------------------


@slow
def test_any_executor(source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        shard(ShardJob(source, tmp_path / "a", samples_per_shard=3), pool)
        assert pool.submit(int).result() == 0  # not shut down
    shard(ShardJob(source, tmp_path / "b", samples_per_shard=3))
    assert sums(tmp_path / "a") == sums(tmp_path / "b")


@pytest.mark.slow
def test_dask_with_a_worker_killed_midway(source: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        killed = []

        def kill_one() -> None:
            parts = tmp_path / "dask/.parts"
            deadline = time.monotonic() + 60
            while not list(parts.glob("*.tar.json")) and time.monotonic() < deadline:
                time.sleep(0.02)
            nanny = next(iter(cluster.workers.values()))
            os.kill(nanny.pid, signal.SIGKILL)
            killed.append(nanny.pid)

        with ThreadPoolExecutor(1) as side:
            watching = side.submit(kill_one)
            result = shard(ShardJob(source, tmp_path / "dask", dask=cluster.scheduler_address, samples_per_shard=1))
            watching.result(timeout=60)
    assert killed
    assert result.written == 12
    shard(ShardJob(source, tmp_path / "here", samples_per_shard=1))
    assert sums(tmp_path / "dask") == sums(tmp_path / "here")
