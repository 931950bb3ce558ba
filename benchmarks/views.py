"""Multi-view testing: CPU time of decoding and cropping a video once for all its views, and once per view.

    python benchmarks/views.py CLIP... [--views 7x3] [--frames 16] [--stride 4] [--size 224] [--rounds 3] [--json FILE]

Every arm cuts the same views. `once` is what `diffmae eval` does. `seek` opens and decodes the video for each view,
with the same reader, which converts only the frames it needs; `seek, all frames` does so too and converts and scales
every frame of the clip's span, as MAE-ST and SlowFast do. Rounds are interleaved; medians of process CPU time.
Then a nano classifier with random weights sees the views of all arms: the largest difference of its logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffmae_video.config import ModelSettings
from diffmae_video.data.decode import Video
from diffmae_video.evaluation.classify import ViewSettings, decode_views
from diffmae_video.evaluation.views import crop_corner, parse_views, plan_views, scaled_size
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.patches import normalize_pixels


def once(data: bytes, settings: ViewSettings, out: torch.Tensor) -> torch.Tensor:
    """All views from one decode, into `out` (V, T, C, H, W)."""
    video = decode_views(data, settings)
    for index in range(len(video.plan.views)):
        video.view(index, out[index])
    return out


def seek(data: bytes, settings: ViewSettings, out: torch.Tensor, whole_span: bool = False) -> torch.Tensor:
    """The same views, each decoded by itself."""
    with Video(data) as video:
        info = video.info
    plan = plan_views(settings.protocols, info.frames, settings.frames, settings.stride)
    size = scaled_size(info.height, info.width, settings.size)
    for index, view in enumerate(plan.views):
        numbers = list(range(view.frames[0], view.frames[-1] + 1)) if whole_span else list(view.frames)
        with Video(data) as video:
            frames = video.clips([numbers], size=size)[0].frames
        rows = [numbers.index(number) for number in view.frames]
        top, left = crop_corner(*size, settings.size, view.place)
        cropped = frames[:, :, top : top + settings.size[0], left : left + settings.size[1]]
        for slot, row in enumerate(rows):
            out[index, slot].copy_(cropped[row])
    return out


@torch.inference_mode()
def largest_difference(model: Classifier, first: torch.Tensor, second: torch.Tensor) -> float:
    """Of the logits of two sets of views, each uint8 (V, T, C, H, W)."""
    return max(
        (model(normalize_pixels(a[None], "symmetric")) - model(normalize_pixels(b[None], "symmetric")))
        .abs()
        .max()
        .item()
        for a, b in zip(first, second, strict=True)
    )


def main() -> None:
    """Print a Markdown table, and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--views", default="7x3")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = ViewSettings(parse_views(options.views), options.frames, options.stride, (options.size, options.size))
    count = sum(protocol.temporal * protocol.spatial for protocol in settings.protocols)
    shape = (count, options.frames, 3, options.size, options.size)
    memory = {name: torch.zeros(shape, dtype=torch.uint8) for name in ("once", "seek", "seek, all frames")}
    arms: dict[str, Callable[[bytes], torch.Tensor]] = {
        "once": lambda data: once(data, settings, memory["once"]),
        "seek": lambda data: seek(data, settings, memory["seek"]),
        "seek, all frames": lambda data: seek(data, settings, memory["seek, all frames"], whole_span=True),
    }
    network = ModelSettings(preset="nano", frames=options.frames, size=(options.size, options.size))
    model = Classifier(Encoder(network, seed=0), 400, head_init=1.0).eval()
    print("| clip | once, CPU s | seek | seek, all frames | pixels equal | largest difference of logits |")
    print("|---|---|---|---|---|---|")
    figures = []
    for path in options.clips:
        data = path.read_bytes()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        results = {}
        for _ in range(options.rounds):
            for name, arm in arms.items():
                begun = time.process_time()
                results[name] = arm(data)
                seconds[name].append(time.process_time() - begun)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        equal = all(torch.equal(results["once"], result) for result in results.values())
        difference = max(largest_difference(model, results["once"], results[name]) for name in list(arms)[1:])
        cells = [f"{median[name]:.2f} ({median[name] / median['once']:.1f}x)" for name in list(arms)[1:]]
        cells += ["yes" if equal else "NO", f"{difference:.1e}"]
        print(f"| {path.name} | {median['once']:.3f} | {' | '.join(cells)} |", flush=True)
        ratios = {name: round(median[name] / median["once"], 2) for name in list(arms)[1:]}
        facts = {"clip": path.name, "cpu_seconds": {name: round(value, 4) for name, value in median.items()}}
        figures.append(facts | {"ratios": ratios, "pixels_equal": equal, "largest_logit_difference": difference})
    if options.json:
        settings_used = {name: getattr(options, name) for name in ("views", "frames", "stride", "size", "rounds")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"settings": settings_used, "clips": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
