"""The model card of an export: what it is, what it saw, how it was trained, what was measured, and how to use it.

It says only what the model's own `info` says; what nobody recorded is named as such.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import PIXEL_NORMS

LIBRARIES = {"safetensors": "diffmae-video", "timm": "timm", "hf": "transformers", "onnx": "onnxruntime"}

MEASURES = {  # of training metrics; the others are about the machine and the moment
    "loss": "training loss",
    "train_top1": "top-1 in training",
    "val_loss": "validation loss",
    "val_top1": "validation top-1, one view",
    "val_top5": "validation top-5, one view",
}


def class_names(model: DiffMAE | Classifier) -> list[str]:
    """Names of the classes as recorded, or `class_0`, ... where they are not; empty without a head."""
    count = getattr(model, "num_classes", 0)
    names = model.info.get("classes") or []
    return list(names) if len(names) == count else [f"class_{i}" for i in range(count)]


def model_card(model: DiffMAE | Classifier, form: str, licence: str) -> str:
    """README.md of an export in the format `form`, with the front matter that model hubs read."""
    info, purpose = model.info, None
    if isinstance(model, Classifier) and model.num_classes:
        purpose = f"{'video' if model.encoder.shape[0] > 1 else 'image'}-classification"
    front = ModelCardData(
        license=licence,
        library_name=LIBRARIES[form],
        pipeline_tag=purpose,
        tags=["video", "masked-autoencoder", "diffusion"],
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {_title(model)}", ""]
    lines += ["Made with diffmae-video, an independent implementation of Diffusion Models as Masked Autoencoders"]
    lines += ["(arXiv 2304.03283).", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(model, form, licence).items()]
    if isinstance(model, Classifier) and model.num_classes:
        names = model.info.get("classes") or []
        known = ", ".join(names) if len(names) == model.num_classes else "names not recorded"
        lines += ["", f"Classes ({model.num_classes}): {known}."]
    lines += ["", "## Measured", "", *_measured(info), "", "## Use", "", "```python", *_usage(model, form), "```"]
    lines += ["", "The licence is the one its exporter named; the terms of the training data hold as well."]
    return "\n".join(lines) + "\n"


def _title(model: DiffMAE | Classifier) -> str:
    recipe = _name(model.info.get("recipe"))
    return f"{_kind(model)}{f', recipe {recipe}' if recipe else ''}"


def _name(path: object) -> str:
    """The last part of a name or path: a card tells nothing of its maker's folders."""
    return PurePath(str(path or "")).name.removesuffix(".toml")


def _kind(model: DiffMAE | Classifier) -> str:
    if isinstance(model, DiffMAE):
        return f"DiffMAE (objective {model.settings.objective})"
    return "Classifier" if model.num_classes else "Encoder"


def _facts(model: DiffMAE | Classifier, form: str, licence: str) -> dict[str, str]:
    settings, info, encoder = model.settings, model.info, model.encoder
    whole = isinstance(model, Classifier) or form in ("safetensors", "hf")
    count = sum(parameter.numel() for parameter in (model if whole else encoder).parameters()) / 1e6
    pixels = " x ".join(map(str, (settings.frames, *settings.size)))
    mean, std = (list(values) for values in PIXEL_NORMS[settings.pixel_norm])
    facts = {
        "Model": f"{_kind(model)}, encoder {encoder.width} wide, {encoder.depth} blocks",
        "Holds": f"{'all of it' if whole else 'the encoder alone'}, {count:.2f} M parameters, as {form}",
        "Input": f"{pixels} pixels RGB, patches {settings.tubelet} x {settings.patch} x {settings.patch}, "
        f"(x / 255 - {mean}) / {std}",
        "Data": str(info.get("dataset") or "not recorded"),
        "Recipe": _name(info.get("recipe")) or "not recorded",
    }
    if "step" in info:
        metrics = info.get("metrics") or {}
        counts = (("epoch", "epochs"), ("samples", "samples"))
        seen = [f"{metrics[name]:g} {text}" for name, text in counts if name in metrics]
        facts["Trained"] = ", ".join([f"{info['step']} steps", *seen])
    if info.get("init"):
        facts["Started from"] = _name(info["init"])
    if info.get("imported_from"):
        facts["Imported from"] = f"{info['imported_from']}, {info.get('file', 'file not recorded')}"
        if info.get("problems"):
            facts["Not imported"] = "; ".join(info["problems"])
    return facts | {"Licence": licence}


def _measured(info: dict[str, Any]) -> list[str]:
    metrics = info.get("metrics") or {}
    lines = [f"- {text}: {metrics[name]:.4g}" for name, text in MEASURES.items() if metrics.get(name) is not None]
    for test in info.get("evaluations") or []:
        for views, scores in test["views"].items():
            interval = scores.get("top1_interval")
            between = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
            lines.append(
                f"- {test['task']}, split {test['split']}, {test['videos']['used']} videos, views {views}: "
                f"top-1 {scores['top1']:.1%}{between}, top-{scores.get('top5_rank', 5)} {scores['top5']:.1%}"
            )
    return lines or ["Nothing was recorded with the weights."]


def _usage(model: DiffMAE | Classifier, form: str) -> list[str]:
    settings = model.settings
    clips = f"float32 (B, 3, {settings.frames}, {settings.size[0]}, {settings.size[1]}), normalised as above"
    if form == "timm":
        return ["import timm", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)']
    if form == "hf":
        video = model.encoder.shape[0] > 1
        name = ("VideoMAE" if video else "ViTMAE") + (
            "ForVideoClassification" if isinstance(model, Classifier) else "ForPreTraining"
        )
        return [
            f"from transformers import AutoImageProcessor, {name}",
            'processor = AutoImageProcessor.from_pretrained("FOLDER")',
            f'model = {name}.from_pretrained("FOLDER")',
        ]
    if form == "onnx":
        return [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
            f'(out,) = session.run(None, {{"clips": clips}})  # {clips}',
        ]
    call = f"model(clips)  # {clips}"
    if isinstance(model, DiffMAE):
        call = "# model.sample(clips, mask, seeds=...) inpaints; model.encoder(clips) gives tokens"
    return ["from diffmae_video import load_model", 'model = load_model("FOLDER").eval()', call]
