"""A scale of real models in miniature: every format and every kind of network and evaluator, with random weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from tests.text.tiny import SIZES, tiny_encoder, write_tokenizer
from torch import nn

import rcm.codecs
import rcm.networks

ROOT = Path(__file__).parents[2]
CODEC = {
    "kind": "wan-vae",
    "channels": 4,
    "cell": 8,
    "stride": 4,
    "width": 4,
    "multipliers": [1, 1, 1, 1],
    "blocks": 1,
    "mean": [0.1, -0.2, 0.3, 0.0],
    "std": [1.0, 2.0, 0.5, 1.5],
}
NETWORK = {
    "width": 24,
    "mlp_width": 32,
    "layers": 2,
    "heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_width": 16,
    "patch": [1, 2, 2],
}
WAN = {**NETWORK, "kind": "wan", "time_width": 8, "time_scale": 1000.0, "positions": None}
COSMOS = {**NETWORK, "kind": "cosmos", "adaln_width": 8, "rope_scale": [1.0, 4.0, 4.0], "time_scale": 1.0}
PROMPTS = ["a red circle", "a blue, red circle", "red & blue", "a circle", "circles"]
NAMES = ["red", "blue, red", "both", "circle", "circles"]  # of the same prompts, by which clips are named
ASKED = [  # VBench's dimensions of the first two; the others are not sampled
    ["subject_consistency", "background_consistency", "temporal_flickering"],
    ["appearance_style", "aesthetic_quality"],
]
PIPELINE = {
    "methods": ["rcm"],
    "clips": "all",
    "steps": [1],
    "nproc": 1,
    "controls": [],
    "figures": ["figure_training", "figure_precision"],
    "scatter": {"synthesize": 2, "embed": 2, "report": 2, "diversity": 1, "text": 1},
}
OF_MEDIA: dict[str, dict[str, list[str]]] = {
    "images": {
        "tables": ["table1", "table3", "table_text"],
        "figures": ["figure_samples", "figure_quality_diversity", "figure_steps"],
    },
    "clips": {"tables": ["table2", "table_text"], "figures": ["figure_clips"]},
}
EVALUATORS = {
    "images": ("detector", "clip_large", "dinov2", "vgg"),
    "clips": ("dino", "clip_base", "clip_large", "aesthetic", "dinov2", "vgg"),
}
EXPERIMENTS = {  # miniature: what it is one of
    "mini-wan-clips": "wan2.1-1.3b-clips",
    "mini-cosmos-images": "cosmos-predict2-0.6b-images",
}


def write(folder: Path) -> Path:
    """Write checkpoints as they are published, and a configuration with two scales of them; returns its folder."""
    files = folder / "published"
    files.mkdir(parents=True)
    sources: dict[str, dict[str, Path | None]] = {media: {} for media in ("clips", "images")}
    torch.manual_seed(0)
    safetensors.torch.save_file(_random(WAN).state_dict(), files / "wan.safetensors")
    parts = sorted(_random(WAN).state_dict().items())
    (files / "large").mkdir()
    for number, half in enumerate((parts[::2], parts[1::2]), 1):
        safetensors.torch.save_file(
            dict(half), files / "large" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    index = {name: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, (name, _) in enumerate(parts)}
    index_file = files / "large" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    state = {f"net.{name}": value.bfloat16() for name, value in _random(COSMOS).state_dict().items()}
    torch.save({**state, "net.blocks.0.self_attn.q_norm._extra_state": torch.zeros(0)}, files / "model.pt")
    flat = {
        name: v.flatten(1) if name == "patch_embedding.weight" else v for name, v in _random(WAN).state_dict().items()
    }
    torch.save({f"net.{name}": value for name, value in flat.items()}, files / "student.pt")  # as rCM's are
    torch.save(_random_codec().state_dict(), files / "vae.pth")
    torch.save(tiny_encoder("umt5").bfloat16().state_dict(), files / "umt5.pth")
    t5 = tiny_encoder("t5", seed=1).state_dict()
    torch.save({**t5, "decoder.block.0.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, files / "t5.bin")
    write_tokenizer(files / "tokenizer")
    (files / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (files / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    style = {"appearance_style": {"appearance_style": "pixel art"}}
    asked = [*ASKED, *(["scene"] for _ in NAMES[len(ASKED) :])]
    info = [{"prompt_en": name, "dimension": d, "auxiliary_info": style} for name, d in zip(NAMES, asked, strict=True)]
    (files / "info.json").write_text(json.dumps(info), encoding="utf-8")

    sources["clips"] = {
        "transformer": files / "wan.safetensors",
        "synthesizer": files / "large",
        "text": files / "umt5.pth",
        "prompts_names": files / "names.txt",
        "prompts_info": files / "info.json",
    }
    sources["images"] = {"transformer": files / "model.pt", "text": files / "t5.bin"}
    config = folder / "config"
    shutil.copytree(ROOT / "config", config)
    for name, whole in EXPERIMENTS.items():
        scale, _, media = name.rpartition("-")
        shared = {"codec": files / "vae.pth", "tokenizer": files / "tokenizer"}
        shared |= dict.fromkeys(("prompts_train", "prompts_report"), files / "prompts.txt")
        checkpoints = {
            key: {"source": f"{path}/" if path.is_dir() else str(path), "sha256": None}
            for key, path in {**shared, **sources[media]}.items()
            if path is not None
        }
        for key in EVALUATORS[media]:  # which `write_evaluators` makes
            place = f"{key}.pth" if key in ("aesthetic", "vgg") else f"{key}/"
            checkpoints[key] = {"source": f"{files}/{place}", "sha256": None}
        text = {"kind": "umt5" if media == "clips" else "t5", **SIZES}
        network = WAN if media == "clips" else COSMOS
        own = OF_MEDIA[media]
        pipeline = {**PIPELINE, **own, "figures": [*PIPELINE["figures"], *own["figures"]]}
        (config / "scale" / f"{scale}.yaml").write_text(yaml.safe_dump(pipeline))
        _write(config / "experiment" / f"{name}.yaml", whole, _changed(media, checkpoints, network, text))
        if media == "clips":
            released = {"student": {"source": str(files / "student.pt")}}
            released |= {key: checkpoints[key] for key in ("codec", "text", "tokenizer")}
            model = {
                "media": media,
                "frames": 5,
                "height": 32,
                "width": 48,
                "network": WAN,
                "codec": CODEC,
                "text": text,
            }
            model |= {"checkpoints": released, "sampler": {"sigma_max": 80.0, "mid_times": [1.5, 1.4, 1.0]}}
            (config / "model" / "mini-student.yaml").write_text(yaml.safe_dump(model))
    return config


def write_evaluators(files: Path) -> None:
    """Write what looks at samples, with few random weights, into a folder: `published` beside that of `write`."""
    from tests.evaluation.test_clip import write_clip
    from tests.evaluation.test_features import write_dino
    from tests.evaluation.test_mask2former import write_detector
    from transformers import ViTConfig, ViTModel

    from rcm.evaluation.features import Vgg

    write_detector(files / "detector")
    write_clip(files / "clip_large")
    write_clip(files / "clip_base", seed=1)
    write_dino(files / "dinov2")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3}
    ViTModel(ViTConfig(**sizes, image_size=224, patch_size=16), add_pooling_layer=False).save_pretrained(files / "dino")
    torch.save({"weight": torch.randn(1, 24), "bias": torch.randn(1)}, files / "aesthetic.pth")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Vgg().state_dict().items()}
    same = {  # one number a tensor, so that the file is small
        name: torch.full((1,), 1 / max(1, shape[1:].numel())).expand(shape) for name, shape in shapes.items()
    }
    torch.save(same, files / "vgg.pth")


def _random(settings: Mapping[str, Any]) -> nn.Module:
    """A network of which every part shows in the output."""
    network = rcm.networks.build(settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def _random_codec() -> nn.Module:
    return rcm.codecs.build(CODEC)


def _changed(media: str, checkpoints: Any, network: Any, text: Any) -> dict[str, Any]:
    """What the miniature has otherwise than the scale that it stands for."""
    listed = {"file": "prompts_report", "prompts": 2, "samples": 1, "still_samples": 2}
    evaluation = {"scorer": "geneval-mask2former", "known_at_least": 0.0} if media == "images" else {}
    return {
        "frames": 5 if media == "clips" else 1,
        "height": 32,
        "width": 48,
        "checkpoints": checkpoints,
        "network": network,
        "codec": CODEC,
        "text": text,
        **({"synthesizer": WAN} if media == "clips" else {}),
        "teacher": {"steps": 2},
        **({"synthesis": {"steps": 2}} if media == "clips" else {}),
        "inference": {"device": "cpu", "precision": "bfloat16", "batch": 2},
        "suites": {
            "train": {"prompts": 4},
            "dev": {"prompts": 2, "samples": 1},
            "report": {"seed": 43, "per_task": 1, "samples": 1} if media == "images" else {"seed": 43, **listed},
            "diversity": {"seed": 4, "file": "prompts_report", "prompts": 1, "samples": 2},
            "text": {"seed": 5, "prompts": 2, "samples": 1},
        },
        "evaluation": {
            "scorer": "vbench-native",
            "bootstrap": 20,
            "throughput": 1,
            "precision": {"times": 2, "samples": 1},
            **evaluation,
        },
        "distillation": {
            "student_updates": 2,
            "batch": 2,
            "tangent_warmup": 0,
            "student_every": 2,
            "max_rollout": 2,
            "preview_every": 1,
            "discriminator": {"layers": [0, 1], "heads": 2, "critic_weight": 1.0},
        },
        "parallel": {"device": "cpu", "precision": "float32", "recompute": "none", "workers": 0, "micro_batch": 1},
    }


def _write(path: Path, whole: str, changed: Mapping[str, Any]) -> None:
    """An experiment that takes `whole`, without its groups, and changes some of it."""
    from rcm.cli.config import compose

    tree = compose([f"experiment={whole}"])
    for key, value in changed.items():
        if key == "suites":
            continue
        merged = key in ("teacher", "synthesis", "distillation", "parallel", "inference", "evaluation")
        tree[key] = {**tree[key], **value} if merged else value
    if "synthesizer" not in changed:
        tree["synthesizer"] = changed["network"]
        tree["synthesis"] = tree["teacher"]
    drawn = ("train", "dev")
    tree["suites"] = {k: {**(tree["suites"][k] if k in drawn else {}), **s} for k, s in changed["suites"].items()}
    for key in ("objective", "seed", "suite"):
        tree.pop(key)
    path.write_text("# @package _global_\n" + yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
