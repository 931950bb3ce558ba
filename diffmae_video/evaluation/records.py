"""Results of one long pass over a split, kept on disk as it goes: a killed pass continues, several processes share it.

The samples of a split are cut into blocks of fixed size. A block is computed by one process, in one go, so that the
composition of every batch, and with it every number to the last bit, is the same whatever the number of processes
and however often the pass was interrupted. Finished blocks are flushed to numbered part files (safetensors, renamed
into place whole); the fingerprint of what is computed is part of the folder's name, so parts never mix.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmae_video.files import replacing

FLUSH_SAMPLES = 64
FLUSH_SECONDS = 20.0


@dataclass
class Part:
    """Some finished blocks."""

    blocks: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)  # of each row of the tensors: index within the split
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # name -> one row per sample
    failed: dict[int, str] = field(default_factory=dict)  # sample -> reason
    seconds: float = 0.0


class PassStore:
    """Finished blocks of a pass, in `folder/partial-FINGERPRINT/`."""

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0) -> None:
        self.folder = Path(folder) / f"partial-{fingerprint[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self._pending = Part()
        self._since = time.monotonic()
        self._number = sum(1 for _ in self.folder.glob(f"rank{rank:04d}-*.safetensors"))

    def done(self) -> set[int]:
        """Blocks that some process, now or in an earlier run, has finished."""
        return {block for _, part in self._read_parts() for block in part["blocks"]}

    def add(self, block: int, rows: dict[int, dict[str, Tensor]], failed: dict[int, str]) -> None:
        """Take the results of a block: for each sample its named tensors, and the samples that failed, with reasons."""
        part = self._pending
        part.blocks.append(block)
        part.failed.update(failed)
        for sample, tensors in rows.items():
            part.samples.append(sample)
            for name, tensor in tensors.items():
                part.tensors.setdefault(name, []).append(tensor.detach().cpu())
        waited = time.monotonic() - self._since
        if len(part.samples) + len(part.failed) >= FLUSH_SAMPLES or waited >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; after this it survives anything."""
        part, now = self._pending, time.monotonic()
        if not part.blocks:
            return
        metadata = {
            "blocks": part.blocks,
            "samples": part.samples,
            "failed": {str(sample): reason for sample, reason in part.failed.items()},
            "seconds": now - self._since,
        }
        tensors = {name: torch.stack(rows) for name, rows in part.tensors.items()}
        path = self.folder / f"rank{self.rank:04d}-{self._number:06d}.safetensors"
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"part": json.dumps(metadata)})
        self._number += 1
        self._pending, self._since = Part(), now

    def summary(self) -> tuple[list[int], dict[int, str], float]:
        """Finished samples ascending, failed samples with reasons, and seconds over all processes and runs."""
        samples, failed, seconds = [], {}, 0.0
        for _, part in self._read_parts():
            samples += part["samples"]
            failed.update({int(sample): reason for sample, reason in part["failed"].items()})
            seconds += part["seconds"]
        return sorted(samples), failed, seconds

    def rows(self, name: str) -> Iterator[tuple[list[int], Tensor]]:
        """The rows of a named tensor, part by part: (samples, tensor with one row each)."""
        for path, part in self._read_parts():
            if part["samples"]:  # a part in which every sample failed has no values
                with safe_open(path, framework="pt") as file:
                    yield part["samples"], file.get_tensor(name)

    def collect(self, name: str) -> Tensor:
        """All rows of a named tensor, in sample order."""
        found = list(self.rows(name))
        if not found:
            return torch.zeros(0)
        order = torch.tensor([sample for samples, _ in found for sample in samples]).argsort()
        return torch.cat([rows for _, rows in found])[order]

    def remove(self) -> None:
        """Delete the parts, once the result of the pass has been written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_parts(self) -> Iterator[tuple[Path, dict]]:
        seen: set[int] = set()
        for path in sorted(self.folder.glob("rank*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = json.loads(file.metadata()["part"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                path.unlink(missing_ok=True)  # damaged: its blocks are computed again
                continue
            if seen & set(metadata["blocks"]):
                continue  # two processes computed the same block: both have the same numbers
            seen |= set(metadata["blocks"])
            yield path, metadata
