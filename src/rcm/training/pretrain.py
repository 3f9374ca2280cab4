"""Train the tiny teacher from nothing: flow matching on scenes of the procedural world."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcm import randomness
from rcm.artefact import UserError
from rcm.codecs import CellCodec, from_pixels
from rcm.data import prompts, world
from rcm.data.shards import batch_indices
from rcm.flow import per_sample, time_distribution, trig_to_rf
from rcm.parallel import Mesh
from rcm.text import WordEncoder

from .ema import PowerEMA
from .metrics import MetricsLog
from .schedule import learning_rate
from .state import States, optimizer_state

_CHUNK = 2000  # scenes drawn at once


@dataclass(frozen=True)
class World:
    """Scenes as latents (N, C, T, H, W); captions as rows of `texts` (M + 1, L, D), whose last is the empty one."""

    latents: Tensor
    captions: Tensor
    texts: Tensor


def captions(config: Mapping[str, Any]) -> list[prompts.Metadata]:
    """The captions of the teacher's training scenes, one a scene."""
    settings = config["pretrain"]
    return prompts.training_suite(
        prompts.VOCABULARIES[config["prompts"]["vocabulary"]],
        seed=settings["seed"],
        number=settings["scenes"],
        weights=settings["weights"],
        media=config["media"],
        still=config["prompts"]["still"],
    )


def pictures(metadatas: list[prompts.Metadata], seed: int, frames: int, start: int = 0) -> Tensor:
    """Draw a scene for each caption: video (N, 3, F, H, W) in [-1, 1]; scene i depends on (seed, start + i) alone."""
    drawn = [
        world.render(world.sample_scene(metadata, np.random.default_rng([seed, start + i])), frames)
        for i, metadata in enumerate(metadatas)
    ]
    return from_pixels(np.stack(drawn))


def draw_world(config: Mapping[str, Any], codec: CellCodec, encoder: WordEncoder) -> World:
    """Draw and encode the training scenes; a codec that is all zeros is fitted to the first of them."""
    settings, frames = config["pretrain"], config["frames"]
    metadatas = captions(config)
    if not codec.basis.any():
        codec.fit(pictures(metadatas[:_CHUNK], settings["seed"], 1)[:, :, 0])
    rows = {text: i for i, text in enumerate(sorted({m["prompt"] for m in metadatas}))}
    latents = [
        codec.encode(pictures(metadatas[start : start + _CHUNK], settings["seed"], frames, start))
        for start in range(0, len(metadatas), _CHUNK)
    ]
    return World(torch.cat(latents), torch.tensor([rows[m["prompt"]] for m in metadatas]), encoder.encode([*rows, ""]))


def flow_matching_loss(network: nn.Module, x0: Tensor, noise: Tensor, r_B: Tensor, text: Tensor) -> Tensor:
    """Mean of |v(x_r, r) - (ε - x0)|² at x_r = (1 - r) x0 + r ε (Lipman et al. 2023, arXiv 2210.02747)."""
    r = per_sample(r_B, x0).to(x0.dtype)
    time_scale: Any = network.time_scale
    velocity = network((1 - r) * x0 + r * noise, r_B[:, None] * time_scale, text)
    return (velocity - (noise - x0)).square().mean()


def pretrain(
    config: Mapping[str, Any],
    network: nn.Module,
    scenes: World,
    *,
    resume_dir: Path,
    metrics_path: Path,
    advance: Callable[[int, str], None] | None = None,
) -> None:
    """Train `network` in place, which then carries the averaged weights; section `pretrain` of the configuration.

    `advance(iterations, note)` is told of progress. An interrupted run continues from its last state in `resume_dir`,
    bit for bit. Raises UserError where that state belongs to another configuration.
    """
    s = dict(config["pretrain"])
    identity = {key: config[key] for key in ("pretrain", "media", "frames", "prompts", "network", "codec", "text")}
    times = time_distribution(s["time"])
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=s["lr"], betas=(0.9, s["beta2"]), weight_decay=s["weight_decay"], fused=True
    )
    ema = PowerEMA(network, s["ema"])
    if len(scenes.latents) < s["batch"]:
        raise UserError(f"pretrain.scenes is {len(scenes.latents)}, but a batch takes {s['batch']}")
    with States(resume_dir, identity, Mesh(None, torch.device("cpu"))) as states:
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer_state(network, optimizer),
            "ema": ema.average,
        }
        done = states.load(state) or 0
        metrics = MetricsLog(metrics_path, step=done)
        began = time.monotonic()
        if advance is not None:
            advance(done, "")
        positions = range(s["batch"])
        for i in range(done + 1, s["iterations"] + 1):
            chosen = torch.tensor(batch_indices(len(scenes.latents), s["batch"], s["seed"], i))

            def uniform(purpose: str, step: int = i) -> Tensor:
                return randomness.uniform((), seed=s["seed"], purpose=purpose, step=step, indices=positions)

            x0 = scenes.latents[chosen]
            noise = randomness.normal(x0.shape[1:], seed=s["seed"], purpose="noise", step=i, indices=positions)
            rows = torch.where(uniform("dropout") < s["prompt_dropout"], len(scenes.texts) - 1, scenes.captions[chosen])
            r_B = trig_to_rf(times.quantile(uniform("time")))
            loss = flow_matching_loss(network, x0, noise, r_B, scenes.texts[rows])
            optimizer.zero_grad()
            loss.backward()
            rate = learning_rate(s["lr"], i, s["iterations"], s["lr_warmup"], "cosine")
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            ema.step(i)
            metrics.write(i, {"loss": loss.item(), "lr": rate, "wall": {"seconds": round(time.monotonic() - began, 3)}})
            if i % s["state_every"] == 0 and i < s["iterations"]:
                metrics.flush()
                states.save(i, state)
            if advance is not None:
                advance(1, f"loss {loss.item():.4f}")
        metrics.close()
    ema.copy_to_network()
