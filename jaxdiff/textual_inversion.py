"""Teach Stable Diffusion new words from a few pictures each, by textual inversion.

    python -m jaxdiff.textual_inversion     # nothing to download: a small model of digits, and one that it cannot name
    python -m jaxdiff.textual_inversion --model DIR --concept "<new1>:DIR:dog" "<new2>:DIR:painting:style"

Writes into --out: learned_embeds.safetensors, which text2image and diffusers read, grids of pictures along the way,
checkpoints, metrics.jsonl, results.json and report.html.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.settings import require
from jaxdiff.text2image_settings import LatentModelSettings
from jaxdiff.textual_inversion_settings import InversionSettings

Group = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """Teach Stable Diffusion new words from a few pictures each, by textual inversion."""

    concept: tuple[str, ...] = ()
    """What to learn, <word>:FOLDER:initialiser or, for a style, <word>:FOLDER:initialiser:style; several at once. None
    means the digit that tiny-world, the model unless another is given, has no name for."""
    model: Annotated[LatentModelSettings, Group] = field(
        default_factory=lambda: LatentModelSettings(model="tiny-world")
    )
    training: Annotated[InversionSettings, Group] = field(default_factory=InversionSettings)
    resume: Literal["auto", "never"] = "auto"
    """auto goes on with the run in --out; never deletes what it left there and starts over."""
    devices: Annotated[ProcessSettings, Group] = field(default_factory=ProcessSettings)
    out: Path = Path("runs/textual_inversion")
    """Run folder."""
    dry_run: bool = False
    """Only say how much memory it would take; reads no weights and no pictures."""

    def __post_init__(self):
        own = self.model.model == "tiny-world"
        require(bool(self.concept) or own, '--concept must say what to learn, such as "<new1>:FOLDER:dog"')
        require(
            not self.model.adapters or self.training.matrices_learning_rate is None,
            "an adapter that is learned is one of the model itself: drop --adapters",
        )
        words = [text.split(":")[0] for text in self.concept]
        require(len(set(words)) == len(words), "--concept: a word stands for two concepts")


# What may differ when a run goes on: none of it changes the learned rows.
FREE = {
    "out",
    "resume",
    "log_every",
    "save_every",
    "sample_every",
    "sample_prompts",
    "sample_images",
    "sample_steps",
    "guidance_scale",
    "dry_run",
} | {field.name for field in fields(ProcessSettings)}


# Unless what is drawn along the way decides when to stop.
FREE_IF_NOT_SCORED = {"sample_every", "sample_prompts", "sample_images", "sample_steps", "guidance_scale"}


def run(config: Config) -> list[Path]:
    """Read model and pictures, learn the words, draw with them, write everything down."""
    from jaxdiff.mesh import open_mesh, own_mesh, require_divisible

    started = time.perf_counter()
    mesh = open_mesh(config.devices)  # before the others, because some of them compute
    from jaxdiff.io.concept_pictures import parse_concept
    from jaxdiff.io.runs import as_json, check_config, check_same_data, check_writable, open_run
    from jaxdiff.processes import is_leader, leader_first, on_leader
    from jaxdiff.recipes.inversion_memory import estimate_learning
    from jaxdiff.recipes.inversion_parts import check_tiny_world, own_concept, prepare_inversion
    from jaxdiff.recipes.inversion_report import write_outputs
    from jaxdiff.recipes.inversion_training import train
    from jaxdiff.recipes.memory import explain_want_of_memory, list_memory

    require_divisible(config.training.batch_size, mesh, "--batch-size", config.training.accumulation_steps)
    training = config.training

    def estimate():
        words = [parse_concept(text).word for text in config.concept] or ["<new1>"]
        return estimate_learning(words, config.model, training, own_mesh(mesh))

    if config.dry_run:
        print(list_memory(estimate()))
        return []
    free = FREE if training.patience is None else FREE - FREE_IF_NOT_SCORED
    check_writable(config.out)
    lower = "lower --batch-size or --size, raise --accumulation-steps, or use --dtype bfloat16"
    with explain_want_of_memory(estimate, lower):
        if config.concept:
            concepts = [parse_concept(text) for text in config.concept]
            if config.model.model == "tiny-world":
                check_tiny_world(concepts, config.model)
        else:
            concepts, training = leader_first(lambda: own_concept(config.training, mesh))
            config = replace(config, training=training)
        if config.resume == "auto":
            check_config(config.out, as_json(config), free)
        parts = prepare_inversion(concepts, config.model, training, mesh)
        out = config.out.expanduser().resolve()
        on_leader(lambda: open_run(out, as_json(config), free, start_over=config.resume == "never"))
        what = "the pictures of --concept, the texts, the weights of the models or the machine's --dtype"
        on_leader(lambda: check_same_data(out, parts.data.about, what))
        outcome = train(parts, training, out)
        return write_outputs(out, parts, outcome, training, as_json(config), started) if is_leader() else []


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("textual_inversion", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
