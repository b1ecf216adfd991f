"""Groups of flags that several commands share; importing them costs no jax."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxdiff.errors import InputError

SamplerName = Literal["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpm++2m", "dpm++2m-sde", "unipc", "pndm"]
Spacing = Literal["leading", "trailing", "linspace", "karras"]
Threshold = Literal["static", "dynamic", "none"]


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)


def as_flag(name: str) -> str:
    """Return a field's name as it is typed on the command line."""
    return "--" + name.replace("_", "-")


def require_at_least(name: str, value: float | int, least: int) -> None:
    """Raise InputError, naming the flag, unless value >= least."""
    require(value >= least, f"{as_flag(name)} must be at least {least}, got {value}")


@dataclass(frozen=True)
class DiffusionSettings:
    """Noise schedule, what the network predicts, and how its error is weighted."""

    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"
    """Noise schedule."""
    num_train_timesteps: int = 1000
    """Timesteps T of the forward process."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (arXiv 2305.08891)."""
    prediction_type: Literal["eps", "x_0", "v"] = "v"
    """What the network predicts: noise, clean image or velocity (arXiv 2202.00512)."""
    loss_weighting: Literal["constant", "min_snr", "sigmoid"] = "constant"
    """Weight of a timestep in the loss: none, min-SNR (arXiv 2303.09556) or sigmoid (arXiv 2410.19324)."""
    min_snr_gamma: float | None = None
    """Clamp of min-SNR, signal-to-noise power ratio; None means 5. Only with --loss-weighting min_snr."""

    def __post_init__(self):
        require_at_least("num_train_timesteps", self.num_train_timesteps, 2 if self.zero_terminal_snr else 1)
        require(
            not (self.zero_terminal_snr and self.prediction_type == "eps"),
            "--zero-terminal-snr leaves no signal at the last timestep, where eps says nothing about the image: "
            "use --prediction-type v or x_0",
        )
        require(
            self.min_snr_gamma is None or self.loss_weighting == "min_snr",
            f"--min-snr-gamma has no effect with --loss-weighting {self.loss_weighting}: drop it or use min_snr",
        )
        require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            f"--min-snr-gamma must be positive, got {self.min_snr_gamma}",
        )


@dataclass(frozen=True)
class OptimizationSettings:
    """How parameters are trained, and how often things are written."""

    train_steps: int = 2000
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
    """Decoupled weight decay of kernels and embeddings."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    ema_decay: float = 0.995
    """Limit of the decay of the parameter average that is sampled from, in [0, 1)."""
    log_every: int = 20
    """Steps between logged figures."""
    save_every: int = 250
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids."""

    def __post_init__(self):
        for name in ("train_steps", "batch_size", "accumulation_steps", "log_every", "save_every", "sample_every"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("warmup_steps", self.warmup_steps, 0)
        decay = self.weight_decay
        require(0 <= decay < math.inf, f"--weight-decay must be a finite number of at least 0, got {decay}")
        require(0 <= self.ema_decay < 1, f"--ema-decay must lie in [0, 1), got {self.ema_decay}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{as_flag(name)} must be positive and finite, got {value}")


@dataclass(frozen=True)
class TrainingSettings(OptimizationSettings):
    """Optimisation, condition dropout, and how often things are written."""

    class_dropout: float = 0.1
    """Probability that an image loses its class alone."""
    domain_dropout: float = 0.0
    """Probability that an image loses its domain alone."""
    joint_dropout: float = 0.1
    """Probability that an image loses both."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("class_dropout", "domain_dropout", "joint_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{as_flag(name)} must lie in [0, 1), got {value}")
        require(
            self.any_dropout <= 1,
            "--class-dropout, --domain-dropout and --joint-dropout exclude each other and must add up to at most 1, "
            f"got {self.any_dropout:g}",
        )

    @property
    def any_dropout(self) -> float:
        """The probability that an image loses its class, its domain or both."""
        return self.joint_dropout + self.class_dropout + self.domain_dropout


@dataclass(frozen=True)
class SamplingSettings:
    """The reverse process and its guidance."""

    sampler: SamplerName = "ddim"
    """DDPM ancestral (arXiv 2006.11239), DDIM (2010.02502), Euler or Heun (2206.00364; Heun evaluates twice a step),
    Euler ancestral (as in k-diffusion), DPM-Solver++ 2M or its SDE form (2211.01095), UniPC (2302.04867), PNDM
    (2202.09778)."""
    num_steps: int = 25
    """Sampling steps, 1 to T."""
    spacing: Spacing = "trailing"
    """Which of the T timesteps the steps visit (arXiv 2305.08891, table 2; karras: 2206.00364, eq. 5)."""
    threshold: Threshold = "static"
    """What happens to predicted pixels outside [-1, 1]: clip them (static), scale the image down (dynamic, arXiv
    2205.11487) or nothing."""
    eta: float | None = None
    """Share of DDPM's noise in a DDIM step, 0 (none) to 1 (all); None means 0. Only with --sampler ddim."""
    churn: float | None = None
    """Fresh noise over all steps together, S_churn of arXiv 2206.00364; None means 0. Only with euler and heun."""
    guidance_scale: float = 4.0
    """Classifier-free guidance g = 1 + w of arXiv 2207.12598: 0 unconditional, 1 conditional, more is stronger."""
    domain_guidance_scale: float | None = None
    """The same for the domain alone; None means equal to --guidance-scale, which costs less."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels sigma/alpha in LOW HIGH (arXiv 2404.07724); None means everywhere."""
    sample_batch_size: int = 100
    """Images sampled at once, rounded up to a multiple of the devices."""

    def __post_init__(self):
        for name in ("num_steps", "sample_batch_size"):
            require_at_least(name, getattr(self, name), 1)
        require(
            (self.sampler, self.spacing) != ("pndm", "karras"),
            "--sampler pndm needs steps of equal length: use --spacing trailing, leading or linspace",
        )
        require(
            self.eta is None or self.sampler == "ddim",
            f"--eta has no effect with --sampler {self.sampler}: drop it or use ddim",
        )
        require(
            self.churn is None or self.sampler in ("euler", "heun"),
            f"--churn has no effect with --sampler {self.sampler}: drop it or use euler or heun",
        )
        require(
            self.churn is None or (math.isfinite(self.churn) and self.churn >= 0),
            f"--churn must be a finite number of at least 0, got {self.churn}",
        )
        require(self.eta is None or 0 <= self.eta <= 1, f"--eta must lie in [0, 1], got {self.eta}")
        for flag, scale in (
            ("guidance", self.guidance_scale),
            ("domain-guidance", self.domain_guidance_scale),
        ):
            require(
                scale is None or (math.isfinite(scale) and scale >= 0),
                f"--{flag}-scale must be a finite number of at least 0, got {scale}",
            )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            require(
                0 <= low < high,
                f"--guidance-interval needs 0 <= LOW < HIGH (noise levels sigma/alpha), got {low} {high}",
            )
            require(
                (self.guidance_scale, self.domain_scale) != (1.0, 1.0),
                "--guidance-interval has no effect at guidance scale 1: drop it or raise --guidance-scale",
            )

    @property
    def domain_scale(self) -> float:
        """The domain's guidance scale in force."""
        return self.guidance_scale if self.domain_guidance_scale is None else self.domain_guidance_scale


def require_timesteps(sampling: SamplingSettings, diffusion: DiffusionSettings) -> None:
    """Raise InputError where the model's noise schedule does not have the timesteps that the sampler would visit."""
    require(
        not (sampling.spacing == "karras" and diffusion.zero_terminal_snr),
        "--spacing karras needs a finite noise level at the last timestep, which --zero-terminal-snr has not: use "
        "--spacing trailing",
    )
    require(
        sampling.num_steps <= diffusion.num_train_timesteps,
        f"--num-steps {sampling.num_steps} is more than the {diffusion.num_train_timesteps} timesteps of training "
        "(--num-train-timesteps)",
    )


def require_trained_branches(sampling: SamplingSettings, training: TrainingSettings) -> None:
    """Raise InputError where guidance would ask the network for a condition that it never met in training."""
    scale, domain_scale = sampling.guidance_scale, sampling.domain_scale
    require(
        domain_scale == 1.0 or training.joint_dropout > 0,
        f"a guidance scale of {domain_scale} needs images without class and domain in training: "
        "raise --joint-dropout above 0, or use --guidance-scale 1",
    )
    require(
        scale == domain_scale or training.class_dropout > 0,
        f"guidance scales {scale} (class) and {domain_scale} (domain) differ, which needs images without class in "
        "training: raise --class-dropout above 0",
    )
