"""A task of another package: one file that registers it, chosen by `train.task`."""

from __future__ import annotations

import pytest
from torch import nn

from diffmae_video.errors import UsageError
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.registry import tasks
from diffmae_video.training.streams import open_stream
from diffmae_video.training.task import LossOutput, TaskSetup


class MeanColour:
    """Predicts the mean value of each clip from its first frame: what another package might train."""

    monitor = ("val_loss", "min")

    def __init__(self, setup: TaskSetup) -> None:
        settings = setup.settings
        self.setup = setup
        self.model = DiffMAE(settings.model, settings.diffusion, seed=settings.seed)
        self.model.readout = nn.Linear(self.model.encoder.width, 1)
        self.model.forward = lambda clips: self.model.readout(self.model.encoder(clips).mean(1))[:, 0]

    @classmethod
    def build(cls, setup):
        return cls(setup)

    def open_stream(self, rank, world):
        return open_stream(self.setup.settings, rank, world)

    def loss(self, model, batch, device):
        clips = batch.clips.to(device).float().transpose(1, 2) / 255  # (B, C, T, H, W)
        errors = (model(clips) - clips.mean((1, 2, 3, 4))).square()
        return LossOutput(errors.mean(), errors.detach(), {"spread": errors.detach().std()})

    def validate(self, model, step):
        return {"val_loss": 1 / (1 + step)}

    def pictures(self, model, step):
        return {}

    def info(self):
        return {**self.setup.facts, "by": "another package"}


@pytest.fixture
def mean_colour(monkeypatch):
    monkeypatch.setattr(tasks, "_parts", dict(tasks._parts))
    tasks.register("mean-colour")(MeanColour)


def test_a_task_from_outside_is_trained_by_the_stage(runs, tmp_path, mean_colour):
    assert tasks.names() == ["pretrain", "finetune", "mean-colour"]
    result = runs.here(tmp_path / "run", "train.task=mean-colour", "train.ema=0")
    assert result.step == 10
    last = runs.metrics(tmp_path / "run")[-1]
    assert last["val_loss"] == pytest.approx(1 / 11)
    assert any("spread" in line for line in runs.metrics(tmp_path / "run"))
    status = (tmp_path / "run" / "model.json").read_text()
    assert "another package" in status


def test_a_task_that_is_not_there_is_named_with_those_that_are(runs, tmp_path):
    with pytest.raises(UsageError, match=r"train\.task.*no task.*pretrain, finetune"):
        runs.here(tmp_path / "run", "train.task=nonsense")
