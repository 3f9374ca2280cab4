"""CLIP's image encoder against transformers' own, and what happens to an image before it, worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rcm.vision import build, preprocessed

SIZES = {"size": 28, "patch": 7, "width": 32, "mlp_width": 48, "layers": 3, "heads": 4, "joint_width": 24}


def test_names_and_shapes_are_those_of_the_official_checkpoint() -> None:
    """official/: the visual half of the public model definition; `transformer.*` stands for every block."""
    facts = json.loads((Path(__file__).parent / "official" / "clip-vit-huge-14.json").read_text())
    official = {
        name.replace("*", str(block)): shape
        for name, shape in facts["tensors"].items()
        for block in range(facts["blocks"] if "*" in name else 1)
    }
    with torch.device("meta"):
        encoder = build("clip-vit-huge-14")
    assert {name: list(value.shape) for name, value in encoder.state_dict().items()} == official
    assert sum(value.numel() for value in encoder.state_dict().values()) == facts["parameters"]


def in_transformers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as transformers' CLIPVisionModel names them, from the official names."""
    renamed = {}
    for name, value in state.items():
        key = name.removeprefix("visual.")
        if key == "head":  # the projection to the joint space, which CLIPVisionModel does not have
            continue
        if ".attn.to_qkv." in key:
            for part, share in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("attn.to_qkv", f"self_attn.{part}_proj")] = share
        else:
            renamed[key] = value
    for official, theirs in (
        ("transformer.", "encoder.layers."),
        ("attn.proj.", "self_attn.out_proj."),
        ("norm1.", "layer_norm1."),
        ("norm2.", "layer_norm2."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
        ("pre_norm.", "pre_layrnorm."),
        ("post_norm.", "post_layernorm."),
        ("patch_embedding.", "embeddings.patch_embedding."),
        ("cls_embedding", "embeddings.class_embedding"),
        ("pos_embedding", "embeddings.position_embedding.weight"),
    ):
        renamed = {name.replace(official, theirs): value for name, value in renamed.items()}
    renamed["embeddings.class_embedding"] = renamed["embeddings.class_embedding"].flatten()
    renamed["embeddings.position_embedding.weight"] = renamed["embeddings.position_embedding.weight"][0]
    return renamed


def test_an_encoding_is_the_last_but_one_of_transformers() -> None:
    torch.manual_seed(0)
    encoder = build(SIZES)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    config = transformers.CLIPVisionConfig(
        image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        hidden_act="gelu",
    )  # fmt: skip
    twin = transformers.CLIPVisionModel(config).eval()
    theirs = in_transformers_names(encoder.state_dict())
    twin.load_state_dict(theirs)  # strict: every tensor is used once, none is invented
    images = torch.rand(2, 3, 40, 31) * 2 - 1
    with torch.no_grad():
        expected = twin(preprocessed(images, 28), output_hidden_states=True).hidden_states[-2]
    encoded = encoder.encode(images)
    assert encoded.shape == (2, 17, 32)
    error = (encoded - expected).norm() / expected.norm()
    print(f"{error:.1e}")
    assert error < 1e-5


def cubic_matrix(length: int, size: int) -> np.ndarray:
    """Keys' cubic convolution with a = -3/4 at pixel centres, edges repeated: (size, length)."""
    matrix, a = np.zeros((size, length)), -0.75
    for row in range(size):
        centre = (row + 0.5) * length / size - 0.5
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - place)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, np.clip(place, 0, length - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize(("height", "width"), [(40, 31), (9, 100), (28, 28)])
def test_images_are_resized_without_antialiasing_and_normalised(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    down, across = cubic_matrix(height, 28), cubic_matrix(width, 28)
    resized = np.einsum("yh,bchw,xw->bcyx", down, images.double().numpy(), across)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = ((resized + 1) / 2 - mean) / deviation
    np.testing.assert_allclose(preprocessed(images, 28).numpy(), expected, rtol=0, atol=5e-5)  # places in float32


def test_bfloat16_and_misuse() -> None:
    torch.manual_seed(0)
    encoder, images = build(SIZES), torch.rand(1, 3, 28, 28)
    exact, rounded = encoder.encode(images), encoder.bfloat16().encode(images)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 5e-2
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(1, 1, 28, 28\)"):
        encoder.encode(images[:, :1])
    with pytest.raises(ValueError, match="size 28 does not divide into patches of 8"):
        build({**SIZES, "patch": 8})
    with pytest.raises(ValueError, match="width 32 does not split into 5 heads"):
        build({**SIZES, "heads": 5})
