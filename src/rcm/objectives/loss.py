"""What the objectives share: a squared error whose samples count only where they are finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]


def finite_samples(*tensors: Tensor) -> Tensor:
    """(B,) True where a sample is finite throughout, in every tensor (B, …)."""
    return torch.stack([x.isfinite().flatten(1).all(dim=1) for x in tensors]).all(dim=0)


def keep(finite_B: Tensor, x: Tensor) -> Tensor:
    """x (B, …) with zeros in place of the samples that are not finite; they get no gradient."""
    return torch.where(finite_B.view(-1, *(1,) * (x.ndim - 1)), x, 0)


def squared_error(error: Tensor, finite_B: Tensor, batch: int) -> Tensor:
    """The sum of squares over the samples at hand, those that are not finite counting 0, over the global batch."""
    return keep(finite_B, error).square().sum() / batch


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ over all elements of a sample, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def check(what: str, choice: str, allowed: Sequence[str]) -> None:
    """Raises ValueError for a choice that is not among the allowed."""
    if choice not in allowed:
        raise ValueError(f"{what} is {choice!r}, must be one of {', '.join(allowed)}")
