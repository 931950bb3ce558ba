"""Settings of every stage: typed, validated, unknown keys are errors."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffmae_video.config.fit_text import read_fit_length
from diffmae_video.registry import (
    DecoderName,
    LoggerName,
    MaskerName,
    ObjectiveName,
    SamplerName,
    TargetName,
    TaskName,
    decoders,
    objectives,
    targets,
)

Stage = Literal["pretrain", "finetune", "evaluate", "render"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(gt=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**15)]
Pixels = Annotated[int, Field(gt=0, le=2**14)]
TOKENS, PARAMETERS = 2**17, 3 * 10**10
"""Limits before memory is taken: settings also come from files of strangers."""
Precision = Literal["auto", "bf16", "fp16", "fp32"]


def _check_space(name: str) -> str:
    if name != "pixel" and not re.fullmatch("pca:[1-9][0-9]*", name):
        raise ValueError(f"{name!r} is no space of patches; choose pixel, or pca:K with K components, e.g. pca:32")
    return name


def _check_fit(text: str) -> str:
    read_fit_length(text)
    return text


SpaceName = Annotated[str, AfterValidator(_check_space)]
FitText = Annotated[str, AfterValidator(_check_fit)]


class Section(BaseModel):
    """A group of settings: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class TeacherSettings(Section):
    """A frozen network whose token features a second decoder predicts (DiffMAE's CLIP target)."""

    source: Literal["timm", "open_clip", "local"] = "timm"
    """Where the teacher comes from."""
    name: str = "vit_base_patch16_clip_224.openai"
    """timm's name, open_clip's `NAME:TAG`, or, for `local`, `package.module:callable` that returns the module."""
    checkpoint: str | None = None
    """Local weights; without it the library's own pretrained weights are loaded."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the feature loss beside the pixel loss."""
    depth: Count = 4
    """Blocks of the feature decoder."""
    width: Width | None = None
    """Width of the teacher's features; without it the teacher is loaded and asked."""


class ModelSettings(Section):
    """Encoder, decoder, objective and target (paper, sections 3 and 4)."""

    preset: Literal["nano", "tiny", "small", "base", "large", "huge"] = "small"
    """Encoder size; `width`, `depth` and `heads` override single numbers of it."""
    width: Width | None = None
    """Encoder width D."""
    depth: Count | None = None
    """Encoder blocks."""
    heads: Count | None = None
    """Encoder attention heads."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of the MLP over its input width."""
    frames: Pixels = 16
    """Frames T of a clip; 1 for images (an image is repeated to fill one tubelet)."""
    size: tuple[Pixels, Pixels] = (224, 224)
    """Height H and width W of a clip, pixels."""
    tubelet: Pixels = 2
    """Frames t in one patch."""
    patch: Pixels = 16
    """Pixels p on a side of one patch."""
    class_token: bool = False
    """Prepend a learned class token in the encoder."""
    positions: Literal["sincos", "learned", "joint", "flat", "rotary"] = "sincos"
    """Position embeddings: separable fixed sine-cosine or learned; over all tokens learned (`joint`) or VideoMAE's
    fixed sinusoid (`flat`), for imports; or none, but rotary attention (`rotary`), which finds its neighbours from the
    first steps on, on grids of any size."""
    position_period: Annotated[float, Field(gt=1)] = 10000.0
    """Longest period of the sine-cosine positions over 2 pi, tokens. On a grid of a few tokens 10000 leaves most
    dimensions nearly constant; there, take positions = 'rotary', or a period of about twice the grid's length."""
    qkv_bias: bool = True
    """Biases on query, key and value projections."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of every LayerNorm; imports carry their own."""
    encoder_norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the encoder's last LayerNorm where it differs (Hugging Face's classifiers: 1e-5)."""
    decoder_norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the decoder's last LayerNorm where it differs (Hugging Face's VideoMAE: 1e-5)."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the last block, rising linearly from 0."""
    decoder: DecoderName = "cross_self"
    """Decoder kind (paper, Figure 3)."""
    decoder_depth: Count = 4
    """Decoder blocks (the field's habit: 4 for video, 8 for images)."""
    decoder_width: Width = 512
    """Decoder width E."""
    decoder_heads: Count = 8
    """Decoder attention heads; never inferred from shapes."""
    decoder_class: bool = False
    """The joint decoder has a class token of its own instead of the encoder's (MAE-ST); needs `class_token`."""
    decoder_class_position: bool = False
    """The joint decoder gives the encoder's class token a learned place (PySlowFast); needs `class_token`."""
    links: Literal["even", "last"] = "even"
    """Which encoder blocks feed the cross decoders: spread evenly, top-down, or only the last."""
    timestep: Literal["add", "adaln", "none"] = "add"
    """How the diffusion step reaches the decoder; it never reaches the encoder."""
    objective: ObjectiveName = "diffmae"
    """`mae`: a learned mask token and no timestep; `ddpm`: nothing visible, everything noised."""
    target: TargetName = "pixel"
    """What the decoder predicts on masked patches."""
    space: SpaceName = "pixel"
    """Where patches are noised and predicted: `pixel`, or `pca:K`, the first K principal components of the training
    set's patches, with the rest predicted by regression."""
    labels: Annotated[int, Field(ge=0, le=100_000)] | Literal["data"] = 0
    """Classes of which the decoder may be told, for sampling by label; `data`: as many as the shards have; 0: none."""
    label_drop: Fraction = 0.1
    """Probability that a label is withheld in training, so that the model also works without (arXiv 2207.12598)."""
    loss_tokens: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the masked tokens that the cross decoder predicts in a training step."""
    pixel_norm: Literal["symmetric", "imagenet", "kinetics"] = "symmetric"
    """Pixel scaling of the diffused variable: [-1, 1], ImageNet mean/std, or 0.45/0.225."""
    teacher: TeacherSettings | None = None
    """Second decoder on frozen features; absent by default."""

    @model_validator(mode="after")
    def _bounded(self) -> ModelSettings:
        tokens = max(1, self.frames // self.tubelet) * (self.size[0] // self.patch) * (self.size[1] // self.patch)
        if tokens > TOKENS:
            raise ValueError(f"frames, size, tubelet and patch make {tokens} tokens, more than {TOKENS}")
        values = 3 * self.tubelet * self.patch**2
        parts = [(self.width or 1280, self.depth or 32), (self.decoder_width, self.decoder_depth)]
        parameters = sum(width * (depth * (4 + 2 * self.mlp_ratio) * width + values) for width, depth in parts)
        if parameters > PARAMETERS:
            raise ValueError(f"the model would have about {parameters:.2g} parameters, more than {PARAMETERS:.2g}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        if self.frames != 1 and self.frames % self.tubelet:
            raise ValueError(f"frames = {self.frames} must be 1 or a multiple of tubelet = {self.tubelet}")
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise ValueError(f"size = {list(self.size)} must be multiples of patch = {self.patch}")
        if self.loss_tokens < 1 and not decoders.fact(self.decoder, "apart", False):
            apart = " or ".join(repr(name) for name in decoders.names() if decoders.fact(name, "apart", False))
            raise ValueError(
                f"loss_tokens below 1 needs decoder = {apart}: the others let masked tokens see each other"
            )
        if self.decoder_class and (not self.class_token or decoders.fact(self.decoder, "links", False)):
            raise ValueError("decoder_class needs class_token = true and decoder = 'joint'")
        if self.decoder_class_position and (not self.class_token or decoders.fact(self.decoder, "links", False)):
            raise ValueError("decoder_class_position needs class_token = true and decoder = 'joint'")
        if targets.fact(self.target, "noise", False) and not objectives.fact(self.objective, "noise", True):
            raise ValueError(f"target = '{self.target}' needs noise, and objective = '{self.objective}' has none")
        if self.space != "pixel":
            for fact in ("blind", "borrows"):
                if targets.fact(self.target, fact, False):
                    raise ValueError(
                        f"space = '{self.space}' does not go with target = '{self.target}': see docs/model.md"
                    )
            if not objectives.fact(self.objective, "sees", True):
                raise ValueError(f"space = '{self.space}' needs clean patches to see, and objective = 'ddpm' has none")
        if self.loss_tokens < 1 and not objectives.fact(self.objective, "sees", True):
            raise ValueError(
                f"loss_tokens below 1 hides tokens from the encoder of objective = '{self.objective}'; leave it at 1"
            )
        return self


class DiffusionSettings(Section):
    """The noise process on masked patches."""

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    """Base variances, linear 1e-4..0.02 (DDPM) or cosine; or flow matching's straight line (rho = 1)."""
    timesteps: Annotated[int, Field(gt=0, le=100_000)] = 1000
    """Diffusion steps of training."""
    rho: Annotated[float, Field(gt=0, le=100)] = 0.8
    """Exponent of every beta; below 1 amplifies the noise (paper, section 3)."""
    draw: Literal["uniform", "angle", "logit_normal"] = "uniform"
    """Timesteps of training: uniform (the paper's), uniform in the angle between clean and noise, where the steps of
    sampling lie, or logit-normal, more often in the middle."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionSettings:
        if self.schedule == "flow" and self.rho != 1:
            raise ValueError(f"rho = {self.rho} is an exponent of betas, and schedule = 'flow' has none: set rho = 1")
        return self


class MaskChoice(Section):
    """One mask of a mix."""

    kind: MaskerName
    """Masker; see diffmae_video.masking."""
    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the tokens that is masked."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the batches, before normalisation; that of `mask.kind` itself is 1."""


class MaskSettings(Section):
    """What is hidden from the encoder in training."""

    kind: MaskerName = "random"
    """Masker; see diffmae_video.masking."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Fraction of the tokens that is masked."""
    mix: tuple[MaskChoice, ...] = ()
    """Other masks that take turns with this one, a micro-batch each, for models that inpaint."""


class SourceSettings(Section):
    """One source of a joint mix of images and clips."""

    path: str
    """Folder or URL of shards with a manifest.json."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the batches drawn from this source, before normalisation."""
    batch_size: Positive | None = None
    """Samples a batch over all processes; `train.batch_size` by default."""
    frames: Pixels | None = None
    """Frames of a clip from this source; 1 for images. `model.frames` by default."""
    size: tuple[Pixels, Pixels] | None = None
    """Height and width from this source; `model.size` by default."""
    repeats: Count | None = None
    """Clips per decoded video; `data.repeats` by default."""
    mask: MaskSettings | None = None
    """Mask of this source; the recipe's `mask` by default."""


class DataSettings(Section):
    """Where samples come from and what happens to a clip on its way to the model."""

    path: str | None = None
    """Folder or URL of shards with a manifest.json; without it, the newest the workspace knows."""
    sources: tuple[SourceSettings, ...] = ()
    """Several weighted sources (`--joint`); empty for a single one."""
    split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split to validate and evaluate on; `test` where the shards have that and no `val`."""
    stride: Positive = 4
    """Distance between the frames of a clip, in frames of the stored video."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frame rate that `stride` counts in: a clip lasts model.frames * stride / fps seconds at any rate (SlowFast and
    MAE-ST: 30). Without it, frames of the stored video are counted."""
    clip_seconds: Annotated[float, Field(gt=0)] | None = None
    """Length of a clip in seconds instead: frames spread evenly over it, whatever the frame rate (data/sampling.py);
    `stride` and `fps` say nothing then."""
    segments: bool = False
    """One frame from each of model.frames equal parts of the video instead (TSN; VideoMAE on Something-Something)."""
    repeats: Count = 1
    """Clips taken from each decoded video (MAE-ST, repeated sampling)."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 2
    """Decoding processes per training process; 0 decodes in the training process."""
    prefetch: Count = 2
    """Batches each worker keeps ready."""
    decoder: Literal["auto", "pyav", "torchcodec"] = "auto"
    """Library that decodes clips for training and validation; `auto` is PyAV, the faster one on our shards."""
    shuffle_block: Positive = 16
    """Shards that are shuffled together."""
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the labelled samples of each class that is used (chosen by seed; the same for every model)."""
    labels_per_class: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Labelled samples of each class that are used at most, of those that label_fraction leaves; 0 for all."""
    crop: Literal["random_resized", "multi_scale", "random", "center"] = "random_resized"
    """Spatial crop in training; the same for all frames of a clip."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Area of the random resized crop, as a fraction of the frame."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio (width / height) of the random resized crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip; data sets with directional labels force 0."""
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: str | None = None
    """RandAugment in timm's notation, e.g. `rand-m7-n4-mstd0.5-inc1`; the same operations for all frames."""
    erasing: Fraction = 0.0
    """Probability of random erasing."""
    max_bad_fraction: Fraction = 0.05
    """Unreadable samples above this fraction of those seen end the run with an error."""
    cache_dir: str | None = None
    """Where remote shards are kept; the user's cache folder by default."""
    cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """Bound of that cache, GiB."""

    @model_validator(mode="after")
    def _fits(self) -> DataSettings:
        if self.segments and (self.clip_seconds or self.fps):
            raise ValueError("segments takes the whole video, clip_seconds and fps a part of it: set one of them")
        return self

    def seconds(self, frames: int) -> float | None:
        """How long a clip of so many frames lasts; None where frames of the stored video are counted."""
        return self.clip_seconds or (frames * self.stride / self.fps if self.fps else None)


class TrainSettings(Section):
    """Optimisation, shared by pre-training and fine-tuning."""

    task: TaskName | None = None
    """What is trained; the stage's own by default: `pretrain` or `finetune`."""
    epochs: Annotated[float, Field(gt=0)] = 100.0
    """Passes over the videos of the split; each counts `data.repeats` clips a video."""
    steps: Positive | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: Positive = 64
    """Clips per optimizer step over all processes, accumulation and repeats included."""
    accumulate: Positive | Literal["auto"] = "auto"
    """Micro-batches per optimizer step; `auto`: as few as the device's memory allows, more when it runs out. Which
    clips a step sees, and its gradients, do not depend on it."""
    optimizer: str = "adamw"
    """Optimizer, by timm's name (`timm.optim.list_optimizers()`): `adamw`, `lamb`, `lion`, `sgd`, ..."""
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Learning rate per 256 clips: lr = base_lr * batch_size / 256."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    """Linear warm-up, in epochs (cut to a tenth of the run where it is longer than that)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; none on norms, biases, positions and tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments, of optimizers that have two."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer below the head."""
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    """Bound on the gradient norm; 0 measures it without clipping."""
    precision: Precision = "auto"
    """Number type of the forward pass; `auto`: bf16 where the hardware has it, fp16 with loss scaling on older GPUs,
    fp32 elsewhere. Chosen at the first step of a run and kept when it is continued."""
    compile: bool = False
    """Run the training step through torch.compile."""
    grad_checkpointing: bool | Literal["selective"] = False
    """Recompute blocks in the backward pass to save memory; `selective` keeps what matrix products and attention gave
    and recomputes the rest: less memory saved, for little time."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights per step (less in the first steps); 0 keeps none."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Non-finite steps that may be skipped before the run stops."""
    checkpoint_every: Positive = 1000
    """Optimizer steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 for none."""
    mirror: str | None = None
    """fsspec URL of a folder that receives a copy of each checkpoint, e.g. `s3://bucket/run`."""
    log_every: Positive = 10
    """Optimizer steps between lines of metrics.jsonl."""
    picture_every: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps between pictures of validation clips; 0 for none."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between validations (loss or accuracy); 0 validates at the end only."""
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps to trace with torch's profiler; 0 for none."""
    log_to: tuple[LoggerName, ...] = ("tensorboard",)
    """Where numbers and pictures also go, beside metrics.jsonl and pictures/; each is an extra of its name."""
    project: str = "diffmae-video"
    """Under which trackers keep the run."""

    @model_validator(mode="before")
    @classmethod
    def _without_wandb(cls, values: Any) -> Any:
        """Runs of before 2026-11-26 saved `wandb = true`, which is now a name in `log_to`."""
        if isinstance(values, dict) and isinstance(values.get("wandb"), bool):
            values = {"log_to": ("tensorboard", *(["wandb"] if values["wandb"] else [])), **values}
            del values["wandb"]
        return values

    @property
    def micro_batches(self) -> int:
        """Batches that the stream gives for one optimizer step; with `auto` the trainer cuts its one batch itself."""
        return 1 if self.accumulate == "auto" else self.accumulate


class FinetuneSettings(Section):
    """The classifier on top of the encoder."""

    protocol: Literal["finetune", "linear", "attentive", "knn"] = "finetune"
    """Train everything, or probe frozen features."""
    pool: Literal["mean", "class", "attentive"] = "mean"
    """How tokens become one vector."""
    dropout: Fraction = 0.0
    """Dropout before the head."""
    drop_path: Fraction = 0.1
    """Stochastic depth while fine-tuning."""
    head_init: Annotated[float, Field(gt=0)] = 2e-5
    """Standard deviation of the head's initial weights."""
    freeze: Annotated[int, Field(ge=0)] = 0
    """Embedding and this many first blocks stay as they are."""
    smoothing: Fraction = 0.1
    """Label smoothing."""
    mixup: Annotated[float, Field(ge=0)] = 0.8
    """Mixup alpha; 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    """CutMix alpha; 0 for none."""
    knn: Positive = 20
    """Neighbours of the kNN probe."""


class PropagateSettings(Section):
    """Following objects by label propagation (DINO's protocol on DAVIS 2017, which SiamMAE keeps)."""

    memory: Annotated[int, Field(ge=0, le=1000)] = 7
    """Last frames that labels are taken from, beside the first one."""
    top: Positive = 5
    """Patches, of all those frames, that each patch takes its label from: the most similar ones."""
    radius: Annotated[int, Field(ge=0, le=1000)] = 12
    """How far these may lie from its own place, patches in each direction; 0 for anywhere."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the softmax over cosine similarities."""
    short_side: Pixels = 480
    """Pixels of the shorter side of the frames that are encoded, rounded to whole patches."""


class EvaluateSettings(Section):
    """Multi-view testing."""

    views: str | None = None
    """Temporal x spatial views, e.g. `5x3`, or several: `1x1,5x3`; the data set's default without it."""
    protocol: Literal["slowfast", "videomae", "segments", "seconds", "stride"] | None = None
    """Which frames and boxes those views are (evaluation/protocols.py). Without it the data set's own, as far as it
    shows clips at the speed of training."""
    batch_views: Pixels = 16
    """Views per forward pass."""
    precision: Precision = "auto"
    """Number type of testing, probes and features; `auto` as in `train.precision`, on the device that tests."""
    bootstrap: Annotated[int, Field(ge=0, le=10**6)] = 1000
    """Resamples of the confidence interval."""
    masks: tuple[str, ...] = ("random:0.75", "tube:0.75", "center")
    """Masks of the inpainting evaluation."""
    draws: Count = 16
    """Masks and noises under which `--protocol denoise` compares the labels of a clip."""
    clips: Positive = 64
    """Clips of the split that the inpainting evaluation takes, evenly spread."""
    samples: Count = 4
    """Samples per clip of the inpainting evaluation; their mean and the best of them are scored beside the first."""
    propagate: PropagateSettings = PropagateSettings()


class RenderSettings(Section):
    """Sampling and what is written of it."""

    mask: str = "random:0.75"
    """`KIND[:VALUE]`, a box, or a file; see `diffmae render-inpaint --help`."""
    propagate: Literal["auto", "off", "only"] = "auto"
    """Take from other frames what they show of the hidden part: `auto` does where the mask shows something that should
    go (a box, a file) and not where it is generated, which shows the model; `only` asks no model at all."""
    fit: FitText = "auto"
    """A model of the clip itself: `auto` trains one for three minutes (30 s on a GPU) where no model is known or named,
    a time (`90s`, `10m`) or a number of steps (`400steps`) always, from `--checkpoint` on where that is given; `off`
    never."""
    fit_recipe: str = "fit-clip"
    """Recipe of that model."""
    sampler: SamplerName = "ddim"
    """Sampler."""
    steps: Annotated[int, Field(gt=0, le=100_000)] = 3
    """Denoising steps: the fewest within 1% of 1000-step DDPM that also beat the first step in features
    (docs/results.md); larger models may gain by more."""
    eta: Fraction = 0.0
    """DDIM's stochasticity: 0 deterministic, 1 like DDPM."""
    samples: Count = 1
    """Samples per clip."""
    label: str | None = None
    """Class of what is to be seen, for a model that was trained with `model.labels`."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 2.0
    """How far `label` is followed: 1 as far as in training, 0 not at all, more than 1 away from what would be there
    without it (classifier-free guidance)."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window that repeats the end of the window before it."""
    margin: Annotated[float, Field(ge=0, le=1000)] = 0.5
    """Context around a small mask, as a share of its size."""
    feather: Annotated[int, Field(ge=0, le=2**14)] = 2
    """Pixels inside the mask over which the result fades in."""
    blend: bool = True
    """Spread the step at the edge of a hole smoothly over the hole, so that colours meet."""
    stride: Positive | None = None
    """Distance between the frames of a window; the model's own by default."""
    window: Literal["auto", "whole", "tiles"] = "auto"
    """Where the model looks: squares around the holes where they fit, the whole frame, or overlapping squares."""
    batch: Pixels = 4
    """Clips sampled at once."""
    precision: Precision = "auto"
    """Number type of sampling; `auto` as in `train.precision`, on the device that renders."""
    codec: Literal["h264", "ffv1", "gif", "png"] = "h264"
    """Output format."""
    crf: Annotated[int, Field(ge=0, le=51)] = 17
    """H.264 quality; lower is better."""

    @model_validator(mode="before")
    @classmethod
    def _without_guide(cls, values: Any) -> Any:
        """Runs of before 2026-11-26 saved `guide = false`, a setting that is gone."""
        if isinstance(values, dict) and values.get("guide") is False:
            return {name: value for name, value in values.items() if name != "guide"}
        return values


class Settings(Section):
    """Everything a stage needs, saved as config.toml beside what it makes."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random draw."""
    model: ModelSettings = ModelSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    mask: MaskSettings = MaskSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    render: RenderSettings = RenderSettings()
