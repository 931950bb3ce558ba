"""`features` and `loss-sweep` on a small untrained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffmae_video.config import DiffusionSettings, ModelSettings, Settings, settings_toml, with_overrides
from diffmae_video.data.shards import ShardReader
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.classify import ViewSettings, decode_views
from diffmae_video.evaluation.views import parse_views
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import normalize_pixels
from diffmae_video.models.weights import load_model, save_model
from diffmae_video.pipelines.feature_pass import read_features
from diffmae_video.pipelines.features import extract_features
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.loss_sweep import loss_sweep
from diffmae_video.pipelines.workspace import Workspace

MODEL = {
    **{"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 16},
    **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pre-training run on record in a workspace of its own."""
    monkeypatch.chdir(tmp_path)
    settings = with_overrides(
        Settings(model=ModelSettings(**MODEL)),
        data={"stride": 2, "workers": 0, "max_bad_fraction": 0.5},
        train={"precision": "fp32"},
    )
    folder = tmp_path / "runs" / "pretrain-001"
    save_model(DiffMAE(settings.model, DiffusionSettings(), seed=3), folder, {"dataset": "squares"})
    (folder / "config.toml").write_text(settings_toml(settings))
    Workspace.here().record("pretrain", folder, dataset="squares")
    return folder


def clip_of(manifest, split: str, index: int) -> torch.Tensor:
    spec = ViewSettings(parse_views("1x1"), 4, 2, (32, 32))
    return normalize_pixels(
        decode_views(ShardReader(manifest).read(split, index).data, spec).view(0)[None], "symmetric"
    )


def test_features_and_table(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    manifest = make_shards(tmp_path / "shards", {"train": 4, "val": 3}, broken=("train0001",))
    exact = ("evaluate.precision=fp32",)
    paths = extract_features(Job(data="shards", out=tmp_path / "out", device="cpu", overrides=exact))
    assert [path.name for path in paths] == ["train.safetensors", "val.safetensors"]
    train = load_file(tmp_path / "out" / "train.safetensors")
    assert train["samples"].tolist() == [0, 2, 3]
    assert train["labels"].tolist() == [0, 2, 0]
    table = pq.read_table(tmp_path / "out" / "train.parquet").to_pydict()
    assert table == {
        "key": ["train0000", "train0002", "train0003"],
        "label": [0, 2, 0],
        "class": ["right", "down", "right"],
    }
    assert list(read_features(paths[0]).failed) == ["train0001"]
    encoder = load_model(run).encoder.eval()
    for split, rows in (("train", train), ("val", load_file(paths[1]))):  # the second split sees the same encoder
        with torch.no_grad():
            tokens = encoder(clip_of(manifest, split, 2))  # (1, N, D) after the norm
            expected = encoder.norm(encoder(clip_of(manifest, split, 2), norm=False).mean(1))[0]
        row = rows["samples"].tolist().index(2)
        assert torch.allclose(rows["features"][row], expected, atol=1e-5)
    job = Job(data="shards", out=tmp_path / "tokens", device="cpu", overrides=exact)
    extract_features(job, splits=["val"], tokens=True)
    stored = read_features(tmp_path / "tokens" / "val.safetensors").features
    assert stored.dtype == torch.float16
    assert torch.allclose(stored[2].float(), tokens[0], atol=5e-3)


def test_features_are_reused_and_never_mixed(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    make_shards(tmp_path / "shards", {"val": 2})
    path = extract_features(Job(data="shards", device="cpu"))[0]
    assert ".diffmae/features" in str(path)
    before = path.stat().st_mtime_ns
    assert extract_features(Job(data="shards", device="cpu"))[0] == path
    assert path.stat().st_mtime_ns == before
    other = extract_features(Job(data="shards", device="cpu"), views="2x1")[0]
    assert other != path
    with pytest.raises(UsageError, match="holds other features"):
        extract_features(Job(data="shards", device="cpu", out=path.parent), views="2x1")
    with pytest.raises(DataError, match="no split"):
        extract_features(Job(data="shards", device="cpu"), splits=["test"])
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="no features file"):
        read_features(path)


def test_loss_sweep_equals_the_model_at_a_fixed_timestep(run: Path, tmp_path: Path, make_shards: Callable) -> None:
    manifest = make_shards(tmp_path / "shards", {"val": 3})
    result = loss_sweep(
        Job(data="shards", device="cpu", out=tmp_path / "sweep", seed=0), run, clips=2, steps=3, ratios=[0.5]
    )
    first, middle, last = result.timesteps
    assert (first, last) == (0, 999)
    assert 0.3 < result.signal[1] < 0.7  # halfway between clean and noise, not halfway through the table
    assert result.clips == 2
    written = json.loads((tmp_path / "sweep" / "loss_sweep.json").read_text())
    assert written["errors"]["0.5"] == list(result.errors["0.5"])
    assert {"loss_sweep.png", "report.html"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert result.signal[0] > 0.99 > 0.01 > result.signal[2]

    from diffmae_video.data.order import clip_seeds

    model, losses = load_model(run).eval(), []
    for index in range(2):
        seeds = [int(clip_seeds(0, 0, index, 0))]
        mask = make_mask("random", 0.5, (2, 2, 2), seeds)
        draw = model.draw(seeds, mask)
        with torch.no_grad():
            output = model(clip_of(manifest, "val", index), mask, draw._replace(timestep=torch.tensor([middle])))
        losses.append(output.loss.item())
    assert result.errors["0.5"][1] == pytest.approx(
        sum(losses) / 2, rel=0.05
    )  # training decodes the crop, views the frame
    assert result.mean_prediction["0.5"] > 0
