"""The flags of text2image: which model, and how a picture is drawn; importing them costs no jax."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.settings import SamplerName, Spacing, as_flag, require, require_at_least

MOST_GUIDANCE = 1000
"""Far above what draws anything, and far below where 1 - g is no number of its own in float32."""


@dataclass(frozen=True)
class LatentModelSettings:
    """Which Stable Diffusion."""

    model: str = "tiny"
    """Folder or Hugging Face name of a diffusers pipeline; `tiny` has random weights and draws noise, in seconds;
    `tiny-world` draws the embedded digits, and is trained first, half an hour or more, once."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    embeddings: tuple[Path, ...] = ()
    """Files of learned words (textual inversion), .safetensors, .bin or .pt."""
    adapters: tuple[Path, ...] = ()
    """Files of learned words and matrices, made by textual_inversion; matrices for all tokens (Custom Diffusion) of
    several are merged, those for the tokens of a word (ConceptSplit) need not be."""
    captions: Path | None = None
    """Text file of captions, one a line, that merging leaves as they are (arXiv 2212.04488); None means built-in ones.
    Only with two --adapters or more."""
    adjust: tuple[str, ...] = ()
    """WORD:CLASS, such as "<new1>:dog": draw with the learned word turned towards its class and of a class's length, so
    that it leaves room for the rest of a prompt (test-time embedding adjustment, arXiv 2506.22685)."""
    adjust_angle: float | None = None
    """Share of the angle that words turn, 0 for none and 1 for all of it; None means 0.2. Only with --adjust."""
    adjust_norm: float | None = None
    """Length of the turned words, in lengths of their class; None means 1. Only with --adjust."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of text encoder and UNet; None means bfloat16 on an accelerator and float32 on a CPU."""
    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the autoencoder."""

    def __post_init__(self):
        require(bool(self.model.strip()), "--model must name a folder, a model on the hub, or tiny")
        require(
            self.revision is None or self.model not in ("tiny", "tiny-world"),
            f"--revision has no effect with --model {self.model}: drop it",
        )
        for text in self.adjust:
            require(all(text.rpartition(":")[::2]), f'--adjust must be WORD:CLASS, such as "<new1>:dog", got {text!r}')
        words = [text.rsplit(":", 1)[0] for text in self.adjust]
        require(len(set(words)) == len(words), "--adjust: one word is given twice")
        for name in ("adjust_angle", "adjust_norm"):
            require(
                bool(self.adjust) or getattr(self, name) is None,
                f"{as_flag(name)} has no effect without --adjust: add it, or drop {as_flag(name)}",
            )
        angle, norm = self.adjust_angle, self.adjust_norm
        require(angle is None or 0 <= angle <= 1, f"--adjust-angle must lie in [0, 1], got {angle}")
        require(norm is None or 0 < norm < math.inf, f"--adjust-norm must be positive and finite, got {norm}")
        require(
            self.captions is None or len(self.adapters) > 1,
            "--captions has no effect without two --adapters to merge: drop it",
        )


@dataclass(frozen=True)
class PictureSettings:
    """From text to picture."""

    negative: str = ""
    """What not to draw, for all prompts."""
    num_steps: int = 50
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance g = 1 + w of arXiv 2207.12598: 0 leaves the text out, 1 follows it, more follows it
    strongly. What diffusers draws without guidance, at 0 too, is 1 here."""
    sampler: SamplerName | None = None
    """Reverse process; None means the model's own, PNDM for Stable Diffusion 1."""
    spacing: Spacing | None = None
    """Which timesteps the steps visit (arXiv 2305.08891, table 2; karras: 2206.00364); None means the model's own."""
    eta: float | None = None
    """Share of DDPM's noise in a DDIM step, 0 to 1; None means 0. Only with --sampler ddim."""
    height: int | None = None
    """Pixels; None means what the model was trained on, 512 for Stable Diffusion 1."""
    width: int | None = None
    """Pixels; None means the same."""
    long_prompts: bool = False
    """Encode prompts in pieces of 75 tokens, as many as they need, instead of refusing long ones."""
    seed: int = 0
    """Seed of the noise: picture i of prompt p depends on the seed, p and i alone."""
    batch_size: int = 4
    """Most pictures drawn at once."""

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "height", "width"):
            require_at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(
            0 <= self.guidance_scale <= MOST_GUIDANCE,
            f"--guidance-scale must lie in [0, {MOST_GUIDANCE}], got {self.guidance_scale}",
        )
        require(self.eta is None or 0 <= self.eta <= 1, f"--eta must lie in [0, 1], got {self.eta}")
        require(
            self.eta is None or self.sampler == "ddim",
            "--eta has no effect without --sampler ddim: add it, or drop --eta",
        )
        require(
            not self.negative or self.guidance_scale != 1,
            "--negative has no effect at --guidance-scale 1: drop one of them",
        )
