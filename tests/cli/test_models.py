"""`rcm generate` with models of the official kinds at a small size, against the same worked out step by step.

The samplers are written here in rectified-flow times, the guidance and the conditions by hand; frames are compared as
bytes, which may differ by one.
"""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence
from torch import Tensor, nn

import rcm.codecs
import rcm.networks
import rcm.text
import rcm.vision
from rcm.artefact import UserError, sha256_file
from rcm.checkpoints import export_safetensors, save_dcp, save_pth
from rcm.cli import generate, sizes
from rcm.cli.config import compose
from rcm.cli.orders import named
from rcm.cli.parser import STAGES, parse
from rcm.cli.progress import Progress
from rcm.randomness import normal
from rcm.tree import config_dir, options, settings_of

from ..text.tiny import SIZES as TEXT
from ..text.tiny import tiny_encoder, write_tokenizer
from .conftest import Run

VISION = {"size": 14, "patch": 7, "width": 24, "mlp_width": 24, "layers": 2, "heads": 2, "joint_width": 8}
SIZES = {
    "width": 24,
    "mlp_width": 24,
    "layers": 1,
    "heads": 2,
    "text_width": TEXT["width"],
    "in_channels": 16,
    "out_channels": 16,
    "patch": [1, 2, 2],
}
WAN = {
    **SIZES,
    "kind": "wan",
    "time_width": 16,
    "time_scale": 1000.0,
}
COSMOS = {
    **SIZES,
    "kind": "cosmos",
    "adaln_width": 8,
    "time_scale": 1.0,
    "rope_scale": [1.0, 4.0, 4.0],
}
NETWORKS = {
    "t2v": WAN,
    "t2i": COSMOS,
    "i2v": {**WAN, "in_channels": 36, "image_width": VISION["width"]},
    "experts": {**WAN, "in_channels": 36},
}
SAMPLER = {"sigma_max": 80.0, "mid_times": [1.3, 1.0, 0.6]}
TEACHER = {
    "sampler": "euler",
    "guidance": 3.0,
    "guidance_form": "unconditional",
    "negative_prompt": "grey",
    "steps": 3,
    "shift": 3.0,
    "sigma_max": 200.0,
}
COSMOS_TEACHER = {"sampler": "cosmos", "guidance_form": "conditional", "shift": 1.0, "sigma_max": 80.0}
WIDTH, HEIGHT = 48, 32


@dataclass(frozen=True)
class World:
    """A folder with the checkpoints of small models, as the pipeline puts them, and the modules that they hold."""

    folder: Path
    networks: Mapping[tuple[str, str], nn.Module]
    codec: Any
    text: Any
    vision: Any


def settings(name: str) -> dict[str, Any]:
    return {
        "media": "images" if name == "t2i" else "clips",
        "frames": 1 if name == "t2i" else 5,
        "height": HEIGHT,
        "width": WIDTH,
        "network": NETWORKS[name],
        "codec": {**settings_of("codec", "wan2.1-vae"), "width": 4, "multipliers": [1, 1, 1, 1], "blocks": 1},
        "text": {"kind": "umt5", **TEXT},
        "sampler": SAMPLER,
    }


def model(name: str) -> dict[str, Any]:
    """What config/model/NAME.yaml says."""
    files = ("transformer", "codec", "text", *(("second",) if name == "experts" else ("vision",)))
    sources = {file: {"source": f"hf://someone/model/{file}-of-theirs.pth"} for file in files}
    sources["tokenizer"] = {"source": "hf://someone/model/tokenizer/"}
    extra = {"vision": VISION} if name == "i2v" else {"boundary": 0.9} if name == "experts" else {}
    teacher = {**TEACHER, **(COSMOS_TEACHER if name == "t2i" else {})}
    return {**settings(name), "teacher": teacher, "checkpoints": sources, **extra}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("models")
    (folder / "config" / "model").mkdir(parents=True)
    for part in config_dir().iterdir():
        (folder / "config" / part.name).exists() or (folder / "config" / part.name).symlink_to(part)
    networks = {}
    torch.manual_seed(0)
    codec = rcm.codecs.build(settings("t2v")["codec"]).eval()
    vision = rcm.vision.build(VISION).eval()
    text = tiny_encoder("umt5")
    text.tokenizer = rcm.text.tokenizer(write_tokenizer(folder / "tokenizer"))
    for name in NETWORKS:
        (folder / "config" / "model" / f"{name}.yaml").write_text(yaml.safe_dump(model(name)))
        data = folder / "data" / name
        for expert in ("transformer", "second"):
            network = rcm.networks.build(NETWORKS[name]).eval()
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            networks[name, expert] = network
            if expert == "transformer" or name == "experts":
                state = {f"net.{key}": value for key, value in network.state_dict().items()}  # as rCM releases have it
                save_pth(data / settings(name)["media"] / "checkpoints" / f"{expert}.pth", state)
        for file, module in (("codec", codec), ("text", text), ("vision", vision)):
            save_pth(data / "checkpoints" / f"{file}.pth", module.state_dict())
        write_tokenizer(data / "checkpoints" / "tokenizer")
    student = networks["t2v", "transformer"].state_dict()
    export_safetensors(folder / "student.safetensors", student, settings("t2v"))
    return World(folder, networks, codec, text, vision)


@pytest.fixture
def models(made: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("RCM_CONFIG_DIR", str(made.folder / "config"))
    monkeypatch.chdir(made.folder)
    return made


# --- By hand ---------------------------------------------------------------------------------------------------------


def noise(job: tuple[int, int], frames: int, seed: int, step: int = 0) -> Tensor:
    shape = (16, 1 + (frames - 1) // 4, HEIGHT // 8, WIDTH // 8)
    return normal(shape, seed=seed, purpose="sample", step=step, indices=[job[0] * 2**16 + job[1]]).double()


Velocity = Callable[[Tensor, float], Tensor]


def velocity(network: nn.Module, text: Tensor, **conditions: Tensor) -> Velocity:
    def call(x: Tensor, r: float) -> Tensor:
        time = torch.tensor([[r * network.time_scale]], dtype=torch.float64)
        return network(x.float(), time, text, **conditions).double()

    return call


def few_steps(v: Velocity, noises: list[Tensor], sigma_max: float = 80.0) -> Tensor:
    rs = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(sigma_max), 1.3, 1.0, 0.6)][: len(noises)]
    first = math.atan(sigma_max)
    x = noises[0] / (math.cos(first) + math.sin(first))
    for r, following, fresh in zip(rs, [*rs[1:], 0.0], [*noises[1:], 0.0], strict=True):
        x = (1 - following) * (x - r * v(x, r)) + following * fresh
    return x


def many_steps(v: Velocity, x: Tensor, grid: list[float]) -> Tensor:
    for r, following in pairwise(grid):
        x = x + (following - r) * v(x, r)
    return x


def wan_grid(steps: int = 3, shift: float = 3.0, sigma_max: float = 200.0) -> list[float]:
    r_max = sigma_max / (1 + sigma_max)
    top = r_max / (shift - (shift - 1) * r_max)
    return [shift * u / (1 + (shift - 1) * u) for u in np.linspace(top, 0, steps + 1)]


def pixels(codec: Any, latents: Tensor) -> np.ndarray:
    return ((codec.decode(latents)[0].permute(1, 2, 3, 0).double() + 1) * 127.5).numpy()


def close(frames: np.ndarray, expected: np.ndarray) -> None:
    assert frames.dtype == np.uint8 and frames.shape == expected.shape
    assert np.abs(frames - expected).max() < 0.52  # half a step of rounding
    assert expected.std() > 1


def embedded(made: World, prompt: str) -> Tensor:
    return made.text.encode([prompt])


def guided(one: Velocity, other: Velocity, scale: float) -> Velocity:
    return lambda x, r: other(x, r) + scale * (one(x, r) - other(x, r))


def first_frame(codec: Any, image: Tensor, frames: int) -> Tensor:
    """The mask (a one for each of the 4 frames of the first latent) and the latents of image and grey frames."""
    video = torch.cat([image[:, :, None], torch.zeros(1, 3, frames - 1, HEIGHT, WIDTH)], dim=2)
    latents = codec.encode(video)
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


# --- Students --------------------------------------------------------------------------------------------------------


def files(models: World, name: str) -> list[object]:
    folder = models.folder / "data" / name / "checkpoints"
    return [
        *("--codec", folder / "codec.pth", "--text-encoder", folder / "text.pth"),
        *("--tokenizer", folder / "tokenizer"),
    ]


def comment(path: Path) -> dict[str, Any]:
    """The settings in a file, by Pillow, or by ffmpeg for films."""
    if path.suffix == ".mp4":
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", "\n")
        line = next(line for line in text.splitlines() if line.startswith("comment="))
        return json.loads(
            line.removeprefix("comment=")
            .replace("\\=", "=")
            .replace("\\;", ";")
            .replace("\\#", "#")
            .replace("\\\\", "\\")
        )
    with Image.open(path) as image:
        found = image.info.get("Comment") or image.info["comment"]
        return json.loads(found)


def test_a_student_by_itself(models: World, run: Run, tmp_path: Path) -> None:
    """All that decides is in the export; the noise of each step is that of job (0, 0)."""
    student, out = models.folder / "student.safetensors", tmp_path / "x.npy"
    run(
        "generate",
        "--checkpoint",
        student,
        *files(models, "t2v"),
        "--prompt",
        "a red circle",
        "--seed",
        3,
        "--out",
        out,
    )
    v = velocity(models.networks["t2v", "transformer"], embedded(models, "a red circle"))
    expected = few_steps(v, [noise((0, 0), 5, 3, step) for step in range(4)])
    close(np.load(out), pixels(models.codec, expected))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_formats_and_what_they_say(suffix: str, models: World, run: Run, tmp_path: Path) -> None:
    out, prompt = tmp_path / f"x{suffix}", 'a "red" circle; = \\ # é\n'
    run("generate", "--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--prompt", prompt,
        "--steps", 2, "--sigma-max", 120, "--frames", 9, "--size", "32x48", "--seed", 5, "--out", out)  # fmt: skip
    said = comment(out)
    assert said["prompt"] == prompt and said["seed"] == 5 and said["job"] == [0, 0]
    assert (said["width"], said["height"], said["frames"]) == (32, 48, 9)
    assert said["sampler"]["sigma_max"] == 120 and said["sampler"]["steps"] == 2
    assert said["times"] == pytest.approx([math.atan(120), 1.3])
    assert said["files"]["checkpoint"]["sha256"] == sha256_file(models.folder / "student.safetensors")
    assert (said["device"], said["precision"]) == ("cpu", "float32")
    if suffix == ".mp4":
        reader = imageio_ffmpeg.read_frames(str(out))
        facts = next(reader)
        assert (facts["size"], facts["fps"], len(list(reader))) == ((256, 384), 16.0, 9)
    else:
        with Image.open(out) as image:
            assert image.size == (256, 384) and len(list(ImageSequence.Iterator(image))) == 9


def test_a_student_without_fresh_noise(models: World, run: Run, tmp_path: Path) -> None:
    """As Euler steps of the flow, by the switch and by the settings of an export alike."""
    network, out, exported = models.networks["t2v", "transformer"], tmp_path / "x.npy", tmp_path / "ode.safetensors"
    export_safetensors(exported, network.state_dict(), {**settings("t2v"), "sampler": {**SAMPLER, "ode": True}})
    rs = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(80), 1.3, 1.0, 0.6)]
    start = noise((0, 0), 5, 0) / (math.cos(math.atan(80)) + math.sin(math.atan(80)))
    expected = many_steps(velocity(network, embedded(models, "a")), start, [*rs, 0.0])
    for told in (("--checkpoint", models.folder / "student.safetensors", "--ode"), ("--checkpoint", exported)):
        run("generate", *told, *files(models, "t2v"), "--prompt", "a", "--out", out)
        close(np.load(out), pixels(models.codec, expected))


def test_an_experiment_may_say_so() -> None:
    assert compose(["+sampler.ode=true"])["sampler"]["ode"] is True
    with pytest.raises(UserError, match=r"'sampler\.ode' is 3; allowed: true or false"):
        compose(["+sampler.ode=3"])


def test_several_samples_and_their_grid(models: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na circle\n")
    run("generate", "--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--steps", 1,
        "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--out", tmp_path / "x.npy")  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x-0.npy", "x-1.npy", "x-2.npy", "x-3.npy", "x.npy"]
    sheet, network = np.load(tmp_path / "x.npy"), models.networks["t2v", "transformer"]
    assert sheet.shape == (5, 2 * HEIGHT + 2, 2 * WIDTH + 2, 3)
    for number, (prompt, job) in enumerate(
        (prompt, (p, s)) for p, prompt in enumerate(["a red circle", "a circle"]) for s in range(2)
    ):
        single = np.load(tmp_path / f"x-{number}.npy")
        expected = few_steps(velocity(network, embedded(models, prompt)), [noise(job, 5, 0)])
        close(single, pixels(models.codec, expected))
        top, left = job[0] * (HEIGHT + 2), job[1] * (WIDTH + 2)
        assert np.array_equal(sheet[:, top : top + HEIGHT, left : left + WIDTH], single)


def test_a_bare_checkpoint_needs_a_model(models: World, run: Run, fail: Run, tmp_path: Path) -> None:
    """Official releases have no settings, and names with a prefix."""
    bare, out = models.folder / "data/t2v/clips/checkpoints/transformer.pth", tmp_path / "x.npy"
    run("generate", "--model", "t2v", "--checkpoint", bare, "--prompt", "a", "--steps", 1, "--out", out)
    v = velocity(models.networks["t2v", "transformer"], embedded(models, "a"))
    close(np.load(out), pixels(models.codec, few_steps(v, [noise((0, 0), 5, 0)])))
    assert "say --model" in fail("generate", "--checkpoint", bare, "--prompt", "a", "--out", out)


def test_a_folder_by_its_dot(models: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    save_dcp(folder, models.networks["t2v", "transformer"].state_dict())
    monkeypatch.chdir(folder)
    base = ("--model", "t2v", "--checkpoint", ".", *files(models, "t2v"), "--prompt", "a", "--steps", 1)
    run("generate", *base, "--out", tmp_path / "x.gif")
    assert comment(tmp_path / "x.gif")["files"]["checkpoint"]["name"] == "weights"


def test_encoded_texts_in_the_place_of_the_encoder(models: World, run: Run, fail: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "text.safetensors", tmp_path / "x.npy"
    identity = {"encoder": {}, "tokens": TEXT["tokens"]}
    rcm.text.Embeddings.write(path, ["a red circle"], embedded(models, "a red circle"), **identity)
    options = ("--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--steps", 1, "--out", out)
    run("generate", *options, "--text", path, "--prompt", "a red circle")
    v = velocity(models.networks["t2v", "transformer"], embedded(models, "a red circle"))
    close(np.load(out), pixels(models.codec, few_steps(v, [noise((0, 0), 5, 0)])))
    assert "has no embedding of the prompt 'a'" in fail("generate", *options, "--text", path, "--prompt", "a")


def test_a_long_prompt_is_cut_and_that_is_said(models: World, run: Run, tmp_path: Path) -> None:
    options = ("--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--steps", 1)
    said = run("generate", *options, "--prompt", "circle " * 20, "--out", tmp_path / "x.npy")
    cut = ("circle " * 9)[:60]
    assert said == f'rcm generate: note: longer than 12 tokens, the rest is cut: "{cut}" ...\n'
    assert run("generate", *options, "--prompt", "circle " * 11, "--out", tmp_path / "x.npy") == ""


def test_benchmark_and_rounded_weights(
    models: World, capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path
) -> None:
    """Of three runs the first is to warm up; the figures are consistent."""
    from rcm.cli import main

    words = ["generate", "--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--steps", 2]
    words += ["--samples", 2, "--precision", "bfloat16", "--benchmark", "--prompt", "a", "--out", tmp_path / "x.gif"]
    assert main([str(word) for word in words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (comment(tmp_path / "x.gif")["prompts"], comment(tmp_path / "x-1.gif")["job"]) == (["a"], [0, 1])
    assert "batch 1, CPU, bfloat16, the mean of 2 after one to warm up" in line
    total, rate, sampling, decoding = (
        float(line.split(word)[0].split()[-1]) for word in (" s a sample", " frames per", " s for 2", " s for dec")
    )
    assert total == pytest.approx(sampling + decoding, rel=0.02) and rate == pytest.approx(5 / total, rel=0.02)


# --- Teachers --------------------------------------------------------------------------------------------------------


def test_a_teacher_is_guided_away_from_its_negative_prompt(models: World, run: Run, tmp_path: Path) -> None:
    network, out = models.networks["t2v", "transformer"], tmp_path / "x.npy"
    teacher = ("generate", "--model", "t2v", "--teacher", "--prompt", "a red circle", "--out", out)
    one, grey, none = (velocity(network, embedded(models, text)) for text in ("a red circle", "grey", "-x"))
    run(*teacher)
    close(np.load(out), pixels(models.codec, many_steps(guided(one, grey, 3.0), noise((0, 0), 5, 0), wan_grid())))
    changes = ("--negative-prompt", "-x", "--guidance", 2, "--steps", 2, "--shift", 5, "--sigma-max", 80)
    run(*teacher, *changes)
    close(
        np.load(out),
        pixels(models.codec, many_steps(guided(one, none, 2.0), noise((0, 0), 5, 0), wan_grid(2, 5.0, 80.0))),
    )


def test_a_converted_teacher_comes_first(models: World, run: Run, tmp_path: Path) -> None:
    """Where the pipeline has made a DCP folder of the download, that is the default."""
    out, folder = tmp_path / "x.npy", models.folder / "data/t2v/clips/teacher"
    other = models.networks["t2v", "second"]
    save_dcp(folder, other.state_dict())
    try:
        run("generate", "--model", "t2v", "--teacher", "--prompt", "a", "--guidance", 1, "--out", out)
    finally:
        shutil.rmtree(folder)
    expected = many_steps(velocity(other, embedded(models, "a")), noise((0, 0), 5, 0), wan_grid())
    close(np.load(out), pixels(models.codec, expected))


def test_the_noise_level_goes_with_the_shift(models: World, run: Run, tmp_path: Path) -> None:
    """A shift multiplies all noise levels, the first too: σ = shift · u / (1 - u)."""
    out, v = tmp_path / "x.npy", velocity(models.networks["t2v", "transformer"], embedded(models, "a"))
    run("generate", "--model", "t2v", "--teacher", "--prompt", "a", "--guidance", 1, "--shift", 6, "--out", out)
    close(np.load(out), pixels(models.codec, many_steps(v, noise((0, 0), 5, 0), wan_grid(3, 6.0, 400.0))))


@pytest.mark.parametrize("guidance", [2.0, 0.0])
def test_images_of_a_cosmos_network(
    guidance: float, models: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Karras' noise levels from 80 to 0.002, the last step left out; v_c + s (v_c - v_u), of which 0 leaves v_c."""
    out, network, bars = tmp_path / "x.png", models.networks["t2i", "transformer"], []

    class Bar(Progress):
        def __init__(self, name: str, total: int, *rest: Any, **words: Any) -> None:
            super().__init__(name, total, *rest, **words)
            bars.append(self)

    monkeypatch.setattr(generate, "Progress", Bar)
    run("generate", "--model", "t2i", "--teacher", "--prompt", "a red circle", "--guidance", guidance, "--out", out)
    assert [(bar.name, bar.done, bar.total) for bar in bars[1:]] == [("sample", 2, 2), ("decode", 1, 1)]
    sigmas = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 3) ** 7
    one, grey = (velocity(network, embedded(models, text)) for text in ("a red circle", "grey"))
    grid = [sigma / (1 + sigma) for sigma in sigmas]
    x = many_steps(guided(one, grey, guidance + 1), noise((0, 0), 1, 0) * grid[0], grid) / (1 - grid[-1])
    with Image.open(out) as image:
        assert image.size == (8 * WIDTH, 8 * HEIGHT) and not getattr(image, "is_animated", False)
        close(np.array(image)[None, 4::8, 4::8], pixels(models.codec, x))
    assert comment(out)["teacher"]["negative_prompt"] == "grey"


# --- Images to clips -------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Tensor]:
    """An image of just the height and twice the width, and what it is in [-1, 1]."""
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, 2 * WIDTH, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png", torch.from_numpy(values).permute(2, 0, 1)[None] / 127.5 - 1


MIDDLE = (..., slice(WIDTH // 2, 3 * WIDTH // 2))  # of a photo, what is kept of it


def test_wan21_from_an_image(models: World, photo: tuple[Path, Tensor], run: Run, tmp_path: Path) -> None:
    """The clip begins with the image cut to its size, CLIP sees all of it."""
    (path, image), out = photo, tmp_path / "x.npy"
    run("generate", "--model", "i2v", "--teacher", "--prompt", "a", "--image", path, "--size", "48x32", "--out", out)
    first = first_frame(models.codec, image[MIDDLE], 5)
    conditions = {"condition_BCTHW": first, "image_BLD": models.vision.encode(image)}
    network = models.networks["i2v", "transformer"]
    one, grey = (velocity(network, embedded(models, text), **conditions) for text in ("a", "grey"))
    close(np.load(out), pixels(models.codec, many_steps(guided(one, grey, 3.0), noise((0, 0), 5, 0), wan_grid())))


def test_wan22_switches_its_experts_at_the_boundary(
    models: World, photo: tuple[Path, Tensor], run: Run, fail: Run, tmp_path: Path
) -> None:
    (path, image), out = photo, tmp_path / "x.npy"
    high = models.folder / "data/experts/clips/checkpoints/transformer.pth"
    student = ("generate", "--model", "experts", "--checkpoint", high, "--prompt", "a", "--image", path, "--out", out,
               "--size", "48x32")  # fmt: skip
    assert "name that of low noise with --second-checkpoint" in fail(*student)  # not the teacher's, silently
    student = (*student, "--second-checkpoint", high.with_name("second.pth"))
    condition = first_frame(models.codec, image[MIDDLE], 5)
    first, second = (
        velocity(models.networks["experts", which], embedded(models, "a"), condition_BCTHW=condition)
        for which in ("transformer", "second")
    )
    for boundary in (0.9, 0.5):  # the times are 0.988, 0.783, 0.609, 0.406
        run(*student, *(() if boundary == 0.9 else ("--boundary", boundary)))
        expected = few_steps(
            lambda x, r, at=boundary: (first if r >= at else second)(x, r),
            [noise((0, 0), 5, 0, step) for step in range(4)],
        )
        close(np.load(out), pixels(models.codec, expected))


@pytest.mark.parametrize(("free", "where"), [(6.1, "cuda"), (5.9, "cpu")])
def test_the_second_expert_waits_where_there_is_no_room(
    free: float, where: str, models: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is that for its own weights and half as much, of 4 bytes each here."""
    network, places = nn.Linear(1, 1, bias=False), []
    network.time_scale = 1000.0
    monkeypatch.setattr(generate, "network", lambda *_, device, precision: (places.append(device), network)[1])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    order = SimpleNamespace(
        image=None,
        files=dict.fromkeys(("checkpoint", "second"), Path("x.pth")),
        settings={"network": {}, "boundary": 0.9},
        placed={"device": "cuda", "precision": "bfloat16"},
    )
    generate.opened(order, None)
    assert places == ["cuda", where]


def test_the_image_decides_the_aspect_ratio(models: World, run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (100, 400)).save(tmp_path / "tall.jpg")
    student = (
        "generate",
        "--model",
        "i2v",
        "--checkpoint",
        models.folder / "data/i2v/clips/checkpoints/transformer.pth",
    )
    options = ("--prompt", "a", "--image", tmp_path / "tall.jpg", "--steps", 1, "--out", tmp_path / "x.npy")
    run(*student, *options)
    assert np.load(tmp_path / "x.npy").shape == (5, 64, 16, 3)  # 48 x 32 pixels are 19.6 x 78.4 in 1 : 4


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--size 40x32",
            "the width is 40 pixels, but patch and codec take multiples of 16; the next ones are 32 and 48",
        ),
        ("--size 48x8", "the height is 8 pixels, but patch and codec take multiples of 16"),
        ("--frames 6", "6 frames asked for, but clips have 1 + a multiple of 4"),
        ("--frames 1", "1 frames asked for"),
        ("--steps 5", "5 steps"),
        ("--guidance 2", "--guidance is for teachers"),
        ("--aspect 1:1", "--aspect needs --resolution"),
        ("--size 48x32 --aspect 1:1", "omit --resolution and --aspect"),
        ("--image x.png", "this model takes no image"),
        ("--model nothing", "there is no model 'nothing'; there are "),
        ("--device cuda", "there is no GPU here"),
        ("--codec nowhere.pth", "nowhere.pth does not exist: add --download"),
        ("--text nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--second-checkpoint x.pth", "go together"),
        ("--boundary 0.5", "go together"),
        ("--second-checkpoint x.pth --boundary 1.5", "'1.5' is no number between 0 and 1"),
        ("--codec /", "'/' is neither a file nor a folder of one's own"),
        ("--samples 65537", "65537 samples of a prompt asked for, but it has noise for 65536"),
        ("--teacher --ode", "--ode is for students"),
        ("--teacher --guidance 0", "1 is no guidance"),
        ("--teacher --guidance -1", "'-1' is no number of 0 or more"),
        ("--sigma-max 0.1", "sigma_max is 0.1, must be at least"),
    ],
)
def test_mistakes(
    options: str, said: str, models: World, fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = ("--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--prompt", "a")
    message = fail("generate", *base, "--out", tmp_path / "x.png", *options.split())
    assert said in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("name", "option", "source"),
    [
        ("wan2.1-1.3b", (), "hf://Wan-AI/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors"),
        ("wan2.2-i2v-a14b", ("--image", "x.png"), "hf://Wan-AI/Wan2.2-I2V-A14B/high_noise_model/"),
    ],
)
def test_a_missing_file_says_how_to_get_it(
    name: str, option: Sequence[str], source: str, fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("x.png")
    said = fail("generate", "--model", name, "--teacher", "--prompt", "a", "--out", "x.mp4", *option)
    assert f" does not exist: add --download, which fetches it from {source}, or name another with --checkpoint" in said


@pytest.mark.parametrize("name", options("model"))
def test_models_without_an_experiment_are_whole(name: str) -> None:
    scale, settings = named(name)
    network, codec = settings["network"], settings["codec"]
    assert scale == name
    condition = network["in_channels"] - network["out_channels"]
    assert condition == (codec["stride"] + codec["channels"] if "i2v" in name else 0)
    assert network["text_width"] == settings["text"]["width"]
    assert network.get("image_width") == (settings["vision"]["width"] if "vision" in settings else None)
    assert ("second" in settings["checkpoints"]) == ("boundary" in settings)
    sizes.check(settings, (settings["width"], settings["height"]), settings["frames"])


def test_wan21_from_an_image_is_led_away_from_a_shaking_camera_too() -> None:
    of21, of22, of_text = (
        named(name)[1]["teacher"]["negative_prompt"] for name in ("wan2.1-i2v-14b", "wan2.2-i2v-a14b", "wan2.1-1.3b")
    )
    assert of21 == f"镜头晃动，{of_text}" and of22 == of_text


def test_an_image_to_video_model_needs_an_image(models: World, fail: Run, tmp_path: Path) -> None:
    said = fail("generate", "--model", "i2v", "--teacher", "--prompt", "a", "--out", tmp_path / "x.mp4")
    assert "say which with --image" in said


@pytest.mark.parametrize("example", STAGES["generate"].more)
def test_further_examples_parse(example: str) -> None:
    program, stage, *arguments = shlex.split(example)
    assert (program, stage) == ("rcm", "generate")
    assert parse(stage, arguments).model


@pytest.mark.parametrize(
    ("lacking", "options", "said"),
    [
        ("teacher", ("--teacher",), "the model lame is a student: omit --teacher, or name another with --model"),
        ("sampler", (), "the model lame is a teacher: add --teacher"),
        ("teacher.guidance_form", ("--teacher",), "the settings of the model lame lack 'guidance_form'"),
        ("sampler.mid_times", (), "missing 1 required positional argument: 'mid_times'"),
        ("codec", (), "the settings of the model lame lack 'codec'"),
        ("media", (), "the settings of the model lame lack 'media'"),
    ],
)
def test_a_model_file_that_lacks_something(
    lacking: str, options: Sequence[str], said: str, models: World, fail: Run, tmp_path: Path
) -> None:
    whole, (section, _, key) = model("t2v"), lacking.partition(".")
    whole = {**whole, section: {k: v for k, v in whole[section].items() if k != key}} if key else whole
    whole = whole if key else {name: value for name, value in whole.items() if name != section}
    path = models.folder / "config/model/lame.yaml"
    path.write_text(yaml.safe_dump(whole))
    bare = models.folder / "data/t2v/clips/checkpoints/transformer.pth"
    try:
        message = fail(
            *("generate", "--model", "lame", "--checkpoint", bare, *files(models, "t2v"), *options),
            *("--prompt", "a", "--out", tmp_path / "x.gif"),
        )
    finally:
        path.unlink()
    assert said in message


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("wan2.1-1.3b", "take the released one with --model wan2.1-1.3b-rcm --download"),
        ("wan2.1-i2v-14b", "this model has no student here: add --teacher, or name another with --checkpoint"),
        ("cosmos-predict2-2b", "distil it, or name another with --checkpoint"),
    ],
)
def test_what_to_do_without_a_student(
    name: str, remedy: str, fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert remedy in fail("generate", "--model", name, "--prompt", "a", "--out", "x.png")


@pytest.mark.parametrize("out", ["file/x.png", "folder.png"])
def test_where_nothing_can_be_written_nothing_is_done(
    out: str, models: World, fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rcm.cli.generate.encoded", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    base = ("--model", "t2v", "--checkpoint", models.folder / "student.safetensors", "--prompt", "a")
    assert str(tmp_path / out).removesuffix("/x.png") in fail("generate", *base, "--out", tmp_path / out)
