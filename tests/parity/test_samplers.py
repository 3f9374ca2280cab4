"""Teacher samplers against the schedulers of diffusers, step by step, and the loop of its Cosmos-Predict2 pipeline.

diffusers rounds states and times to float32. Here both stay float64: `Unrounded` is a state that does not let itself be
rounded, and the times are replaced by what they were before their rounding, which they must agree with.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rcm.flow import guided
from rcm.sampling import teacher_sample

NOISE = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
CASES = [(steps, shift) for shift in (3.0, 5.0) for steps in (1, 2, 3, 4, 50)]


def velocity(x: Tensor, r: Tensor, text: Tensor | float = 1.0) -> Tensor:
    """Nonlinear in everything."""
    r = r.view(-1, *(1,) * (x.ndim - 1))
    return torch.sin(2 * text * x + 3 * r) - r * x.flip(1)


def trajectory(model: Any = velocity, **settings: Any) -> tuple[list[float], list[Tensor]]:
    """Times and states that the network is called with; the sample is the last state."""
    times, states = [], []

    def recorded(x: Tensor, r: Tensor) -> Tensor:
        times.append(r[0].item())
        states.append(x)
        return model(x, r)

    sample = teacher_sample(recorded, NOISE, **settings)
    return times, [*states, sample]


class Unrounded(Tensor):
    """A tensor that stays as it is where diffusers would round it to float32."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self if torch.float32 in (*args, *kwargs.values()) else super().to(*args, **kwargs)

    def float(self) -> Tensor:
        return self


def exactly(scheduler: Any, times: np.ndarray) -> None:
    """Take the rounding off the times of a scheduler, whose last is 0."""
    exact = torch.from_numpy(np.append(times, 0))
    torch.testing.assert_close(scheduler.sigmas.double(), exact, rtol=2e-7, atol=0)
    scheduler.sigmas = exact
    scheduler.set_begin_index(0)


def walk(scheduler: Any) -> list[Tensor]:
    states = [NOISE.double().as_subclass(Unrounded)]
    for r, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        output = velocity(states[-1], r.expand(len(NOISE)))
        states.append(scheduler.step(output, timestep, states[-1], return_dict=False)[0])
    return [state.as_subclass(Tensor) for state in states]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype == torch.float64
        assert (a - b).abs().max() < 1e-12 * b.abs().max(), f"state {k}"


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    return shift * u / (1 + (shift - 1) * u)


def even(steps: int, shift: float, sigma_max: float) -> np.ndarray:
    """The grid of the authors' code before its shift and without the last time, which is 0."""
    r_max = sigma_max / (1 + sigma_max)
    return np.linspace(r_max / (shift - (shift - 1) * r_max), 0, steps + 1)[:-1]


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_euler_is_that_of_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    u = even(steps, shift, 5000.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=u.tolist())
    exactly(scheduler, shifted(u, shift))
    times, states = trajectory(sampler="euler", steps=steps, shift=shift, sigma_max=5000.0)
    assert times == pytest.approx(shifted(u, shift).tolist(), rel=1e-14)
    assert_close(states, walk(scheduler))


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_unipc_is_that_of_diffusers(steps: int, shift: float) -> None:
    """On the grid of Wan2.1's own scheduler, which begins at u = 0.999."""
    from diffusers import UniPCMultistepScheduler

    u = np.linspace(0.999, 0, steps + 1)[:-1]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=u)
    exactly(scheduler, shifted(u, shift))
    times, states = trajectory(sampler="unipc", steps=steps, shift=shift, sigma_max=999 * shift)
    assert times == pytest.approx(shifted(u, shift).tolist(), rel=1e-14)
    assert_close(states, walk(scheduler))


class Toy:
    """`velocity` in the place of diffusers' Cosmos transformer."""

    dtype = torch.float64
    config = SimpleNamespace(in_channels=NOISE.shape[1])

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> list[Tensor]:
        self.times.append(timestep[0].item())
        return [velocity(hidden_states, timestep, encoder_hidden_states[:, None, None])]


class Unchecked:
    """In the place of the safety checker, without which the pipeline does not run; latents are not checked."""

    def to(self, device: Any) -> None:
        pass


@pytest.mark.parametrize("guidance", [0.0, 4.5])
@pytest.mark.parametrize("steps", [2, 3, 35])
def test_cosmos_is_the_pipeline_of_diffusers(steps: int, guidance: float) -> None:
    from diffusers import Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler

    class Exact(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *, sigmas: Any, device: Any) -> None:
            super().set_timesteps(sigmas=sigmas, device=device)
            exactly(self, self._convert_to_karras(None, steps))

    theirs: list[Tensor] = [NOISE.double() * 80]

    def keep(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(tensors["latents"].as_subclass(Tensor))
        return {}

    text, null_text = torch.full((2, 1, 1), 1.2, dtype=torch.float64), torch.full((2, 1, 1), 0.4, dtype=torch.float64)
    toy = Toy()
    pipeline = Cosmos2TextToImagePipeline(None, None, toy, None, Exact(use_karras_sigmas=True), Unchecked())
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        height=16,
        width=16,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=NOISE.double().as_subclass(Unrounded),
        prompt_embeds=text,
        negative_prompt_embeds=null_text,
        output_type="latent",
        callback_on_step_end=keep,
    )

    def model(x: Tensor, r: Tensor) -> Tensor:
        return guided(
            lambda x, r, text: velocity(x, r, text[:, None, None]), x, r, text, null_text, guidance, "conditional"
        )

    times, states = trajectory(model, sampler="cosmos", steps=steps, shift=1.0, sigma_max=80.0)
    calls = toy.times[:: 2 if guidance else 1]
    assert times == pytest.approx(calls[:-1], rel=1e-13)  # the last step of theirs goes nowhere
    in_sigma = [x / (1 - r) for x, r in zip(states, times, strict=False)]
    assert_close([*in_sigma, states[-1], states[-1]], theirs)
