"""What an evaluation leaves on disk: predictions.parquet (one row a video) and the JSON numbers beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmae_video.errors import DataError
from diffmae_video.files import replacing, write_atomic

FILE = "predictions.parquet"


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of the videos of a split, by protocol, in sample order."""

    keys: list[str]
    labels: Tensor  # (n,) int64
    classes: list[str]
    probabilities: dict[str, Tensor]  # protocol such as "7x3" -> (n, K) float32


def class_difference(first: list[str], second: list[str]) -> str | None:
    """The first difference between two class lists in words, or None where they are equal (names and order)."""
    ends = [*first, "missing"], [*second, "missing"]
    for index, (one, other) in enumerate(zip(*ends, strict=False)):
        if one != other:
            return f"class {index} is {one!r} in the first ({len(first)} classes) and {other!r} in the second " + (
                f"({len(second)} classes)"
            )
    return None


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write one row per video and protocol: key, label, label and predicted names, top-5, probabilities (atomic)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array(predictions.classes, dtype=object)
    tables = []
    for views, probabilities in predictions.probabilities.items():
        top = torch.sort(probabilities, dim=1, descending=True, stable=True).indices[:, :5].numpy()  # (n, 5)
        flat = pa.array(probabilities.contiguous().numpy().reshape(-1), pa.float32())
        columns = {
            "key": pa.array(predictions.keys, pa.string()),
            "views": pa.array([views] * len(predictions.keys), pa.string()),
            "label": pa.array(predictions.labels.numpy(), pa.int64()),
            "label_name": pa.array(names[predictions.labels.numpy()], pa.string()),
            "predicted_name": pa.array(names[top[:, 0]], pa.string()),
            "top5": pa.array(top.tolist(), pa.list_(pa.int64())),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(predictions.classes)),
        }
        tables.append(pa.table(columns))
    whole = pa.concat_tables(tables).replace_schema_metadata({"classes": json.dumps(predictions.classes)})
    with replacing(path) as temporary:
        pq.write_table(whole, temporary, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of an evaluation from its folder or from the file itself.

    Raises:
        DataError: missing, or not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} holds no {FILE}; give the folder of a `diffmae eval` run.")
    try:
        table = pq.read_table(file)
        classes = json.loads(table.schema.metadata[b"classes"])
        keys: list[str] = []
        labels = torch.zeros(0, dtype=torch.int64)
        probabilities: dict[str, Tensor] = {}
        views = table.column("views").to_pylist()
        for name in dict.fromkeys(views):
            part = table.filter(pa.array([view == name for view in views]))
            keys = part.column("key").to_pylist()
            labels = torch.from_numpy(part.column("label").to_numpy().copy())
            flat = part.column("probabilities").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            probabilities[name] = torch.from_numpy(flat.reshape(len(keys), len(classes)).copy())
        return Predictions(keys, labels, classes, probabilities)
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} is not a predictions file of `diffmae eval`; evaluate again.") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON in one step: the old file or the new one, never half of it."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
