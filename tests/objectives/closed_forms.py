"""Networks whose score, probability flow and consistency function are exact, in rectified-flow parameterisation.

The data are D independent coordinates, each the same mixture of normal distributions Σ w_k N(μ_k, s_k²); in two
dimensions this is a mixture on a grid. Shapes: (B, D, 1, 1, 1) for x, (B, 1) for times, K components last.
"""

import math

import torch
from torch import Tensor, nn

NO_TEXT = torch.zeros(1, 1, 1)


def text(batch: int) -> Tensor:
    return NO_TEXT.expand(batch, 1, 1)


class Network(nn.Module):
    """What `rcm.flow.Wrapped` asks of a network; the time reaches `rf` as rectified-flow time (B, 1, 1, 1, 1)."""

    time_scale = 1000.0

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.rf(x, time.view(-1, 1, 1, 1, 1) / self.time_scale, text)


class Mixture:
    """Σ w_k N(μ_k, s_k²) in every coordinate, seen through x = a x0 + s ε."""

    def __init__(self, weights: list[float], means: list[float], stds: list[float]):
        self.weights, self.means, self.stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    def sample(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, math.prod(shape), replacement=True, generator=generator).view(shape)
        return self.means[k] + self.stds[k] * torch.randn(shape, generator=generator, dtype=torch.float64)

    def _standardised(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """((x - a μ_k) / std_k, std_k) with std_k² = a² s_k² + s²."""
        a, s = torch.as_tensor(a)[..., None], torch.as_tensor(s)[..., None]
        std = (a**2 * self.stds**2 + s**2).sqrt()
        return (x[..., None] - a * self.means) / std, std

    def cdf(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        z, _ = self._standardised(x, a, s)
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def density(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        z, std = self._standardised(x, a, s)
        return (self.weights * torch.exp(-(z**2) / 2) / std).sum(-1) / math.sqrt(2 * math.pi)

    def posterior(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x] and E[ε | x]."""
        z, std = self._standardised(x, a, s)
        share = torch.softmax(self.weights.log() - z**2 / 2 - std.log(), dim=-1)
        x0 = self.means + torch.as_tensor(a)[..., None] * self.stds**2 / std * z
        noise = torch.as_tensor(s)[..., None] / std * z
        return (share * x0).sum(-1), (share * noise).sum(-1)

    def transport(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The probability flow from x = a x0 + s ε down to the data. In one dimension it keeps the distribution
        function: F_0(f) = F(x). Solved by bisection; one Newton step then carries the derivative (and digits)."""
        with torch.no_grad():
            level = self.cdf(x, a, s)
            low, high = torch.full_like(level, -60.0), torch.full_like(level, 60.0)
            for _ in range(60):
                middle = (low + high) / 2
                below = self.cdf(middle, 1.0, 0.0) < level
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        f = ((low + high) / 2).detach()
        return f - (self.cdf(f, 1.0, 0.0) - self.cdf(x, a, s)) / self.density(f, 1.0, 0.0)


NORMAL = Mixture([1.0], [0.7], [0.6])
TWO_MODES = Mixture([0.35, 0.65], [-1.1, 0.8], [0.3, 0.25])


class Teacher(Network):
    """The exact velocity E[ε - x0 | x]."""

    def __init__(self, data: Mixture):
        super().__init__()
        self.data = data

    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        x0, noise = self.data.posterior(x, 1 - r, r)
        return noise - x0


class Exact(Network):
    """The exact consistency function, as the velocity (x - f) / r; with an offset (B, D, 1, 1, 1) to differentiate."""

    def __init__(self, data: Mixture, batch: int = 1, size: int = 1):
        super().__init__()
        self.data = data
        self.offset = nn.Parameter(torch.zeros(batch, size, 1, 1, 1, dtype=torch.float64))

    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        return (x - self.data.transport(x, 1 - r, r)) / r + self.offset


class Mlp(Network):
    """A smooth student: tanh layers on x, r and the text's mean; `offset` as above, if a batch is given."""

    def __init__(self, size: int, width: int = 32, *, batch: int | None = None, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(size + 2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, size)
            ).double()
        shape = (1 if batch is None else batch, size, 1, 1, 1)
        self.offset = nn.Parameter(torch.zeros(shape, dtype=torch.float64), requires_grad=batch is not None)

    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        features = torch.cat([x.flatten(1), r.flatten(1), text.mean(dim=(1, 2))[:, None]], dim=1)
        return self.layers(features.to(x.dtype)).view_as(x) + self.offset
