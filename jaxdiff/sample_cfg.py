"""Sample and judge a run of train_cfg again, with other guidance, sampler, steps, seed or number of images.

    python -m jaxdiff.sample_cfg --run runs/train_cfg --guidance-scale 3 --out runs/guidance_3

Writes into --out: grids, reverse-process strips, results.json, report.html and, with --deliver 50, single pictures.
"""

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
    SamplingSettings,
    require,
    require_at_least,
    require_timesteps,
    require_trained_branches,
)
from jaxdiff.train_cfg import Config as TrainConfig

Group = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """Sample and judge a trained run again."""

    run: Path = Path("runs/train_cfg")
    """Run folder of train_cfg."""
    out: Path = Path("runs/sample_cfg")
    """Folder to write into; files of the same name are replaced."""
    seed: int = 0
    """Seed of the samples."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint to sample: the last, or the one of lowest loss on held-out images."""
    devices: Annotated[ProcessSettings, Group] = field(default_factory=ProcessSettings)
    sampling: Annotated[SamplingSettings, Group] = field(default_factory=SamplingSettings)
    samples_per_class: int = 100
    """Judged samples of each class in each domain."""
    deliver: int = 0
    """Write this many single pictures of each class in each domain, `samples/{domain}/{class}_{001..}.png`."""

    def __post_init__(self):
        require_at_least("samples_per_class", self.samples_per_class, 1)
        require(
            self.out.expanduser().resolve() != self.run.expanduser().resolve(),
            f"--out {self.out} is the run itself, whose report would be replaced: choose another folder",
        )
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(
            0 <= self.deliver <= self.samples_per_class,
            f"--deliver must lie in 0..{self.samples_per_class} (--samples-per-class), got {self.deliver}",
        )


def run(config: Config) -> list[Path]:
    """Restore a run's model and judge, sample, judge and report."""
    from jaxdiff.io.runs import as_json, make_folder, read_run
    from jaxdiff.mesh import open_mesh
    from jaxdiff.processes import on_leader
    from jaxdiff.recipes.conditional_training import restore_trained
    from jaxdiff.recipes.digits_report import Evaluation, evaluate
    from jaxdiff.recipes.sampling import make_sampler

    started = time.perf_counter()
    folder, trained_with = read_run(config.run, TrainConfig)
    require_timesteps(config.sampling, trained_with.diffusion)
    require_trained_branches(config.sampling, trained_with.training)
    mesh = open_mesh(config.devices)
    out = config.out.expanduser().resolve()
    on_leader(lambda: make_folder(out))
    model, params, judge, figures = restore_trained(
        folder,
        trained_with.preset,
        trained_with.dtype,
        trained_with.diffusion,
        trained_with.training,
        config.checkpoint,
        mesh,
    )
    task = Evaluation(
        run=folder,
        out=out,
        model=model,
        params=params,
        judge=judge,
        sampler=make_sampler(model, config.sampling, mesh),
        sampling=config.sampling,
        seed=config.seed,
        samples_per_class=config.samples_per_class,
        deliver=config.deliver,
        mesh=mesh,
    )
    return evaluate(task, figures, as_json(config), started)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("sample_cfg", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
