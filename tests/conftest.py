"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run in parallel processes

import diffmae_video.compat  # noqa: F401 - before timm and transformers, which import torchvision

import pytest
import torch

torch.set_num_threads(1)
SAM_SIZE = 128  # of the pictures of a small SAM 2, instead of 1024


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real clips (clips/, hostile/, tennis7/); tests that need it skip where it is missing."""
    folder = Path(os.environ.get("DIFFMAE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real clips here: set DIFFMAE_TEST_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def no_user_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see no DIFFMAE_ variable of the person who runs them, nor the width of their terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith("DIFFMAE_") and name != "DIFFMAE_TEST_DATA"]:
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of training come first: they fork, which is safe while no other test has left threads that hold locks."""
    items.sort(key=lambda item: "training" not in item.path.parts)


def _small_sam(name: str) -> Any:
    """The parts of SAM 2 or EdgeTAM, narrow, on pictures of 128 pixels."""
    import transformers

    backbone = {
        "image_size": [SAM_SIZE, SAM_SIZE], "hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3], "window_size_per_stage": [8, 4, 14, 7],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
    }  # fmt: skip
    vision: dict[str, Any] = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **backbone},
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 128,
    }  # fmt: skip
    kind, own = "sam2_vision_model", dict[str, Any](memory_attention_feed_forward_hidden_size=32)
    if name == "EdgeTam":
        given = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
        vision["backbone_config"] = {
            "model_type": "timm_wrapper",
            "architecture": "repvit_m1",
            "num_classes": 1,
            "model_args": given,
        }
        vision["backbone_channel_list"] = [384, 192, 96, 48]
        kind, own = "edgetam_vision_model", {"memory_attention_mlp_hidden_size": 32}
        own |= {"perceiver_resampler_num_latents": 8, "perceiver_resampler_num_latents_2d": 16}
        own |= {"memory_attention_rope_k_sizes": [4, 4]}
    config = getattr(transformers, f"{name}VideoConfig")(
        vision_config={"model_type": kind, **vision},
        prompt_encoder_config={"hidden_size": 128, "image_size": SAM_SIZE},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "iou_head_hidden_dim": 32, "num_attention_heads": 2},
        image_size=SAM_SIZE, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_rope_feat_sizes=[8, 8], memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}VideoModel")(config)
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10.0)  # the object is seen
    return model


@pytest.fixture(scope="session", params=["Sam2", "EdgeTam"])
def sam_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SAM 2 or EdgeTAM with random weights, as a download from the hub lies on the disk."""
    import transformers

    made = tmp_path_factory.mktemp("sam")
    _small_sam(request.param).save_pretrained(made)
    size = {"height": SAM_SIZE, "width": SAM_SIZE}
    transformers.Sam2VideoProcessor(
        transformers.Sam2ImageProcessor(size=size, mask_size={"height": SAM_SIZE // 4, "width": SAM_SIZE // 4}),
        transformers.Sam2VideoVideoProcessor(size=size),
        target_size=SAM_SIZE,
    ).save_pretrained(made)
    return made
