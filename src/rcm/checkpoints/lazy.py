"""Lazy states: tensors by name that stay on the disk, so that a checkpoint may be larger than the memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from rcm.checkpoints.flat import State, checked

Fill = Callable[[str, Tensor], object]


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, each read anew when it is asked for.

    `described` has names, shapes and data types, as tensors without content; `fill(name, out)` reads into a contiguous
    CPU tensor of that shape and type.
    """

    def __init__(self, described: State, fill: Fill):
        self.described, self._fill = described, fill

    def __getitem__(self, name: str) -> Tensor:
        out = torch.empty_like(self.described[name], device="cpu", memory_format=torch.contiguous_format)
        self._fill(name, out)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def copy_to(self, name: str, place: Tensor) -> None:
        """Write a tensor into `place`, of as many elements; without a copy between where type and device allow."""
        own = self.described[name]
        if place.device.type == "cpu" and place.dtype == own.dtype and place.is_contiguous():
            self._fill(name, place.detach().view(own.shape))
        else:
            place.detach().copy_(self[name].view(place.shape))

    def renamed(self, names: Mapping[str, str]) -> "LazyState":
        """The tensors that `names` lists: name there -> name here."""
        described = {name: self.described[own] for name, own in names.items()}
        return LazyState(described, lambda name, out: self._fill(names[name], out))

    def reshaped(self, shapes: Mapping[str, torch.Size]) -> "LazyState":
        """The same with other shapes, of as many elements, for the tensors named."""
        described = {
            name: value.new_empty(shapes[name]) if name in shapes else value for name, value in self.described.items()
        }
        return LazyState(described, lambda name, out: self._fill(name, out.view(self.described[name].shape)))

    def cast(self, dtype: torch.dtype) -> "LazyState":
        """The same with all floating-point numbers in another data type."""
        described = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.described.items()
        }
        return LazyState(described, lambda name, out: self.copy_to(name, out))

    def watched(self, seen: Callable[[str], object]) -> "LazyState":
        """The same, which calls `seen` with the name of each tensor that was read."""

        def fill(name: str, out: Tensor) -> None:
            self._fill(name, out)
            seen(name)

        return LazyState(self.described, fill)


def lazy(state: Mapping[str, Tensor], where: str) -> LazyState:
    """Any flat state as a lazy one; a UserError where it is none."""
    if isinstance(state, LazyState):
        return state
    held = checked(state, where)
    return LazyState({name: _described(value) for name, value in held.items()}, lambda k, out: out.copy_(held[k]))


def _described(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
