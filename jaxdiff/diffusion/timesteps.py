"""Which timesteps a sampler visits, largest first.

    (1)  leading   t_i = (N - 1 - i) (T // N) + offset;   trailing  t_i = round(T - i T / N) - 1;   linspace  both ends
                                                                             (arXiv 2305.08891, table 2)
    (2)  Karras    noise_level_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, rho = 7
                                                                             (arXiv 2206.00364, eq. 5)

(2) gives timesteps between the integers, see `NoiseSchedule`.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.diffusion.schedule import NoiseSchedule

Spacing = Literal["leading", "trailing", "linspace", "karras"]
Timetable = Int[np.ndarray, "N"] | Float[np.ndarray, "N"]
"""Falling timesteps: integers, or real numbers between them."""
Walk = Int[np.ndarray, "M"] | Float[np.ndarray, "M"]
"""A timetable and, last, where its last step ends."""

CLEAN = -1
"""Where a walk ends that ends at clean data."""


def timestep_spacing(
    spacing: Spacing, num_steps: int, schedule: NoiseSchedule, offset: int = 0, whole: bool = True
) -> Timetable:
    """Return the timesteps of equations (1) and (2), largest first.

    Args:
      spacing: leading starts at `offset` and leaves out the top; trailing holds T-1 and leaves out the bottom;
        linspace and karras hold both ends.
      num_steps: N, 1 to T.
      schedule: gives T, and the noise levels of (2).
      offset: added to every leading timestep.
      whole: round linspace to integers.

    Raises:
      ValueError: num_steps outside 1..T, an unknown spacing, an offset that leaves 0..T-1 or has no effect, or no
        finite noise level at T-1 for (2).
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1..{total}, got {num_steps}")
    if offset and spacing != "leading":
        raise ValueError(f"an offset belongs to leading spacing, got {offset} with {spacing}")
    steps = np.arange(num_steps, dtype=np.float64)
    if spacing == "leading":
        timesteps = steps * (total // num_steps) + offset
    elif spacing == "trailing":
        timesteps = np.rint(total - steps * (total / num_steps))[::-1] - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, num_steps)
        if num_steps == 1:
            timesteps[:] = total - 1
        if not whole:
            return timesteps[::-1].astype(np.float32)
        timesteps = np.rint(timesteps)
    elif spacing == "karras":
        return _karras(num_steps, schedule)
    else:
        raise ValueError(f"unknown spacing {spacing!r}: choose leading, trailing, linspace or karras")
    if timesteps[0] < 0 or timesteps[-1] > total - 1:
        raise ValueError(f"offset {offset} moves {num_steps} leading timesteps out of 0..{total - 1}")
    return timesteps[::-1].astype(np.int32)


def check_reach(timesteps: Timetable, schedule: NoiseSchedule) -> None:
    """Raise ValueError where leading spacing was rounded so far down that it misses the noisiest timesteps."""
    total, num_steps = schedule.num_train_timesteps, len(timesteps)
    if timesteps[0] + 2 * (total // num_steps) < total - 1:
        raise ValueError(
            f"{num_steps} leading timesteps end at {timesteps[0]}, far below {total - 1}: take a number that divides "
            f"{total}, or trailing spacing"
        )


def _karras(num_steps: int, schedule: NoiseSchedule, rho: float = 7.0) -> Float[np.ndarray, "N"]:
    """Return equation (2) over all noise levels of the schedule."""
    log_levels = -0.5 * np.asarray(schedule.logsnrs, np.float64)
    if not np.isfinite(log_levels[-1]):
        raise ValueError("karras spacing needs a finite noise level at the last timestep, not zero terminal SNR")
    low, high = np.exp(log_levels[[0, -1]] / rho)
    levels = np.linspace(high, low, num_steps) ** rho
    return np.interp(np.log(levels), log_levels, np.arange(len(log_levels))).astype(np.float32)


def with_final(timesteps: Timetable, final: int = CLEAN) -> Walk:
    """Append where the last step ends: -1 for clean data, 0 for the first noisy timestep.

    Raises:
      ValueError: the list is empty, not finite, negative, does not fall strictly, or `final` is below -1.
    """
    timesteps = np.asarray(timesteps)
    kind = np.int32 if np.issubdtype(timesteps.dtype, np.integer) else np.float32
    walked = np.append(timesteps.astype(kind), kind(final))
    falls = len(walked) > 1 and np.isfinite(walked).all() and np.all(np.diff(walked) < 0) and walked[-2] >= 0
    if final < CLEAN or not falls:
        raise ValueError(f"timesteps must fall strictly down to {final}, got {walked.tolist()}")
    return walked


def check_inside(timesteps: Walk, schedule: NoiseSchedule) -> None:
    """Raise ValueError where a walk begins above the schedule's last timestep, which JAX would take for the last."""
    last = schedule.num_train_timesteps - 1
    if timesteps[0] > last:
        raise ValueError(f"timesteps must lie in 0..{last}, got {timesteps[0]}")
