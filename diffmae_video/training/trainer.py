"""One run in one process: state, steps, and what happens at intervals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffmae_video.config import Settings
from diffmae_video.errors import DataError, DiffmaeError, UsageError
from diffmae_video.training import parallel, run, state
from diffmae_video.training.checkpoint import Checkpoint, Checkpointer, load_tensors
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import autocast, describe_machine, peak_flops, peak_memory
from diffmae_video.training.logging import RunLog
from diffmae_video.training.meter import Meter
from diffmae_video.training.run import Run
from diffmae_video.training.stepper import Stepper
from diffmae_video.training.task import Task, need_clips


class Trainer:
    """One run in one process; `train` is the way to use it."""

    def __init__(self, task: Task, settings: Settings, here: Run, distributed: Distributed) -> None:
        self.task, self.settings, self.train, self.directory = task, settings, settings.train, here.directory
        self.distributed, self.device = distributed, distributed.device
        self.next_report = 0.0  # of the monotonic clock
        self.say, self.report, self.flops_per_clip = here.say, here.report, here.flops_per_clip
        self.wanted = here.identity
        state.seed_random(settings.seed, distributed.rank)
        self.model = task.model.to(self.device).train()
        self.sharded = distributed.world > 1 and self.train.sharding == "fsdp"
        self.stream = task.open_stream(distributed.rank, distributed.world)
        clips_an_epoch = self.stream.samples_per_epoch * settings.data.repeats
        if not settings.data.sources:
            need_clips(settings, clips_an_epoch, distributed.world)
        batch = self.train.batch_size
        self.steps_per_epoch = clips_an_epoch / batch
        self.total = self.train.steps or max(1, round(self.train.epochs * self.steps_per_epoch))
        self.warmup = min(self.train.warmup_epochs * clips_an_epoch, self.total * batch / 10)
        self.step = self.resumed_from = 0
        self.best: float | None = None
        self.unfinished_last_step = False  # stopped in it: its pictures and validation are still to come
        self.meter = Meter(self.device)
        self.stepper = Stepper(task, settings, here, self.meter, self.total, self.warmup)
        self.optimizer, self.average = self.stepper.optimizer, self.stepper.average
        self._files: Checkpointer | None = None
        self.log: RunLog | None = None
        self.last: dict[str, Any] = {}

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stream.close()
        try:
            if self._files is not None:
                self._files.close()
        except DiffmaeError:
            if failure[0] is None:
                raise
        finally:
            if self.log is not None:
                self.log.close()

    @property
    def files(self) -> Checkpointer:
        """The run's checkpoints, once it has started."""
        assert self._files is not None
        return self._files

    def mark(self, status: str) -> None:
        """Write the run's status for whoever looks into the directory."""
        if self.distributed.main:
            with contextlib.suppress(OSError):
                run.write_status(self.directory, status=status, step=self.step, total=self.total)

    # --- beginning --------------------------------------------------------------------------------------------------

    def start(self, found: Checkpoint | None) -> None:
        """Open the files of the run and take over a checkpoint's state."""
        train = self.train
        self._files = Checkpointer(
            self.directory / "checkpoints", self.distributed, train.keep_last, train.keep_every, train.mirror
        )
        if found is not None:
            try:
                self._load(found)
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise DataError(
                    f"Checkpoint {found.path} cannot be continued: its state.json holds odd values ({error!r}); delete "
                    "it to use the one before it."
                ) from error
        if self.distributed.main:
            self.log = RunLog(
                self.directory, self.step, train.log_to, train.project, self.settings.model_dump(mode="json"), self.say
            )
            run.write_status(
                self.directory,
                status="running",
                step=self.step,
                total=self.total,
                machine=describe_machine(self.device),
            )

    def _load(self, found: Checkpoint) -> None:
        longer = found.step < self.total  # a finished run may go on to a later last step
        if differs := run.identity_difference(found.state["identity"], self.wanted, but_length=longer):
            raise UsageError(f"Checkpoint {found.path} is of another run ({differs}); restore that, or start afresh.")
        if found.step > self.total:
            raise ValueError(f"step {found.step} of a run of {self.total}")
        rank, world = self.distributed.rank, self.distributed.world
        tensors = state.run_tensors(self.model, self.optimizer, self.average)
        same = found.state["world"] == world
        generators = state.random_tensors(rank, self.device) if same else {}
        load_tensors(found, {**tensors, **generators}, world)
        state.set_optimizer(self.model, self.optimizer, found.state["optimizer"])
        if same:
            state.set_random(generators, rank, self.device)
        else:
            state.seed_random(self.settings.seed + found.step, rank)
        self.stream.load_state_dict(found.state["stream"])
        self.step = self.resumed_from = found.step
        self.stepper.load(found.state["stepper"], same)
        self.best, self.unfinished_last_step = found.state["best"], found.state["unfinished_last_step"]
        self.last = dict(found.state.get("last", {}))  # absent before 2026-11-26
        self.files.best_step = found.state["best_step"]
        if self.distributed.main:  # totals over ranks: rank 0 carries them on
            self.stepper.bad = dict(found.state["bad"])
            self.meter.load(found.state["window"], world)
        self.say(f"Continuing {self.directory} from step {self.step} of {self.total} ({found.path.name}).")

    # --- training ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """The stream's batches; drawing from it moves no generator of this process."""
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number when it starts: a resumed run starts two
            return iter(self.stream)

    # --- at intervals -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Do what a run that was stopped, or killed, in its last step left undone, if it was."""
        if self.unfinished_last_step:
            self.unfinished_last_step = False
            if self.train.picture_every:
                self._pictures()
            self._validate()
            self.save()
        elif self.step == self.total and self.distributed.broadcast(self._behind()):
            weights = self._weights()
            if self.distributed.main:
                self._export(weights, self._info(), self.step)

    def at_intervals(self, stop: bool) -> None:
        """After a step: log, pictures, validation, checkpoint and report where they are due. A collective."""
        self.files.poll()
        due = self._due(stop)
        if due["log"]:
            self._log()
        if due["pictures"]:
            self._pictures()
        improved = due["validate"] and self._validate()
        if due["save"] or improved:
            self.save()
        if due["pictures"] or due["validate"] or due["save"]:
            self._report(now=stop)

    def finish(self) -> None:
        """Wait until everything is on disk and mark the run as finished."""
        self.files.wait()
        self.mark("finished")
        self._report(now=True)

    def _report(self, now: bool) -> None:
        """Write the page about the run; unless it has to be `now`, reports take at most 2% of the time."""
        if self.report is None or not self.distributed.main or not (now or time.monotonic() >= self.next_report):
            return
        begun = time.monotonic()
        with self.meter.other():
            self.report(self.directory)
        self.next_report = time.monotonic() + 50 * (time.monotonic() - begun)

    def _due(self, stop: bool) -> dict[str, bool]:
        train, step, end = self.train, self.step, self.step == self.total
        self.unfinished_last_step = stop and end
        every = {
            "log": train.log_every,
            "pictures": train.picture_every,
            "validate": train.validate_every,
            "save": train.checkpoint_every,
        }
        due = {name: bool(count) and step % count == 0 for name, count in every.items()}
        due["log"] = due["log"] or end
        due["save"] = due["save"] or end or stop
        due["validate"] = (due["validate"] or end) and not stop
        due["pictures"] = (due["pictures"] or (end and train.picture_every > 0)) and not stop
        return due

    def _log(self) -> None:
        line = self.meter.line(self.distributed, self.train.batch_size)
        line["bad_samples"] = sum(sum(part.values()) for part in self.distributed.gather(self.stepper.bad))
        if not self.distributed.main:
            return
        rate = line["clips_per_s"] / self.distributed.world
        line = {
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "samples": self.step * self.train.batch_size,
            "loss": line.pop("loss", None),
            "lr": self.stepper.rate,
            **line,
            "peak_memory": round(peak_memory(self.device), 4),
            "skipped": self.stepper.skipped,
        }
        if self.stepper.scaler.is_enabled():
            line |= {"loss_scale": self.stepper.scaler.get_scale(), "overflows": self.stepper.overflows}
        if self.flops_per_clip:
            line["mfu"] = round(rate * self.flops_per_clip / peak_flops(str(self.device), self.train.precision), 4)
        self.last = {"step": self.step, **line}
        if self.log is not None:
            self.log.metrics(self.step, line)

    def figures(self) -> dict[str, str]:
        """The last line's loss and rate, for a progress bar."""
        if not self.last or self.last.get("loss") is None:
            return {}
        last = self.last
        return {
            "loss": f"{last['loss']:.4g}",
            "clips/s": f"{last['clips_per_s']:.3g}",
            "data wait": f"{100 * last['data_wait']:.0f}%",
        }

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with its moving average, in evaluation mode."""
        parallel.reshard(self.model)
        if self.average is not None:
            self.average.swap()
        self.model.eval()
        try:
            with autocast(self.device, self.train.precision), torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.model.train()
            parallel.reshard(self.model)
            if self.average is not None:
                self.average.swap()

    def _pictures(self) -> None:
        if not (self.distributed.main or self.sharded):  # a sharded model computes with all ranks or not at all
            return
        with self.meter.other(), self._averaged():
            pictures = self.task.pictures(self.model, self.step)
        if self.log is not None:
            self.log.pictures(self.step, pictures)

    def _validate(self) -> bool:
        """Validate, log, and tell whether the result is the best so far."""
        with self.meter.other(), self._averaged():
            metrics = self.task.validate(self.model, self.step)
        if not metrics:
            return False
        if self.log is not None:
            self.log.metrics(self.step, metrics)
            self.last |= metrics
        name, better = getattr(self.task, "monitor", ("val_loss", "min"))
        value = metrics.get(name)
        if value is None or (self.best is not None and (value >= self.best if better == "min" else value <= self.best)):
            return False
        self.best, self.files.best_step = value, self.step
        return True

    def save(self) -> None:
        """Start writing a checkpoint of this moment, and the weights beside it. A collective."""
        bad: dict[str, int] = {}
        for part in self.distributed.gather(self.stepper.bad):
            for reason, count in part.items():
                bad[reason] = bad.get(reason, 0) + count
        numbers = {
            "step": self.step,
            "world": self.distributed.world,
            "identity": self.wanted,
            "stream": self.stream.state_dict(),
            "stepper": self.stepper.state(),
            "best": self.best,
            "unfinished_last_step": self.unfinished_last_step,
            "best_step": self.files.best_step,
            "bad": bad,
            "optimizer": state.optimizer_numbers(self.model, self.optimizer),
            "window": self.meter.state(self.distributed),
            "last": self.last,
        }
        parallel.reshard(self.model)
        tensors = state.run_tensors(self.model, self.optimizer, self.average)
        generators = state.random_tensors(self.distributed.rank, self.device)
        with self.meter.other():
            weights, info, step = self._weights(), self._info(), self.step
            self.files.save({**tensors, **generators}, numbers, lambda: self._export(weights, info, step))

    def _weights(self) -> dict[str, Tensor] | None:
        """Weights of the whole model, averaged where the run averages; None where another rank has them. A collective
        where parameters are sharded."""
        if not (self.sharded or self.distributed.main):
            return None
        return parallel.full_state(self.model, self.average.average if self.average else None)

    def _info(self) -> dict[str, Any]:
        return {**self.task.info(), "step": self.step, "metrics": dict(self.last)}

    def _behind(self) -> bool:
        """Whether the weights beside the checkpoints are older than the newest of them, which is written first."""
        from diffmae_video.models.weights import saved_step

        return saved_step(self.directory) != self.step

    def _export(self, weights: dict[str, Tensor] | None, info: dict[str, Any], step: int) -> None:
        from diffmae_video.models.weights import save_model

        model: Any = self.model
        save_model(model, self.directory, info, state=weights)
        run.write_status(self.directory, step=step)
