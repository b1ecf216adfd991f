"""What kind of file holds which names of tensors, so that a file in the wrong place is refused by what it is."""

import re
from collections.abc import Iterable
from typing import Literal

from jaxdiff.errors import InputError

Kind = Literal["words", "adapter", "checkpoint", "course"]
"""Of files that jaxdiff takes: learned words, its own adapters, whole Stable Diffusion, the course's network."""

TAKEN: dict[Kind, str] = {
    "words": "taken here are learned words of textual inversion for Stable Diffusion 1.x and 2.x",
    "adapter": "taken here are adapters that jaxdiff's textual_inversion wrote",
    "checkpoint": "taken here is a single file with all three networks of Stable Diffusion 1.x or 2.x, or a folder",
    "course": "taken here is the course's UNet.pt, or a folder of diffusers with a UNet2DModel",
}
"""By what is wanted, the end of the sentence."""

KINDS: tuple[tuple[str, Kind | None, str], ...] = (
    (
        "a LoRA",
        None,
        r"(lora|oft|lycoris)_(unet|te\d?|transformer|prior|text_model)_.*"
        r"|(.*\.)?lora_(A|B|down|up|linear_layer|magnitude_vector)(\..*)?"
        r"|.*\.lora\.(up|down)\..*|.*processor\.to_(q|k|v|out)_lora\..*"
        r"|.*\.(hada_w\d(_[ab])?|lokr_w\d(_[ab])?|dora_scale)",
    ),
    ("learned words of Stable Diffusion XL or 3", None, r"clip_g|t5xxl"),
    ("Stable Diffusion XL or its kin", None, r"conditioner\.embedders\..*|(.*\.)?add_embedding\.linear_1\..*"),
    ("Flux or its kin", None, r"(.*\.)?(double_blocks|single_transformer_blocks)\.\d+\..*"),
    ("Stable Diffusion 3 or its kin", None, r"(.*\.)?(joint_blocks|transformer_blocks\.\d+\.attn\.add_q_proj)\..*"),
    ("an IP-Adapter", None, r"image_proj\..*|ip_adapter\..*"),
    ("a motion module of AnimateDiff", None, r"(.*\.)?(motion_modules|temporal_transformer)\..*"),
    (
        "Custom Diffusion as diffusers reads it, beside which jaxdiff writes adapter.safetensors",
        None,
        r".*_custom_diffusion\..*",
    ),
    ("a ControlNet", None, r"(.*\.)?(input_hint_block|controlnet_cond_embedding)\..*"),
    (
        "Stable Diffusion as a single file, which weights_convert takes",
        "checkpoint",
        r"(model\.diffusion_model|first_stage_model|cond_stage_model)\..*",
    ),
    ("one network of a diffusers folder", None, r"(encoder\.)?down_blocks\..*|text_model\.encoder\..*"),
    ("an adapter of jaxdiff, which --adapters takes", "adapter", r"(word|unet)\..+"),
    ("a learned word, which --embeddings takes", "words", r"emb_params|clip_l|<[^<>]+>"),
)
"""What a file is, its kind if jaxdiff takes it, and what the name of one of its tensors is like; the first counts."""


def check_kind(origin: str, names: Iterable[object], wanted: Kind) -> None:
    """Check that the names in a file are not those of a known kind of file that is not wanted.

    Args:
      origin: what the user named, with which the message begins.
      names: of all its tensors; what is no text is of no kind.
      wanted: the kind that is taken here.

    Raises:
      InputError: it is of another kind; the message says of which, and what is taken.
    """
    words = [name for name in names if isinstance(name, str)]
    for what, kind, pattern in KINDS:
        compiled = re.compile(pattern)
        if found := next((word for word in words if compiled.fullmatch(word)), None):
            if kind != wanted:
                raise InputError(f"{origin}: holds {found}, so it is {what}; {TAKEN[wanted]}")
            return
