"""Files in the wrong place, by the names that published ones hold, are refused by what they are."""

import re

import pytest
import torch
from conversion import convert
from conversion import refused as refused_conversion
from safetensors.torch import save_file

from jaxdiff.errors import InputError
from jaxdiff.io.adapters import read_adapter
from jaxdiff.io.learned_embeddings import read_learned

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
KINDS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": "a LoRA",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": "a LoRA",
    f"unet.{ATTENTION}.to_q.lora_A.weight": "a LoRA",
    f"unet.{ATTENTION}.to_q.lora.up.weight": "a LoRA",
    f"unet.{ATTENTION}.processor.to_q_lora.down.weight": "a LoRA",
    f"{ATTENTION}.processor.to_out_lora.up.weight": "a LoRA",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": "a LoRA",
    "base_model.model.down_blocks.0.attn1.to_q.lora_B.default.weight": "a LoRA",
    "text_model.encoder.layers.0.mlp.fc1.hada_w1_a": "a LoRA",
    "lycoris_unet_down_blocks_0_attentions_0_proj_in.diff": "a LoRA",
    "oft_unet_down_blocks_0_attentions_0_proj_in.oft_blocks": "a LoRA",
    "image_proj.norm.weight": "an IP-Adapter",
    "down_blocks.0.motion_modules.0.norm.weight": "a motion module of AnimateDiff",
    f"{ATTENTION}.processor.to_k_custom_diffusion.weight": "Custom Diffusion as diffusers reads it, beside which "
    "jaxdiff writes adapter.safetensors",
    "clip_g": "learned words of Stable Diffusion XL or 3",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": "Stable Diffusion XL or its kin",
    "add_embedding.linear_1.weight": "Stable Diffusion XL or its kin",
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3 or its kin",
    "transformer_blocks.0.attn.add_q_proj.weight": "Stable Diffusion 3 or its kin",
    "double_blocks.0.img_attn.qkv.weight": "Flux or its kin",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux or its kin",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    f"{ATTENTION}.to_q.weight": "one network of a diffusers folder",
}
"""Of files that are taken nowhere: one name, and what they are."""


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_taken_nowhere_says_what_it_is(tmp_path, name):
    save_file({"a": torch.ones(2, 2), name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(2, 2), name: torch.ones(2, 2)}, tmp_path / "a.pt")
    told = f"holds {name}, so it is {KINDS[name]}; taken here "
    for ending in ("safetensors", "pt"):
        with pytest.raises(InputError, match=re.escape(told) + "are learned words of textual inversion") as found:
            read_learned(tmp_path / f"a.{ending}")
        assert str(found.value).startswith(f"--embeddings {tmp_path / 'a'}")
        answer = convert(tmp_path / f"a.{ending}", tmp_path / "out", kind="stable_diffusion")
        refused_conversion(answer, told + "is a single file with all three networks of Stable Diffusion 1.x or 2.x")
    with pytest.raises(InputError, match=re.escape(told) + "are adapters that jaxdiff"):
        read_adapter(tmp_path / "a.safetensors")
    refused_conversion(convert(tmp_path / "a.pt", tmp_path / "out"), told + "is the course's UNet.pt")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("word.<new1>", "an adapter of jaxdiff, which --adapters takes"),
        ("emb_params", "a learned word, which --embeddings takes"),
        ("clip_l", "a learned word, which --embeddings takes"),
        ("<cat-toy>", "a learned word, which --embeddings takes"),
        ("model.diffusion_model.out.0.weight", "Stable Diffusion as a single file, which weights_convert takes"),
    ],
)
def test_a_file_that_is_taken_elsewhere_says_where(tmp_path, name, what):
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    told = f"holds {name}, so it is {what}; taken here "
    if "--embeddings" not in what:
        with pytest.raises(InputError, match=re.escape(told)):
            read_learned(tmp_path / "a.safetensors")
    if "--adapters" not in what:
        with pytest.raises(InputError, match=re.escape(told)):
            read_adapter(tmp_path / "a.safetensors")
    if "weights_convert" not in what:
        refused_conversion(convert(tmp_path / "a.safetensors", tmp_path / "out", kind="stable_diffusion"), told)
    refused_conversion(convert(tmp_path / "a.safetensors", tmp_path / "out"), told)


def test_a_checkpoint_with_a_state_dict_is_told_by_the_names_in_it(tmp_path):
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="so it is Stable Diffusion as a single file"):
        read_learned(tmp_path / "a.pt")
