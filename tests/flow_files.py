"""Transformers of flow matching in one file, by the names of their first publication."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

QKV = r"(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)"
MLP = {
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
#: diffusers' words -> theirs; the longer ones first.
WORDS: dict[str, dict[str, str]] = {
    "sd3": {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "transformer_blocks": "joint_blocks",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "norm1.linear": "x_block.adaLN_modulation.1",
        **MLP,
    },
    "flux": {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "norm1_context.linear": "txt_mod.lin",
        "norm1.linear": "img_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    },
    "klein": {
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "modulation_img.linear": "modulation_img.lin",
        "modulation_txt.linear": "modulation_txt.lin",
        "stream_modulation.linear": "stream_modulation.lin",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        "attn.to_qkv_mlp_proj": "linear1",
    },
    "sana": {
        "patch_embed.proj": "x_embedder.proj",
        "time_embed.linear": "t_block.1",
        "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "caption_projection.linear_": "y_embedder.y_proj.fc",
        "caption_norm": "attention_y_norm",
        "transformer_blocks": "blocks",
        "attn1.to_out.0": "attn.proj",
        "attn2.to_out.0": "cross_attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv",
        "ff.conv_point": "mlp.point_conv.conv",
        "proj_out": "final_layer.linear",
    },
    "z_image": {
        "all_final_layer.2-1": "final_layer",
        "all_x_embedder.2-1": "x_embedder",
        "attention.norm_k": "attention.k_norm",
        "attention.norm_q": "attention.q_norm",
        "attention.to_out.0": "attention.out",
    },
}
FLUXES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "attn.to_out.0": "img_attn.proj",
}


def original(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' by their first names."""
    if family == "qwen_image":  # it was published under the same
        return dict(state)
    found: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    last = max(
        (int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)", n) for n in state) if m),
        default=0,
    )
    # of what is fused q comes first, of a single block the MLP last
    for name in sorted(state, key=lambda n: ("proj_mlp" in n, "_v" in n, "_k" in n)):
        t = state[name]
        swapped = "norm_out.linear" in name
        swapped |= family == "sd3" and f"transformer_blocks.{last}.norm1_context" in name
        new, single = name, name.startswith("single_transformer_blocks")
        fused = re.search(rf"(attn1?|attention)\.{QKV}\.(weight|bias)$", name)
        if family == "sana":
            fused = fused or re.search(r"(attn2)\.(to_k|to_v)\.(weight|bias)$", name)
        if single and family == "flux":
            fused = fused or re.search(r"(proj_mlp)\.(weight|bias)$", name)
        if fused:
            text = "add_" in name
            place = "linear1" if single else f"{'txt' if text else 'img'}_attn.qkv"
            if family == "sd3":
                place = f"{'context' if text else 'x'}_block.attn.qkv"
            elif family == "z_image":
                place = "attention.qkv"
            elif family == "sana":
                place = "attn.qkv" if fused[1] == "attn1" else "cross_attn.kv_linear"
            new = f"{name[: fused.start()]}{place}.{fused[fused.lastindex]}"
        for old, word in WORDS[family].items():
            new = new.replace(old, word)
        if family in ("flux", "klein"):
            for old, word in FLUXES.items():
                new = new.replace(old, word)
            side = "norm" if single else "img_attn.norm"
            new = new.replace("attn.norm_q.weight", f"{side}.query_norm.scale")
            new = new.replace("attn.norm_k.weight", f"{side}.key_norm.scale")
            if single:
                new = new.replace("proj_out", "linear2").replace("attn.to_out", "linear2")
                new = new.replace("norm.linear", "modulation.lin")
            elif new.startswith("proj_out"):
                new = new.replace("proj_out", "final_layer.linear")
            new = new.replace("norm_out.linear", "final_layer.adaLN_modulation.1")
            new = new.replace("single_transformer_blocks", "single_blocks")
            new = new.replace("transformer_blocks", "double_blocks")
        if name == "scale_shift_table":  # of Sana, whose blocks have such a table too
            new = "final_layer.scale_shift_table"
        t = torch.cat(t.chunk(2)[::-1]) if swapped else t
        parts.setdefault(new, []).append(t)
    for new, ts in parts.items():
        found[new] = torch.cat(ts) if ts[1:] else ts[0]
    return found
