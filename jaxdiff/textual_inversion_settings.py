"""The flags of textual_inversion: what is learned and how; importing them costs no jax."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxdiff.settings import OptimizationSettings, as_flag, require, require_at_least
from jaxdiff.text2image_settings import PictureSettings


@dataclass(frozen=True)
class InversionSettings(OptimizationSettings):
    """How the new words are trained, and how often things are written."""

    train_steps: int = 1000
    """Training steps."""
    batch_size: int = 4
    """Pictures of a training step, over all devices."""
    learning_rate: float = 5e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 20
    """Steps of linear warm-up; a cosine to 0 follows."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the rows."""
    ema_decay: float = 0.99
    """Limit of the decay of the average of the rows, which is what is kept, in [0, 1)."""
    save_every: int = 100
    """Steps between checkpoints."""
    sample_every: int = 250
    """Steps between grids of pictures."""
    vectors_per_token: int = 1
    """Rows that each word becomes."""
    mean_initializer: bool = False
    """Start from the mean of the tokens where an initialiser has several, instead of refusing it."""
    templates: tuple[str, ...] = ()
    """FILE of texts to learn all words from, one a line, {} for the word; or object:FILE, style:FILE or both, for the
    words of a kind. None means the built-in ones."""
    flip: bool = True
    """Learn from the pictures and from their mirror images; never so for the digit of the tiny world."""
    crops: int = 0
    """Learn from this many random squares of each picture too, of 70 to 100 % of its shorter side."""
    fixed_norm: bool = False
    """Learn the direction of each vector alone, with the mean norm of the model's words (arXiv 2512.13672). A step
    turns a vector by --learning-rate, in radians; the paper's is 0.01."""
    direction_prior: float | None = None
    """Pull towards the initialiser's direction; None means the paper's 1e-4. Only with --fixed-norm."""
    kv_learning_rate: float | None = None
    """Learn the UNet's keys and values of the text too (Custom Diffusion, arXiv 2212.04488), at this peak rate, the
    paper's being 1e-5 for each picture of a batch; None means words alone."""
    value_learning_rate: float | None = None
    """Learn, for each word, what is added to the values of its own tokens (ConceptSplit, arXiv 2510.04668), at this
    peak rate, and nothing else: the word itself stays its initialiser. None means that the word is learned."""
    adapter_rank: int | None = None
    """Keep the learned matrices at this rank, in a smaller file; None means whole. Only with --kv-learning-rate or
    --value-learning-rate."""
    prior: tuple[str, ...] = ()
    """Class pictures, FOLDER:TEXT, such as "pictures/dogs:a photo of a dog"; half of each batch, so that the class is
    not forgotten (arXiv 2208.12242). Only with --kv-learning-rate."""
    prior_weight: float | None = None
    """Their weight in the loss, beside 1 for the concepts; None means 1. Only with --prior."""
    mask: tuple[str, ...] = ()
    """Where the subject is, <word>:FOLDER with a mask for each picture, of its name and size; only white counts."""
    loss_weighting: Literal["constant", "min_snr"] = "constant"
    """Weight of a timestep in the loss: none, or min-SNR with gamma 5 (arXiv 2303.09556)."""
    sample_prompts: tuple[str, ...] = ()
    """Texts of the pictures along the way and at the end; none means two for each word, and one for each pair."""
    sample_images: int = 4
    """Pictures of each of these texts."""
    score_model: str | None = None
    """Folder or Hugging Face name of a CLIP that scores the pictures along the way by their likeness to the concepts'
    own: the mean of 100 cosines, as the course's grader has it. `tiny-digits` needs no download."""
    patience: int | None = None
    """Stop when so many scores in a row have not risen, and in any case save what had been learned at the best one.
    Only with --score-model."""
    sample_steps: int = 25
    """Sampling steps of these pictures."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of these pictures, g = 1 + w of arXiv 2207.12598."""
    size: int | None = None
    """Height and width of pictures in pixels; None means what the model was trained on."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("vectors_per_token", "sample_images", "sample_steps", "size"):
            require_at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        require_at_least("crops", self.crops, 0)
        require(all(text.strip() for text in self.sample_prompts), "--sample-prompts: one is empty")
        require(
            self.direction_prior is None or self.fixed_norm,
            "--direction-prior has no effect without --fixed-norm: add it, or drop --direction-prior",
        )
        require(
            self.direction_prior is None or 0 <= self.direction_prior < math.inf,
            f"--direction-prior must be a finite number of at least 0, got {self.direction_prior}",
        )
        for name in ("weight_decay", "clip_norm"):
            require(
                not self.fixed_norm
                or self.kv_learning_rate is not None  # it acts on the matrices
                or getattr(self, name) == getattr(type(self), name),
                f"{as_flag(name)} has no effect with --fixed-norm, where every gradient is one long: drop it",
            )
        for name in ("kv_learning_rate", "fixed_norm", "learning_rate"):
            require(
                self.value_learning_rate is None or getattr(self, name) == getattr(type(self), name),
                f"{as_flag(name)} has no effect with --value-learning-rate, where words stay as they are: drop it",
            )
        require(
            self.adapter_rank is None or self.matrices_learning_rate is not None,
            "--adapter-rank has no effect without --kv-learning-rate or --value-learning-rate: add one, or drop it",
        )
        require(
            not self.prior or self.kv_learning_rate is not None,
            "--prior has no effect without --kv-learning-rate: no text of a class holds a learned word, so words alone "
            "learn nothing from it; add it, or drop --prior",
        )
        needs = {"prior_weight": "prior", "patience": "score_model"}
        for name, needed in needs.items():
            require(
                getattr(self, name) is None or getattr(self, needed) not in (None, ()),
                f"{as_flag(name)} has no effect without {as_flag(needed)}: add it, or drop {as_flag(name)}",
            )
        for name in ("kv_learning_rate", "value_learning_rate", "prior_weight"):
            value = 1.0 if getattr(self, name) is None else getattr(self, name)
            require(0 < value < math.inf, f"{as_flag(name)} must be positive and finite, got {value}")
        for name in ("adapter_rank", "patience"):
            require_at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        require(
            not self.prior or self.batch_size % 2 == 0,
            f"--prior fills every second place of a batch: --batch-size must be even, got {self.batch_size}",
        )
        scored = (self.train_steps - 1) // self.sample_every
        require(
            self.patience is None or self.patience < scored,
            f"--patience {self.patience} can never end this run, which scores {scored} times on its way: sample more "
            "often by --sample-every",
        )
        _ = self.pictures  # refuses what cannot be drawn

    @property
    def matrices_learning_rate(self) -> float | None:
        """Peak rate of what is learned beside words; None where nothing is."""
        return self.kv_learning_rate if self.value_learning_rate is None else self.value_learning_rate

    @property
    def pictures(self) -> PictureSettings:
        """How pictures are drawn."""
        return PictureSettings(
            num_steps=self.sample_steps,
            guidance_scale=self.guidance_scale,
            height=self.size,
            width=self.size,
            seed=self.seed,
            batch_size=self.batch_size,
        )
