"""Outputs equal those of timm and transformers on the same random weights, and key maps fit the peers' files."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from diffmae_video.errors import DataError, UsageError
from diffmae_video.masking import Mask
from diffmae_video.models.importers import import_weights
from diffmae_video.models.patches import normalize_patches, patch_statistics, patchify

VIT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192, "patch_size": 8}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, biases and norms too: zeros and ones would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.05 * noise)
    return model.eval()


def test_timm_vit_base(tmp_path):
    peer = randomize(timm.create_model("vit_base_patch16_224", num_classes=7))
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    ours = import_weights("timm", tmp_path / "vit.safetensors").eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.forward_features(images[:, :, None]), peer.forward_features(images), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(ours(images[:, :, None]), peer(images), atol=1e-5, rtol=1e-5)


def test_timm_mean_pool(tmp_path):
    peer = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=48, patch_size=8, depth=2, global_pool="avg", class_token=False
    )
    save_file(randomize(peer).state_dict(), tmp_path / "vit.safetensors")
    ours = import_weights("timm", tmp_path / "vit.safetensors").eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images[:, :, None]), peer(images), atol=1e-5, rtol=1e-5)


def test_positions_resize_as_timm(tmp_path):
    peer = randomize(
        timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=1, dynamic_img_size=True)
    )
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    ours = import_weights("timm", tmp_path / "vit.safetensors").eval()
    for size in ((80, 80), (32, 64)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(ours(images[:, :, None]), peer(images), atol=1e-5, rtol=1e-5)


def test_hugging_face_vitmae(tmp_path):
    config = transformers.ViTMAEConfig(**VIT, **DECODER, image_size=32, norm_pix_loss=True, layer_norm_eps=1e-6)
    peer = randomize(transformers.ViTMAEForPreTraining(config))
    peer.save_pretrained(tmp_path)
    ours = import_weights("auto", tmp_path).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = peer(images, noise=noise)
        mask = Mask.from_grid(theirs.mask.bool(), (1, 4, 4))
        out = ours(images[:, :, None], mask, ours.draw([0, 1], mask))
    expected = theirs.logits[theirs.mask.bool()].view(2, mask.masked.shape[1], -1)
    torch.testing.assert_close(out.prediction, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, theirs.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["as installed", "transformers 4"])
def test_hugging_face_videomae_pretraining(tmp_path, names):
    config = transformers.VideoMAEConfig(
        **VIT, **DECODER, image_size=32, num_frames=8, use_mean_pooling=False, norm_pix_loss=False
    )
    peer = randomize(transformers.VideoMAEForPreTraining(config))
    if names == "as installed":
        peer.config.save_pretrained(tmp_path)
        save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / "model.safetensors")
    else:  # save_pretrained writes the names that version 4 had
        peer.save_pretrained(tmp_path)
    ours = import_weights("hf-videomae", tmp_path).eval()
    clips = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grid = torch.zeros(2, 64, dtype=torch.bool)
    grid[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))[:48]] = True
    mask = Mask.from_grid(grid, (4, 4, 4))
    with torch.no_grad():
        encoded = peer.videomae(clips, bool_masked_pos=grid).last_hidden_state
        encoding = ours.encode(clips.transpose(1, 2), mask)
        torch.testing.assert_close(encoding.latents, encoded, atol=1e-5, rtol=1e-5)
        # their loss un-normalises ImageNet pixels, the logits do not depend on it
        logits = peer(clips, bool_masked_pos=grid).logits
        out = ours(clips.transpose(1, 2), mask, ours.draw([0, 1], mask))
    torch.testing.assert_close(out.prediction, logits, atol=1e-5, rtol=1e-5)


def test_hugging_face_videomae_classifier(tmp_path):
    config = transformers.VideoMAEConfig(**VIT, image_size=32, num_frames=8, num_labels=6, layer_norm_eps=1e-6)
    peer = randomize(transformers.VideoMAEForVideoClassification(config))
    peer.save_pretrained(tmp_path)
    ours = import_weights("hf-videomae", tmp_path).eval()
    clips = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(clips.transpose(1, 2)), peer(clips).logits, atol=1e-5, rtol=1e-5)


def test_norm_pixel_is_maes():
    patches = patchify(torch.randn(1, 3, 1, 16, 16), 1, 8)
    normed, (mean, std) = normalize_patches(patches), patch_statistics(patches)
    torch.testing.assert_close(
        normed, (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    )
    torch.testing.assert_close(normed * std + mean, patches, atol=1e-6, rtol=1e-5)


# --- mae and mae_st have no package: their tensors are built here from their names and shapes ------------------------


def block(prefix: str, width: int, split: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one ViT block, with split or fused query, key and value."""
    shapes = {f"{prefix}attn.qkv.weight": (3 * width, width), f"{prefix}attn.qkv.bias": (3 * width,)}
    if split:
        shapes = {f"{prefix}attn.{p}.weight": (width, width) for p in "qkv"}
        shapes |= {f"{prefix}attn.{p}.bias": (width,) for p in "qkv"}
    shapes |= {f"{prefix}attn.proj.weight": (width, width), f"{prefix}attn.proj.bias": (width,)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
    shapes |= {f"{prefix}mlp.fc1.weight": (4 * width, width), f"{prefix}mlp.fc1.bias": (4 * width,)}
    return shapes | {f"{prefix}mlp.fc2.weight": (width, 4 * width), f"{prefix}mlp.fc2.bias": (width,)}


def mae_st_shapes(split: bool = True, joint: bool = False, slowfast: bool = False) -> dict[str, tuple[int, ...]]:
    """A mae_st pre-training checkpoint of width 192 and 16 frames of 32 x 32 pixels (patch 8), as keys/maest__*.txt."""
    width, inner, spatial, times = 192, 64, 16, 8
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "mask_token": (1, 1, inner)}
    for prefix, size in (("", width), ("decoder_", inner)):
        if joint or (slowfast and prefix):
            shapes[f"{prefix}pos_embed"] = (1, 1 + spatial * times, size)
        else:
            shapes[f"{prefix}pos_embed_spatial"] = (1, spatial, size)
            shapes[f"{prefix}pos_embed_temporal"] = (1, times, size)
            shapes[f"{prefix}pos_embed_class"] = (1, 1, size)
    shapes |= {"patch_embed.proj.weight": (width, 3, 2, 8, 8), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"decoder_embed.weight": (inner, width), "decoder_embed.bias": (inner,)}
    for i in range(2):
        shapes |= block(f"blocks.{i}.", width, split)
    blocks, norm, head = "decoder_blocks.", "decoder_norm", "decoder_pred"
    if slowfast:
        blocks, norm, head = "pred_head.transforms.0.", "pred_head.transforms.0.1", "pred_head.projections.0"
    else:
        shapes["decoder_cls_token"] = (1, 1, inner)
    shapes |= block(f"{blocks}0.", inner, split)
    shapes |= {f"{norm}.weight": (inner,), f"{norm}.bias": (inner,)}
    return shapes | {f"{head}.weight": (192, inner), f"{head}.bias": (192,)}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values at every name, scaled like trained weights."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("container", ["model", "model_state", "module", None])
def test_mae_st_containers_and_every_tensor(tmp_path, container):
    tensors = random_tensors(mae_st_shapes())
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "st.pth")
    ours = import_weights("mae_st", tmp_path / "st.pth").state_dict()
    encoder, decoder = "encoder.blocks.1.attn.qkv", "decoder.blocks.0.attn.qkv"
    for name, prefix in ((encoder, "blocks.1.attn."), (decoder, "decoder_blocks.0.attn.")):
        for part in ("weight", "bias"):
            assert torch.equal(ours[f"{name}.{part}"], torch.cat([tensors[f"{prefix}{p}.{part}"] for p in "qkv"]))
    assert torch.equal(ours["encoder.cls_token"], tensors["cls_token"] + tensors["pos_embed_class"])
    assert torch.equal(ours["decoder.cls_token"], tensors["decoder_cls_token"] + tensors["decoder_pos_embed_class"])
    assert torch.equal(ours["encoder.positions.temporal"], tensors["pos_embed_temporal"])
    assert torch.equal(ours["decoder.positions.spatial"], tensors["decoder_pos_embed_spatial"])
    assert torch.equal(ours["encoder.patch_embed.proj.weight"], tensors["patch_embed.proj.weight"])
    # one predicted frame a tubelet: both of ours start from it
    assert torch.equal(ours["decoder.head.weight"], torch.cat([tensors["decoder_pred.weight"]] * 2))
    special = {"encoder.cls_token", "decoder.cls_token", "decoder.head.weight", "decoder.head.bias"}
    plain = {name: name.replace("encoder.", "").replace("decoder.", "decoder_") for name in set(ours) - special}
    same = {name: theirs for name, theirs in plain.items() if theirs in tensors}
    assert len(same) == 3 * 10 + 2 + 2 + 2  # all but qkv of three blocks, both last norms, the patch embedding
    assert all(torch.equal(ours[name], tensors[theirs]) for name, theirs in same.items())
    assert torch.equal(ours["decoder.latent_embed.weight"], tensors["decoder_embed.weight"])
    assert torch.equal(ours["decoder.mask_token"], tensors["mask_token"])


def test_mae_st_joint_equals_separate_positions(tmp_path):
    split = random_tensors(mae_st_shapes())
    joint = {name: tensor for name, tensor in split.items() if "pos_embed" not in name}
    for prefix in ("", "decoder_"):
        spatial, temporal = split[f"{prefix}pos_embed_spatial"], split[f"{prefix}pos_embed_temporal"]
        grid = spatial.tile(1, temporal.shape[1], 1) + temporal.repeat_interleave(spatial.shape[1], 1)
        joint[f"{prefix}pos_embed"] = torch.cat([split[f"{prefix}pos_embed_class"], grid], 1)
    for name in [name for name in joint if ".q." in name]:  # and fused, as PySlowFast saves it
        fused = torch.cat([joint.pop(name.replace(".q.", f".{part}.")) for part in "qkv"])
        joint[name.replace(".q.", ".qkv.")] = fused
    clips = torch.randn(1, 3, 16, 32, 32)
    grid = torch.ones(1, 128, dtype=torch.bool)
    grid[:, ::5] = False
    mask = Mask.from_grid(grid, (8, 4, 4))
    outputs = []
    for name, tensors in (("split", split), ("joint", joint)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        model = import_weights("mae_st", tmp_path / f"{name}.pth").eval()
        with torch.no_grad():
            outputs.append(model(clips, mask, model.draw([0], mask)).prediction)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_slowfast_decoder_position_of_the_class_token_is_reported(tmp_path):
    tensors = random_tensors(mae_st_shapes(split=False, slowfast=True))
    torch.save({"model_state": tensors}, tmp_path / "sf.pyth")
    with pytest.raises(DataError, match=r"unexpected decoder\.positions\.class"):
        import_weights("mae_st", tmp_path / "sf.pyth")
    tensors["decoder_pos_embed"][:, 0] = 0
    torch.save({"model_state": tensors}, tmp_path / "sf.pyth")
    model = import_weights("mae_st", tmp_path / "sf.pyth")
    assert model.settings.decoder_heads == 1
    assert model.settings.positions == "joint"


@pytest.mark.parametrize("how", ["central", "mean"])
def test_inflation(tmp_path, how):
    peer = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, depth=2))
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    ours = import_weights("timm", tmp_path / "vit.safetensors", frames=8, inflate=how).eval()
    assert ours.encoder.shape == (4, 4, 4)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # an image fills one tubelet by repetition: either way its tokens are the 2-D model's
        torch.testing.assert_close(ours(images[:, :, None]), peer(images), atol=1e-5, rtol=1e-5)


def test_missing_unexpected_misshapen_are_listed(tmp_path):
    tensors = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, depth=2).state_dict()
    del tensors["blocks.1.norm2.bias"]
    tensors["norm.weight"] = torch.ones(191)
    tensors["blocks.0.ls1.gamma"] = torch.ones(192)
    save_file(tensors, tmp_path / "vit.safetensors")
    with pytest.raises(DataError) as error:
        import_weights("timm", tmp_path / "vit.safetensors")
    for part in (
        "missing encoder.blocks.1.norm2.bias (192,)",
        "unexpected encoder.blocks.0.ls1.gamma (192,)",
        "misshapen encoder.norm.weight (191,) instead of (192,)",
    ):
        assert part in str(error.value)
    model = import_weights("timm", tmp_path / "vit.safetensors", allow_partial=True)
    assert len(model.info["problems"]) == 3
    assert torch.equal(model.head.weight, tensors["head.weight"])


def test_wrong_source_is_named(tmp_path):
    torch.save(random_tensors(mae_st_shapes()), tmp_path / "st.pth")
    with pytest.raises(UsageError, match="looks like weights of mae_st"):
        import_weights("videomae", tmp_path / "st.pth")


class Payload:
    """What a hostile checkpoint holds: unpickling it would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"model": {"x": torch.zeros(1)}, "args": Payload(str(ran))}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match="refused"):
        import_weights("auto", tmp_path / "evil.pth")
    assert not ran.exists()


def test_damaged_files_are_refused(tmp_path):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(DataError):
            import_weights("auto", tmp_path / name)
