"""VBench's native dimensions: formulas on features made by hand, models of the real classes with few random weights."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from rcm.artefact import UserError
from rcm.evaluation import vbench_native
from rcm.evaluation.samples import PromptSamples
from rcm.evaluation.vbench_native import Dino, Models

ASKED = list(vbench_native.DIMENSIONS)
METADATA: dict[str, Any] = {
    "prompt": "a long text",
    "name": "red, pixel art",
    "dimension": [*ASKED, "scene"],
    "auxiliary_info": {"appearance_style": {"appearance_style": "pixel art"}},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DINO with patches of 16 at 224 pixels, CLIPs at 32, and a head for their features."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    width: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    vit = ViTModel(ViTConfig(**width, image_size=224, patch_size=16), add_pooling_layer=False)
    torch.nn.init.normal_(vit.embeddings.position_embeddings)
    torch.nn.init.normal_(vit.embeddings.cls_token)
    for parameter in vit.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    vit.save_pretrained(folder / "dino")
    for name in ("clip_base", "clip_large"):
        part = {**width, "hidden_act": "quick_gelu"}
        config = CLIPConfig(
            text_config={**part, "vocab_size": 302, "eos_token_id": 301},
            vision_config={**part, "image_size": 32, "patch_size": 8},
            projection_dim=12,
            logit_scale_init_value=float(np.log(90.0)),
        )
        clip = CLIPModel(config)
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        clip.save_pretrained(folder / name)
        letters = [chr(number) for number in range(33, 127)]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        vocabulary |= {"<|startoftext|>": 300, "<|endoftext|>": 301}
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
    torch.save({"weight": torch.randn(1, 12), "bias": torch.randn(1)}, folder / "aesthetic.pth")
    return {"dino": folder / "dino", "aesthetic": folder / "aesthetic.pth"} | {
        name: folder / name for name in ("clip_base", "clip_large")
    }


def moving(frames: int, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A clip in which waves run and levels differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 8
    phase = np.arange(frames)[:, None, None, None]
    colors = rng.uniform(0.2, 1, 3)
    return (127 + 110 * np.sin(colors * (x[..., None] + 0.3 * y[..., None]) + 0.4 * phase)).astype(np.uint8)


def clip_file(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=bool(others), append_images=others)
    return path


# --- Formulas ------------------------------------------------------------------------------------------------------


def test_consistency_by_hand() -> None:
    """Cosines with the frame before: .6, -.6 (counts 0), 1; with the first: .6, -1 (0), -1 (0)."""
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [-1.0, 0.0]])
    expected = ((0.6 + 0.6) / 2 + (0 + 0) / 2 + (1 + 0) / 2) / 3
    assert vbench_native.consistency(features) == pytest.approx(expected, abs=1e-7)
    assert vbench_native.consistency(features[:2]) == pytest.approx(0.6, abs=1e-7)


def test_aesthetic_quality_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    head = {"weight": torch.tensor([[2.0, 3.0]]), "bias": torch.tensor([4.0])}
    assert vbench_native.aesthetic_quality(features, head) == pytest.approx((6.0 + 7.6) / 2 / 10)


def test_temporal_flickering_by_hand(weights: dict[str, Path]) -> None:
    """Levels 0, 51, 51, 0 of three channels, of which one stands still: means of 34, 0 and 34 levels."""
    frames = np.zeros((4, 5, 7, 3), np.uint8)
    frames[1:3, ..., :2] = 51
    value = Models(weights).value("temporal_flickering", frames, METADATA)
    assert value == pytest.approx((255 - (34 + 0 + 34) / 3) / 255, abs=1e-7)


def test_temporal_flickering_of_a_whole_clip_is_exact_to_a_millionth(weights: dict[str, Path]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 240, 416, 3), np.uint8)
    steps = [np.abs(b.astype(np.int64) - a).sum() / a.size for a, b in pairwise(frames)]
    value = Models(weights).value("temporal_flickering", frames, METADATA)
    assert value == pytest.approx((255 - sum(steps) / len(steps)) / 255, abs=1e-6)


# --- Preparation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "to"), [(480, 832, (224, 388)), (300, 200, (336, 224)), (224, 400, None)])
def test_frames_keep_their_proportions(height: int, width: int, to: tuple[int, int] | None) -> None:
    levels = vbench_native.resized(torch.zeros(1, height, width, 3, dtype=torch.uint8), 224, "bilinear")
    assert levels.shape == (1, 3, *(to or (height, width)))


def test_resizing_takes_the_nearest_pixels_alone() -> None:
    """Four times smaller without antialiasing is the mean of the two middle pixels of four, along either axis."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    levels = vbench_native.resized(torch.as_tensor(frames), 2, "bilinear")
    rows = (frames[:, [1, 5]].astype(float) + frames[:, [2, 6]]) / 2
    expected = (rows[:, :, [1, 5]] + rows[:, :, [2, 6]]) / 2
    assert np.allclose(levels.permute(0, 2, 3, 1), expected, atol=1e-4)


def cubic(side: int, count: int) -> np.ndarray:
    """Weights (count, side) of Keys' cubic convolution with a = -3/4: position i looks at (i + .5) / scale - .5."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((count, side))
    for i in range(count):
        place = (i + 0.5) / ((count + 0.1) / side) - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(tap, 0), side - 1)] += kernel(place - tap)
    return weights


def test_positions_are_scaled_as_dinos_own() -> None:
    """By (rows + .1) / side, whatever the number of rows that comes of it."""
    side, rows, columns = 6, 6, 9
    table = torch.randn(1, 1 + side * side, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = vbench_native.positions(table, rows, columns)
    grid = table[0, 1:].unflatten(0, (side, side)).numpy()
    expected = np.einsum("rs,stn,ct->rcn", cubic(side, rows), grid, cubic(side, columns))
    assert torch.equal(found[0, 0], table[0, 0])
    assert np.allclose(found[0, 1:].unflatten(0, (rows, columns)), expected, atol=1e-10)
    assert torch.equal(vbench_native.positions(table, side, side), table)


def test_dino_at_its_own_size_is_transformers_model(weights: dict[str, Path]) -> None:
    frames = moving(3, 224, 224)
    ours = Dino(weights["dino"]).images(frames)
    model = ViTModel.from_pretrained(weights["dino"], add_pooling_layer=False).eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        pixels = (torch.as_tensor(frames).permute(0, 3, 1, 2) / 255 - mean) / std
        theirs = F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_dino_off_its_size_differs_from_transformers_by_its_positions_alone(weights: dict[str, Path]) -> None:
    """224 x 388 has 14 x 24 patches, the last four columns of pixels left out."""
    frames = moving(2, 224, 388)
    dino = Dino(weights["dino"])
    ours = dino.images(frames)
    cut = frames.copy()
    cut[:, :, 384:] = 0
    assert torch.equal(dino.images(cut), ours)
    table = dino.model.embeddings.position_embeddings
    near = F.interpolate(table[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2), (14, 24), mode="bicubic")
    found = vbench_native.positions(table, 14, 24)[:, 1:].unflatten(1, (14, 24)).permute(0, 3, 1, 2)
    assert 1e-3 < (found - near).abs().mean() < 0.1


def test_the_eps_of_dino_is_its_own(weights: dict[str, Path]) -> None:
    assert Dino(weights["dino"]).model.layernorm.eps == 1e-6


# --- Clips ---------------------------------------------------------------------------------------------------------


def test_a_still_clip_is_perfectly_consistent(weights: dict[str, Path]) -> None:
    models = Models(weights)
    frames = np.repeat(moving(1), 5, axis=0)
    for dimension in ("subject_consistency", "background_consistency", "temporal_flickering"):
        assert models.value(dimension, frames, METADATA) == pytest.approx(1, abs=1e-6)
    changing = np.concatenate([moving(2), moving(2, seed=5)])
    assert models.value("subject_consistency", changing, METADATA) < 0.9999


def test_values_do_not_depend_on_the_batch(weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    frames, models = moving(7), Models(weights)
    whole = {dimension: models.value(dimension, frames, METADATA) for dimension in ASKED}
    again = {dimension: models.value(dimension, frames, METADATA) for dimension in ASKED}
    assert whole == again
    monkeypatch.setattr(vbench_native, "_BATCH", 2)
    parts = {dimension: models.value(dimension, frames, METADATA) for dimension in ASKED}
    assert parts == pytest.approx(whole, abs=1e-6)


def test_appearance_style_is_the_logit_of_frame_and_phrase(weights: dict[str, Path]) -> None:
    frames, models = moving(3), Models(weights)
    clip = models.clip_base
    cosines = clip.images(frames) @ clip.texts(["pixel art"]).T
    value = models.value("appearance_style", frames, METADATA)
    assert value == pytest.approx(float(cosines.mean()) * 90 / 100, abs=1e-6)
    other = {**METADATA, "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}}}
    assert models.value("appearance_style", frames, other) != value


def measured(item: PromptSamples, models: Any) -> list[dict[str, Any]]:
    return list(vbench_native.measure([item], models))


def test_rows_hold_the_dimensions_of_their_prompt(weights: dict[str, Path], tmp_path: Path) -> None:
    frames = moving(2)
    path = clip_file(tmp_path / "00007" / "samples" / "0001.png", frames)
    counted: list[int] = []
    item = PromptSamples(7, METADATA, (path,))
    (row,) = vbench_native.measure([item], weights, advance=lambda: counted.append(1))
    assert {key: row[key] for key in ("prompt", "filename", "name", "dimension")} == {
        "prompt": 7,
        "filename": "00007/samples/0001.png",
        "name": "red, pixel art",
        "dimension": [*ASKED, "scene"],
    }
    models = Models(weights)
    assert row["values"] == {dimension: models.value(dimension, frames, METADATA) for dimension in ASKED}
    assert counted == [1]
    few = PromptSamples(7, {**METADATA, "dimension": ["temporal_flickering", "scene"]}, (path,))
    assert list(measured(few, {})[0]["values"]) == ["temporal_flickering"]  # and no weights are needed


def test_clips_of_other_dimensions_are_not_opened(tmp_path: Path) -> None:
    item = PromptSamples(0, {**METADATA, "dimension": ["scene"]}, (tmp_path / "0000.png",))
    assert measured(item, {})[0]["values"] == {}


def test_one_frame_cannot_be_compared(weights: dict[str, Path], tmp_path: Path) -> None:
    path = clip_file(tmp_path / "00000" / "samples" / "0000.png", moving(1))
    with pytest.raises(UserError, match=r"0000.png has one frame, but subject_consistency compares frames"):
        measured(PromptSamples(0, METADATA, (path,)), weights)
    (row,) = measured(PromptSamples(0, {**METADATA, "dimension": ["aesthetic_quality"]}, (path,)), weights)
    assert list(row["values"]) == ["aesthetic_quality"]


def test_clips_have_as_many_frames_as_were_sampled(tmp_path: Path) -> None:
    path = clip_file(tmp_path / "00000" / "samples" / "0000.png", moving(3))
    item = PromptSamples(0, {**METADATA, "dimension": ["temporal_flickering"]}, (path,))
    assert len(list(vbench_native.measure([item], {}, frames=3))) == 1
    with pytest.raises(UserError, match=r"0000.png has 3 frames, expected 81"):
        list(vbench_native.measure([item], {}, frames=81))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"prompt": "x"}, "prompt 00003 is none of VBench's"),
        ({**METADATA, "auxiliary_info": {}}, "names none under auxiliary_info"),
        ({**METADATA, "dimension": ["subject_consistency"]}, "need the weights dino"),
    ],
)
def test_prompts_and_weights_that_are_lacking(
    metadata: dict[str, Any], words: str, tmp_path: Path, weights: dict[str, Path]
) -> None:
    path = clip_file(tmp_path / "00003" / "samples" / "0000.png", moving(2))
    given = {name: path for name, path in weights.items() if name != "dino" or "auxiliary_info" not in metadata}
    if metadata.get("auxiliary_info") == {}:
        given = weights
    with pytest.raises(UserError, match=words):
        measured(PromptSamples(3, metadata, (path,)), given)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no"),
        lambda path: torch.save({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: path.unlink(missing_ok=True),
    ],
)
def test_another_head_is_refused(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    spoil(path)
    with pytest.raises(UserError, match=r"head\.pth"):
        vbench_native.open_head(path, 12)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(UserError, match="no use for the weights vgg"):
        Models({"vgg": "x"})
