"""Networks in diffusers' layout: names of the tensors, both ways, and the `config.json` beside them.

Shapes and values are the same: `WanTransformer3DModel` and `CosmosTransformer3DModel` differ in names alone. Not in
them are the time scale (their schedulers' `num_train_timesteps`), and what is this project's own: learned absolute
positions and the second time.
"""

import re
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from rcm.artefact import UserError
from rcm.networks.cosmos import CosmosTransformer
from rcm.networks.wan import WanTransformer

# Our names of modules and parameters, and theirs; `*` is the number of a block.
_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_WAN = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    **{f"blocks.*.self_attn.{ours}": f"blocks.*.attn1.{theirs}" for ours, theirs in _WAN_ATTENTION.items()},
    **{f"blocks.*.cross_attn.{ours}": f"blocks.*.attn2.{theirs}" for ours, theirs in _WAN_ATTENTION.items()},
    "blocks.*.norm3": "blocks.*.norm2",  # numbered in the order of use
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_COSMOS_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_COSMOS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "blocks.*.adaln_modulation_self_attn.1": "transformer_blocks.*.norm1.linear_1",
    "blocks.*.adaln_modulation_self_attn.2": "transformer_blocks.*.norm1.linear_2",
    "blocks.*.adaln_modulation_cross_attn.1": "transformer_blocks.*.norm2.linear_1",
    "blocks.*.adaln_modulation_cross_attn.2": "transformer_blocks.*.norm2.linear_2",
    "blocks.*.adaln_modulation_mlp.1": "transformer_blocks.*.norm3.linear_1",
    "blocks.*.adaln_modulation_mlp.2": "transformer_blocks.*.norm3.linear_2",
    **{f"blocks.*.self_attn.{ours}": f"transformer_blocks.*.attn1.{name}" for ours, name in _COSMOS_ATTENTION.items()},
    **{f"blocks.*.cross_attn.{ours}": f"transformer_blocks.*.attn2.{name}" for ours, name in _COSMOS_ATTENTION.items()},
    "blocks.*.mlp.layer1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.layer2": "transformer_blocks.*.ff.net.2",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_NAMES = {"wan": _WAN, "cosmos": _COSMOS}
_CLASSES = {"wan": WanTransformer, "cosmos": CosmosTransformer}


def to_diffusers(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of each of our names, for a network of these settings (`kind` decides).

    Raises UserError for a name that has no place in diffusers' class.
    """
    return {name: _renamed(name, _NAMES[settings["kind"]], "diffusers' layout") for name in names}


def from_diffusers(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Our name of each of diffusers' names; UserError for one that is not of such a network."""
    ours = {theirs: name for name, theirs in _NAMES[settings["kind"]].items()}
    return {name: _renamed(name, ours, f"a network of kind {settings['kind']}") for name in names}


def _renamed(name: str, table: Mapping[str, str], where: str) -> str:
    pattern, number = re.sub(r"(?<=blocks\.)\d+", "*", name), re.search(r"(?<=blocks\.)\d+", name)
    module, _, parameter = pattern.rpartition(".")
    if pattern in table:
        renamed = table[pattern]
    elif module in table and parameter in ("weight", "bias"):
        renamed = f"{table[module]}.{parameter}"
    else:
        raise UserError(f"{name} has no place in {where}; expected the tensors of a published architecture")
    return renamed.replace("*", number[0]) if number else renamed


def config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the `config.json` holds from which diffusers builds a network of these settings.

    Raises UserError for settings that diffusers' class does not have.
    """
    kind = settings["kind"]
    defaults = {name: parameter.default for name, parameter in signature(_CLASSES[kind]).parameters.items()}
    s = defaults | dict(settings)
    common = {
        "num_attention_heads": s["heads"],
        "attention_head_dim": s["width"] // s["heads"],
        "num_layers": s["layers"],
        "in_channels": s["in_channels"],
        "out_channels": s["out_channels"],
        "patch_size": list(s["patch"]),
    }
    if kind == "cosmos":
        return {
            "_class_name": "CosmosTransformer3DModel",
            **common,
            "mlp_ratio": s["mlp_width"] / s["width"],
            "text_embed_dim": s["text_width"],
            "adaln_lora_dim": s["adaln_width"],
            "rope_scale": list(s["rope_scale"]),
            "max_size": [128, 240, 240],  # of latents, as published
            "concat_padding_mask": True,
            "extra_pos_embed_type": None,
        }
    if own := [name for name in ("positions", "second_time") if s[name]]:
        raise UserError(
            f"the network has {' and '.join(own)}, which diffusers' WanTransformer3DModel has not; expected the "
            "settings of a published architecture"
        )
    return {
        "_class_name": "WanTransformer3DModel",
        **common,
        "ffn_dim": s["mlp_width"],
        "text_dim": s["text_width"],
        "freq_dim": s["time_width"],
        "image_dim": s["image_width"],
        "added_kv_proj_dim": s["width"] if s["image_width"] else None,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": s["eps"],
    }
