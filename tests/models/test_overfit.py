"""A nano model learns eight real clips by heart and paints them back by full sampling."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffmae_video.config import ModelSettings
from diffmae_video.data.decode import read_clips
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import denormalize_pixels, normalize_pixels

NAMES = (
    "k400_arm_wrestling_ehLnj7pXnYE.mp4",
    "k400_bungee_jumping_b6yQZjPE26c.mp4",
    "k400_bungee_jumping_dAeUFSdYG1I.mp4",
    "mmaction2_demo.mp4",
    "tv_gallery_basketball.mp4",
    "tv_k400_R6llTwEh07w.mp4",
    "tv_k400_SOX5yA1l24A.mp4",
    "tv_k400_WUzgd7C1pWA.mp4",
)
STEPS, RATE = 2500, 2e-3


def eight_clips(folder) -> torch.Tensor:
    """uint8 (8, 4, 3, 32, 32): four frames, eight apart, of each video."""
    clips = []
    for name in NAMES:
        (clip,) = read_clips((folder / "clips" / name).read_bytes(), [[0, 8, 16, 24]])
        frames = torch.as_tensor(clip.frames).float()  # (T, C, H, W)
        frames = torch.nn.functional.interpolate(frames, (32, 32), mode="bilinear", antialias=True)
        clips.append(frames.round().clamp(0, 255).to(torch.uint8))
    return torch.stack(clips)


def picture(pixels: torch.Tensor, hidden: torch.Tensor, painted: torch.Tensor) -> Image.Image:
    """A row for each clip: its frames, what the encoder saw of them, and how they came back; four times enlarged."""
    columns = [pixels, pixels.masked_fill(hidden, 127), painted]  # uint8 (B, T, C, H, W) each
    sheet = torch.cat([part for clip in columns for part in clip.unbind(1)], 3)  # (B, C, H, 3 * T * W)
    sheet = torch.cat(sheet.unbind(0), 1).permute(1, 2, 0)  # (B * H, 3 * T * W, C)
    return Image.fromarray(sheet.numpy()).resize((4 * sheet.shape[1], 4 * sheet.shape[0]), Image.Resampling.NEAREST)


@pytest.mark.slow
def test_eight_real_clips_come_back_above_30_db(shared_data, tmp_path):
    pixels = eight_clips(shared_data)
    clips = normalize_pixels(pixels, "symmetric")
    model = DiffMAE(
        ModelSettings(preset="nano", frames=4, size=(32, 32), patch=8, decoder_width=128, decoder_heads=4)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        seeds = torch.arange(8) + 8 * step
        mask = make_mask("random", 0.75, (2, 4, 4), seeds)
        loss = model(clips, mask, model.draw(seeds, mask)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    mask = make_mask("random", 0.75, (2, 4, 4), range(1, 9))
    hidden = mask.pixels(2, 8)[:, :, None].expand_as(pixels)
    painted = denormalize_pixels(model.sample(clips, mask, seeds=range(8), sampler="ddpm", steps=1000), "symmetric")
    assert torch.equal(painted[~hidden], pixels[~hidden])
    error = (painted[hidden].float() - pixels[hidden].float()).square().mean()
    ratio = float(20 * torch.log10(255 / error.sqrt()))
    picture(pixels, hidden, painted).save(tmp_path / "clips.png")
    print(f"masked PSNR {ratio:.2f} dB, loss {float(loss.detach()):.5f}, {tmp_path / 'clips.png'}")
    assert ratio > 30
