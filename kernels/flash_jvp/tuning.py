"""Tile configurations."""
from dataclasses import dataclass
from torch import Tensor

@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages}

T = Tile(64, 32, 4, 1)
def tile(kernel: str, q: Tensor, k: Tensor) -> Tile:
    return T
