"""Importers: mae_st (which has no package: its tensors are built here), inflation, and files that must be refused."""

from __future__ import annotations

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import Block

from diffmae_video.errors import DataError, UsageError
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.importers import import_weights
from diffmae_video.models.patches import patchify
from diffmae_video.models.weights import load_model, save_model


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


def reference_block(tensors: dict[str, torch.Tensor], prefix: str, width: int, heads: int) -> Block:
    """timm's block with the weights of one of mae_st's, query, key and value joined."""
    block = Block(width, heads, qkv_bias=True)
    for norm in (block.norm1, block.norm2):
        norm.eps = 1e-6
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for kind in ("weight", "bias"):
        state[f"attn.qkv.{kind}"] = torch.cat([state.pop(f"attn.{part}.{kind}") for part in "qkv"])
    block.load_state_dict(state)
    return block.eval()


def mae_st_forward(tensors: dict[str, torch.Tensor], clips: torch.Tensor, keep: torch.Tensor, heads: int, inner: int):
    """What mae_st computes, after its description: (B, N, p * p * 3) for every token from the visible ones `keep` (V,).

    The class token is dropped between encoder and decoder, which has its own.
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def places(prefix: str) -> torch.Tensor:
        spatial, temporal = tensors[f"{prefix}pos_embed_spatial"], tensors[f"{prefix}pos_embed_temporal"]
        return spatial.tile(1, temporal.shape[1], 1) + temporal.repeat_interleave(spatial.shape[1], 1)

    kernel = tensors["patch_embed.proj.weight"]
    x = F.conv3d(clips, kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    x = (x + places(""))[:, keep]
    x = torch.cat([(tensors["cls_token"] + tensors["pos_embed_class"]).expand(len(x), -1, -1), x], 1)
    for number in range(2):
        x = reference_block(tensors, f"blocks.{number}.", x.shape[2], heads)(x)
    x = F.linear(norm(x, "norm")[:, 1:], tensors["decoder_embed.weight"], tensors["decoder_embed.bias"])
    grid = tensors["mask_token"].repeat(len(x), places("").shape[1], 1)
    grid[:, keep] = x
    own = (tensors["decoder_cls_token"] + tensors["decoder_pos_embed_class"]).expand(len(x), -1, -1)
    x = torch.cat([own, grid + places("decoder_")], 1)
    x = norm(reference_block(tensors, "decoder_blocks.0.", x.shape[2], inner)(x), "decoder_norm")
    return F.linear(x[:, 1:], tensors["decoder_pred.weight"], tensors["decoder_pred.bias"])


def test_mae_st_predictions(tmp_path):
    tensors = random_tensors(mae_st_shapes())
    torch.save({"model": tensors}, tmp_path / "st.pth")
    ours = import_weights("mae_st", tmp_path / "st.pth").eval()
    clips = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = make_mask("random", 0.9, (8, 4, 4), [3, 3])  # the same for both
    with torch.no_grad():
        expected = mae_st_forward(tensors, clips, mask.visible[0], heads=3, inner=16)[:, mask.masked[0]]
        found = ours(clips, mask, ours.draw([0, 1], mask)).prediction
    torch.testing.assert_close(found, expected.repeat(1, 1, 2), atol=1e-5, rtol=1e-5)  # for both frames of a tubelet


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


def slowfast_forward(tensors: dict[str, torch.Tensor], clips: torch.Tensor, keep: torch.Tensor, heads: int, inner: int):
    """What PySlowFast computes: the decoder reads the encoder's class token, at a place of its own."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    kernel, spatial, temporal = (
        tensors[name] for name in ("patch_embed.proj.weight", "pos_embed_spatial", "pos_embed_temporal")
    )
    x = F.conv3d(clips, kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    x = (x + spatial.tile(1, temporal.shape[1], 1) + temporal.repeat_interleave(spatial.shape[1], 1))[:, keep]
    x = torch.cat([(tensors["cls_token"] + tensors["pos_embed_class"]).expand(len(x), -1, -1), x], 1)
    for number in range(2):
        x = reference_block(tensors, f"blocks.{number}.", x.shape[2], heads)(x)
    x = F.linear(norm(x, "norm"), tensors["decoder_embed.weight"], tensors["decoder_embed.bias"])
    grid = tensors["mask_token"].repeat(len(x), tensors["decoder_pos_embed"].shape[1] - 1, 1)
    grid[:, keep] = x[:, 1:]
    x = torch.cat([x[:, :1], grid], 1) + tensors["decoder_pos_embed"]
    x = reference_block(tensors, "pred_head.transforms.0.0.", x.shape[2], inner)(x)
    x = norm(x, "pred_head.transforms.0.1")[:, 1:]
    return F.linear(x, tensors["pred_head.projections.0.weight"], tensors["pred_head.projections.0.bias"])


def test_slowfast_decoder_gives_the_class_token_a_place(tmp_path):
    tensors = random_tensors(mae_st_shapes(split=True, slowfast=True))
    torch.save({"model_state": tensors}, tmp_path / "sf.pyth")
    ours = import_weights("mae_st", tmp_path / "sf.pyth", decoder_heads=4).eval()
    assert ours.settings.decoder_class_position
    clips = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = make_mask("random", 0.9, (8, 4, 4), [3, 3])
    with torch.no_grad():
        expected = slowfast_forward(tensors, clips, mask.visible[0], heads=3, inner=4)[:, mask.masked[0]]
        found = ours(clips, mask, ours.draw([0, 1], mask)).prediction
    torch.testing.assert_close(found, expected.repeat(1, 1, 2), atol=1e-5, rtol=1e-5)
    save_model(ours, tmp_path / "saved")
    again = load_model(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(clips, mask, again.draw([0, 1], mask)).prediction, found)
    assert "decoder.class_position" in ours.no_weight_decay()


def test_a_zero_place_of_the_class_token_is_none(tmp_path):
    tensors = random_tensors(mae_st_shapes(split=False, slowfast=True))
    tensors["decoder_pos_embed"][:, 0] = 0
    torch.save({"model_state": tensors}, tmp_path / "sf.pyth")
    model = import_weights("mae_st", tmp_path / "sf.pyth")
    assert model.settings.decoder_heads == 1
    assert model.settings.positions == "joint"
    assert not model.settings.decoder_class_position


@pytest.mark.parametrize("how", ["central", "mean"])
def test_inflation(tmp_path, how):
    torch.manual_seed(0)
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, depth=2).eval()
    torch.nn.init.normal_(peer.head.weight)
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    ours = import_weights("timm", tmp_path / "vit.safetensors", frames=8, inflate=how).eval()
    assert ours.encoder.shape == (4, 4, 4)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # an image fills one tubelet by repetition: either way its tokens are the 2-D model's
        torch.testing.assert_close(ours(images[:, :, None]), peer(images), atol=1e-5, rtol=1e-5)
        clip = torch.randn(1, 3, 2, 32, 32)  # of a moving tubelet, `central` sees the later frame, `mean` both alike
        seen = clip[:, :, 1] if how == "central" else clip.mean(2)
        tokens = ours.encoder.patch_embed(patchify(clip, 2, 8))
        torch.testing.assert_close(tokens, peer.patch_embed(seen), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="--frames N"):
        import_weights("timm", tmp_path / "vit.safetensors", inflate=how)


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
