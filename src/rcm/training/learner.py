"""A network that learns: gradients, optimiser, learning rate, and its own count of updates."""

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rcm.artefact import UserError
from rcm.flow import Wrapped

from .schedule import learning_rate
from .settings import Settings
from .sharded import count_nonfinite, local, total_norm, whole

MOMENTS = "exp_avg", "exp_avg_sq"


class Learner:
    """AdamW on the parts of the parameters that this rank holds, without clipping."""

    def __init__(self, network: nn.Module, peak: float, updates: int, settings: Settings):
        self.network, self.wrapped = network, Wrapped(network)
        self.peak, self.total, self.settings = peak, updates, settings
        self.updates = 0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._parts = {name: nn.Parameter(local(p)) for name, p in self.parameters.items()}
        self.optimizer = adamw(self._parts.values(), settings)
        for part in self._parts.values():
            self.optimizer.state[part] |= {moment: torch.zeros_like(part) for moment in MOMENTS}
        self._tell_updates()

    def update(self) -> dict[str, float]:
        """Take a step along the gradients that are there, and forget them; what is not finite in them is 0."""
        s = self.settings
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm, faulty = total_norm(gradients).item(), 0
        if not math.isfinite(norm):
            faulty = count_nonfinite(gradients)
            for gradient in gradients:
                local(gradient).nan_to_num_(0.0, 0.0, 0.0)
            norm = total_norm(gradients).item()
        self.updates += 1
        rate = learning_rate(self.peak, self.updates, self.total, s.lr_warmup, s.lr_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for name, p in self.parameters.items():
            # FSDP may have moved its shard since
            self._parts[name].data = local(p)
            self._parts[name].grad = None if p.grad is None or not local(p).numel() else local(p.grad)
        self.optimizer.step()
        self.forget()
        return {"lr": rate, "gradient_norm": norm, "nonfinite_gradients": faulty}

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
        for p in self.parameters.values():
            p.grad = None

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, in the memory where it is used."""
        return {
            "network": self.network.state_dict(),
            "optimizer": {name: self._moments(name) for name in self.parameters},
            "updates": self.updates,
        }

    def _moments(self, name: str) -> dict[str, Tensor]:
        state = self.optimizer.state[self._parts[name]]
        return {moment: whole(state[moment], self.parameters[name]) for moment in MOMENTS}

    def resume(self, updates: int) -> None:
        """Go on behind `updates` of them, once the tensors of `state` have been filled."""
        self.updates = updates
        self._tell_updates()

    def _tell_updates(self) -> None:
        """Give the optimiser the count of updates: torch's keeps one for each parameter, the other one for all."""
        for group in self.optimizer.param_groups:
            group["step"] = self.updates
        for part in self._parts.values():
            self.optimizer.state[part]["step"] = torch.tensor(float(self.updates), device=part.device)


def adamw(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW with beta1 = 0, as `optimizer_kind` says; the rate is set at every update."""
    parameters = list(parameters)
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (0.0, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if optimizer_kind(settings.optimizer, parameters[0].device.type) == "torch":
        return torch.optim.AdamW(parameters, fused=True, **options)
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(parameters, adam_w_mode=True, **options)


def optimizer_kind(asked: str, device: str) -> str:
    """torch (its fused AdamW) or transformer_engine (its FusedAdam): with `auto` the latter on a GPU that has it.

    Raises UserError where transformer_engine is asked for and cannot run.
    """
    found = importlib.util.find_spec("transformer_engine") is not None
    if asked == "transformer_engine" and not (found and device == "cuda"):
        lacking = "a CUDA device" if found else "the package transformer_engine"
        raise UserError(
            f"distillation.optimizer is transformer_engine, which needs {lacking}: "
            "install it (the extra `gpu`), or set distillation.optimizer=torch"
        )
    return "transformer_engine" if asked != "torch" and found and device == "cuda" else "torch"
