"""CLIP's features and GenEval's colours: random weights against transformers' own processing, hand-made colours."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rcm.artefact import UserError
from rcm.data.prompts import COCO
from rcm.evaluation.clip import Clip, Colors, cutout, preprocessed
from rcm.evaluation.geneval import Detection
from rcm.vision import MEAN, STD

SIZE = 32
START, END = 300, 301  # the end has the largest number, as OpenAI's, by which CLIP finds it


def write_clip(folder: Path, hidden_act: str = "quick_gelu", seed: int = 0) -> Path:
    """CLIP with a few thousand random weights; its tokenizer knows single bytes and two merges."""
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**width, "vocab_size": 302, "max_position_embeddings": 77, "hidden_act": hidden_act, "eos_token_id": 2}
    vision = {**width, "image_size": SIZE, "patch_size": 8, "hidden_act": hidden_act}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embedding" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip(folder)


def pictures(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves and edges, as photographs have them, rather than noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    angle = rng.uniform(0, 6, (n, 1, 1, 3))
    waves = 127 + 110 * np.sin(angle * x[..., None] + 2 * y[..., None] + angle)
    waves[:, height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, (n, 1, 1, 3))
    return waves.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 70), (20, 30), (32, 32)])
def test_images_are_prepared_as_transformers_does_it_with_pil(height: int, width: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = pictures(2, height, width)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})(
        list(images), return_tensors="pt"
    )["pixel_values"]
    ours = preprocessed(images, SIZE)
    assert ours.shape == theirs.shape == (2, 3, SIZE, SIZE)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01  # PIL rounds between its two passes, too
    assert levels.mean() < 0.25


def test_without_antialiasing_is_pytorchs_bicubic_in_whole_levels() -> None:
    images = pictures(1, 80, 80)
    sharp, smooth = (preprocessed(images, SIZE, antialias=antialias) for antialias in (False, True))
    levels = (sharp * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    # By hand: scale 2.5, the centre of pixel 4 is at 4.5 * 2.5 - 0.5 = 10.75; weights of a = -0.75 at 1.75, ...
    weights = np.array([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    window = images[0, 9:13, 9:13].astype(float)
    by_hand = np.einsum("i,j,ijc->c", weights, weights, window).clip(0, 255)
    np.testing.assert_allclose(levels[0, :, 4, 4], by_hand.round(), atol=1e-4)
    assert (sharp - smooth).abs().max() > 0.05


@pytest.mark.parametrize(("height", "width"), [(1, 99), (80, 4), (9, 120)])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_thin_cutout_is_prepared_without_what_the_centre_does_not_show(
    height: int, width: int, antialias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(1, height, width)
    small = min(height, width)
    whole = torch.nn.functional.interpolate(
        torch.as_tensor(images).permute(0, 3, 1, 2).float(),
        (SIZE * height // small, SIZE * width // small),
        mode="bicubic",
        antialias=antialias,
    )
    top, left = ((side - SIZE) // 2 for side in whole.shape[2:])
    expected = whole[:, :, top : top + SIZE, left : left + SIZE].clamp(0, 255)
    sizes = []
    plain = torch.nn.functional.interpolate

    def watched(images: torch.Tensor, to: tuple[int, int], **options: object) -> torch.Tensor:
        sizes.append(to)
        return plain(images, to, **options)

    monkeypatch.setattr("rcm.evaluation.clip.F.interpolate", watched)
    levels = (preprocessed(images, SIZE, antialias=antialias) * torch.tensor(STD)[:, None, None] * 255) + (
        torch.tensor(MEAN)[:, None, None] * 255
    )
    assert (levels - expected).abs().max() < 0.501
    assert max(sizes[0]) < max(whole.shape)


@pytest.mark.parametrize("side", [255, 257, 259])
def test_the_centre_is_cut_out_where_torchvision_does(side: int) -> None:
    columns = np.broadcast_to(np.arange(side, dtype=np.uint16)[None, None, :, None] % 256, (1, 224, side, 3))
    first = preprocessed(columns.astype(np.uint8), 224)[0, 0, 0, 0] * STD[0] + MEAN[0]
    assert round(float(first) * 255) == {255: 16, 257: 16, 259: 18}[side]  # halves go to the even number


def test_features_are_those_of_transformers_and_of_length_one(clip: Clip, folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    images = pictures(3, 40, 50)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([[START, 1, END]]), pixel_values=preprocessed(images, SIZE)).image_embeds
    ours = clip.images(images)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(3))
    assert (ours[0] @ ours[1]) < 0.999
    many = clip.images(np.repeat(images, 12, 0))  # more than a batch
    torch.testing.assert_close(many[::12], ours, atol=1e-6, rtol=1e-5)


def test_texts_do_not_depend_on_their_neighbours(clip: Clip, folder: Path) -> None:
    texts = ["red", "a photo of a red cat", "x " * 200]
    together = clip.texts(texts)
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(clip.texts([text])[0], row, atol=1e-6, rtol=1e-5)
    tokens = CLIPTokenizer.from_pretrained(folder)("red", return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[START, 189, END]]  # the merges are in use
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(**tokens, pixel_values=torch.zeros(1, 3, SIZE, SIZE)).text_embeds
    torch.testing.assert_close(together[:1], theirs, atol=1e-6, rtol=1e-5)
    assert (together[0] @ together[1]) < 0.999


def test_another_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hidden_act 'gelu', but OpenAI's CLIP has 'quick_gelu'"):
        Clip(write_clip(tmp_path / "clip", hidden_act="gelu"))


def test_what_lacks_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json"):
        Clip(tmp_path)
    broken = write_clip(tmp_path / "broken")
    (broken / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read CLIP's vocabulary"):
        Clip(broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot read a CLIPModel"):
        Clip(broken)


def test_weights_of_another_model_are_refused_rather_than_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"visual_projection.weight is missing"):
        Clip(folder)


class Palette(Clip):
    """Stands for CLIP: an image is its mean colour, a text the colour that it names."""

    rgb: ClassVar = dict(
        zip(
            COCO.colors,
            [
                *((1, 0, 0), (1, 0.5, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1)),
                *((0.5, 0, 0.5), (1, 0.7, 0.8), (0.5, 0.3, 0.1), (0, 0, 0), (1, 1, 1)),
            ],
            strict=True,
        )
    )

    def __init__(self) -> None:
        self.asked: list[str] = []

    @staticmethod
    def _features(values: torch.Tensor) -> torch.Tensor:
        centred = values.float() - 0.45  # black and white point in opposite directions
        return centred / centred.norm(dim=-1, keepdim=True)

    def images(self, frames, *, antialias=True):
        return self._features(torch.as_tensor(frames).float().mean((1, 2)) / 255)

    def texts(self, texts):
        self.asked += texts
        named = [next(color for color in self.rgb if f"a {color}" in text) for text in texts]
        return self._features(torch.tensor([self.rgb[color] for color in named]))


def test_colours_of_objects_on_grey() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:] = (0, 0, 255), (255, 255, 0), (250, 250, 250)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 8:20] = True
    mask[5:15, 8:10] = False  # blue in the box, not in the mask
    clip = Palette()
    colors = Colors(clip)
    found = [Detection("cat", (8, 5, 20, 15), 0.9, mask), Detection("cat", (20.2, 0, 30, 19.6), 0.8)]
    assert colors.of(image, found, "cat") == ["yellow", "white"]
    assert len(clip.asked) == 30
    assert clip.asked[:3] == ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    assert colors.of(image, found[:1], "cat") == ["yellow"]
    assert len(clip.asked) == 30  # one classifier a name
    assert colors.of(image, [], "dog") == []
    colors.of(image, found[:1], "dog")
    assert clip.asked[-3:] == ["a photo of a white dog", "a photo of a white-colored dog", "a photo of a white object"]


def test_a_cutout_is_the_object_in_front_of_grey() -> None:
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    mask = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], bool)
    cut = cutout(image, Detection("cat", (1, 1, 3, 3), 1.0, mask))
    assert cut.shape == (2, 2, 3)
    assert cut[0, 0].tolist() == [15, 16, 17] and cut[1, 1].tolist() == [30, 31, 32]
    assert cut[0, 1].tolist() == [153, 153, 153]  # #999
    assert cutout(image, Detection("cat", (0.4, 0.6, 3.6, 3), 1.0)).tolist() == image[1:3].tolist()
    with pytest.raises(ValueError, match="mask"):
        cutout(image, Detection("cat", (0, 0, 1, 1), 1.0, mask[:2]))


def test_a_classifier_averages_its_templates(clip: Clip) -> None:
    """The mean of the three directions, brought back to length 1, in float64 from texts alone."""
    texts = ["a photo of a brown dog", "a photo of a brown-colored dog", "a photo of a brown object"]
    mean = clip.texts(texts).double().mean(0)
    row = Colors(clip)._classifier("dog")[COCO.colors.index("brown")]
    torch.testing.assert_close(row.double(), mean / mean.norm(), atol=1e-6, rtol=1e-5)
