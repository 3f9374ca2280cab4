"""What the objectives share: a squared error whose samples count only where they are finite."""

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]


def finite_samples(*tensors: Tensor) -> Tensor:
    """(B,) True where a sample is finite throughout, in every tensor (B, …)."""
    return torch.stack([x.isfinite().flatten(1).all(dim=1) for x in tensors]).all(dim=0)


def keep(finite_B: Tensor, x: Tensor) -> Tensor:
    """x (B, …) with zeros in place of the samples that are not finite; they get no gradient."""
    return torch.where(finite_B.view(-1, *(1,) * (x.ndim - 1)), x, 0)


def squared_error(error: Tensor, finite_B: Tensor) -> Tensor:
    """The sum of squares over a sample, averaged over all B samples, those that are not finite counting as 0."""
    return keep(finite_B, error).square().sum() / len(error)


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ over all elements of a sample, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
