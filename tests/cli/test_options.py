"""Every option of every command does what it says, or is refused in one sentence.

`OPTIONS` holds, for each command, the words of a plain call and, for each option, words that are added to it. With
them the outcome (what is printed, the exit code, the files) must be another one; where the plain call cannot show the
option, a pair holds the words of both calls. An outcome is compared without times and rates, and a call that fails must
say one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import CliRunner
from PIL import Image

from diffmae_video.cli.app import app, run, variable_of
from diffmae_video.data.manifest import ShardInfo, write_manifest
from diffmae_video.data.shards import TarShard
from diffmae_video.files import sha256_of, write_atomic

Words = str | tuple[str, str]

TRAIN = "--recipe smoke --device cpu --out new"
OPTIONS: dict[str, tuple[str, dict[str, Words]]] = {
    "demo": (
        "demo --out started --recipe smoke --device mps",
        {"--out": "--out other", "--recipe": "--recipe demo", "--seed": "--seed 5", "--device": "--device cuda"},
    ),
    "demo-data": (
        "demo-data new --train 3 --val 2 --frames 4 --workers 1",
        {
            "--train": "--train 4",
            "--val": "--val 3",
            "--size": "--size 48",
            "--frames": "--frames 6",
            "--fps": "--fps 20",
            "--seed": "--seed 7",
            "--workers": "--workers 2",
        },
    ),
    "shard": (
        "shard clips new --workers 1",
        {
            "--dataset": "--dataset mine",
            "--layout": "--layout flat",
            "--image": "--image",
            "--copy": "--copy",
            "--trim": ("shard spans.csv new", "shard spans.csv new --trim"),
            "--short-side": "--short-side 16",
            "--fps": "--fps 5",
            "--crf": "--crf 40",
            "--preset": "--preset ultrafast",
            "--gop": "--gop 4",
            "--b-frames": "--b-frames 0",
            "--fold": "--fold 2",
            "--val-fraction": ("shard flat new --dry-run", "shard flat new --dry-run --val-fraction 0.5"),
            "--min-frames": "--min-frames 999",
            "--samples-per-shard": "--samples-per-shard 2",
            "--workers": "--workers 2",
            "--dask": "--dask tcp://127.0.0.1:9 --workers 1",
            "--timeout": ("shard one new --workers 1", "shard one new --workers 1 --timeout 0.1"),
            "--memory": ("shard big new --image --workers 1", "shard big new --image --workers 1 --memory 0.5"),
            "--limit": "--limit frames=2",
            "--overwrite": ("shard clips shards --workers 1", "shard clips shards --workers 1 --overwrite"),
            "--dry-run": "--dry-run",
        },
    ),
    "verify": ("verify damaged", {"--decode": "--decode"}),
    "index": ("index tars", {"--dataset": "--dataset mine", "--split": "--split test"}),
    "stats": ("stats shards --out new", {"--out": "--out other", "--split": "--split val"}),
    "pretrain": (
        f"pretrain {TRAIN}",
        {
            "--throughput": (f"pretrain {TRAIN} --dry-run", f"pretrain {TRAIN} --dry-run --throughput 2"),
            "--init": "--init runs/pretrain-001",
            "--video": (f"pretrain {TRAIN} --image", f"pretrain {TRAIN} --image --video"),
            "--image": "--image",
            "--joint": "--joint",
            "--data": "--data few",
            "--recipe": "--recipe nano-image",
            "--set": "--set train.steps=3",
            "--out": "--out other",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--nproc": "--nproc 3",
            "--resume": ("pretrain --recipe smoke", "pretrain --recipe smoke --resume never"),
            "--dry-run": "--dry-run",
            "--device-memory": (f"pretrain {TRAIN} --dry-run", f"pretrain {TRAIN} --dry-run --device-memory 1GiB"),
            "--profile": "--profile 1",
        },
    ),
    "report": ("report runs/pretrain-001", {"--out": "--out page.html"}),
    "finetune": (
        f"finetune --task demo {TRAIN}",
        {
            "--task": "--task k400",
            "--init": "--init scratch",
            "--protocol": "--protocol linear",
            "--data": "--data few",
            "--recipe": "--recipe nano-image",
            "--set": "--set train.steps=3",
            "--out": "--out other",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--nproc": "--nproc 3",
            "--resume": (
                "finetune --task demo --recipe smoke --init runs/pretrain-001",
                "finetune --task demo --recipe smoke --init runs/pretrain-001 --resume never",
            ),
            "--dry-run": "--dry-run",
            "--device-memory": (
                f"finetune --task demo {TRAIN} --dry-run",
                f"finetune --task demo {TRAIN} --dry-run --device-memory 1GiB",
            ),
        },
    ),
    "eval": (
        "eval --task demo --out new --device cpu",
        {
            "--task": "--task inpaint --dry-run",
            "--views": "--views 2x3",
            "--masks": "--masks center",
            "--protocol": "--protocol denoise",
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--data": "--data few",
            "--set": "--set evaluate.bootstrap=3",
            "--out": "--out other",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--nproc": "--nproc 2",
            "--resume": (
                "eval --task demo --checkpoint runs/finetune-001",
                "eval --task demo --checkpoint runs/finetune-001 --resume never",
            ),
            "--dry-run": "--dry-run",
        },
    ),
    "features": (
        "features --out new --device cpu --data shards",
        {
            "--split": "--split val",
            "--views": "--views 2x1",
            "--tokens": "--tokens",
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--data": "--data few",
            "--set": "--set data.stride=2",
            "--out": "--out other",
            "--device": "--device mps",
            "--nproc": "--nproc 2",
            "--dry-run": "--dry-run",
        },
    ),
    "predict": (
        "predict one/clip.mp4 --device cpu",
        {
            "--task": "--task k400",
            "--views": ("predict one/clip.mp4 --json", "predict one/clip.mp4 --json --views 3x3"),
            "--top": "--top 2",
            "--json": "--json",
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--set": "--set data.stride=9",
            "--device": "--device mps",
        },
    ),
    "compare": (
        "compare runs/eval-001 runs/eval-004",
        {
            "--views": "--views 9x9",
            "--common": ("compare runs/eval-001 runs/eval-003", "compare runs/eval-001 runs/eval-003 --common"),
            "--out": "--out new",
            "--seed": (
                "compare runs/eval-001 runs/eval-004 --out new",
                "compare runs/eval-001 runs/eval-004 --out new --seed 7",
            ),
        },
    ),
    "loss-sweep": (
        "loss-sweep --out new --clips 4 --steps 3 --ratio 0.5",
        {
            "--clips": "--clips 3",
            "--steps": "--steps 4",
            "--ratio": "--ratio 0.9",
            "--data": "--data few",
            "--set": "--set data.eval_split=train",
            "--out": "--out other",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--dry-run": "--dry-run",
        },
    ),
    "render-inpaint": (
        "render-inpaint one/clip.mp4 --out new --device cpu --mask center",
        {
            "--mask": "--mask box:0,0,8,8",
            "--track": "--track 0:0,0,8,8;5:8,8,8,8",
            "--follow": "--follow",
            "--sam": "--sam nothing --follow",
            "--dilate": "--dilate 3",
            "--invert": "--invert",
            "--lossless": "--lossless",
            "--codec": "--codec gif",
            "--crf": "--crf 40",
            "--sampler": "--sampler ddpm",
            "--steps": "--steps 5",
            "--samples": "--samples 2",
            "--label": "--label left",
            "--guidance": "--guidance 3",
            "--stride": "--stride 2",
            "--window": "--window whole",
            "--propagate": "--propagate only",
            "--fit": "--fit 2steps",
            "--fps": ("render-inpaint frames", "render-inpaint frames --fps 12"),
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--recipe": "--recipe smoke",
            "--set": "--set render.feather=0",
            "--out": "--out other",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--resume": (
                "render-inpaint one/clip.mp4 --mask center",
                "render-inpaint one/clip.mp4 --mask center --resume never",
            ),
            "--dry-run": "--dry-run",
        },
    ),
    "studio": (
        "studio one/clip.mp4 --dry-run",
        {
            "--port": "--port 7861",
            "--folder": "--folder other",
            "--max-upload": "--max-upload 5",
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--recipe": "--recipe smoke",
            "--set": "--set render.feather=0",
            "--seed": "--seed 7",
            "--device": "--device mps",
            "--dry-run": ("studio names.txt", "studio names.txt --dry-run"),
        },
    ),
    "import": (
        "import mae theirs.pth --out new",
        {
            "--out": "--out other",
            "--frames": "--frames 4",
            "--inflate": ("import mae theirs.pth --frames 4", "import mae theirs.pth --frames 4 --inflate mean"),
            "--heads": "--heads 6",
            "--decoder-heads": "--decoder-heads 4",
            "--size": "--size 16x64",
            "--key": "--key model_ema",
            "--target": "--target pixel",
            "--classes": "--classes names.txt",
            "--allow-partial": ("import mae odd.pth", "import mae odd.pth --allow-partial"),
            "--overwrite": ("import mae theirs.pth --out few", "import mae theirs.pth --out few --overwrite"),
        },
    ),
    "export": (
        "export --out new",
        {
            "--checkpoint": "--checkpoint runs/pretrain-001",
            "--format": "--format timm",
            "--out": "--out other",
            "--licence": "--licence mit",
            "--overwrite": ("export --out few", "export --out few --overwrite"),
        },
    ),
    "study run": (
        "study run smoke --dry-run --device cpu",
        {
            "--data": ("study run smoke --jobs slurm", "study run smoke --jobs slurm --data demo=few"),
            "--out": ("study run smoke --jobs slurm", "study run smoke --jobs slurm --out other"),
            "--jobs": "--jobs 0",
            "--device": ("study run smoke --jobs slurm", "study run smoke --jobs slurm --device mps"),
            "--dry-run": ("study run smoke --jobs slurm", "study run smoke --jobs slurm --dry-run"),
        },
    ),
    "study table": ("study table nowhere", {}),
    "study list": ("study list", {}),
    "status": ("status", {}),
    "doctor": ("doctor", {}),
    "recipes": ("recipes", {}),
    "recipes fit": (
        "recipes fit --data shards --tflops 0.01 --device-memory 8GiB",  # not the memory that is free just now
        {
            "--hours": "--hours 0.01",
            "--tflops": "--tflops 0.02",
            "--data": "--data few",
            "--device": ("recipes fit --data shards --tflops 0.01", "recipes fit --data shards --device mps"),
            "--nproc": "--nproc 2",
            "--device-memory": "--device-memory 1GiB",
        },
    ),
    "recipes show": (
        "recipes show smoke",
        {"--stage": "--stage finetune", "--set": "--set train.steps=9"},
    ),
}


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    command = typer.main.get_command(app) if command is None else command
    for key, child in getattr(command, "commands", {}).items():
        path = f"{name} {key}".strip()
        if not getattr(child, "commands", None) or child.invoke_without_command:
            yield path, child
        yield from commands(child, path)


def options_of(command: Any) -> list[Any]:
    """Options of a command that are its own; `--debug` and `--help` have tests of their own."""
    ours = [one for one in command.params if one.param_type_name == "option"]
    return [one for one in ours if one.opts[0] not in ("--help", "--debug")]


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_call_that_shows_what_it_does(name: str) -> None:
    assert name in OPTIONS, f"add {name} to OPTIONS"
    assert [one.opts[0] for one in options_of(COMMANDS[name])] == list(OPTIONS[name][1])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_every_option_whole(name: str) -> None:
    shown = CliRunner().invoke(typer.main.get_command(app), [*name.split(), "--help"]).output
    plain = re.sub(r"[\s-]+", "", shown)
    for one in options_of(COMMANDS[name]):
        assert re.sub(r"[\s-]+", "", f"{one.opts[0]}{one.metavar or ''}") in plain
        assert re.sub(r"[\s-]+", "", one.help) in plain, one.help


def test_an_option_can_be_given_by_its_variable_and_only_to_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [variable_of(name, one.opts[0]) for name, command in COMMANDS.items() for one in options_of(command)]
    assert len(set(names)) == len(names)
    found = {one.envvar for command in COMMANDS.values() for one in options_of(command)}
    assert found == set(names)
    monkeypatch.setenv("DIFFMAE_RECIPES_SHOW_SET", "train.steps=9 train.batch_size=3")
    monkeypatch.setenv("DIFFMAE_PRETRAIN_SET", "no.such=1")
    assert run(["recipes", "show", "smoke"]) == 0
    shown = capsys.readouterr().out
    assert "steps = 9" in shown
    assert "batch_size = 3" in shown


# ---- the calls themselves


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a little of everything: clips, shards, runs, weights of others."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def do(words: str) -> None:
            assert run(words.split()) == 0, words

        do("demo-data clips --train 16 --val 16 --workers 1")
        do("demo-data fewer --train 8 --val 8 --workers 1 --seed 3")
        do("shard fewer few --copy --workers 1")
        do("shard clips shards --copy --workers 1")
        Path("one").mkdir()
        Path("flat").mkdir()
        Path("big").mkdir()
        Image.new("RGBA", (8192, 4600), (9, 9, 9, 255)).save("big/a.png", compress_level=1)
        clips = sorted(Path("clips/train").glob("*.mp4"))
        shutil.copy(clips[0], "one/clip.mp4")
        for clip in Path("clips").rglob("*.mp4"):
            shutil.copy(clip, "flat")
        rows = [f"clips/train/{clips[0].name},a,train,0.2,0.8", f"clips/train/{clips[1].name},b,train,0.2,0.8"]
        Path("spans.csv").write_text("\n".join(["path,label,split,start,end", *rows]) + "\n")
        Path("tars").mkdir()
        shutil.copy("few/train-000000.tar", "tars/train-000000.tar")
        Path("damaged").mkdir()
        with open("damaged/val-000000.tar", "wb") as file:
            tar = TarShard(file)
            tar.add("key", "mp4", b"no video", {"label": 0, "frames": 4, "fps": 10.0, "width": 32, "height": 32})
            tar.close()
        size, digest = Path("damaged/val-000000.tar").stat().st_size, sha256_of(Path("damaged/val-000000.tar"))
        shards = [(ShardInfo("val-000000.tar", "val", size, digest, 1), tar.rows)]
        write_manifest("damaged", dataset="damaged", kind="video", classes=["a"], shards=shards)
        do("pretrain --recipe smoke")
        do("pretrain --recipe smoke --seed 1")
        do("finetune --task demo --recipe smoke --init runs/pretrain-001")
        do("eval --task demo")
        do("eval --task demo --views 2x3")
        do("eval --task demo --data few")
        do("finetune --task demo --recipe smoke --init scratch --seed 3 --out scratch")
        do("eval --task demo --checkpoint scratch")
        do("finetune --task demo --recipe smoke --init runs/pretrain-001 --seed 4 --out newest")
        do("render-inpaint one/clip.mp4 --mask center")
        do("render-inpaint one/clip.mp4 --mask center --codec png --out pngs")
        shutil.move(next(Path("pngs").rglob("*.png")).parent, "frames")
        theirs, average = theirs_mae(0), theirs_mae(1)
        torch.save({"model": theirs, "model_ema": average}, "theirs.pth")
        torch.save({"model": theirs | {"blocks.0.odd": torch.zeros(2)}}, "odd.pth")
        Path("names.txt").write_text("a\nb\n")
        for status in Path("runs").glob("*-001/run.json"):  # as if they had been stopped
            write_atomic(status, json.dumps(json.loads(status.read_text()) | {"status": "stopped"}))
        Path("started").mkdir()
        from diffmae_video._version import __version__

        identity = {"version": __version__, "recipe": "smoke", "seed": 0}
        stages = {"demo-data": {"seconds": 1.0}, "shard": {"seconds": 1.0}}
        Path("started/demo.json").write_text(json.dumps({"identity": identity, "stages": stages}))
        shutil.copytree("shards", "started/shards")
    return folder


def theirs_mae(seed: int) -> dict[str, torch.Tensor]:
    """An image MAE as its authors' code saves it: width 192, one block, 4x4 patches of 8 pixels, a small decoder."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (192, 3, 8, 8), "patch_embed.proj.bias": (192,)}
    shapes |= {"cls_token": (1, 1, 192), "pos_embed": (1, 17, 192), "mask_token": (1, 1, 64)}
    shapes |= {"decoder_pos_embed": (1, 17, 64), "decoder_embed.weight": (64, 192), "decoder_embed.bias": (64,)}
    shapes |= {"decoder_pred.weight": (192, 64), "decoder_pred.bias": (192,)}
    for prefix, width in (("", 192), ("decoder_", 64)):
        for layer, (rows, columns) in {
            "attn.qkv": (3, 1),
            "attn.proj": (1, 1),
            "mlp.fc1": (4, 1),
            "mlp.fc2": (1, 4),
        }.items():
            shapes[f"{prefix}blocks.0.{layer}.weight"] = (rows * width, columns * width)
            shapes[f"{prefix}blocks.0.{layer}.bias"] = (rows * width,)
        for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


TIMES = (
    r"\d+(\.\d+)?(e[+-]?\d+)? ?(ms|s|GiB|/s|clips/s|dB)\b|\b\d+[hm]\d\d[ms]\b|\d+(\.\d+)?%?(?= of the (time|peak))"
    r"|\b\d{4}-\d\d-\d\d[T ][\d:+.Z-]+|process \d+ on \S+|Ports?: \d+|127\.0\.0\.1:\d+"
)
MEASURED = (
    r'"(\w*seconds\w*|\w+_s|data_wait|overhead|mfu|peak_memory|made|bytes_read|step_time|time|machine|rate|command)"'
)
PROGRESS = r"(?m)^[\w -]+: \d+(/\d+)? \w+, \S+/s.*\n"
"""A plain line of progress: there are as many as the work takes tens of seconds."""
UNSTABLE = (".html", ".lock", ".holder", ".log")


def outcome(made: Path, words: str, place: Path) -> tuple[int, str, dict[str, str], list[int]]:
    """What a call came to: exit code, what it said, its files by digest, and sizes of the pools it made."""
    shutil.copytree(made, place)
    record = place / ".diffmae" / "workspace.json"
    record.write_text(record.read_text().replace(str(made), str(place)))
    pools: list[int] = []
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.chdir(place)
        patch.setenv("COLUMNS", "1000")
        for kind in (ThreadPoolExecutor, ProcessPoolExecutor):
            patch.setattr(kind, "__init__", _noting(kind.__init__, pools))
        code = run(words.split())
    files = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file() and not name.endswith(UNSTABLE) and "events.out" not in name and "trace" not in name:
            files[re.sub(r"profile.*", "profile", name)] = _digest(path, place)
    text = said.getvalue().replace(str(place), "").replace(str(made), "")
    shutil.rmtree(place)
    return code, re.sub(TIMES, "#", re.sub(PROGRESS, "", text)), files, pools


def _noting(init: Callable[..., None], pools: list[int]) -> Callable[..., None]:
    def noted(self: Any, max_workers: int | None = None, *arguments: Any, **options: Any) -> None:
        pools.append(max_workers or 0)
        init(self, max_workers, *arguments, **options)

    return noted


def _digest(path: Path, place: Path) -> str:
    if "checkpoints" in path.parts:  # they hold times; metrics.jsonl and the weights tell what was computed
        return "checkpoint"
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".toml", ".csv", ".md", ".txt"):
        text = content.decode().replace(str(place), "")
        text = re.sub(MEASURED + r': ("(?:[^"\\]|\\.)*"|\{[^}]*\}|[^,}\]\n]+)', "", text)
        content = re.sub(TIMES, "#", text).encode()
    return hashlib.sha256(content).hexdigest()


def is_one_sentence(code: int, text: str) -> bool:
    """Whether a refusal is one: of ours, or the command line's own about a value."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return (
        "Unexpected" not in text
        and "Traceback" not in text
        and (last.startswith(("diffmae: ", "Error: ")) or code == 3)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name][1]])
def test_every_option_does_something_or_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    base, changes = OPTIONS[name]
    only = os.environ.get("ONLY_OPTION")
    seen: dict[str, Any] = {}

    def call(words: str) -> Any:
        if words not in seen:
            seen[words] = outcome(made, words, tmp_path / "place")
        return seen[words]

    plain = call(base)
    assert outcome(made, base, tmp_path / "place") == plain, "the plain call is not repeatable"
    without_effect = []
    for option, words in changes.items():
        if only and option != only:
            continue
        before, after = words if isinstance(words, tuple) else (base, f"{base} {words}")
        first, second = call(before), call(after)
        if second == first:
            without_effect.append(option)
        assert second[0] in (0, 1, 2, 3), (after, second[0])
        if second[0]:
            assert is_one_sentence(second[0], second[1]), (after, second[1])
    assert without_effect == []


def test_recipes_show_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from diffmae_video.config.recipes import setting_keys

    assert run(["recipes", "show", "video-base"]) == 0
    shown = capsys.readouterr().out
    for key in setting_keys():
        assert re.search(rf"^(# )?{key.rpartition('.')[2]} (=|is not set)", shown, re.M), key
