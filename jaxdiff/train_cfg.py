"""Train a class- and domain-conditional diffusion model with classifier-free guidance, sample it and judge it.

    python -m jaxdiff.train_cfg --data digits --out runs/digits

Writes into --out: checkpoints, metrics.jsonl and TensorBoard files, sample grids, reverse-process strips,
results.json and report.html. Run the same command again to go on where it stopped.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import run_command
from jaxdiff.settings import DiffusionSettings, SamplingSettings, require, require_trained_branches


@dataclass(frozen=True)
class Config:
    """Train a class- and domain-conditional diffusion model, sample it and judge the samples."""

    data: str = "digits"
    """`digits` (embedded), a folder, or tfds:NAME[,NAME...]; see the README for the layouts."""
    out: Path = Path("runs/train_cfg")
    """Run folder; an unfinished run found there goes on."""
    seed: int = 0
    """Seed of initial parameters, data order, noise and samples."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the run folder's last checkpoint, or delete its checkpoints and start over."""
    devices: int | None = None
    """Devices that share a batch; None means all."""
    image_size: int | None = None
    """Height and width in pixels to resize to; None keeps the data's own."""
    preset: Literal["tiny", "small", "base"] = "tiny"
    """UNet: tiny 1.1 M, small 4.4 M or base 27.2 M parameters (10 classes, 2 domains)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters and schedule stay float32."""
    diffusion: Annotated[DiffusionSettings, tyro.conf.arg(name="")] = field(default_factory=DiffusionSettings)
    train_steps: int = 1500
    """Training steps."""
    batch_size: int = 64
    """Images of a training step, over all devices."""
    accumulation_steps: int = 1
    """Equal parts that a batch is worked through in, to save memory."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a cosine to 0 follows."""
    weight_decay: float = 0.01
    """Decoupled weight decay of kernels."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    ema_decay: float = 0.995
    """Limit of the decay of the parameter average that is sampled from, in [0, 1)."""
    class_dropout: float = 0.1
    """Probability that an image loses its class alone."""
    domain_dropout: float = 0.0
    """Probability that an image loses its domain alone."""
    joint_dropout: float = 0.1
    """Probability that an image loses both."""
    log_every: int = 20
    """Steps between logged figures."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids."""
    judge_steps: int = 600
    """Training steps of the judge."""
    samples_per_class: int = 100
    """Judged samples of each class in each domain."""
    deliver: int = 0
    """Write this many single pictures of each class in each domain, `samples/{domain}/{class}_{001..}.png`."""
    sampling: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(default_factory=SamplingSettings)

    def __post_init__(self):
        for name in (
            "train_steps", "batch_size", "accumulation_steps", "log_every", "save_every", "sample_every",
            "judge_steps", "samples_per_class",
        ):  # fmt: skip
            flag, value = "--" + name.replace("_", "-"), getattr(self, name)
            require(value >= 1, f"{flag} must be at least 1, got {value}")
        for name in ("class_dropout", "domain_dropout", "joint_dropout", "ema_decay"):
            flag, value = "--" + name.replace("_", "-"), getattr(self, name)
            require(0 <= value < 1, f"{flag} must lie in [0, 1), got {value}")
        require(self.learning_rate > 0, f"--learning-rate must be positive, got {self.learning_rate}")
        require(self.clip_norm > 0, f"--clip-norm must be positive, got {self.clip_norm}")
        require(self.warmup_steps >= 0, f"--warmup-steps must be at least 0, got {self.warmup_steps}")
        require(self.weight_decay >= 0, f"--weight-decay must be at least 0, got {self.weight_decay}")
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(
            0 <= self.deliver <= self.samples_per_class,
            f"--deliver must lie in 0..{self.samples_per_class} (--samples-per-class), got {self.deliver}",
        )
        require_trained_branches(self.sampling, self.class_dropout, self.domain_dropout, self.joint_dropout)


# What may differ when a run goes on: none of it changes the trained parameters.
FREE = {"out", "resume", "devices", "log_every", "save_every", "sample_every", "samples_per_class", "deliver"} | {
    field.name for field in dataclasses.fields(SamplingSettings)
}


def build(config: Config, splits, mesh):
    """Return the model, the optimizer with its learning rate, the loss and the state at step 0."""
    import jax

    from jaxdiff.recipes.conditional import build_conditional_model
    from jaxdiff.recipes.objective import ConditionDropout, make_diffusion_loss
    from jaxdiff.recipes.training import create_state, make_optimizer

    data = splits.train
    model = build_conditional_model(
        config.preset,
        config.dtype,
        config.diffusion,
        data.images.shape[1:],
        data.class_names,
        data.domain_names,
    )
    optimizer, learning_rate = make_optimizer(
        config.learning_rate, config.warmup_steps, config.train_steps, config.weight_decay, config.clip_norm
    )
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    dropout = ConditionDropout(config.class_dropout, config.domain_dropout, config.joint_dropout)
    loss_fn = make_diffusion_loss(model, config.diffusion, dropout)
    state = create_state(model.init(init_key), optimizer, train_key, mesh)
    return model, optimizer, learning_rate, loss_fn, state
