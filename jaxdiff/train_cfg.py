"""Train a class- and domain-conditional diffusion model with classifier-free guidance, sample it and judge it.

    python -m jaxdiff.train_cfg --data digits --out runs/train_cfg

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
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.settings import (
    DiffusionSettings,
    SamplingSettings,
    TrainingSettings,
    require,
    require_at_least,
    require_timesteps,
    require_trained_branches,
)

Group = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """Train a class- and domain-conditional diffusion model, sample it and judge the samples."""

    data: str = "digits"
    """`digits` (embedded), a folder, or tfds:NAME[,NAME...]; the README shows the layouts."""
    out: Path = Path("runs/train_cfg")
    """Run folder; an unfinished run found there goes on."""
    seed: int = 0
    """Seed of initial parameters, data order, noise and samples."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the last checkpoint, or delete the run's checkpoints and start over."""
    devices: Annotated[ProcessSettings, Group] = field(default_factory=ProcessSettings)
    image_size: int | None = None
    """Height and width in pixels to resize to; None keeps the data's own."""
    preset: Literal["tiny", "small", "base"] = "tiny"
    """UNet: tiny 3.0 M, small 4.4 M or base 27.2 M parameters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; parameters and schedule stay float32."""
    diffusion: Annotated[DiffusionSettings, Group] = field(default_factory=DiffusionSettings)
    training: Annotated[TrainingSettings, Group] = field(default_factory=TrainingSettings)
    sampling: Annotated[SamplingSettings, Group] = field(default_factory=SamplingSettings)
    judge_steps: int = 600
    """Training steps of the judge."""
    samples_per_class: int = 100
    """Judged samples of each class in each domain."""
    deliver: int = 0
    """Write this many single pictures of each class in each domain, `samples/{domain}/{class}_{001..}.png`."""

    def __post_init__(self):
        for name in ("judge_steps", "samples_per_class"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("image_size", 1 if self.image_size is None else self.image_size, 1)
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(
            0 <= self.deliver <= self.samples_per_class,
            f"--deliver must lie in 0..{self.samples_per_class} (--samples-per-class), got {self.deliver}",
        )
        require_timesteps(self.sampling, self.diffusion)
        require_trained_branches(self.sampling, self.training)


# What may differ when a run goes on: none of it changes the trained parameters.
FREE = {
    "out",
    "resume",
    "log_every",
    "save_every",
    "sample_every",
    "samples_per_class",
    "deliver",
} | {field.name for group in (ProcessSettings, SamplingSettings) for field in dataclasses.fields(group)}


def run(config: Config) -> list[Path]:
    """Load and check the data, train judge and model, sample, judge and report."""
    from jaxdiff.io.datasets import check_data, describe, load_data
    from jaxdiff.io.runs import MADE_BY_TRAINING, as_json, check_config, check_same_data, check_writable, open_run
    from jaxdiff.mesh import open_mesh, require_divisible
    from jaxdiff.processes import on_leader
    from jaxdiff.recipes.conditional_training import build_training, train
    from jaxdiff.recipes.digits_report import Evaluation, evaluate
    from jaxdiff.recipes.judge import prepare_judge
    from jaxdiff.recipes.sampling import make_sampler

    started = time.perf_counter()
    mesh = open_mesh(config.devices)
    require_divisible(config.training.batch_size, mesh, "--batch-size", config.training.accumulation_steps)
    check_writable(config.out)
    if config.resume == "auto":
        check_config(config.out, as_json(config), FREE)
    splits = load_data(config.data, config.image_size)
    print(describe(splits))
    parts = build_training(
        splits.train, config.preset, config.dtype, config.diffusion, config.training, config.seed, mesh
    )
    # Only now, because a folder that holds a config is taken for a run, and nothing above may spoil an older one.
    out = config.out.expanduser().resolve()
    on_leader(lambda: open_run(out, as_json(config), FREE, start_over=config.resume == "never"))
    on_leader(lambda: check_same_data(out, check_data(splits)))
    sampler = make_sampler(parts.model, config.sampling, mesh)
    judge, judged = prepare_judge(splits, config.judge_steps, config.seed, mesh, out)
    params, trained = train(
        parts, splits, config.training, sampler, config.sampling.sample_batch_size, config.seed, out, mesh
    )
    task = Evaluation(
        run=out,
        out=out,
        model=parts.model,
        params=params,
        judge=judge,
        sampler=sampler,
        sampling=config.sampling,
        seed=config.seed,
        samples_per_class=config.samples_per_class,
        deliver=config.deliver,
        mesh=mesh,
    )
    written = evaluate(task, judged | trained, as_json(config), started)
    return [path for name in MADE_BY_TRAINING if (path := out / name).exists()] + written


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("train_cfg", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
