"""One pass of a frozen encoder over splits of a data set, kept on disk for probes and for others to use."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmae_video._version import __version__
from diffmae_video.data.manifest import Manifest
from diffmae_video.errors import DataError, DiffmaeError, Stopped, UsageError
from diffmae_video.evaluation.classify import SplitViews, ViewSettings, run_pass, videos_per_block
from diffmae_video.evaluation.records import PassStore
from diffmae_video.files import replacing
from diffmae_video.models.classifier import Classifier
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import Loaded
from diffmae_video.pipelines.workspace import Workspace
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.signals import stop_on_signal


@dataclass(frozen=True)
class Features:
    """Features of the videos of a split, in sample order."""

    path: Path
    features: Tensor  # (n, D) float32 pooled, or (n, N, D) float16 tokens (memory-mapped)
    labels: Tensor  # (n,) int64, -1 = none
    samples: Tensor  # (n,) int64, index within the split
    failed: dict[str, str]


@dataclass(frozen=True)
class FeaturePass:
    """One encoder over the splits of one data set.

    Pooled features are what the head of a classifier with that `pool` sees; tokens are what the encoder's last norm
    gives, with the class token first where there is one.
    """

    processes: Distributed
    loaded: Loaded
    manifest: Manifest
    spec: ViewSettings
    tokens: bool = False
    pool: str = "mean"
    folder: Path | None = None

    def of_split(self, split: str, samples: Sequence[int] | np.ndarray | None = None) -> Features:
        """Features of a split (or of some of its samples), from the cache or computed and put there. A collective.

        Raises:
            DataError: more videos are unreadable than data.max_bad_fraction allows.
            Stopped: a signal came; what is done is kept.
        """
        return _split_features(self, split, samples)


def _split_features(task: FeaturePass, split: str, samples: Sequence[int] | np.ndarray | None) -> Features:
    processes, loaded, manifest, spec = task.processes, task.loaded, task.manifest, task.spec
    tokens, pool, folder = task.tokens, task.pool, task.folder
    settings = loaded.settings
    chosen = range(manifest.splits[split]) if samples is None else [int(sample) for sample in samples]
    facts = {
        "version": __version__,
        "weights": loaded.weights_sha256,
        "data": manifest.hash,
        "split": split,
        "samples": None if samples is None else list(chosen),
        "views": asdict(spec),
        "batch_views": settings.evaluate.batch_views,
        "features": "tokens" if tokens else pool,
        "precision": loaded.precision,
        "device": processes.device.type,
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    if folder is None:
        folder = Workspace.here().folder / ".diffmae" / "features" / fingerprint[:16]
    path = folder / f"{split}.safetensors"
    cached = processes.broadcast(_fingerprint(path))
    if cached == fingerprint:
        return read_features(path)
    if cached is not None:
        raise UsageError(f"{path} holds other features; name another folder with --out or remove it.")
    network = copy.deepcopy(loaded.model.encoder)
    if not tokens:
        network = Classifier(network, 0, pool=pool)
    network.eval()

    def forward(clips: Tensor) -> Tensor:
        with loaded.autocast():
            return network(loaded.prepare(clips)).float()  # (B, D), or tokens (B, [1 +] N, D)

    block = videos_per_block(spec.protocols, settings.evaluate.batch_views)
    dataset = SplitViews(manifest, split, spec, chosen, block, settings.data.cache_dir, settings.data.cache_gib)
    store = PassStore(folder, fingerprint, processes.rank)
    with stop_on_signal() as stop, console.progress(len(chosen), f"features {split}", "videos") as bar:

        def advance(videos: int, failed: int) -> None:
            bar.update(videos)
            if stop:
                store.flush()
                raise Stopped(f"Stopped by {stop.name}; run the same command again to continue.")

        run_pass(
            forward,
            dataset,
            store,
            batch_views=settings.evaluate.batch_views,
            device=processes.device,
            workers=settings.data.workers,
            rank=processes.rank,
            world=processes.world,
            dtype=torch.float16 if tokens else torch.float32,
            advance=advance,
        )
    processes.barrier()
    if processes.main:
        _, failed, _ = store.summary()
        if len(failed) > settings.data.max_bad_fraction * len(chosen) or len(failed) == len(chosen):
            index, reason = min(failed.items())
            raise DataError(
                f"{len(failed)} of {len(chosen)} videos of {split} cannot be read, the first is "
                f"{manifest.samples(split).key(index)} ({reason.rstrip('.')}); repair the shards."
            )
        _write(path, store, str(spec.protocols[0]), manifest, split, fingerprint)
        store.remove()
    processes.barrier()
    return read_features(path)


def read_features(path: Path) -> Features:
    """Read features that `diffmae features` wrote; large ones stay on disk until they are used.

    Raises:
        DataError: missing, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("features", "null"))
            tensors = {name: file.get_tensor(name) for name in ("features", "labels", "samples")}
        return Features(path, tensors["features"], tensors["labels"], tensors["samples"], facts["failed"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no features file of `diffmae features` ({error}); make it again.") from error


def _fingerprint(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["features"])["fingerprint"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return "unknown"


def _write(path: Path, store: Any, name: str, manifest: Manifest, split: str, fingerprint: str) -> None:
    """Write the rows of a finished pass in sample order, part by part: memory does not grow with the data set."""
    samples, failed, _ = store.summary()
    table = manifest.samples(split)
    labels = table.label[samples].astype(np.int64)
    place = {sample: row for row, sample in enumerate(samples)}
    first = next(store.rows(name))[1]
    shape, dtype = (len(samples), *first.shape[1:]), first.numpy().dtype
    facts = {
        "fingerprint": fingerprint,
        "dataset": manifest.dataset,
        "split": split,
        "views": name,
        "failed": {table.key(index): reason for index, reason in sorted(failed.items())},
    }
    needed = 2 * int(np.prod(shape)) * dtype.itemsize + 16 * len(samples)  # rows come in any order: once to sort them
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DiffmaeError(f"{path} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; make room.")
    with replacing(path) as temporary, tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy") as scratch:
        rows = np.lib.format.open_memmap(scratch.name, "w+", dtype, shape)  # on disk: it may not fit into memory
        for part, values in store.rows(name):
            rows[[place[sample] for sample in part]] = values.numpy()
        tensors = {"features": torch.from_numpy(rows), "labels": torch.from_numpy(labels)}
        tensors["samples"] = torch.tensor(samples, dtype=torch.long)
        save_file(tensors, temporary, {"features": json.dumps(facts)})
    classes = [manifest.classes[label] if label >= 0 else None for label in labels]
    columns = {"key": [table.key(index) for index in samples], "label": labels, "class": pa.array(classes, pa.string())}
    with replacing(path.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.table(columns), temporary)
