"""Show what DDIM does with a trained pixel-space model: etas, ways between noises, step counts, and the way back.

    python -m jaxdiff.ddim_grid --weights runs/train_cfg --out runs/ddim_grid

Writes into --out: single pictures, one labelled grid a mode, results.json and report.html.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import run_command
from jaxdiff.ddim_settings import DrawingSettings, ModeSettings, require_effect
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.errors import InputError
from jaxdiff.settings import require, require_at_least, require_trained_branches
from jaxdiff.train_cfg import Config as TrainConfig

Group = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """Show what DDIM does with a trained pixel-space model."""

    weights: Path | None = None
    """A run of train_cfg, or a folder that `python -m weights_convert ddpm SOURCE FOLDER` wrote; None means the run
    under runs/ that train_cfg made last."""
    noise: Path | None = None
    """Folder of starting noises, one float32 tensor a file (.pt, .npy, .npz, .safetensors); None draws from --seed."""
    out: Path = Path("runs/ddim_grid")
    """Folder to write into; files of the same name are replaced."""
    mode: Literal["images", "eta", "interpolate", "steps", "invert", "all"] = "all"
    """Each noise once; a noise under several etas; ways between two noises; samplers by step count; inversion; all."""
    num_noises: int | None = None
    """Starting noises to draw from --seed; None means 10. Not with --noise."""
    seed: int = 0
    """Seed of the noises, and of the noise along the way where eta > 0."""
    drawing: Annotated[DrawingSettings, Group] = field(default_factory=DrawingSettings)
    modes: Annotated[ModeSettings, Group] = field(default_factory=ModeSettings)
    domain: str | None = None
    """Domain to draw; None means the run's first. Only with a run of train_cfg."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 for none; None means the run's own. Only with a run of train_cfg."""
    batch_size: int = 20
    """Pictures drawn at once, rounded up to a multiple of the devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in."""
    devices: Annotated[ProcessSettings, Group] = field(default_factory=ProcessSettings)

    def __post_init__(self):
        for name in ("num_noises", "batch_size"):
            require_at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require_effect(self.mode, self.drawing, self.modes)
        require(
            self.guidance_scale is None or self.mode != "invert",
            "--guidance-scale: no effect with --mode invert, which goes without guidance",
        )
        require(
            self.noise is None or self.seed == 0 or self.mode in ("eta", "all"),
            f"--seed: no effect with --noise and --mode {self.mode}, which adds no noise on the way",
        )
        require(
            self.noise is None or self.num_noises is None,
            "--num-noises has no effect with --noise: drop one of them",
        )
        require(
            self.guidance_scale is None or (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0),
            f"--guidance-scale must be a finite number of at least 0, got {self.guidance_scale}",
        )


def load_model(config: Config, mesh):
    """Return the model of a run or of converted weights.

    Raises:
      InputError: there is neither, or a flag does not fit it.
    """
    from jaxdiff.io.runs import last_run, read_json, read_run
    from jaxdiff.recipes.pixel_model import pretrained_model, trained_model

    weights = last_run(Path("runs")) if config.weights is None else config.weights.expanduser()
    if weights is None or not (weights / "config.json").is_file():
        where = "in runs/" if weights is None else f"in {weights}"
        raise InputError(
            f"--weights: no run of train_cfg {where}, nor converted weights. `python -m jaxdiff.train_cfg` trains "
            "digits in some minutes; face weights come from "
            "`python -m weights_convert ddpm google/ddpm-celebahq-256 weights/celebahq`"
        )
    if "format" in read_json(weights / "config.json"):
        for name in ("domain", "guidance_scale"):
            flag = name.replace("_", "-")
            require(getattr(config, name) is None, f"--{flag} has no effect: {weights} has no conditions")
        return pretrained_model(weights, config.dtype)
    folder, trained_with = read_run(weights, TrainConfig)
    sampling = trained_with.sampling
    if config.guidance_scale is not None:
        sampling = dataclasses.replace(
            sampling, guidance_scale=config.guidance_scale, domain_guidance_scale=None, guidance_interval=None
        )
    require_trained_branches(sampling, trained_with.training)
    known = trained_with.preset, config.dtype, trained_with.diffusion, trained_with.training
    return trained_model(folder, *known, sampling, config.domain, mesh)


def run(config: Config) -> list[Path]:
    """Load model and noises, show every mode, write everything down."""
    from jaxdiff.io.runs import as_json, make_folder
    from jaxdiff.mesh import open_mesh, own_mesh
    from jaxdiff.processes import is_leader
    from jaxdiff.recipes.ddim_report import show, write_all
    from jaxdiff.recipes.drawing import make_drawing, read_or_draw_noises

    started = time.perf_counter()
    mesh = open_mesh(config.devices)
    model = load_model(config, mesh)
    if not is_leader():
        return []  # so few pictures are the first process's alone, but a checkpoint is read by all
    mesh = own_mesh(mesh)
    names, noises = read_or_draw_noises(config.noise, config.num_noises or 10, config.seed, model.image_shape)
    drawing = make_drawing(model, config.drawing, config.seed, config.batch_size, mesh)
    shown = show(config.mode, drawing, names, noises, config.modes)
    return write_all(make_folder(config.out), drawing, shown, as_json(config), started)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("ddim_grid", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
