"""Mask2Former's preparation and selection: by hand, against plain numpy, and with a tiny random network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from rcm.artefact import UserError
from rcm.data.prompts import COCO, color_attr, single_object
from rcm.evaluation import mask2former
from rcm.evaluation.geneval import Detection
from rcm.evaluation.mask2former import Mask2Former, instances, prepared
from rcm.evaluation.samples import list_samples

MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
CAT = COCO.classes.index("cat")


@pytest.mark.parametrize(
    ("height", "width", "resized", "padded"),
    [
        (768, 1360, (753, 1333), (768, 1344)),  # 0.98015: 752.75 rounds up
        (512, 512, (800, 800), (800, 800)),
        (480, 640, (800, 1067), (800, 1088)),
        (640, 480, (1067, 800), (1088, 800)),
        (100, 1000, (133, 1333), (160, 1344)),
    ],
)
def test_images_are_resized_and_padded_as_by_mmdet(height, width, resized, padded) -> None:
    pixels, size = prepared(np.full((height, width, 3), (200, 100, 50), np.uint8))
    assert size == resized
    assert pixels.shape == (3, *padded)
    assert pixels.dtype == torch.float32
    inside = pixels[:, : size[0], : size[1]]
    for channel, value in enumerate((200, 100, 50)):  # red first
        torch.testing.assert_close(inside[channel], torch.full(size, float((value - MEAN[channel]) / STD[channel])))
        for padding in (pixels[channel, size[0] :], pixels[channel, :, size[1] :]):
            grey = torch.full(padding.shape, float((128 - MEAN[channel]) / STD[channel]))
            torch.testing.assert_close(padding, grey)


def test_pixels_are_those_of_transformers_own_preparation() -> None:
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    y, x = np.mgrid[:100, :164]  # 800 x 1312, which both leave without padding
    image = np.stack([x * 1.5, y * 2, 255 * (x > 80)], -1).astype(np.uint8)
    theirs = Mask2FormerImageProcessorPil(
        size={"shortest_edge": 800, "longest_edge": 1333},
        image_mean=(MEAN / 255).tolist(),
        image_std=(STD / 255).tolist(),
        size_divisor=32,
    )(image, return_tensors="pt")["pixel_values"][0]
    ours, _ = prepared(image)
    assert ours.shape == theirs.shape == (3, 800, 1312)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None]
    assert levels.max() < 1.01


def logits_of(cls: int, odds: float) -> torch.Tensor:
    """Logits of 81 classes where `cls` has `odds` times the probability of each other one."""
    logits = torch.zeros(81)
    logits[cls] = np.log(odds)
    return logits


def test_a_square_by_hand() -> None:
    mask = torch.full((8, 8), -5.0)
    mask[2:6, 3:7] = np.log(3.0)  # sigmoid 0.75
    mask[2, 3] = 20.0  # sigmoid 1
    found = instances(logits_of(CAT, 8.0)[None], mask[None], (8, 8), (8, 8), (8, 8))
    assert len(found) == 80  # one query, every class
    assert found[0].cls == "cat"
    assert found[0].box == (3, 2, 7, 6)
    assert found[0].score == pytest.approx(8 / 88 * (15 * 0.75 + 1) / 16, rel=1e-5)
    assert found[1].score == pytest.approx(1 / 88 * (15 * 0.75 + 1) / 16, rel=1e-5)
    assert found[0].mask is not None and found[0].mask.dtype == bool
    assert found[0].mask.sum() == 16 and found[0].mask[2:6, 3:7].all()


def test_classes_go_by_their_number_and_no_object_is_none() -> None:
    mask = torch.full((3, 4, 4), 9.0)
    logits = torch.stack([logits_of(k, 1e4) for k in (64, 66, 80)])
    logits[0] *= 1.1
    found = instances(logits, mask, (4, 4), (4, 4), (4, 4))
    assert [one.cls for one in found[:2]] == ["computer mouse", "computer keyboard"]
    assert {COCO.classes[65], COCO.classes[62]} == {"tv remote", "tv"}
    assert found[2].score < 1e-3  # the third query is sure that there is nothing
    assert len(found) == 100


def test_an_empty_mask_gives_nothing() -> None:
    masks = torch.stack([torch.full((4, 4), -1.0), torch.full((4, 4), 1.0)])
    found = instances(torch.stack([logits_of(CAT, 1e6), logits_of(0, 1e3)]), masks, (4, 4), (4, 4), (4, 4))
    assert found[0].cls == "person"
    assert found[0].box == (0, 0, 4, 4)
    assert all(one.score < 1e-2 for one in found[1:])


def test_the_padding_is_cut_off_before_the_mask_is_brought_to_the_image() -> None:
    """8 x 8 logits of a padded image of 32 x 32, of which 32 x 16 are the image, which has 64 x 32 pixels."""
    mask = torch.full((8, 8), -4.0)
    mask[:, 2:] = 4.0  # from column 8 of the padded image on; the edge of the interpolation lies there too
    found = instances(logits_of(CAT, 9.0)[None], mask[None], (32, 32), (32, 16), (64, 32))
    assert found[0].mask is not None and found[0].mask.shape == (64, 32)
    assert found[0].box == (16, 0, 32, 64)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Plain interpolation between centres of pixels, the border repeated."""
    out = image
    for axis, size in ((0, height), (1, width)):
        old = out.shape[axis]
        at = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (at - low)[:, None] if axis == 0 else (at - low)[None]
        out = np.take(out, low, axis) * (1 - part) + np.take(out, high, axis) * part
    return out


def test_selection_equals_plain_numpy() -> None:
    rng = np.random.default_rng(3)
    classes, masks = rng.normal(size=(5, 81)) * 3, rng.normal(size=(5, 6, 7)) * 4
    masks[4] = -np.abs(masks[4])  # an empty one
    padded, unpadded, original = (24, 28), (21, 25), (40, 31)
    found = instances(torch.from_numpy(classes), torch.from_numpy(masks), padded, unpadded, original)

    exponentials = np.exp(classes)
    pairs = sorted(
        ((exponentials[q, c] / exponentials[q].sum(), q, c) for q in range(5) for c in range(80)), reverse=True
    )[:100]
    expected = []
    for probability, query, cls in pairs:
        logits = bilinear(bilinear(masks[query], *padded)[: unpadded[0], : unpadded[1]], *original)
        if not (logits > 0).any():
            continue
        values = [1 / (1 + np.exp(-value)) for value in logits.flat if value > 0]
        where = [(y, x) for y in range(original[0]) for x in range(original[1]) if logits[y, x] > 0]
        ys, xs = zip(*where, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        expected.append((COCO.classes[cls], box, probability * sum(values) / (len(values) + 1e-6), logits > 0))
    assert 50 < len(expected) < 100
    assert [one.cls for one in found] == [cls for cls, *_ in expected]
    for one, (_, box, score, mask) in zip(found, expected, strict=True):
        assert one.box == box
        assert one.score == pytest.approx(score, rel=1e-6)
        np.testing.assert_array_equal(one.mask, mask)


def write_detector(folder: Path, labels: int = 80) -> Path:
    """A Mask2Former with a Swin of a few thousand random weights."""
    backbone = SwinConfig(
        embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_indices=[1, 2, 3, 4]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        dim_feedforward=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=labels,
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_the_network_sees_the_prepared_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 60, 3), np.uint8)
    folder = write_detector(tmp_path)
    detector = Mask2Former(folder)
    found = detector.detect(image)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    pixels, size = prepared(image)
    assert size == (267, 1333)
    with torch.no_grad():
        output = model(pixel_values=pixels[None])
    again = instances(
        output.class_queries_logits[0], output.masks_queries_logits[0], (288, 1344), (267, 1333), (12, 60)
    )
    assert len(found) == len(again) > 0
    assert [(one.cls, one.box) for one in found] == [(one.cls, one.box) for one in again]
    assert [one.score for one in found] == pytest.approx([one.score for one in again], rel=1e-5)
    assert all(one.mask is not None and one.mask.shape == (12, 60) for one in found)
    assert detector.classes == COCO.classes


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows 133 classes; expected COCO's 80"):
        Mask2Former(write_detector(tmp_path, labels=133))


def test_names_of_classes_must_stand_in_cocos_order(tmp_path: Path) -> None:
    folder = write_detector(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def named(labels: list[str]) -> Path:
        ids = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
        path.write_text(json.dumps(config | ids))
        return folder

    names = [name.removeprefix("computer ") for name in COCO.classes]  # the labels of the Hub spell some otherwise
    names[57] = "sofa"
    Mask2Former(named(names))
    names[15], names[16] = "dog", "cat"
    with pytest.raises(UserError, match=r"calls class 15 'dog', which is COCO's 'cat'; expected .* COCO's order"):
        Mask2Former(named(names))


def test_cudnn_stays_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, seen = Mask2Former(write_detector(tmp_path)), []
    whole = detector.model

    def watched(**given: torch.Tensor) -> object:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return whole(**given)

    monkeypatch.setattr(detector, "model", watched)
    detector.detect(np.zeros((8, 40, 3), np.uint8))
    assert seen == [(True, False)]


class Fixed:
    """A detector with one answer."""

    classes = COCO.classes

    def __init__(self, found: list[Detection]):
        self.found = found

    def detect(self, image: np.ndarray) -> list[Detection]:
        return self.found


class Reds:
    """Stands for CLIP: red where an image has more red than blue, else blue; texts of these colours alone."""

    def images(self, frames, *, antialias=True):
        red, _, blue = torch.as_tensor(frames).float().mean((0, 1, 2))
        return torch.tensor([[1.0, 0.0] if red > blue else [0.0, 1.0]])

    def texts(self, texts):
        return torch.tensor([[float(" red" in text), float(" blue" in text)] for text in texts]) + 1e-6


def write_sample(root: Path, index: int, metadata: dict, image: Image.Image, **options) -> None:
    folder = root / f"{index:05d}" / "samples"
    folder.mkdir(parents=True)
    (folder.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    image.save(folder / "0000.png", **options)


def test_rows_hold_all_objects_and_the_colours_that_captions_ask_for(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    write_sample(tmp_path, 0, single_object("cat"), image)
    write_sample(tmp_path, 7, color_attr("cat", "red", "dog", "blue"), image)
    left = np.arange(20)[None].repeat(10, 0) < 10
    found = [
        Detection("cat", (0, 0, 10, 10), 0.9, left),
        Detection("dog", (10, 0, 20, 10), 0.31, ~left),
        Detection("dog", (10, 0, 20, 10), 0.3, ~left),
        Detection("bus", (10, 0, 20, 10), 0.8, ~left),
    ]
    steps: list[int] = []
    rows = list(
        mask2former.measure(list_samples([tmp_path]), Fixed(found), Reds(), lambda: steps.append(1))  # type: ignore
    )
    assert [row["prompt"] for row in rows] == [0, 7]
    assert [row["filename"] for row in rows] == ["00000/samples/0000.png", "00007/samples/0000.png"]
    assert rows[1]["metadata"]["prompt"] == "a photo of a red cat and a blue dog"
    assert [row[-1] for row in rows[0]["detections"]] == [None] * 4
    assert rows[1]["detections"] == [
        ["cat", 0, 0, 10, 10, 0.9, "red"],
        ["dog", 10, 0, 20, 10, 0.31, "blue"],
        ["dog", 10, 0, 20, 10, 0.3, None],  # not above the threshold
        ["bus", 10, 0, 20, 10, 0.8, None],
    ]
    assert len(steps) == 2
    assert json.loads(json.dumps(rows)) == rows


def test_a_film_is_refused(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (0, 0, 255))
    other = Image.new("RGB", (8, 8), (0, 255, 255))
    write_sample(tmp_path, 0, single_object("cat"), image, save_all=True, append_images=[other])
    with pytest.raises(UserError, match=r"0000.png has 2 frames"):
        list(mask2former.measure(list_samples([tmp_path]), Fixed([]), Reds(), lambda: None))  # type: ignore
