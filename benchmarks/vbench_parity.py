"""VBench's own functions against the native ones, on the same rendered clips and with the same random weights.

PYTHONPATH=src:kernels python benchmarks/vbench_parity.py [--dino-code vision_transformer.py]

It needs an environment that has this project's packages and VBench's (the package vbench, openai-clip, decord,
torchvision, setuptools<81, numpy<2); what cannot be imported is said and left out. `--dino-code` is the file of that
name of facebookresearch/dino: VBench fetches it by torch.hub. Models are of the real classes, small and with random
weights, which are written under the names of the hub's checkpoints. The clips are lossless, so both sides decode the
same pixels.
"""

import argparse
import gzip
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imageio_ffmpeg
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rcm.data import prompts, world
from rcm.evaluation.samples import read_frames
from rcm.evaluation.vbench_native import DIMENSIONS, Models

STYLE = "pixel art"
METADATA = {"name": "a clip", "auxiliary_info": {"appearance_style": {"appearance_style": STYLE}}}


def write_clips(folder: Path, clips: int, frames: int, height: int, width: int, seed: int) -> list[str]:
    """Scenes of the tiny world, enlarged, with noise; H.264 in RGB without loss."""
    rng = np.random.default_rng(seed)
    suite = prompts.evaluation_suite(prompts.TINY, seed=seed, per_task=4)
    paths = []
    for index in range(clips):
        caption = prompts.as_clip(suite[int(rng.integers(len(suite)))], "right")
        scene = world.render(world.sample_scene(caption, rng), frames)
        large = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in scene]
        noisy = [np.clip(frame + rng.normal(0, 6, frame.shape), 0, 255).astype(np.uint8) for frame in large]
        path = folder / f"a clip-{index}.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path), (width, height), pix_fmt_in="rgb24", pix_fmt_out="rgb24", codec="libx264rgb", fps=16,
            output_params=["-crf", "0"], macro_block_size=1, quality=None,
        )  # fmt: skip
        writer.send(None)
        for frame in noisy:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        if not np.array_equal(read_frames(path), np.stack(noisy)):
            raise SystemExit(f"{path} is not lossless")
        paths.append(str(path))
    return paths


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights of a spread that keeps signals of order one, so that features differ from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel() if "embedding" not in name and "embed" not in name else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.float().eval()


# --- CLIP ----------------------------------------------------------------------------------------------------------


def official_clip(features: int, patch: int, seed: int) -> nn.Module:
    """A model of OpenAI's class, of two layers, for pictures of 224 pixels."""
    code = importlib.import_module("clip.model")
    torch.manual_seed(seed)
    model = code.CLIP(features, 224, 2, 64, patch, 77, 49408, 64, 1, 2)
    randomised(model, seed)
    model.logit_scale.data.fill_(float(np.log(100)))
    return model


def write_clip(folder: Path, model: nn.Module, features: int, patch: int) -> None:
    """The same weights as transformers' folder, with the vocabulary of openai-clip."""
    state = model.state_dict()
    out: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for source, target in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
        for i in range(2):
            block, layer = f"{source}.resblocks.{i}", f"{target}.encoder.layers.{i}"
            norms |= {f"{block}.ln_{k}": f"{layer}.layer_norm{k}" for k in (1, 2)}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms |= {f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj"}
            for kind in ("weight", "bias"):
                for name, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    out[f"{layer}.self_attn.{name}_proj.{kind}"] = part
    for name, other in norms.items():
        out |= {f"{other}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    width = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    part = {**width, "hidden_act": "quick_gelu"}
    text = {**part, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": features,
        "text_config": text | {"projection_dim": features},
        "vision_config": part | {"image_size": 224, "patch_size": patch, "projection_dim": features},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in out.items()}, folder / "model.safetensors")
    code = importlib.import_module("clip.simple_tokenizer")
    (folder / "vocab.json").write_text(json.dumps(code.SimpleTokenizer().encoder))
    lines = gzip.decompress(Path(code.default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")


# --- DINO ----------------------------------------------------------------------------------------------------------


def official_dino(path: Path) -> nn.Module:
    """DINO's own class with three layers of ViT-S's width."""
    spec = importlib.util.spec_from_file_location("dino_code", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    torch.manual_seed(3)
    norm = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731 - what DINO's functions pass
    model = code.VisionTransformer(
        patch_size=16, embed_dim=192, depth=3, num_heads=3, mlp_ratio=4, qkv_bias=True, norm_layer=norm
    )
    return randomised(model, 3)


def write_dino(folder: Path, model: nn.Module) -> None:
    """The same weights under the names of facebook/dino-vitb16."""
    state = model.state_dict()
    out = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
    }
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(3):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        names |= {f"{block}.norm1": f"{layer}.layernorm_before", f"{block}.norm2": f"{layer}.layernorm_after"}
        names |= {f"{block}.attn.proj": f"{layer}.attention.output.dense"}
        names |= {f"{block}.mlp.fc1": f"{layer}.intermediate.dense", f"{block}.mlp.fc2": f"{layer}.output.dense"}
        for kind in ("weight", "bias"):
            parts = state[f"{block}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{layer}.attention.attention.{name}.{kind}"] = part
    for name, other in names.items():
        out |= {f"{other}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-12,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in out.items()}, folder / "model.safetensors")


# --- Comparison ----------------------------------------------------------------------------------------------------


def official_functions(folder: Path, dino_code: Path | None) -> dict[str, Callable[[list[str]], Any]]:
    """VBench's functions by dimension, ready to be given videos; writes the same weights for the native ones."""

    def flicker(videos: list[str]) -> Any:
        return importlib.import_module("vbench.temporal_flickering").temporal_flickering(videos)

    def subject(videos: list[str]) -> Any:
        if dino_code is None:
            raise ImportError("DINO's own code was not given (--dino-code)")
        model = official_dino(dino_code)
        write_dino(folder / "dino", model)
        code = importlib.import_module("vbench.subject_consistency")
        return code.subject_consistency(model, videos, "cpu", False)

    def background(videos: list[str]) -> Any:
        model = official_clip(48, 32, 1)
        write_clip(folder / "clip_base", model, 48, 32)
        code = importlib.import_module("vbench.background_consistency")
        with torch.no_grad():
            return code.background_consistency(model, None, videos, "cpu", False)

    def style(videos: list[str]) -> Any:
        code = importlib.import_module("vbench.appearance_style")
        model = official_clip(48, 32, 1)  # what background consistency has written
        asked = [{"auxiliary_info": {"appearance_style": STYLE}, "video_list": videos}]
        return code.appearance_style(model, asked, "cpu")

    def aesthetic(videos: list[str]) -> Any:
        model = official_clip(768, 14, 2)
        write_clip(folder / "clip_large", model, 768, 14)
        head = randomised(nn.Linear(768, 1), 4)
        torch.save(head.state_dict(), folder / "aesthetic.pth")
        return importlib.import_module("vbench.aesthetic_quality").laion_aesthetic(head, model, videos, "cpu")

    return {
        "temporal_flickering": flicker,
        "subject_consistency": subject,
        "background_consistency": background,
        "appearance_style": style,
        "aesthetic_quality": aesthetic,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dino-code", type=Path, help="vision_transformer.py of facebookresearch/dino")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = (arguments.clips, arguments.frames, arguments.height, arguments.width)
        videos = write_clips(folder, *size, arguments.seed)
        functions = official_functions(folder, arguments.dino_code)
        paths = {name: folder / name for name in ("dino", "clip_base", "clip_large")}
        models = Models({**paths, "aesthetic": folder / "aesthetic.pth"})
        print("{} clips of {} frames, {} x {}, random weights, CPU, torch {}".format(*size, torch.__version__))
        print(f"{'':24s}{'official':>12s}{'native':>12s}{'mean diff.':>12s}{'largest':>12s}")
        for dimension in DIMENSIONS:
            try:
                _, found = functions[dimension](videos)
            except ImportError as error:
                print(f"{dimension:24s}not run: {error}")
                continue
            theirs = np.array([entry["video_results"] for entry in found])
            ours = np.array([models.value(dimension, read_frames(path), METADATA) for path in videos])
            gap = ours - theirs
            numbers = f"{theirs.mean():12.6f}{ours.mean():12.6f}{gap.mean():12.1e}{np.abs(gap).max():12.1e}"
            print(f"{dimension:24s}{numbers}")
        others = "RAFT, AMT, MUSIQ, GRiT, UMT, Tag2Text and ViCLIP"
        print(f"The other 11 dimensions have no native counterpart: they take {others}.")


if __name__ == "__main__":
    main()
