"""One run in one process: state, steps, and what happens at intervals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffmae_video.config import Settings
from diffmae_video.errors import DataError, DiffmaeError, UsageError
from diffmae_video.files import write_atomic
from diffmae_video.training import optim, parallel, run, state
from diffmae_video.training.checkpoint import Checkpointer, Found, load_tensors
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import autocast, describe_machine, peak_flops, peak_memory
from diffmae_video.training.logging import RunLog
from diffmae_video.training.meter import Meter
from diffmae_video.training.run import Run
from diffmae_video.training.signals import StopRequest
from diffmae_video.training.task import Task


class Trainer:
    """One run in one process; `train` is the way to use it."""

    def __init__(self, task: Task, settings: Settings, here: Run, distributed: Distributed) -> None:
        self.task, self.settings, self.train, self.directory = task, settings, settings.train, here.directory
        self.distributed, self.device = distributed, distributed.device
        self.say, self.report, self.flops_per_clip = here.say, here.report, here.flops_per_clip
        self.wanted = here.identity
        state.seed_random(settings.seed, distributed.rank)
        self.model = task.model.to(self.device).train()
        self.wrapped = parallel.parallelize(self.model, self.train, distributed)
        self.sharded = distributed.world > 1 and self.train.sharding == "fsdp"
        self.optimizer = optim.build_optimizer(self.model, self.train, fused=self.device.type != "mps")
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.average = optim.MovingAverage(named, self.train.ema) if self.train.ema else None
        self.stream = task.open_stream(distributed.rank, distributed.world)
        clips_an_epoch = self.stream.samples_per_epoch * settings.data.repeats
        if not settings.data.sources and clips_an_epoch < self.train.batch_size:
            raise UsageError(
                f"The split {settings.data.split} has {clips_an_epoch} clips an epoch, fewer than train.batch_size = "
                f"{self.train.batch_size}; lower it or add data."
            )
        batch = self.train.batch_size
        self.steps_per_epoch = clips_an_epoch / batch
        self.total = self.train.steps or max(1, round(self.train.epochs * self.steps_per_epoch))
        self.warmup = min(self.train.warmup_epochs * clips_an_epoch, self.total * batch / 10)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.train.precision == "fp16")
        self.step = self.resumed_from = self.skipped = self.overflows = 0
        self.bad: dict[str, int] = {}
        self.best: float | None = None
        self.owed = False  # stopped in the very last step: its pictures and validation are still to come
        self.meter = Meter(self.device)
        self.files: Checkpointer | None = None
        self.log: RunLog | None = None
        self.last: dict[str, Any] = {}

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stream.close()
        try:
            if self.files is not None:
                self.files.close()
        except DiffmaeError:
            if failure[0] is None:
                raise
        finally:
            if self.log is not None:
                self.log.close()

    def mark(self, status: str) -> None:
        """Write the run's status for whoever looks into the directory."""
        if self.distributed.main:
            with contextlib.suppress(OSError):
                run.write_status(self.directory, status=status, step=self.step, total=self.total)

    # --- beginning --------------------------------------------------------------------------------------------------

    def start(self, found: Found | None) -> None:
        """Open the files of the run and take over a checkpoint's state."""
        train = self.train
        self.files = Checkpointer(
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
            self.log = RunLog(self.directory, self.step, train.wandb, self.settings.model_dump(mode="json"))
            run.write_status(
                self.directory,
                status="running",
                step=self.step,
                total=self.total,
                machine=describe_machine(self.device),
            )

    def _load(self, found: Found) -> None:
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
        self.skipped, self.best = found.state["skipped"], found.state["best"]
        self.owed = found.state["owed"]
        self.overflows = found.state["overflows"]
        self.scaler.load_state_dict(found.state["scaler"])
        self.files.best_step = found.state["best_step"]
        if self.distributed.main:  # totals over ranks: rank 0 carries them on
            self.bad = dict(found.state["bad"])
            self.meter.load(found.state["window"], world)
        self.say(f"Continuing {self.directory} from step {self.step} of {self.total} ({found.path.name}).")

    # --- training ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """The stream's batches; drawing from it moves no generator of this process."""
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number when it starts: a resumed run starts two
            return iter(self.stream)

    def one_step(self, batches: Iterator[Any], request: StopRequest) -> bool:
        """One optimizer step; returns whether any rank was asked to stop. A collective."""
        train, meter = self.train, self.meter
        batch_keys: list[Any] = []
        losses = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for micro in range(train.accumulate):
            with meter.waiting():
                batch = next(batches)
            batch_keys.append(batch)
            for reason, count in batch.bad.items():
                self.bad[reason] = self.bad.get(reason, 0) + count
            with meter.computing(), parallel.synchronized(self.wrapped, micro == train.accumulate - 1):
                with autocast(self.device, train.precision):
                    output = self.task.loss(self.wrapped, batch, self.device)
                self.scaler.scale(output.loss / train.accumulate).backward()
                losses += output.loss.detach() / train.accumulate
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0) + value.detach() / train.accumulate
        with meter.computing():
            self.scaler.unscale_(self.optimizer)
            norm = parallel.gradient_norm(self.model, train.clip_grad)
            overflow, bad, stop = self.distributed.any(*self._finite(losses, norm), bool(request))
            if bad or overflow:
                self._nonfinite(batch_keys, losses, norm, overflow and not bad)
            else:
                samples = (self.step + 0.5) * train.batch_size  # at the middle of the step: neither end is wasted on 0
                peak = optim.peak_learning_rate(train)
                self.rate = optim.learning_rate(
                    samples, self.total * train.batch_size, self.warmup, peak, min(train.min_lr, peak)
                )
                optim.set_learning_rate(self.optimizer, self.rate)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                if self.average is not None:
                    self.average.update(self.step)
                meter.add({**sums, "loss": losses, "grad_norm": norm})
                meter.steps += 1
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return stop

    def _finite(self, loss: Tensor, norm: Tensor) -> tuple[bool, bool]:
        """Whether the gradients are beyond fp16's range (and a smaller scale may cure it); whether a step is lost."""
        if bool(torch.isfinite(loss + norm)):
            return False, False
        curable = self.scaler.is_enabled() and self.scaler.get_scale() > 1 and bool(torch.isfinite(loss))
        return curable, not curable

    def _nonfinite(self, batches: list[Any], loss: Tensor, norm: Tensor, overflow: bool) -> None:
        """A loss or gradient that is no number: note the batch; stop unless some may be skipped.

        In fp16 gradients may overflow because the loss was scaled too far: the scale is halved and the step left out.
        """
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() / 2)
            self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})
        if overflow:
            self.overflows += 1
            return
        step = self.step + 1
        note = {
            "step": step,
            "rank": self.distributed.rank,
            "seed": self.settings.seed,
            "loss": str(loss.item()),
            "grad_norm": str(norm.item()),
            "keys": [key for batch in batches for key in batch.keys],
            "seeds": [seed for batch in batches for seed in batch.seeds.tolist()],
        }
        path = self.directory / f"nonfinite-{step:08d}-rank{self.distributed.rank}.json"
        write_atomic(path, json.dumps(note, indent=1) + "\n")
        self.skipped += 1
        if self.skipped > self.train.skip_nonfinite:
            raise DiffmaeError(
                f"Loss or gradient of step {step} is not finite (loss {note['loss']}); the weights are as before it, "
                f"{path} names its clips: lower train.base_lr or set train.clip_grad, then run the command again."
            )
        self.say(f"Step {step} is skipped: its loss or gradient is not finite ({path.name}).")

    # --- at intervals -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Do what a run that was stopped in its last step still owes, if it was."""
        if not self.owed:
            return
        self.owed = False
        if self.train.picture_every:
            self._pictures()
        self._validate()
        self.save()

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
        if self.report and self.distributed.main and (due["pictures"] or due["validate"] or due["save"]):
            with self.meter.aside():
                self.report(self.directory)

    def finish(self) -> None:
        """Wait until everything is on disk and mark the run as finished."""
        self.files.wait()
        self.mark("finished")
        if self.report and self.distributed.main:
            self.report(self.directory)

    def _due(self, stop: bool) -> dict[str, bool]:
        train, step, end = self.train, self.step, self.step == self.total
        self.owed = stop and end
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
        line["bad_samples"] = sum(sum(part.values()) for part in self.distributed.gather(self.bad))
        if not self.distributed.main:
            return
        rate = line["clips_per_s"] / self.distributed.world
        line = {
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "samples": self.step * self.train.batch_size,
            "loss": line.pop("loss", None),
            "lr": getattr(self, "rate", 0.0),
            **line,
            "peak_memory": round(peak_memory(self.device), 4),
            "skipped": self.skipped,
        }
        if self.scaler.is_enabled():
            line |= {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        if self.flops_per_clip:
            line["mfu"] = round(rate * self.flops_per_clip / peak_flops(str(self.device), self.train.precision), 4)
        self.last = {"step": self.step, **line}
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
        with self.meter.aside(), self._averaged():
            pictures = self.task.pictures(self.model, self.step)
        if self.log is not None:
            self.log.pictures(self.step, pictures)

    def _validate(self) -> bool:
        """Validate, log, and tell whether the result is the best so far."""
        with self.meter.aside(), self._averaged():
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
        for part in self.distributed.gather(self.bad):
            for reason, count in part.items():
                bad[reason] = bad.get(reason, 0) + count
        numbers = {
            "step": self.step,
            "world": self.distributed.world,
            "identity": self.wanted,
            "stream": self.stream.state_dict(),
            "skipped": self.skipped,
            "best": self.best,
            "owed": self.owed,
            "best_step": self.files.best_step,
            "bad": bad,
            "scaler": self.scaler.state_dict(),
            "optimizer": state.optimizer_numbers(self.model, self.optimizer),
            "overflows": self.overflows,
            "window": self.meter.state(self.distributed),
        }
        parallel.reshard(self.model)
        tensors = state.run_tensors(self.model, self.optimizer, self.average)
        generators = state.random_tensors(self.distributed.rank, self.device)
        with self.meter.aside():
            weights = None
            if self.sharded or self.distributed.main:
                weights = parallel.full_state(self.model, self.average.average if self.average else None)
            info = {**self.task.info(), "step": self.step, "metrics": dict(self.last)}
            self.files.save({**tensors, **generators}, numbers, lambda: self._export(weights, info, numbers["step"]))

    def _export(self, weights: dict[str, Tensor], info: dict[str, Any], step: int) -> None:
        from diffmae_video.models.weights import save_model

        save_model(self.model, self.directory, info, state=weights)
        run.write_status(self.directory, step=step)
