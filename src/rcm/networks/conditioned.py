"""An image-to-video network with its image, in the place of a text-to-video one.

Shapes: B batch, C channels, T frames, H, W latent height and width, L tokens, D width, P time steps per sample.
"""

from typing import cast

from torch import Tensor, nn


class Conditioned(nn.Module):
    """`network` with the arguments that do not change while a sample is drawn; see `WanTransformer.forward`.

    Conditions of fewer samples than a batch are repeated whole, as a guided batch repeats its latents: one serves all.
    """

    condition_BCTHW: Tensor | None
    image_BLD: Tensor | None

    def __init__(self, network: nn.Module, *, condition_BCTHW: Tensor | None = None, image_BLD: Tensor | None = None):
        super().__init__()
        self.network = network
        self.register_buffer("condition_BCTHW", condition_BCTHW, persistent=False)
        self.register_buffer("image_BLD", image_BLD, persistent=False)

    @property
    def time_scale(self) -> float:
        return cast(float, self.network.time_scale)

    def forward(self, latents_BCTHW: Tensor, time_BP: Tensor, text_BLD: Tensor) -> Tensor:
        """Velocity (B, C, T, H, W); raises ValueError where the conditions do not divide the batch."""
        condition, image = (repeated(x, len(latents_BCTHW)) for x in (self.condition_BCTHW, self.image_BLD))
        return self.network(latents_BCTHW, time_BP, text_BLD, None, condition, image)


def repeated(x: Tensor | None, batch: int) -> Tensor | None:
    """The samples of `x` again and again, until they are `batch`."""
    if x is None:
        return None
    if batch % len(x):
        raise ValueError(f"a batch of {batch} samples cannot share conditions of {len(x)}")
    return x.repeat(batch // len(x), *(1,) * (x.ndim - 1))
