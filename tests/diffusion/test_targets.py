"""Targets: x_0 back from the right answer under every schedule."""

from __future__ import annotations

import pytest
import torch

from diffmae_video import registry
from diffmae_video.diffusion.schedule import DRAWS, Schedule

SCHEDULES = {
    "linear": Schedule.make("linear", 1000, 0.8),
    "cosine": Schedule.make("cosine"),
    "flow": Schedule.make("flow"),
}
DEVIATION = torch.tensor([3.0, 1.0, 0.3, 0.05], dtype=torch.float64)


def target(name: str):
    """The target of that name."""
    return registry.targets.get(name)()


def drawn(seed: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 of unequal deviations, and noise: (count, 5, 4) each."""
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, count, 5, 4, generator=generator, dtype=torch.float64)
    return x_0 * DEVIATION, noise


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", registry.targets.names())
def test_the_right_answer_gives_x_0(name, schedule):
    one, (x_0, noise) = target(name), drawn(0)
    for t in (0, 1, 100, 500, 900, 999):
        signal, sigma = SCHEDULES[schedule].signal[t], SCHEDULES[schedule].sigma[t]
        x_t = signal * x_0 + sigma * noise
        answer = one.expected(x_0, noise, signal, sigma)
        torch.testing.assert_close(one.x_0(answer, x_t, signal, sigma), x_0, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in registry.targets.names() if not registry.targets.fact(n, "blind", False)])
def test_where_nothing_is_known_of_a_value_the_answer_still_gives_it(name):
    """signal 0, sigma 1, noise 0, as for components that are not noised."""
    one, (x_0, noise) = target(name), drawn(1)
    zero, unit = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    answer = one.expected(x_0, 0 * noise, zero, unit)
    torch.testing.assert_close(one.x_0(answer, 123.0 * noise * 0, zero, unit), x_0)


def test_velocity_of_flow_is_that_of_flow_matching():
    """noise - x_0 is a linear function of x_t and the answer, so that predicting one is predicting the other."""
    (x_0, noise), velocity = drawn(4), target("velocity")
    for t in (10, 500, 990):
        signal, sigma = SCHEDULES["flow"].signal[t], SCHEDULES["flow"].sigma[t]
        x_t, length = signal * x_0 + sigma * noise, signal**2 + sigma**2
        answer = velocity.expected(x_0, noise, signal, sigma)
        along = ((sigma - signal) * x_t + answer * length.sqrt()) / length
        torch.testing.assert_close(along, noise - x_0)


@pytest.mark.parametrize("kind", DRAWS)
def test_timesteps_of_training(kind):
    """Uniform in the index, in the angle, or logit-normal: by the share below each quarter."""
    schedule, generator = SCHEDULES["linear"], torch.Generator().manual_seed(0)
    drawn = torch.stack([schedule.draw(kind, generator) for _ in range(4000)])
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) <= 999
    part = drawn / 1000
    if kind == "angle":
        part = torch.atan2(schedule.sigma, schedule.signal)[drawn] * 2 / torch.pi
    if kind == "logit_normal":
        part = torch.special.ndtr(torch.logit((drawn + 0.5) / 1000))
    for quarter in (0.25, 0.5, 0.75):
        assert float((part < quarter).float().mean()) == pytest.approx(quarter, abs=0.03)
    with pytest.raises(ValueError, match="uniform, angle, logit_normal"):
        schedule.draw("log", generator)
