"""Recognition on real clips: fine-tuned from DiffMAE pre-training, beside scratch with the same fine-tuning budget.

    python benchmarks/tennis7.py ../shared/data/tennis7 WORK [--seeds 3] [--set-pretrain train.steps=100 ...]

Shards the set by its splits.csv (no scene stands in both splits), and for each seed pre-trains on the training clips,
fine-tunes from that and from scratch, fits a linear probe on both encoders, and evaluates all four arms, or those named
with --arm. Every model sees the same clips, labels and steps of fine-tuning. Finished stages are kept in WORK, so a
stopped run continues. Writes WORK/tennis7.json and a Markdown table to stdout.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

ARMS = ("pretrained", "scratch", "pretrained, linear probe", "scratch, linear probe")


def lay_out(source: Path, target: Path) -> None:
    """Class folders by split, as hard links (or copies where the disk differs): target/train/serve/..."""
    with open(source / "splits.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            place = target / row["split"] / row["label"] / Path(row["path"]).name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                try:
                    os.link(source / row["path"], place)
                except OSError:
                    shutil.copyfile(source / row["path"], place)


def run_seed(
    seed: int, work: Path, shards: Path, recipe: str, overrides: dict[str, list[str]], arms: list[str]
) -> dict[str, Any]:
    """Top-1 by arm and protocol, and process CPU seconds by stage, of one seed."""
    from diffmae_video.pipelines.evaluate import evaluate
    from diffmae_video.pipelines.finetune import finetune
    from diffmae_video.pipelines.job import Job
    from diffmae_video.pipelines.pretrain import pretrain

    folder = work / f"seed{seed}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Any, *arguments: Any) -> Any:
        begun = _cpu()
        result = stage(*arguments)
        seconds[name] = round(_cpu() - begun, 1)
        return result

    pretrained = folder / "pretrain"
    shared = Job(recipe=recipe, data=str(shards), seed=seed, device="cpu")
    timed("pretrain", pretrain, shared.with_(overrides=overrides["pretrain"], out=pretrained))
    scores: dict[str, dict[str, float]] = {}
    for arm in arms:
        init = str(pretrained) if arm.startswith("pretrained") else "scratch"
        protocol = "linear" if "linear" in arm else "finetune"
        run = folder / arm.replace(", ", "-").replace(" ", "-")
        if protocol == "linear" and run.exists():
            shutil.rmtree(run)
        job = shared.with_(overrides=overrides["finetune"], out=run)
        timed(arm, finetune, job, "tennis7", init, protocol)
        out = folder / f"eval-{run.name}"
        if (out / "eval.json").exists():
            shutil.rmtree(out)
        result = evaluate(Job(checkpoint=str(run), data=str(shards), device="cpu", out=out), "tennis7")
        assert result is not None  # no dry run
        scores[arm] = {views: one.top1 for views, one in result.scores.items()}
    result = {"seed": seed, "top1": scores, "cpu_seconds": seconds}
    done.write_text(json.dumps(result, indent=1))
    return result


def _cpu() -> float:
    """CPU seconds of this process and of the workers that have ended."""
    own, children = time.process_time(), os.times()
    return own + children.children_user + children.children_system


def markdown(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of top-1 over the seeds, by arm and protocol."""
    arms = list(results[0]["top1"])
    protocols = list(results[0]["top1"][arms[0]])
    lines = ["| weights | " + " | ".join(f"top-1 %, {views}" for views in protocols) + " | CPU s |"]
    lines.append("|---" * (len(protocols) + 2) + "|")
    for arm in arms:
        cells = []
        for views in protocols:
            values = [result["top1"][arm][views] * 100 for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        cost = statistics.mean(result["cpu_seconds"][arm] for result in results)
        if arm.startswith("pretrained"):
            cost += statistics.mean(result["cpu_seconds"]["pretrain"] for result in results)
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {cost:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with splits.csv and one folder a class")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default=str(Path(__file__).with_suffix(".toml")))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for both training stages")
    parser.add_argument("--set-pretrain", action="append", default=[])
    parser.add_argument("--set-finetune", action="append", default=[])
    parser.add_argument("--arm", dest="arms", action="append", choices=ARMS, help="some of the arms; may be repeated")
    arguments = parser.parse_args()

    from diffmae_video.data.transcode import TranscodeOptions
    from diffmae_video.pipelines.shard import ShardJob, shard

    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["DIFFMAE_WORKSPACE"] = str(work)
    lay_out(arguments.source, work / "clips")
    shard(
        ShardJob(
            work / "clips", work / "shards", dataset="tennis7", options=TranscodeOptions(short_side=128), workers=1
        )
    )
    overrides = {
        "pretrain": [*arguments.overrides, *arguments.set_pretrain],
        "finetune": [*arguments.overrides, *arguments.set_finetune],
    }
    recipe = str(Path(arguments.recipe).resolve())
    arms: list[str] = arguments.arms or list(ARMS)
    results = [run_seed(seed, work, work / "shards", recipe, overrides, arms) for seed in range(arguments.seeds)]
    (work / "tennis7.json").write_text(json.dumps(results, indent=1))
    print(markdown(results))


if __name__ == "__main__":
    main()
