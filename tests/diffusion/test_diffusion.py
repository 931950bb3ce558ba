"""Schedules and samplers against closed forms and against diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import diffmae_video.compat  # noqa: F401

import diffusers
import numpy as np
import pytest
import torch

from diffmae_video import registry
from diffmae_video.diffusion import samplers
from diffmae_video.diffusion.samplers import Step, ddim, ddpm, dpm_solver_pp_2m, heun
from diffmae_video.diffusion.schedule import Schedule

STEPS = 20
SAMPLERS = {name: registry.samplers.get(name) for name in registry.samplers.names()}


def linear_denoiser(x, timestep):
    """An arbitrary smooth x_0 predictor that depends on both arguments."""
    return torch.tanh(0.7 * x + 0.1) * (1 + timestep.double().view(-1, 1) / 2000)


def sample(steps: Iterator[Step]) -> torch.Tensor:
    """What a sampler makes of its noise: the last prediction."""
    *_, last = steps
    return last.x_0


def start() -> torch.Tensor:
    """Pure noise, float64."""
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def in_float64(scheduler):
    """diffusers builds its tables in float32: give it ours of the same definition, so that only the rules differ."""
    schedule = Schedule.make()
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_bar
    for name, table in (("alpha_t", schedule.signal), ("sigma_t", schedule.sigma)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, table)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "one"):
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize(("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_and_posterior_of_diffusers(kind, theirs):
    peer = diffusers.DDPMScheduler(beta_schedule=theirs, variance_type="fixed_small")
    ours = Schedule.make(kind, 1000, rho=1.0)
    torch.testing.assert_close(ours.betas.float(), peer.betas, atol=2e-7, rtol=2e-6)
    torch.testing.assert_close(ours.alphas_bar.float(), peer.alphas_cumprod, atol=1e-6, rtol=1e-3)
    for i in (1, 10, 500, 998):
        assert float(ours.posterior_variance[i]) == pytest.approx(float(peer._get_variance(i)), rel=1e-4, abs=1e-7)


def test_facts_of_the_rho_schedule():
    """alpha_bar at the paper's exponents, computed independently in plain Python."""
    for rho in (1.0, 0.8, 0.6):
        product = 1.0
        for i in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999) ** rho
        table = Schedule.make("linear", 1000, rho).alphas_bar
        assert table.dtype == torch.float64
        assert float(table[-1]) == pytest.approx(product, rel=1e-9)
    middle = [float(Schedule.make("linear", 1000, rho).alphas_bar[249]) for rho in (1.0, 0.8, 0.6)]
    assert middle == pytest.approx([0.5241, 0.1260, 0.0011], abs=6e-5)


def test_posterior_by_bayes():
    """Mean and variance of q(x_{t-1} | x_t, x_0) from the product of two Gaussians."""
    schedule = Schedule.make("linear", 50, 0.8)
    for i in range(1, 50):
        beta, previous = schedule.betas[i], schedule.alphas_bar[i - 1]
        precision = (1 - beta) / beta + 1 / (1 - previous)
        torch.testing.assert_close(schedule.posterior_variance[i], 1 / precision)
        torch.testing.assert_close(schedule.posterior_x0[i], previous.sqrt() / (1 - previous) / precision)
        torch.testing.assert_close(schedule.posterior_xt[i], (1 - beta).sqrt() / beta / precision)


def test_respacing_keeps_marginals():
    schedule = Schedule.make("linear", 1000, 0.8)
    for steps in (1, 2, 7, 50, 1000):
        kept = schedule.respace(steps)
        assert len(kept) == steps
        assert int(kept.timesteps[-1]) == 999
        torch.testing.assert_close(kept.alphas_bar, schedule.alphas_bar[kept.timesteps])
    torch.testing.assert_close(schedule.respace(1000).betas, schedule.betas)
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        schedule.respace(1001)


@pytest.mark.parametrize("rho", [1.0, 0.8, 0.5])
def test_steps_are_spread_evenly_in_angle(rho):
    """Distinct, ascending, from the first to the last; every angle is as near as distinct timesteps allow."""
    schedule = Schedule.make("linear", 1000, rho)
    angles = torch.rad2deg(torch.arccos(schedule.alphas_bar.sqrt()))
    for steps in (2, 5, 50, 333, 999, 1000):
        kept = schedule.respace(steps).timesteps
        assert len(kept) == steps
        assert (int(kept[0]), int(kept[-1])) == (0, 999)
        assert bool((kept.diff() > 0).all())
    few = angles[schedule.respace(8).timesteps].diff()
    widest = float(angles.diff().max())  # what a single timestep turns: the grain of the spacing
    assert float((few - few.mean()).abs().max()) <= widest
    with pytest.raises(ValueError, match="angle, even"):
        schedule.respace(8, "uniform")


def test_long_steps_of_a_noisy_schedule_stay_finite():
    """At rho = 0.5 the signal falls to 1e-45 within one long step: tables and samplers must not turn it into 0 / 0."""
    schedule = Schedule.make("linear", 1000, 0.5)
    for steps in (1, 2, 3, 5):
        for spacing in ("angle", "even"):
            for sampler in SAMPLERS.values():
                generator = torch.Generator().manual_seed(0)
                out = sample(sampler(linear_denoiser, start(), schedule, steps, generator, spacing=spacing))
                assert bool(out.isfinite().all())


def test_forward_marginals_by_monte_carlo():
    """One step of noise at a time gives the closed form's mean and variance."""
    schedule = Schedule.make("linear", 40, 0.8)
    generator = torch.Generator().manual_seed(0)
    count, x0 = 200_000, 1.7
    x = torch.full((count,), x0, dtype=torch.float64)
    for i in range(12):
        beta = float(schedule.betas[i])
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise
    at = torch.full((count, 1), x0, dtype=torch.float64)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    closed = schedule.add_noise(at, noise, torch.full((count,), 11))
    mean, std = float(schedule.alphas_bar[11].sqrt()) * x0, float(schedule.sigma[11])
    for sample in (x, closed):
        assert float(sample.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(count))
        assert float(sample.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * count))


def test_add_noise_of_diffusers():
    x0, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    timestep = torch.tensor([0, 10, 500, 999])
    expected = diffusers.DDPMScheduler().add_noise(x0, noise, timestep)
    torch.testing.assert_close(Schedule.make().add_noise(x0, noise, timestep), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_trajectory_of_diffusers(eta):
    peer = in_float64(diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False))
    kept = Schedule.make().respace(STEPS).timesteps
    steps = ddim(linear_denoiser, start(), Schedule.make(), STEPS, torch.Generator().manual_seed(3), eta=eta)
    seen = [step.x_t for step in steps]
    # their step reads the previous timestep off an even spacing: our own 20 kept ones are not even, so step by step
    x, generator = start(), torch.Generator().manual_seed(3)
    for i in range(STEPS - 1, 0, -1):
        torch.testing.assert_close(seen[STEPS - 1 - i], x, atol=1e-5, rtol=1e-5)
        now, previous = int(kept[i]), int(kept[i - 1])
        peer.num_inference_steps = 1
        peer.register_to_config(num_train_timesteps=now - previous)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) if eta else None
        x0 = linear_denoiser(x, torch.full((3,), now))
        x = peer.step(x0, now, x, eta=eta, variance_noise=noise).prev_sample


def test_ddpm_trajectory_of_diffusers():
    peer = in_float64(diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False, variance_type="fixed_small"))
    kept = Schedule.make().respace(STEPS).timesteps
    peer.set_timesteps(timesteps=kept.flip(0).tolist())
    steps = list(ddpm(linear_denoiser, start(), Schedule.make(), STEPS, torch.Generator().manual_seed(3)))
    seen, final = [step.x_t for step in steps], steps[-1].x_0
    x, generator = start(), torch.Generator().manual_seed(3)
    for i in range(STEPS - 1, -1, -1):
        torch.testing.assert_close(seen[STEPS - 1 - i], x, atol=1e-5, rtol=1e-5)
        now = int(kept[i])
        x = peer.step(linear_denoiser(x, torch.full((3,), now)), now, x, generator=generator).prev_sample
    torch.testing.assert_close(final, x, atol=1e-5, rtol=1e-5)


def test_dpm_solver_trajectory_of_diffusers():
    peer = in_float64(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="sample", algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        )
    )
    kept = Schedule.make().respace(STEPS).timesteps
    peer.set_timesteps(STEPS)
    times = kept.flip(0)
    signal = Schedule.make().alphas_bar[times]
    peer.timesteps = times
    peer.sigmas = torch.cat([((1 - signal) / signal).sqrt(), torch.zeros(1, dtype=torch.float64)])
    steps = list(dpm_solver_pp_2m(linear_denoiser, start(), Schedule.make(), STEPS))
    seen, final = [step.x_t for step in steps], steps[-1].x_0
    x = start()
    for i, now in enumerate(times.tolist()):
        torch.testing.assert_close(seen[i], x, atol=1e-5, rtol=1e-5)
        x = peer.step(linear_denoiser(x, torch.full((3,), now)), now, x).prev_sample
    torch.testing.assert_close(final, x, atol=1e-5, rtol=1e-5)


# --- Gaussian data: the best denoiser is known, so the samplers must give the conditional distribution ----------------


class Gaussian:
    """Six correlated values, the first two visible; the rest given them is Gaussian with known mean and covariance."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        root = rng.normal(size=(6, 6)) * 0.5
        covariance = root @ root.T + 0.1 * np.eye(6)
        seen, hidden = slice(0, 2), slice(2, 6)
        gain = covariance[hidden, seen] @ np.linalg.inv(covariance[seen, seen])
        self.mean = torch.tensor(gain @ np.array([0.9, -0.4]))
        self.covariance = torch.tensor(covariance[hidden, hidden] - gain @ covariance[seen, hidden])
        self.schedule = Schedule.make("linear", 1000, 0.8)

    def denoise(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t, visible]: the posterior mean of a Gaussian seen through Gaussian noise."""
        signal, sigma = self.schedule.signal[int(timestep[0])], self.schedule.sigma[int(timestep[0])]
        total = signal**2 * self.covariance + sigma**2 * torch.eye(4, dtype=torch.float64)
        gain = signal * self.covariance @ torch.linalg.inv(total)
        return self.mean + (x - signal * self.mean) @ gain.T

    def moments(self, sampler: str, steps: int, spacing: str = "angle") -> tuple[torch.Tensor, torch.Tensor]:
        """Exact mean and covariance of what a deterministic sampler makes of N(0, I): it is affine in x_T."""
        run, start = SAMPLERS[sampler], torch.eye(4, dtype=torch.float64)
        offset = sample(run(self.denoise, 0 * start[:1], self.schedule, steps, spacing=spacing))
        linear = sample(run(self.denoise, start, self.schedule, steps, spacing=spacing)) - offset
        return offset[0], linear.T @ linear

    def error(self, sampler: str, steps: int, spacing: str = "angle") -> float:
        """Largest deviation of the covariance."""
        return float((self.moments(sampler, steps, spacing)[1] - self.covariance).abs().max())


SCHEDULES = {
    "linear": Schedule.make("linear", 1000, 0.8),
    "rho 1": Schedule.make("linear", 1000, 1.0),
    "cosine": Schedule.make("cosine", 1000, 1.0),
    "flow": Schedule.make("flow", 1000, 1.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_gaussian_conditional_of_deterministic_samplers(sampler, schedule):
    problem = Gaussian()
    problem.schedule = SCHEDULES[schedule]
    mean, covariance = problem.moments(sampler, 500)
    left = float(problem.schedule.signal[-1])  # what the sampler, which starts from pure noise, knows nothing of
    torch.testing.assert_close(mean, problem.mean, atol=5e-3 + left, rtol=0)
    largest = float(problem.covariance.abs().max())
    torch.testing.assert_close(covariance, problem.covariance, atol=0.02 * largest, rtol=0)


def test_errors_fall_at_the_expected_order():
    """Order 1 for DDIM between 125 and 500 steps; DPM-Solver++(2M) is nearer at every count."""
    problem = Gaussian()
    first = math.log(problem.error("ddim", 125) / problem.error("ddim", 500), 4)
    assert 0.7 < first < 1.3
    for steps in (50, 125, 500):
        assert problem.error("dpm++", steps) < problem.error("ddim", steps)


@pytest.mark.parametrize("rho", [1.0, 0.8, 0.5])
def test_few_steps_spread_in_angle_do_what_many_even_ones_do(rho):
    """20 DPM-Solver++ steps at even angles leave less error in the covariance than 50 over even timesteps."""
    problem = Gaussian()
    problem.schedule = Schedule.make("linear", 1000, rho)
    assert problem.error("dpm++", 20) < 0.03 * float(problem.covariance.abs().max())
    assert problem.error("dpm++", 20) < problem.error("dpm++", 50, "even") * 1.05
    assert problem.error("ddim", 20) < problem.error("ddim", 20, "even")


def exact_moments_of_ddpm(problem: Gaussian, steps: int, monkeypatch, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of ancestral samples without sampling: they are affine in x_T and in each step's noise.

    Row 0 of the batch gets no noise at all, every other row a unit of one component of one of the draws.
    """
    unit = torch.eye(1 + 4 * steps, dtype=torch.float64)[:, 1:].unflatten(1, (steps, 4))  # (rows, draw, component)
    draws = iter(range(1, steps))
    monkeypatch.setattr(samplers, "randn_like", lambda x, generators: unit[:, next(draws)])
    out = sample(ddpm(problem.denoise, unit[:, 0], problem.schedule, steps, **options))
    assert next(draws, None) is None  # every step but the last has drawn
    linear = out[1:] - out[0]
    return out[0], linear.T @ linear


def test_ancestral_errors_fall_at_the_expected_order(monkeypatch):
    """First order in the number of steps, in mean and covariance, towards the conditional distribution."""
    problem, errors = Gaussian(), []
    for steps in (64, 128, 256):
        mean, covariance = exact_moments_of_ddpm(problem, steps, monkeypatch)
        errors.append([float((x - y).abs().max()) for x, y in ((mean, problem.mean), (covariance, problem.covariance))])
    largest = float(problem.covariance.abs().max())
    assert errors[2][0] < 1e-6
    assert errors[2][1] < 0.02 * largest
    for coarse, fine in ((0, 1), (1, 2)):
        assert 0.7 < math.log2(errors[coarse][1] / errors[fine][1]) < 1.3


def test_ddim_with_all_its_noise_is_ddpm():
    """At eta = 1 both draw from the posterior (arXiv 2010.02502, section 4.1)."""
    runs = [
        sample(
            run(
                linear_denoiser,
                start(),
                Schedule.make("linear", 1000, 0.8),
                STEPS,
                torch.Generator().manual_seed(3),
                **more,
            )
        )
        for run, more in ((ddpm, {}), (ddim, {"eta": 1.0}))
    ]
    torch.testing.assert_close(*runs, atol=1e-10, rtol=1e-10)


def test_the_larger_variance_gives_the_larger_spread(monkeypatch):
    """`beta` (fixed large) instead of the posterior's: the same mean, more covariance in every direction."""
    problem = Gaussian()
    mean, small = exact_moments_of_ddpm(problem, 64, monkeypatch)
    same, large = exact_moments_of_ddpm(problem, 64, monkeypatch, variance="beta")
    torch.testing.assert_close(mean, same)
    assert float(torch.linalg.eigvalsh(large - small).min()) > 0


def test_gaussian_conditional_of_ddpm():
    """10,000 ancestral samples: within five standard errors, beyond the bias that 250 steps leave."""
    problem, count = Gaussian(), 10_000
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    samples = sample(ddpm(problem.denoise, x, problem.schedule, 250, generator))
    scale = problem.covariance.diagonal().sqrt()
    assert bool(((samples.mean(0) - problem.mean).abs() < 5 * scale / math.sqrt(count) + 5e-3).all())
    bound = 5 * math.sqrt(2 / count) * scale[:, None] * scale + 0.02
    assert bool(((torch.cov(samples.T) - problem.covariance).abs() < bound).all())


def test_dpm_solver_is_second_order_on_even_log_steps():
    """On a schedule whose steps are even in log signal-to-noise, halving the step divides the error by about four."""
    problem = Gaussian()

    def error(steps: int) -> float:
        ratio = torch.linspace(4.0, -4.0, steps + 1, dtype=torch.float64)  # log(alpha / sigma), clean to noisy
        signal = torch.sigmoid(2 * ratio)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        problem.schedule = Schedule.from_betas(1 - signal / previous, torch.arange(steps + 1))
        # stop before the jump to zero noise, which is exact in another way: compare x at the first kept noise level
        out = [
            list(dpm_solver_pp_2m(problem.denoise, x, problem.schedule, steps + 1))[-1].x_t
            for x in (torch.zeros(1, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
        ]
        first, end = float(signal[-1]), float(signal[0])
        eye = torch.eye(4, dtype=torch.float64)
        # probability flow carries N(m, S) at one noise level to the other along matching square roots
        values, vectors = torch.linalg.eigh(problem.covariance)
        gain = ((end * values + 1 - end) / (first * values + 1 - first)).sqrt()
        exact = vectors @ torch.diag(gain) @ vectors.T @ eye
        return float(((out[1] - out[0]) - exact).abs().max())

    order = math.log2(error(80) / error(160))
    assert 1.7 < order < 2.3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_comes_nearer_with_every_doubling(schedule, monkeypatch):
    """On data where the right answer is known, the error of the covariance falls with every doubling of the steps; the
    second order needs 8 of them to be monotonous where it extrapolates (DPM-Solver++)."""
    problem = Gaussian()
    problem.schedule = SCHEDULES[schedule]
    largest = float(problem.covariance.abs().max())
    counts = (1, 2, 4, 8, 16, 32, 64)
    errors = {name: [problem.error(name, steps) for steps in counts] for name in ("ddim", "dpm++", "heun")}
    errors["ddpm"] = [
        float((exact_moments_of_ddpm(problem, steps, monkeypatch)[1] - problem.covariance).abs().max())
        for steps in counts
    ]
    for name, values in errors.items():
        assert values[0] > 0.99 * largest, name  # one step is the mean: no spread at all
        assert all(later < earlier for earlier, later in pairwise(values[3 if name == "dpm++" else 1 :])), name
        assert values[-1] < 0.07 * largest, name
    for name in ("dpm++", "heun"):
        assert errors[name][-1] < errors["ddim"][-1] / 4


def test_flow_is_the_straight_line():
    """x_t of flow matching, at middles of equal parts, so that neither end divides by zero."""
    schedule = Schedule.make("flow", 1000)
    torch.testing.assert_close(schedule.signal + schedule.sigma, torch.ones(1000, dtype=torch.float64))
    assert float(schedule.sigma[0]) == pytest.approx(5e-4)
    assert float(schedule.signal[-1]) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="rho = 1"):
        Schedule.make("flow", 1000, 0.8)
    with pytest.raises(ValueError, match="linear, cosine, flow"):
        Schedule.make("sigmoid")


def test_flow_trajectory_of_diffusers():
    """DDIM on the straight line is Euler's method of flow matching: x moves along noise - x_0."""
    schedule = Schedule.make("flow")
    kept = schedule.respace(STEPS)
    peer = diffusers.FlowMatchEulerDiscreteScheduler()
    peer.set_timesteps(sigmas=kept.sigma.flip(0).tolist())
    peer.sigmas = torch.cat([kept.sigma.flip(0), torch.zeros(1, dtype=torch.float64)])
    steps = list(ddim(linear_denoiser, start(), schedule, STEPS))
    x = start()
    for i, now in enumerate(reversed(range(STEPS))):
        torch.testing.assert_close(steps[i].x_t, x, atol=1e-5, rtol=1e-5)
        x_0 = linear_denoiser(x, torch.full((3,), int(kept.timesteps[now])))
        x = peer.step((x - x_0) / kept.sigma[now], peer.timesteps[i], x).prev_sample.double()
    torch.testing.assert_close(steps[-1].x_0, x, atol=1e-5, rtol=1e-5)


def test_heun_trajectory_of_diffusers():
    """Each of our steps is their DPM-Solver++(2S) with its middle moved to the end."""
    schedule = Schedule.make()
    kept = schedule.respace(STEPS)
    steps = list(heun(linear_denoiser, start(), schedule, STEPS))
    for i in range(STEPS - 1):
        now, before = int(kept.timesteps[STEPS - 1 - i]), int(kept.timesteps[STEPS - 2 - i])
        peer = in_float64(
            diffusers.DPMSolverSinglestepScheduler(
                prediction_type="sample", algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
            )
        )
        peer.set_timesteps(3)
        ratio = (schedule.sigma / schedule.signal)[[now, before, before]]
        peer.sigmas = torch.cat([ratio, ratio[-1:]])
        x = steps[i].x_t
        peer._step_index = 0
        first = linear_denoiser(x, torch.full((3,), now))
        there = peer.dpm_solver_first_order_update(first, sample=x)
        peer._step_index = 1
        outputs = [first, linear_denoiser(there, torch.full((3,), before))]
        x = peer.singlestep_dpm_solver_second_order_update(outputs, sample=x)
        torch.testing.assert_close(steps[i + 1].x_t, x, atol=1e-6, rtol=1e-6)


def test_heun_is_second_order():
    """Halving the step divides the error by about four, until the grain of the timesteps and the last jump show."""
    problem = Gaussian()
    order = math.log(problem.error("heun", 8) / problem.error("heun", 32), 4)
    assert 1.7 < order < 2.3


def test_noise_needs_a_generator():
    with pytest.raises(ValueError, match="generator"):
        sample(ddpm(linear_denoiser, start(), Schedule.make(), 3))
    with pytest.raises(ValueError, match="posterior, beta"):
        sample(ddpm(linear_denoiser, start(), Schedule.make(), 3, torch.Generator(), variance="learned"))


def test_a_sample_does_not_depend_on_its_batch():
    def run(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sample(ddpm(linear_denoiser, start()[rows], Schedule.make(), 5, generators))

    assert torch.equal(run([0, 1, 2])[1:], run([1, 2]))
