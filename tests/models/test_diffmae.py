"""Invariants of the model, through its public methods."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.decoder import link_blocks
from diffmae_video.models.diffmae import DiffMAE, Draw
from diffmae_video.models.patches import gather_tokens, patchify

SHAPE = (2, 4, 4)


def settings(**changes) -> ModelSettings:
    """A model of a few thousand weights on clips of 4 x 32 x 32."""
    fields = {
        "preset": "nano",
        "width": 32,
        "depth": 3,
        "heads": 2,
        "frames": 4,
        "size": (32, 32),
        "patch": 8,
        "decoder_width": 32,
        "decoder_heads": 2,
        "decoder_depth": 2,
    }
    return ModelSettings(**{**fields, **changes})


def model(**changes) -> DiffMAE:
    """The model in evaluation mode, every parameter away from zero so that no path is closed."""
    net = DiffMAE(settings(**changes))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return net.eval()


def clips(seed: int = 0, batch: int = 2, frames: int = 4) -> torch.Tensor:
    """Random normalised clips."""
    return torch.randn(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(seed))


def uneven_mask() -> Mask:
    """Two samples with different counts."""
    grid = torch.zeros(2, 32, dtype=torch.bool)
    grid[0, 3:20], grid[1, ::4] = True, True
    return Mask.from_grid(grid, SHAPE)


KINDS = ["joint", "cross_self", "cross"]


@pytest.mark.parametrize("decoder", KINDS)
@pytest.mark.parametrize("class_token", [True, False])
def test_encoder_sees_no_masked_pixel_timestep_or_noise(decoder, class_token):
    net, mask, x = model(decoder=decoder, class_token=class_token), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    hidden = mask.pixels(2, 8)[:, None].expand_as(x)
    y = torch.where(hidden, clips(1), x)
    caught = []
    net.encoder.norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        first, second = net.encode(x, mask), net.encode(y, mask)
        draw = net.draw([3, 4], mask)
        net(x, mask, draw)
        net(y, mask, Draw((draw.timestep + 500) % 1000, -draw.noise, None))
    assert torch.equal(first.latents, second.latents)
    assert all(torch.equal(first.features[link], second.features[link]) for link in first.features)
    assert torch.equal(caught[2], caught[3])
    assert torch.equal(caught[0], caught[2])
    with torch.no_grad():
        changed = net.encode(torch.where(hidden, x, clips(1)), mask)
    assert not torch.equal(first.latents, changed.latents)  # visible pixels do matter


@pytest.mark.parametrize("target", ["pixel", "norm_pixel", "noise", "velocity"])
def test_the_loss_compares_masked_patches_only(target):
    """Where the decoder cannot see the clip at all, changing visible pixels leaves the loss as it is."""
    net, mask, x = model(target=target), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    with torch.no_grad():
        for block in net.decoder.blocks:
            block.cross_attn.proj.weight.zero_()
    hidden = mask.pixels(2, 8)[:, None].expand_as(x)
    draw = net.draw([3, 4], mask)
    with torch.no_grad():
        losses = [net(torch.where(hidden, x, other), mask, draw).loss for other in (clips(1), clips(2))]
        moved = net(torch.where(hidden, clips(1), x), mask, draw).loss
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], moved)


@pytest.mark.parametrize("timestep", ["add", "adaln", "none"])
@pytest.mark.parametrize("decoder", KINDS)
def test_who_sees_whom_in_the_decoder(decoder, timestep):
    net, mask = model(decoder=decoder, timestep=timestep), make_mask("random", 0.75, SHAPE, [0, 1])
    encoding, noisy = net.encode(clips(), mask), torch.randn(2, mask.masked.shape[1], 384)
    when = torch.tensor([100, 800])
    changed = noisy.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        one, two = net.denoise(noisy, when, encoding), net.denoise(changed, when, encoding)
        later = net.denoise(noisy, when + 50, encoding)
    assert not torch.equal(one[:, 0], two[:, 0])
    independent = torch.allclose(one[:, 1:], two[:, 1:], atol=1e-7, rtol=0)
    assert independent == (decoder == "cross")
    assert torch.equal(one, later) == (timestep == "none")


@pytest.mark.parametrize("mask", [make_mask("random", 0.75, SHAPE, [0, 1]), uneven_mask()], ids=["even", "uneven"])
def test_loss_and_its_gradient_are_those_of_the_mean_squared_error(mask):
    net, x = model(), clips()
    out = net(x, mask, net.draw([3, 4], mask))
    clean = patchify(x, 2, 8)
    rows = [(out.prediction[b, : int(mask.grid[b].sum())] - clean[b, mask.grid[b]]).square().mean() for b in range(2)]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(out.loss, expected)
    found, wanted = (torch.autograd.grad(loss, out.prediction, retain_graph=True)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("decoder", KINDS)
def test_permuting_samples_permutes_outputs(decoder):
    net, mask, x = model(decoder=decoder), make_mask("random", 0.75, SHAPE, [0, 1, 2]), clips(batch=3)
    order = torch.tensor([2, 0, 1])
    moved = Mask.from_grid(mask.grid[order], SHAPE)
    with torch.no_grad():
        one = net(x, mask, net.draw(torch.tensor([7, 8, 9]), mask))
        two = net(x[order], moved, net.draw(torch.tensor([7, 8, 9])[order], moved))
    torch.testing.assert_close(one.per_sample[order], two.per_sample, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(one.prediction[order], two.prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "learned", "joint", "flat"])
def test_an_image_equals_the_clip_that_repeats_it(positions):
    net = model(frames=2, positions=positions)
    mask, x = make_mask("random", 0.75, (1, 4, 4), [0, 1]), clips(frames=1)
    still = x.expand(-1, -1, 2, -1, -1)
    draw = net.draw([1, 2], mask)
    with torch.no_grad():
        torch.testing.assert_close(net.encoder(x), net.encoder(still), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(x, mask, draw).loss, net(still, mask, draw).loss, atol=1e-5, rtol=1e-5)
        kernel = net.encoder.patch_embed.proj
        summed = torch.nn.functional.conv2d(x[:, :, 0], kernel.weight.sum(2), kernel.bias, stride=8)  # the claim itself
        embedded = net.encoder.patch_embed(net.encoder._embeddable(x, None)[0])
    torch.testing.assert_close(embedded, summed.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_patch_embedding_equals_its_convolution():
    net, x = model(), clips()
    embedded = net.encoder.patch_embed(net.encoder._embeddable(x, None)[0])
    torch.testing.assert_close(
        embedded, net.encoder.patch_embed.proj(x).flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("decoder", KINDS)
@pytest.mark.parametrize("class_token", [True, False])
def test_padded_masks_change_nothing(decoder, class_token):
    net, mask, x = model(decoder=decoder, class_token=class_token), uneven_mask(), clips()
    seeds = torch.tensor([5, 6])
    with torch.no_grad():
        both = net(x, mask, net.draw(seeds, mask))
        for row in range(2):
            alone = Mask.from_grid(mask.grid[row : row + 1], SHAPE)
            one = net(x[row : row + 1], alone, net.draw(seeds[row : row + 1], alone))
            torch.testing.assert_close(both.per_sample[row], one.loss, atol=1e-5, rtol=1e-5)


def test_draws_do_not_depend_on_the_batch_or_the_global_generator():
    net = model(decoder="cross", loss_tokens=0.5, labels=3)
    mask = make_mask("random", 0.75, SHAPE, [0, 1])
    together = net.draw([11, 12], mask, torch.tensor([0, 2]))
    torch.manual_seed(1234)
    alone = net.draw([12], make_mask("random", 0.75, SHAPE, [1]), torch.tensor([2]))
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))
    assert together.noise.shape == (2, 12, 384)
    assert len(set(together.keep[0].tolist())) == 12


def test_predicting_a_subset_is_the_whole_prediction_at_that_subset():
    part, mask, x = model(decoder="cross", loss_tokens=0.5), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    whole = model(decoder="cross")
    draw = part.draw([11, 12], mask)
    everywhere = torch.zeros(2, 24, 384).scatter(1, draw.keep[..., None].expand(-1, -1, 384), draw.noise)
    with torch.no_grad():
        few = part(x, mask, draw).prediction
        all_of_it = whole(x, mask, Draw(draw.timestep, everywhere, None)).prediction
    torch.testing.assert_close(few, all_of_it.gather(1, draw.keep[..., None].expand(-1, -1, 384)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "objective", "timestep", "target", "class_token"),
    [
        combination
        for combination in itertools.product(
            KINDS, ["diffmae", "mae", "ddpm"], ["add", "adaln", "none"], ["pixel", "velocity"], [True, False]
        )
        if not (combination[1] == "mae" and combination[3] == "velocity")
    ],
)
def test_every_parameter_learns_at_every_step(decoder, objective, timestep, target, class_token):
    """DistributedDataParallel waits for parameters without gradient."""
    fields = {"decoder": decoder, "objective": objective, "timestep": timestep, "target": target}
    net, mask = model(**fields, class_token=class_token, positions="learned"), make_mask("random", 0.75, SHAPE, [0, 1])
    net(clips(), mask, net.draw([1, 2], mask)).loss.backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("objective", ["diffmae", "mae", "ddpm"])
def test_sampling_keeps_known_pixels_bit_for_bit(sampler, objective):
    net, mask, x = model(objective=objective), uneven_mask(), clips()
    known = torch.rand(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2
    out = net.sample(x, mask, seeds=[1, 2], sampler=sampler, steps=4, samples=2, known=known)
    assert out.shape == (2, 2, 3, 4, 32, 32)
    kept = (~mask.pixels(2, 8)[:, None] | known).expand_as(x)
    for k in range(2):
        assert torch.equal(out[:, k][kept], x[kept])
        assert bool((out[:, k][~kept] != x[~kept]).float().mean() > 0.99)
    assert (objective == "mae") == torch.equal(out[:, 0], out[:, 1])
    alone = net.sample(
        x[1:],
        Mask.from_grid(mask.grid[1:], SHAPE),
        seeds=[2],
        sampler=sampler,
        steps=4,
        known=known[1:],
    )
    if objective == "ddpm":  # with equal counts a sample does not depend on its batch
        torch.testing.assert_close(alone[0], out[1, 0], atol=1e-4, rtol=1e-4)


def test_sampling_does_not_read_what_it_fills():
    net, mask, x = model(), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    hidden = mask.pixels(2, 8)[:, None].expand_as(x)
    blank = torch.where(hidden, torch.zeros_like(x), x)
    outs = [net.sample(clip, mask, seeds=[1, 2], steps=3) for clip in (x, blank)]
    assert torch.equal(*outs)


def test_trajectory_starts_with_the_masked_autoencoders_answer():
    """At the last timestep the input is noise to one part in 10^5: the first x_0 is one MAE forward from it."""
    net, mask, x = model(), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    steps = list(net.sample_steps(x, mask, seeds=[1, 2], steps=5))
    frames, final = [step.clips() for step in steps], net.sample(x, mask, seeds=[1, 2], steps=5)
    assert [step.timestep for step in steps] == net.schedule.respace(5).timesteps.flip(0).tolist()
    single = net.sample(x, mask, seeds=[1, 2], steps=1)
    assert torch.equal(frames[0], single)
    assert torch.equal(frames[-1], final)
    other = clips(5)  # the clean clip under the mask has no part in it: signal power at T is 2e-11
    assert float(net.signal[-1]) < 5e-6
    hidden = mask.pixels(2, 8)[:, None].expand_as(x)
    torch.testing.assert_close(net.sample(torch.where(hidden, other, x), mask, seeds=[1, 2], steps=1), single)


def test_diffmae_with_a_blind_input_is_mae():
    """Same encoder, same decoder, noise input switched off: the objectives agree to the bit pattern of one forward."""
    one = model(objective="diffmae", timestep="none", decoder="joint")
    two = model(objective="mae", decoder="joint")
    with torch.no_grad():
        one.decoder.noisy_embed.weight.zero_()
        one.decoder.noisy_embed.bias.zero_()
    two.load_state_dict(one.state_dict(), strict=False)
    mask, x = make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    draw = one.draw([1, 2], mask)
    with torch.no_grad():
        last = Draw(torch.full((2,), 999), draw.noise, None)
        torch.testing.assert_close(one(x, mask, last).prediction, two(x, mask, two.draw([1, 2], mask)).prediction)
        torch.testing.assert_close(one(x, mask, last).loss, two(x, mask, last).loss)


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_other_targets_give_the_same_x0(target):
    """A decoder that predicts the right noise or velocity denoises to the right pixels."""
    net, mask, x = model(target=target), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    draw = net.draw([1, 2], mask)
    when = torch.tensor([50, 200])
    signal, sigma = net.signal[when].view(-1, 1, 1), net.sigma[when].view(-1, 1, 1)
    clean = gather_tokens(patchify(x, 2, 8), mask.masked)
    right = draw.noise if target == "noise" else signal * draw.noise - sigma * clean
    net.decoder.forward = lambda *arguments: right
    noisy = signal * clean + sigma * draw.noise
    torch.testing.assert_close(net.denoise(noisy, when, net.encode(x, mask)), clean, atol=1e-4, rtol=1e-4)
    assert float(net(x, mask, Draw(when, draw.noise, None)).loss) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("objective", ["diffmae", "mae", "ddpm"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_samples_and_trains_in_double_precision(objective, sampler):
    net, mask, x = model(objective=objective).eval(), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    options = {"seeds": [3, 4], "steps": 3, "sampler": sampler}
    single = net.sample(x, mask, **options)
    loss = net(x, mask, net.draw([3, 4], mask)).loss
    net.double()
    double = net.sample(x.double(), mask, **options)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)
    again = net(x.double(), mask, net.draw([3, 4], mask)).loss
    assert again.dtype == torch.float64
    torch.testing.assert_close(again.float(), loss, atol=1e-5, rtol=1e-5)


def test_a_model_of_half_the_bits_samples():
    net, mask, x = model().eval().bfloat16(), make_mask("random", 0.75, SHAPE, [0, 1]), clips().bfloat16()
    filled = net.sample(x, mask, seeds=[0, 1], steps=2)
    assert filled.dtype == torch.bfloat16
    assert filled.isfinite().all()


@pytest.mark.parametrize("target", ["norm_pixel", "norm_pixel_channel"])
def test_norm_pixel_refuses_to_sample_unless_told_to_borrow(target):
    net, mask, x = model(target=target), make_mask("random", 0.75, SHAPE, [0, 1]), clips()
    with pytest.raises(UsageError, match="leaks ground truth"):
        net.sample(x, mask, seeds=[0, 1], steps=2)
    assert net.sample(x, mask, seeds=[0, 1], steps=2, borrow_statistics=True).shape == x.shape


def test_links():
    assert link_blocks("even", 24, 8) == [23, 20, 17, 14, 11, 8, 5, 2]
    assert link_blocks("even", 4, 4) == [3, 2, 1, 0]
    assert link_blocks("even", 2, 4) == [1, 1, 0, 0]
    assert link_blocks("last", 12, 3) == [11] * 3


def test_same_seed_same_weights_and_global_generator_untouched():
    state = torch.get_rng_state()
    one, two = DiffMAE(settings(), seed=3), DiffMAE(settings(), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = DiffMAE(settings(), seed=4)
    assert not torch.equal(one.encoder.blocks[0].attn.qkv.weight, other.encoder.blocks[0].attn.qkv.weight)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        net, mask = model(), make_mask("random", 0.75, SHAPE, [0, 1])
        net.train().set_grad_checkpointing(enable)
        net(clips(), mask, net.draw([1, 2], mask)).loss.backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("decoder", "precision"), [("joint", torch.bfloat16), ("cross_self", torch.bfloat16), ("cross", torch.float32)]
)
def test_training_step_has_no_graph_break(decoder, precision):
    changes = {"loss_tokens": 0.5} if decoder == "cross" else {"timestep": "adaln"}
    net = model(decoder=decoder, depth=1, decoder_depth=1, **changes).train()
    mask, x, results = make_mask("random", 0.75, SHAPE, [0, 1]), clips(), []
    draw = net.draw([1, 2], mask)
    for step in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):  # an error at the first graph break
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = step(x, mask, draw).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
    for eager, compiled in zip(*results, strict=True):
        if precision == torch.float32:
            torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=1e-4)
        else:  # they round at different places
            assert (compiled - eager).norm() < 0.02 * eager.norm() + 1e-5


def test_schedule_of_the_settings():
    net = DiffMAE(settings(), DiffusionSettings(schedule="cosine", timesteps=50, rho=1.0))
    assert len(net.schedule) == 50
    assert int(net.draw(list(range(200)), make_mask("random", 0.75, SHAPE, range(200))).timestep.max()) == 49
