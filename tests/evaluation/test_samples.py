"""Folders of samples: what is read, what is missing, and files that are broken."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcm.artefact import UserError
from rcm.cli.pictures import encode, png
from rcm.data import prompts
from rcm.evaluation.samples import (
    Expected,
    check_prompt,
    list_samples,
    missing,
    read_frames,
    read_sampling,
)

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)


def _folder(root: Path, index: int, metadata: Any, files: dict[str, bytes]) -> Path:
    samples = root / f"{index:05d}" / "samples"
    samples.mkdir(parents=True)
    (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    for name, content in files.items():
        (samples / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def film() -> bytes:
    smooth = np.linspace(40, 200, 9)[:, None, None, None] + np.zeros((9, 48, 64, 3))
    return encode(smooth.astype(np.uint8), ".mp4", rate=16)


def test_the_official_layout_is_read(tmp_path: Path) -> None:
    picture = png(FRAMES[:1])
    files = {"00001.png": picture, "00000.png": picture, "grid.png": b"", "0002.jpg": b""}
    _folder(tmp_path, 3, prompts.single_object("dog"), files)
    (tmp_path / "00003" / "grid.png").write_bytes(b"")
    (tmp_path / "sampling.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (item,) = list_samples([tmp_path])
    assert (item.index, item.metadata["tag"]) == (3, "single_object")
    assert [item.name(path) for path in item.paths] == ["00003/samples/00000.png", "00003/samples/00001.png"]


def test_metadata_need_not_be_genevals(tmp_path: Path, film: bytes) -> None:
    metadata = {"prompt": "a long prompt", "name": "In a still frame, a stop sign", "dimension": ["scene"]}
    _folder(tmp_path, 0, metadata, {"0000.mp4": film})
    (item,) = list_samples([tmp_path])
    assert item.metadata == metadata
    assert read_frames(item.paths[0]).shape == (9, 48, 64, 3)
    for broken in ({"name": "x"}, {"prompt": ""}, {"prompt": 3}, {"tag": "scene", "prompt": "x", "include": []}):
        (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"00000/metadata.jsonl, line 1: key"):
            list_samples([tmp_path])


def test_prompts_and_samples_are_there_once(tmp_path: Path) -> None:
    picture = png(FRAMES[:1])
    first = _folder(tmp_path / "a", 0, prompts.single_object("dog"), {"0000.png": picture})
    second = _folder(tmp_path / "b", 0, prompts.single_object("cat"), {"0000.png": picture})
    with pytest.raises(UserError, match=r"prompt 00000 is in .*b and in .*a; parts must differ"):
        list_samples([first, second])
    (first / "00000" / "samples" / "00000.png").write_bytes(picture)
    with pytest.raises(UserError, match=r"00000/samples/0000.png and .*/00000.png are the same sample twice"):
        list_samples([first])


def test_films_are_read_frame_by_frame(tmp_path: Path, film: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(film)
    frames = read_frames(tmp_path / "x.mp4", 9)
    assert frames.dtype == np.uint8
    assert np.allclose(frames.mean((1, 2, 3)), np.linspace(40, 200, 9), atol=3)  # H.264 is lossy


def test_broken_samples_are_named(tmp_path: Path, film: bytes) -> None:
    import imageio_ffmpeg

    (tmp_path / "whole.mp4").write_bytes(encode(FRAMES.repeat(4, axis=0), ".mp4"))
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        "whole.mp4",
        "-c",
        "copy",
        "-movflags",
        "faststart",
    ]
    subprocess.run([*command, "front.mp4"], cwd=tmp_path, check=True)
    front = (tmp_path / "front.mp4").read_bytes()  # its index comes first, so that a part of it can be decoded
    rotten = bytearray(front)
    rotten[len(front) // 2 : len(front) // 2 + 4000] = bytes(4000)
    picture, clip = png(FRAMES[:1]), png(FRAMES)
    for name, content in {
        "empty.png": b"",
        "empty.mp4": b"",
        "cut.png": picture[: len(picture) // 2],
        "cut_clip.png": clip[: len(clip) // 2],
        "cut.mp4": film[: len(film) // 2],
        "cut_front.mp4": front[: len(front) * 2 // 3],
        "rotten.mp4": bytes(rotten),
        "text.png": b"no picture",
        "text.mp4": b"no film",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"/{name}( is empty|: )"):
            read_frames(tmp_path / name)
    with pytest.raises(UserError, match=r"nothing.png"):
        read_frames(tmp_path / "nothing.png")


def test_damage_inside_a_film_is_noticed_though_all_frames_come(tmp_path: Path) -> None:
    """Some bytes of a frame in the middle are other ones: unless told to stop ffmpeg makes the rest up."""
    import imageio_ffmpeg

    content = bytearray(encode(FRAMES.repeat(4, axis=0), ".mp4"))
    begin = content.index(b"mdat") + 4
    place = begin + (content.index(b"moov") - begin) // 2 if content.index(b"moov") > begin else len(content) // 2
    content[place : place + 40] = bytes(reversed(range(40)))
    (tmp_path / "x.mp4").write_bytes(bytes(content))
    loose = imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4"), output_params=["-fps_mode", "passthrough"])
    next(loose)
    assert len(list(loose)) == 36
    with pytest.raises(UserError, match=r"cannot read the sample .*x.mp4"):
        read_frames(tmp_path / "x.mp4", 36)


def test_pictures_of_other_depth_or_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: its pixels are I;16; expected 8 bits a channel"):
        read_frames(tmp_path / "deep.png")
    (tmp_path / "bomb.png").write_bytes(png(FRAMES[:1]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"cannot read the sample .*bomb.png: Image size \(3072 pixels\) exceeds limit"):
        read_frames(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_another_number_of_frames_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(encode(FRAMES[:8], suffix))
    assert len(read_frames(path, 8)) == 8
    with pytest.raises(UserError, match=rf"x{suffix} has 8 frames, expected 9"):
        read_frames(path, 9)


def test_missing_samples_are_counted() -> None:
    captions = [prompts.single_object(name) for name in ("dog", "cat", "cow")]
    expected = Expected(captions, 2)
    found = [f"{prompt:05d}/samples/{number:04d}.png" for prompt in range(3) for number in range(2)]
    assert missing(expected, found) == []
    assert missing(expected, [name.replace("/000", "/0000") for name in found]) == []  # five digits
    few = [found[0], found[4], found[5]]
    with pytest.raises(UserError, match=r"3 of 6 samples are missing, the first 00000/samples/0001.png"):
        missing(expected, few)
    assert missing(expected, few, True) == [found[1], found[2], found[3]]
    assert missing(Expected(captions, [1, 0, 2]), few) == []
    assert missing(expected, ["00000/samples/0001.png", "00000/samples/0002.png", *found[2:]]) == []  # from 1 on
    with pytest.raises(UserError, match=r"00003/samples/0000.png is of none of the 3 prompts"):
        missing(expected, [*found, "00003/samples/0000.png"])
    with pytest.raises(UserError, match=r"a.png is no name of a sample"):
        missing(expected, ["a.png"])


def test_without_a_suite_all_prompts_have_the_same_number() -> None:
    found = ["00000/samples/0000.mp4", "00000/samples/0001.mp4", "00001/samples/0001.mp4"]
    assert missing(None, found, True) == ["00001/samples/0000.mp4"]
    with pytest.raises(UserError, match=r"1 of 4 samples are missing, the first 00001/samples/0000.mp4"):
        missing(None, found)
    assert missing(None, found[:2]) == missing(None, []) == []
    whole = [name.replace("00001", "00002") for name in (*found, "00001/samples/0000.mp4")]
    with pytest.raises(UserError, match=r"2 of 6 samples are missing, the first 00001/samples/0000.mp4"):
        missing(None, whole)  # a prompt between others has none


def test_samples_that_the_suite_does_not_have_are_refused() -> None:
    expected = Expected([prompts.single_object("dog")], 1)
    with pytest.raises(UserError, match=r"00000/samples/0004.png is one too many: of this prompt the suite has 1"):
        missing(expected, ["00000/samples/0001.png", "00000/samples/0004.png"], True)


def test_numbers_of_thousands_of_digits_are_no_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no name of a sample"):
        missing(None, [f"{'1' * 5000}/samples/0000.png"])
    _folder(tmp_path, 0, {"prompt": "a dog", "seed": 1}, {"0000.png": b""})
    (tmp_path / "00000/metadata.jsonl").write_text(f'{{"prompt": "a dog", "seed": {"1" * 5000}}}')
    with pytest.raises(UserError, match=r"00000/metadata.jsonl, line 1: not JSON \(Exceeds"):
        list_samples([tmp_path])


def test_samples_must_be_of_the_given_prompts() -> None:
    expected = Expected([prompts.single_object("dog")], 1)
    check_prompt(expected, 0, prompts.single_object("dog"), "x")
    with pytest.raises(UserError, match=r"x was made from 'a photo of a cat', but prompt 0 of the file"):
        check_prompt(expected, 0, prompts.single_object("cat"), "x")
    with pytest.raises(UserError, match=r"x is of none of the 1 prompts"):
        check_prompt(expected, 1, prompts.single_object("dog"), "x")


def test_how_samples_were_made_is_common_to_the_parts(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("1", "2")]
    for folder in folders:
        folder.mkdir()
    assert read_sampling(folders) is None
    said = {"checkpoint_sha256": "ab", "sigma_max": 80.0, "seed": 3, "part": "1-of-2"}
    (folders[0] / "sampling.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"2/sampling.json and .*1/sampling.json differ in checkpoint_sha256"):
        read_sampling(folders)
    (folders[1] / "sampling.json").write_text(json.dumps(said | {"part": "2-of-2"}))
    assert read_sampling(folders) == {"checkpoint_sha256": "ab", "sigma_max": 80.0, "seed": 3}
    (folders[1] / "sampling.json").write_text(json.dumps(said | {"sigma_max": 800.0}))
    with pytest.raises(UserError, match=r"differ in sigma_max: the parts were not sampled alike"):
        read_sampling(folders)
    (folders[1] / "sampling.json").write_text("{")
    with pytest.raises(UserError, match=r"2/sampling.json is not valid JSON"):
        read_sampling(folders)
    (folders[1] / "sampling.json").write_text("[]")
    with pytest.raises(UserError, match=r"2/sampling.json holds no JSON object"):
        read_sampling(folders)
