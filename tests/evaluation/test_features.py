"""Diversity by features: hand-made features, hand-worked values, and tiny random networks against other code."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from rcm.artefact import UserError
from rcm.evaluation import features
from rcm.evaluation.clip import Clip
from rcm.evaluation.features import Dino, Vgg, distance, evenly, measure, opened_vgg, pair_difference, pooled, vbench2
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import PromptSamples

TINY = (3, 4, 5, 4, 3)  # widths


# --- Distances -----------------------------------------------------------------------------------------------------


def test_distance_of_hand_made_features() -> None:
    alike = torch.tensor([3.0, 4.0]).expand(8, 5, 2)
    assert distance(torch.stack([pooled(frames) for frames in alike])) == pytest.approx(0, abs=1e-12)
    assert distance(torch.stack([pooled(row[None]) for row in 7 * torch.eye(8)])) == pytest.approx(1)
    assert distance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(2)
    three = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]).double()  # cosines .6, 0 and .8
    assert distance(three) == pytest.approx(1 - 1.4 / 3, abs=1e-7)


def test_frames_count_alike_whatever_their_length() -> None:
    clip = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    torch.testing.assert_close(pooled(clip), torch.tensor([0.5, 0.5]).double().sqrt(), rtol=0, atol=1e-12)


def test_frames_are_even_from_the_first_to_the_last() -> None:
    assert evenly(81).tolist() == [0, 5, 11, 16, 21, 27, 32, 37, 43, 48, 53, 59, 64, 69, 75, 80]
    assert evenly(31).tolist() == list(range(0, 31, 2))
    assert evenly(5).tolist() == [0, 1, 2, 3, 4]
    assert evenly(1).tolist() == [0]


def pictures(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coloured waves with an edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    angle = rng.uniform(0, 6, (n, 1, 1, 3))
    waves = 127 + 110 * np.sin(angle * x[..., None] + 2 * y[..., None] + angle)
    waves[:, height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, (n, 1, 1, 3))
    return waves.clip(0, 255).astype(np.uint8)


def write_dino(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("height", "width"), [(480, 832), (301, 260), (120, 90)])
def test_dinos_features_are_transformers_own(height: int, width: int, tmp_path: Path) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    process = BitImageProcessorPil(  # preprocessor_config.json of facebook/dinov2-large
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images = pictures(3, height, width)
    model = Dinov2Model.from_pretrained(write_dino(tmp_path)).eval()
    with torch.no_grad():
        theirs = model(**process(list(images), return_tensors="pt")).last_hidden_state[:, 0]
    assert theirs.std(0).mean() > 0.01  # the images differ in it
    torch.testing.assert_close(Dino(tmp_path).images(images), theirs, rtol=0, atol=1e-4)


# --- VBench-2.0 ----------------------------------------------------------------------------------------------------


class Levels(nn.Module):
    """In the place of VGG-19: layers of two channels and one pixel that show the red of an image's first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> list[Tensor]:
        red = (images[:, 0, 0, 0] * 0.229 + 0.485).reshape(-1, 1, 1, 1).expand(-1, 2, 1, 1)
        return [red, red, red, red, 2 * red, 3 * red]


def level(*values: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def test_vbench2_by_hand() -> None:
    """Levels 0 and .2: content .6; every entry of a Gram matrix .2² / 2 = .02, in one layer of five .08."""
    expected = (0.6 + 1000 * (4 * 0.02 + 0.08) / 5) / 2 / 17.712
    assert vbench2([level(0), level(51)], Levels()) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]
    # a second frame that is alike in both halves it; a third sample like the first gives two such pairs of three
    assert vbench2([level(0, 9), level(51, 9)], Levels()) == pytest.approx(expected / 2, abs=1e-6)  # type: ignore[arg-type]
    assert vbench2([level(0), level(51), level(0)], Levels()) == pytest.approx(expected * 2 / 3, abs=1e-6)  # type: ignore[arg-type]
    assert vbench2([level(0), level(255)], Levels()) == 1  # type: ignore[arg-type]  # 1.9 is cut off
    assert vbench2([level(7), level(7)], Levels()) == 0  # type: ignore[arg-type]


def naive(samples: Sequence[np.ndarray], state: dict[str, Tensor]) -> float:
    """The definition, all frames of all samples in memory, layers named one by one, in float64."""
    stages = [(0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28, 30)]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    seen = []
    for frames in samples:
        x = (torch.tensor(frames).double().permute(0, 3, 1, 2) / 255 - mean) / std
        kept = {}
        for stage in stages:
            for number in stage:
                names = f"features.{number}.weight", f"features.{number}.bias"
                kept[number] = F.conv2d(x, *(state[name].double() for name in names), padding=1)
                x = kept[number].clamp(min=0)
            x = F.max_pool2d(x, 2)
        seen.append(kept)
    content, style = [], []
    for a, b in combinations(seen, 2):
        content.append((a[30] - b[30]).abs().mean())
        for number in (0, 5, 10, 19, 28):
            c, h, w = a[number].shape[1:]
            first, second = (torch.einsum("tihw,tjhw->tij", x[number], x[number]) / (c * h * w) for x in (a, b))
            style.append((first - second).abs().mean())
    return min(float((torch.stack(content).mean() + 1000 * torch.stack(style).mean()) / 2 / 17.712), 1.0)


def test_vbench2_equals_the_definition_on_a_small_vgg() -> None:
    torch.manual_seed(0)
    vgg = Vgg(TINY).eval()
    with torch.no_grad():
        for name, parameter in vgg.named_parameters():
            parameter.mul_(1.3) if name.endswith("weight") else parameter.normal_(std=0.1)
        vgg.features[0].weight.mul_(0.1)
    samples = [pictures(3, 48, 32, seed) for seed in range(4)]
    found = vbench2(samples, vgg)
    assert 0.001 < found < 0.5
    assert found == pytest.approx(naive(samples, vgg.state_dict()), rel=1e-5)
    assert vbench2([samples[i] for i in (2, 0, 3, 1)], vgg) == pytest.approx(found, rel=1e-6)  # any order
    assert vbench2([samples[1]] * 3, vgg) == pytest.approx(0, abs=1e-8)
    assert vbench2(samples[:2], vgg) != pytest.approx(found, rel=1e-3)


def test_pairs_are_those_of_two_different() -> None:
    assert pair_difference(torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0]])) == pytest.approx((2 + 1 + 2) / 3)


def test_vgg19_has_torchvisions_names_and_number_of_weights(tmp_path: Path) -> None:
    model = Vgg()
    convolutions = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    assert list(model.state_dict()) == [f"features.{n}.{part}" for n in convolutions for part in ("weight", "bias")]
    assert sum(value.numel() for value in model.parameters()) == 143_667_240 - 123_642_856  # all, less the classifier
    torch.save({**model.state_dict(), "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg19.pth")
    opened = opened_vgg(tmp_path / "vgg19.pth")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in opened.parameters())


def test_another_file_is_named(tmp_path: Path) -> None:
    torch.save(Vgg(TINY).state_dict(), tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth .* features\.0\.weight is \(3, 3, 3, 3\), needs \(64, 3, 3, 3\)"):
        opened_vgg(tmp_path / "small.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"cannot read .*torn\.pth .*expected torchvision's vgg19"):
        opened_vgg(tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"cannot read .*none\.pth"):
        opened_vgg(tmp_path / "none.pth")


# --- Rows ----------------------------------------------------------------------------------------------------------


class Corner:
    """A feature extractor whose feature is the colour of the first pixel."""

    def images(self, frames: np.ndarray) -> Tensor:
        return torch.tensor(frames[:, 0, 0]).float()


def items(folder: Path, *prompts: Sequence[tuple[int, int, int]]) -> list[PromptSamples]:
    """Prompts 3, 4, ... with an image of one colour for each sample."""
    found = []
    for index, colors in enumerate(prompts, start=3):
        paths = [folder / f"{index}-{number}.png" for number in range(len(colors))]
        for path, color in zip(paths, colors, strict=True):
            Image.new("RGB", (20, 16), color).save(path)
        found.append(PromptSamples(index, {"prompt": "a thing"}, tuple(paths)))
    return found


def test_distances_take_eight_samples_and_vbench2_all(tmp_path: Path) -> None:
    red, green, blue = (40, 0, 0), (0, 100, 0), (0, 0, 50)
    models = {"clip_large": Corner(), "dinov2": Corner(), "vgg": Levels()}
    eight = [red, red, red, red, green, green, green, blue]
    told: list[int] = []
    chosen = items(tmp_path, eight, [*eight, blue, blue], eight[:7], [red])
    rows = list(measure(chosen, models, advance=told.append))
    assert [row["prompt"] for row in rows] == [3, 4, 5, 6]
    assert [row["samples"] for row in rows] == told == [8, 10, 7, 1]
    different = (4 * 3 + 4 * 1 + 3 * 1) / 28  # pairs of different colours, which are at right angles
    assert rows[0]["values"]["clip_distance"] == pytest.approx(different)
    assert rows[1]["values"]["dino_distance"] == pytest.approx(different)
    assert rows[2]["values"]["clip_distance"] is rows[2]["values"]["dino_distance"] is None
    unlike = (3 * 40 / 255 + 1000 * 8 / 5 * (40 / 255) ** 2 / 2) / 2 / 17.712  # red and another
    found = [row["values"]["vbench2"] for row in rows[:3]]
    assert found == pytest.approx([unlike * 16 / 28, unlike * 24 / 45, unlike * 12 / 21], rel=1e-5)
    assert rows[3]["values"] == {"clip_distance": None, "dino_distance": None, "vbench2": None}
    json.dumps(rows, allow_nan=False)
    columns = features.columns(Measured({}, rows[::-1]), allow_missing=True)
    assert list(columns) == ["diversity.clip_distance", "diversity.dino_distance", "diversity.vbench2"]
    assert columns["diversity.vbench2"] == [None, None, None, *found, None]  # prompts keep their places


def test_missing_samples_of_diversity_are_refused_or_named() -> None:
    def measured(**counts: int) -> Measured:
        values = {"clip_distance": 0.1, "dino_distance": 0.2, "vbench2": 0.3}
        return Measured({}, [{"prompt": int(k[1:]), "samples": n, "values": values} for k, n in counts.items()])

    assert features.columns(measured(p1=8, p0=8))["diversity.vbench2"] == [0.3, 0.3]
    gap, few = measured(p0=8, p2=8), measured(p0=8, p1=7, p3=8)
    with pytest.raises(UserError, match=r"diversity suite is not whole: prompt 1 of diversity has 0 of 8 samples; "):
        features.columns(gap)
    with pytest.raises(UserError, match=r"prompt 1 of diversity has 7 of 8 samples and 1 more; "):
        features.columns(few)
    assert features.columns(gap, allow_missing=True)["diversity.dino_distance"] == [0.2, None, 0.2]
    assert features.lacking(few) == [f"prompt {k} of diversity has {n} of 8 samples" for k, n in ((1, 7), (2, 0))]


def save_clip(path: Path, frames: np.ndarray) -> None:
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others)


def test_clips_of_unequal_length_are_refused(tmp_path: Path) -> None:
    paths = (tmp_path / "0000.png", tmp_path / "0001.png")
    for path, count in zip(paths, (3, 2), strict=True):
        save_clip(path, pictures(count, 16, 20))
    models = {"clip_large": Corner(), "dinov2": Corner(), "vgg": Levels()}
    items = [PromptSamples(0, {"prompt": "a"}, paths)]
    with pytest.raises(UserError, match=r"0001\.png has 2 frames, 0000\.png beside it 3; samples of one prompt"):
        list(measure(items, models))
    with pytest.raises(UserError, match=r"0000\.png has 3 frames, expected 2"):
        list(measure(items, models, frames=2))


def test_models_are_opened_from_their_folders(tmp_path: Path) -> None:
    """Tiny networks of the real classes, on clips of 20 frames, against the definition in transformers' features."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 3, "hidden_act": "quick_gelu"}
    vision = {**small, "image_size": 16, "patch_size": 8, "hidden_act": "quick_gelu"}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip/vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (tmp_path / "clip/merges.txt").write_text("#version: 0.2\n")
    write_dino(tmp_path / "dino")
    paths = tuple(tmp_path / f"{number:04d}.png" for number in range(8))
    clips = [pictures(20, 40, 48, seed) for seed in range(8)]
    for path, frames in zip(paths, clips, strict=True):
        save_clip(path, frames)
    models = {"clip_large": tmp_path / "clip", "dinov2": tmp_path / "dino", "vgg": Levels()}
    (row,) = measure([PromptSamples(0, {"prompt": "a"}, paths)], models)
    chosen = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19]
    for name, model in (("clip_distance", Clip(tmp_path / "clip")), ("dino_distance", Dino(tmp_path / "dino"))):
        means = [F.normalize(model.images(frames[chosen]), dim=-1).mean(0).numpy() for frames in clips]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(means, 2)]
        assert row["values"][name] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
        assert row["values"][name] > 1e-3
    assert 0 < row["values"]["vbench2"] <= 1
