"""What `rcm sample` does with a batch; its samples are those of `rcm generate`, see test_generate.py."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rcm.cli.models import decoded
from rcm.codecs import CellCodec


@pytest.mark.parametrize(("kind", "together"), [("wan", [1, 1, 1, 1, 1]), ("cells", [5])])
def test_only_the_tiny_codec_decodes_a_batch_at_once(kind: str, together: list[int]) -> None:
    """Eight images of 1360 x 768 at once are 42 GiB; the samples of published tables were decoded at once."""
    batches = []

    class Codec:
        def decode(self, latents_BCTHW: Tensor) -> Tensor:
            batches.append(len(latents_BCTHW))
            return latents_BCTHW.clamp(-1, 1)

    class Cells(Codec, CellCodec):
        pass

    latents = torch.linspace(-1.2, 1.2, 90).reshape(5, 3, 1, 2, 3)
    frames = decoded(Codec() if kind == "wan" else Cells(channels=1, cell=1, stride=1), latents)
    assert batches == together
    expected = ((latents.clamp(-1, 1).numpy().transpose(0, 2, 3, 4, 1) + 1) * 127.5).round()
    assert np.array_equal(frames, expected.astype(np.uint8))
