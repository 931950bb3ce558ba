"""Outputs equal those of timm and transformers on the same random weights, under their names and the authors'."""

from __future__ import annotations

import argparse
from pathlib import Path

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffmae_video.diffusion.targets import NormPixelChannel, normalize_patches, patch_statistics
from diffmae_video.masking import Mask
from diffmae_video.models.importers import import_weights
from diffmae_video.models.patches import patchify

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
        tokens, encoded = ours.encode(images[:, :, None], mask).latents, peer.vit(images, noise=noise).last_hidden_state
    order = noise.argsort(1)[:, :4].argsort(1)[..., None].expand(-1, -1, 48)  # theirs stand in the order of the noise
    torch.testing.assert_close(tokens[:, :1], encoded[:, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], encoded[:, 1:].gather(1, order), atol=1e-5, rtol=1e-5)
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
        tokens = peer.videomae(clips).last_hidden_state  # before the norm, which acts behind the pooling
        torch.testing.assert_close(ours.forward_features(clips.transpose(1, 2)), tokens, atol=1e-5, rtol=1e-5)


def test_norm_pixel_is_maes():
    patches = patchify(torch.randn(1, 3, 1, 16, 16), 1, 8)
    normed, (mean, std) = normalize_patches(patches), patch_statistics(patches)
    torch.testing.assert_close(
        normed, (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    )
    torch.testing.assert_close(normed * std + mean, patches, atol=1e-6, rtol=1e-5)


def test_norm_pixel_channel_is_videomaes():
    """Each channel of a patch by its own mean and unbiased deviation, 1e-6 outside the root, one by one."""
    clip = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    clip[:, 1] = clip[:, 1] * 5 + 3
    patches, target = patchify(clip, 2, 8), NormPixelChannel()
    expected = patches.clone()
    for token in range(patches.shape[1]):
        for channel in range(3):
            values = patches[0, token, channel::3]  #  (t * p * p,)
            expected[0, token, channel::3] = (values - values.mean()) / (values.var() ** 0.5 + 1e-6)
    torch.testing.assert_close(target.from_pixels(patches), expected, atol=1e-6, rtol=1e-5)
    # a perfect prediction, with the statistics of the truth, is the truth
    torch.testing.assert_close(target.to_pixels(expected, patches), patches, atol=1e-5, rtol=1e-5)


def test_loss_of_videomae_with_normalised_pixels_is_transformers(tmp_path):
    """Their loss takes ImageNet pixels back to [0, 1] and normalises there, which channel by channel is the same."""
    config = transformers.VideoMAEConfig(
        **VIT, **DECODER, image_size=32, num_frames=8, use_mean_pooling=False, layer_norm_eps=1e-6, norm_pix_loss=True
    )
    peer = randomize(transformers.VideoMAEForPreTraining(config))
    peer.save_pretrained(tmp_path)
    ours = import_weights("hf-videomae", tmp_path).eval()
    assert ours.settings.target == "norm_pixel_channel"
    clips = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grid = torch.zeros(2, 64, dtype=torch.bool)
    grid[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))[:48]] = True
    mask = Mask.from_grid(grid, (4, 4, 4))
    with torch.no_grad():
        theirs = peer(clips, bool_masked_pos=grid).loss
        found = ours(clips.transpose(1, 2), mask, ours.draw([0, 1], mask)).loss
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


# --- the authors' own names: transformers' models are those networks, renamed ----------------------------------------

BLOCK = (
    ("attention.output.dense.", "attn.proj."),
    ("attention.attention.", "attn."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
)
MAE = (
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("vit.embeddings.", ""),
    ("vit.encoder.layer.", "blocks."),
    ("vit.layernorm.", "norm."),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_encoder.layer.", "decoder_blocks."),  # what transformers 5 makes of it
    ("decoder.", ""),
)
VIDEOMAE = (
    ("videomae.embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("videomae.encoder.layer.", "encoder.blocks."),
    ("videomae.layernorm.", "encoder.norm."),
    ("decoder.decoder_layers.", "decoder.blocks."),
)


def authors_names(folder: Path, rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """The tensors that transformers saved in `folder`, by the names of the networks' authors, with fused qkv."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next((old for old, _ in rules if name.startswith(old)), "")
        name = dict(rules).get(prefix, "") + name.removeprefix(prefix)
        for old, new in BLOCK:
            name = name.replace(old, new)
        out[name] = tensor
    for name in [name for name in out if ".query." in name]:
        parts = [out.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        out[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return out


def test_mae_by_its_authors_names(tmp_path):
    config = transformers.ViTMAEConfig(**VIT, **DECODER, image_size=32, layer_norm_eps=1e-6)
    peer = randomize(transformers.ViTMAEForPreTraining(config))
    peer.save_pretrained(tmp_path)
    tensors = authors_names(tmp_path, MAE)
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.1.attn.qkv.bias", "blocks.2.mlp.fc1.bias"} < set(tensors)
    torch.save({"model": tensors, "args": argparse.Namespace(model="mae_vit")}, tmp_path / "mae.pth")
    ours = import_weights("auto", tmp_path / "mae.pth", heads=4, decoder_heads=4).eval()
    assert ours.info["imported_from"] == "mae"
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        theirs = peer(images, noise=noise)
        mask = Mask.from_grid(theirs.mask.bool(), (1, 4, 4))
        found = ours(images[:, :, None], mask, ours.draw([0, 1], mask)).prediction
    torch.testing.assert_close(found, theirs.logits[theirs.mask.bool()].view_as(found), atol=1e-5, rtol=1e-5)


SIZES = {  # of VideoMAE, and of VideoMAEv2's giant, which shares its names: patch 14 and MLPs of 48 / 11
    "VideoMAE": (VIT, DECODER, 32),
    "VideoMAEv2": (
        VIT | {"hidden_size": 44, "intermediate_size": 192, "patch_size": 14},
        DECODER | {"decoder_intermediate_size": int(32 * 48 / 11)},
        56,
    ),
}


@pytest.mark.parametrize("version", SIZES)
def test_videomae_by_its_authors_names(tmp_path, version):
    encoder, decoder, size = SIZES[version]
    config = transformers.VideoMAEConfig(
        **encoder, **decoder, image_size=size, num_frames=8, use_mean_pooling=False, layer_norm_eps=1e-6
    )
    peer = randomize(transformers.VideoMAEForPreTraining(config))
    peer.decoder.norm.eps = 1e-6  # the authors'; transformers leaves it at 1e-5
    peer.save_pretrained(tmp_path)
    tensors = authors_names(tmp_path, VIDEOMAE)
    names = {"encoder.blocks.2.attn.q_bias", "encoder.blocks.0.attn.qkv.weight", "encoder_to_decoder.weight"}
    assert names | {"decoder.blocks.1.attn.v_bias", "decoder.head.bias", "encoder.norm.bias"} < set(tensors)
    torch.save({"module": tensors}, tmp_path / "videomae.pth")  # as DeepSpeed keeps it
    options = {"frames": 8, "size": (size, size), "heads": 4, "decoder_heads": 4}
    ours = import_weights("videomae", tmp_path / "videomae.pth", **options).eval()
    clips = torch.randn(2, 8, 3, size, size, generator=torch.Generator().manual_seed(0))
    grid = torch.zeros(2, 64, dtype=torch.bool)
    grid[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))[:48]] = True
    mask = Mask.from_grid(grid, (4, 4, 4))
    with torch.no_grad():
        logits = peer(clips, bool_masked_pos=grid).logits
        found = ours(clips.transpose(1, 2), mask, ours.draw([0, 1], mask)).prediction
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_videomae_classifier_by_its_authors_names(tmp_path, prefix):
    config = transformers.VideoMAEConfig(**VIT, image_size=32, num_frames=8, num_labels=6, layer_norm_eps=1e-6)
    peer = randomize(transformers.VideoMAEForVideoClassification(config))
    peer.fc_norm.eps = 1e-6
    peer.save_pretrained(tmp_path)
    renamed = authors_names(tmp_path, VIDEOMAE).items()
    tensors = {name.removeprefix("encoder.").replace("classifier.", "head."): tensor for name, tensor in renamed}
    assert {"fc_norm.weight", "head.bias", "blocks.0.attn.q_bias", "patch_embed.proj.weight"} < set(tensors)
    torch.save({"model": {f"{prefix}{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "tuned.pth")
    ours = import_weights("videomae", tmp_path / "tuned.pth", frames=8, size=(32, 32), heads=4).eval()
    clips = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(clips.transpose(1, 2)), peer(clips).logits, atol=1e-5, rtol=1e-5)
