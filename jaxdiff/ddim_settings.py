"""The flags of ddim_grid: how a picture comes from its noise, and what each mode shows; importing them costs no jax."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxdiff.settings import Threshold, as_flag, require, require_at_least


@dataclass(frozen=True)
class DrawingSettings:
    """From noise to picture."""

    preset: Literal["own", "course"] = "own"
    """own: as the weights or the run say; course: timesteps 981, 961, .. 1 of 50 steps, ending at t = 0, nothing
    clipped, min-max pictures."""
    num_steps: int | None = None
    """DDIM steps; None means 50, or as many as --timesteps names."""
    timesteps: tuple[int, ...] | None = None
    """Visit these timesteps, largest first, instead of evenly spaced ones; the steps mode keeps its own."""
    spacing: Literal["leading", "trailing", "linspace", "karras"] | None = None
    """Which timesteps the steps visit (arXiv 2305.08891, table 2; karras: 2206.00364); None means as the preset."""
    threshold: Threshold | None = None
    """Predicted pixels outside [-1, 1]: clip (static), scale down (dynamic, arXiv 2205.11487) or leave (none); None
    means as the preset."""
    scaling: Literal["clamp", "minmax"] | None = None
    """Pixels as written: clamped to [-1, 1], or stretched from each picture's least to its greatest value; None means
    as the preset, clamp for own."""

    def __post_init__(self):
        require_at_least("num_steps", 1 if self.num_steps is None else self.num_steps, 1)
        if self.timesteps is not None:
            require(
                self.num_steps is None and self.spacing is None,
                "--timesteps leaves nothing to --num-steps and --spacing: drop them",
            )
            falling = all(before > after for before, after in zip(self.timesteps, self.timesteps[1:]))
            require(
                len(self.timesteps) > 0 and falling and self.timesteps[-1] >= 0,
                f"--timesteps must fall strictly, to 0 or above, got {' '.join(map(str, self.timesteps)) or 'none'}",
            )


@dataclass(frozen=True)
class ModeSettings:
    """What the modes show."""

    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Rows of the eta grid: shares of DDPM's noise, 0 to 1."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Columns of the interpolation grid, from 0, the first noise, to 1, the second."""
    extrapolate: bool = False
    """Allow alphas outside [0, 1]."""
    step_counts: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Columns of the steps grid."""
    reference_steps: int = 1000
    """DDIM steps that the steps mode compares with, at most T."""
    iterations: tuple[int, ...] = (1, 5)
    """Inversions to show, by fixed-point iterations a step (arXiv 2309.04907); 1 is plain DDIM inversion."""

    def __post_init__(self):
        for name in ("etas", "alphas", "step_counts", "iterations"):
            values = getattr(self, name)
            require(len(values) > 0, f"{as_flag(name)} needs at least one value")
            require(len(set(values)) == len(values), f"{as_flag(name)} names a value twice: {values}")
            require(all(map(math.isfinite, values)), f"{as_flag(name)} must be finite, got {values}")
        require(all(0 <= eta <= 1 for eta in self.etas), f"--etas must lie in [0, 1], got {self.etas}")
        require(
            self.extrapolate or all(0 <= alpha <= 1 for alpha in self.alphas),
            f"--alphas must lie in [0, 1], got {self.alphas}: to go beyond the two noises, add --extrapolate",
        )
        for name in ("step_counts", "iterations"):
            require_at_least(name, min(getattr(self, name)), 1)
        require_at_least("reference_steps", self.reference_steps, 1)
