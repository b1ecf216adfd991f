"""A folder with a pretrained pixel-space UNet: config.json, which says how to sample it, and model.safetensors.

`python -m weights_convert ddpm` writes such folders; nothing here needs torch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdiff.diffusion.prediction import PredictionType
from jaxdiff.diffusion.schedule import NoiseSchedule, ScheduleName, check_prediction_type, make_schedule
from jaxdiff.diffusion.timesteps import Spacing
from jaxdiff.errors import InputError
from jaxdiff.io.runs import write_json
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.io.weights import flatten_params, load_params, write_safetensors
from jaxdiff.models.unet import UNet, UNetConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "jaxdiff-unet"
FORMAT_VERSION = 1
MAX_TIMESTEPS = 100_000
"""Most timesteps of a schedule, so that no file asks for tables of any size."""


@dataclass(frozen=True)
class ForwardProcess:
    """The noise that the network was trained on, and what it predicts; the defaults are DDPM's."""

    schedule: ScheduleName = "linear"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: PredictionType = "eps"
    zero_terminal_snr: bool = False

    def __post_init__(self):
        if not (2 if self.zero_terminal_snr else 1) <= self.num_train_timesteps <= MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}, not in 1..{MAX_TIMESTEPS}")
        check_prediction_type(self.make_schedule(), self.prediction_type)

    def make_schedule(self) -> NoiseSchedule:
        """Return the tables."""
        return make_schedule(
            self.schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.zero_terminal_snr
        )


@dataclass(frozen=True)
class SamplingDefaults:
    """How the publisher samples the network; the defaults are DDPM's.

    Attributes:
      spacing: which timesteps the steps visit.
      steps_offset: added to every timestep of leading spacing.
      final: where the last step ends, -1 for clean data, 0 for the first noisy timestep.
      clip: whether the predicted clean image is clipped to [-1, 1] at every step.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 0
    final: Literal[-1, 0] = -1
    clip: bool = True


@dataclass(frozen=True)
class Source:
    """Where the parameters come from: what the user named, and the SHA-256 of its weights.

    Of several files in the order of their names, the digest is that of all their bytes.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class PretrainedConfig:
    """All that config.json says beside its format; `image_size` is in pixels, height and width."""

    unet: UNetConfig
    image_size: int
    diffusion: ForwardProcess
    sampling: SamplingDefaults
    source: Source

    def __post_init__(self):
        if self.unet.num_classes or self.unet.num_domains:
            raise ValueError("a pretrained UNet has no class or domain conditions")
        if self.unet.in_channels != self.unet.out_channels:
            raise ValueError(
                f"the UNet makes {self.unet.out_channels} channels of {self.unet.in_channels}, not a prediction alone"
            )
        if not 0 <= self.sampling.steps_offset < self.diffusion.num_train_timesteps:
            raise ValueError(f"steps_offset is {self.sampling.steps_offset}, not a timestep")
        if self.image_size < 1 or self.image_size % self.unet.size_divisor:
            raise ValueError(f"image_size is {self.image_size}, not a multiple of {self.unet.size_divisor}")


def load_pretrained_unet(folder: Path, dtype: DTypeLike = jnp.float32) -> tuple[UNet, dict, PretrainedConfig]:
    """Return the network, its parameters (float32), and how it was trained and wants to be sampled.

    Args:
      folder: from `save_pretrained_unet`.
      dtype: type of the network's computation.

    Raises:
      InputError: a file is missing or damaged, or either of them does not fit the format; the message names what.
    """
    folder = folder.expanduser()
    config = read_pretrained_config(folder)
    params = load_params(folder / WEIGHTS, unet_shapes(config.unet))
    return UNet(config.unet, dtype), jax.tree.map(jnp.asarray, params), config


def read_pretrained_config(folder: Path) -> PretrainedConfig:
    """Return what a folder's config.json says.

    Raises:
      InputError: it is missing, of another format or version, or a field is missing, unknown or of a wrong value.
    """
    path = folder.expanduser() / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file; make the folder with `python -m weights_convert ddpm SOURCE {folder}`")
    fields = read_strict_json(path)
    found = fields.pop("format", None), fields.pop("format_version", None)
    if found != (FORMAT, FORMAT_VERSION):
        raise InputError(
            f"{path}: format {found[0]!r} version {found[1]!r} instead of {FORMAT!r} version {FORMAT_VERSION}; "
            "convert the weights with `python -m weights_convert ddpm`"
        )
    try:
        return decode(PretrainedConfig, fields)
    except ValueError as error:
        raise InputError(f"{path}: {error}; convert the weights again") from error


def save_pretrained_unet(folder: Path, params: dict, config: PretrainedConfig) -> list[Path]:
    """Write both files into a folder, config.json last, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_safetensors(folder / WEIGHTS, flatten_params(params), {"format": FORMAT})
    write_json(folder / CONFIG, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(config)})
    return [folder / CONFIG, folder / WEIGHTS]


def unet_shapes(config: UNetConfig) -> dict[str, Any]:
    """Return the tree of parameters without its numbers."""
    size = config.size_divisor
    images = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    timesteps = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(UNet(config).init, jax.random.key(0), images, timesteps)["params"]
