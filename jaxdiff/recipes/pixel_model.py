"""One face for every trained pixel-space model: a run of train_cfg, or converted weights.

A model of a run is conditional: noise i is drawn as class i modulo the number of classes, in one domain, guided as its
run samples. Converted weights have no conditions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxdiff.diffusion.guidance import Denoiser, guide
from jaxdiff.diffusion.prediction import to_prediction
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import CLEAN, Spacing, Walk, timestep_spacing, with_final
from jaxdiff.errors import InputError
from jaxdiff.io.provenance import tree_hash
from jaxdiff.mesh import bring_home
from jaxdiff.recipes.conditional import Condition
from jaxdiff.recipes.conditional_training import restore_model
from jaxdiff.recipes.pretrained_unet import load_pretrained_unet
from jaxdiff.recipes.sampling import guide_conditions, make_denoiser
from jaxdiff.settings import DiffusionSettings, SamplingSettings, Threshold, TrainingSettings


@dataclass(frozen=True)
class PixelModel:
    """What a sampler needs to know of a trained model.

    Attributes:
      title: what it draws, for headings.
      make_denoiser: (params, condition) -> denoiser, guided but not thresholded.
      make_unguided: the same without guidance.
      condition_of: conditions of images by their numbers; a tree of arrays, empty without conditions.
      spacing: how it is sampled unless told otherwise, as are the next three.
      steps_offset: added to every leading timestep.
      final: where a walk ends, -1 for clean data or 0.
      threshold: what happens to predicted pixels outside [-1, 1].
    """

    title: str
    params: Any
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    make_denoiser: Callable[[Any, Any], Denoiser]
    make_unguided: Callable[[Any, Any], Denoiser]
    condition_of: Callable[[Int[np.ndarray, "N"]], Any]
    spacing: Spacing
    steps_offset: int = 0
    final: int = CLEAN
    threshold: Threshold = "static"

    def walk(self, num_steps: int, flag: str) -> Walk:
        """Return `num_steps` evenly spaced timesteps, and where they end.

        Raises:
          InputError: the noise schedule has none such; the message names the flag that asked for them.
        """
        try:
            timesteps = timestep_spacing(self.spacing, num_steps, self.schedule, self.steps_offset)
            # A step from t = 0 to t = 0 changes nothing.
            return with_final(timesteps[timesteps > self.final], self.final)
        except ValueError as error:
            raise InputError(f"{flag} {num_steps}: {error}") from error

    @property
    def sha256(self) -> str:
        """The digest of the parameters."""
        return tree_hash(self.params)


def pretrained_model(folder: Path, dtype: str) -> PixelModel:
    """Return the model of a folder that `python -m weights_convert ddpm` wrote.

    Raises:
      InputError: there are no such weights in it, or they are damaged.
    """
    network, params, config = load_pretrained_unet(folder, jnp.dtype(dtype))
    schedule = config.diffusion.make_schedule()

    def make_denoiser(params: Any, condition: tuple[()]) -> Denoiser:
        def denoise(x_t: jax.Array, t: jax.Array):
            output = jnp.asarray(network.apply({"params": params}, x_t, jnp.broadcast_to(t, x_t.shape[:1])))
            return to_prediction(output, x_t, *schedule.alpha_sigma(t), config.diffusion.prediction_type)

        return denoise

    return PixelModel(
        config.source.name,
        params,
        schedule,
        (config.image_size, config.image_size, config.unet.in_channels),
        make_denoiser,
        make_denoiser,
        lambda numbers: (),
        config.sampling.spacing,
        config.sampling.steps_offset,
        config.sampling.final,
        "static" if config.sampling.clip else "none",
    )


def trained_model(
    run: Path,
    preset: str,
    dtype: str,
    diffusion: DiffusionSettings,
    training: TrainingSettings,
    sampling: SamplingSettings,
    domain: str | None,
    mesh: Mesh,
) -> PixelModel:
    """Return the model of a run of train_cfg, guided as `sampling` says.

    Args:
      run: folder of train_cfg.
      preset: UNet of the run, and so on from its config.
      dtype: type to compute in.
      diffusion: schedule and prediction.
      training: optimizer, whose state is part of a checkpoint.
      sampling: guidance.
      domain: name of the domain to draw; None means the first.
      mesh: of all processes; the parameters end on this one's devices.

    Raises:
      InputError: the run has no checkpoint yet, or no such domain.
    """
    model, params, step = restore_model(run, preset, dtype, diffusion, training, "last", mesh)
    names = model.domain_names
    if domain is not None and domain not in names:
        raise InputError(f"--domain {domain}: the run in {run} knows {', '.join(names)}")
    number = 0 if domain is None else names.index(domain)

    def condition_of(numbers: np.ndarray) -> Condition:
        return Condition(
            (numbers % len(model.class_names)).astype(np.int32), np.full(len(numbers), number, dtype=np.int32)
        )

    return PixelModel(
        f"{names[number]}, step {step:,} of {run.name}",
        bring_home(params, mesh),
        model.schedule,
        model.image_shape,
        lambda params, condition: guide_conditions(model, make_denoiser(model, params), condition, sampling),
        lambda params, condition: guide(make_denoiser(model, params), [(1.0, condition)]),
        condition_of,
        sampling.spacing,
        threshold=sampling.threshold,
    )
