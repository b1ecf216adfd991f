"""Classify pictures by the names of their classes alone, with CLIP, and explain the result.

    python -m jaxdiff.zeroshot --images DIR --labels id2label.json --model openai/clip-vit-base-patch32 --out runs/clip

Writes into --out: predictions.csv, per_class.csv, sheets of successes and failures, results.json and report.html.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.command import run_command
from jaxdiff.settings import require, require_at_least


@dataclass(frozen=True)
class Config:
    """Classify pictures by the names of their classes alone, with CLIP, and explain the result."""

    images: str = "digits"
    """`digits` (embedded), a folder of CLASS_IMAGE.png files, a folder of class folders, or a csv: filename,label."""
    labels: Path | None = None
    """JSON object of class number -> class name, {"0": "bicycle", ...}."""
    model: tuple[str, ...] = ("tiny-digits",)
    """Folders or Hugging Face names; several make one table. `tiny-digits` is trained on the spot, in two minutes."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    template: tuple[str, ...] = ("A photo of {}.",)
    """Prompts with {} for the class name, or imagenet-80 or imagenet-7; several are averaged."""
    descriptions: Path | None = None
    """JSON object of class name -> list of prompts, instead of templates."""
    compare_templates: bool = False
    """Also give the accuracy with each template alone."""
    clean_names: bool = False
    """Replace underscores in class names by spaces."""
    truncate: bool = False
    """Cut prompts that are too long instead of refusing them."""
    out: Path = Path("runs/zeroshot")
    """Folder to write into; files of the same name are replaced."""
    cases: int = 5
    """Successes, and failures, on the sheets of cases."""
    seed: int = 0
    """Seed of the bootstrap and of the drawn cases."""
    batch_size: int = 64
    """Pictures encoded at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the networks compute in."""
    devices: int | None = None
    """Devices that share a batch; None means all."""
    tiny_steps: int = 900
    """Training steps of tiny-digits."""

    def __post_init__(self):
        for name in ("cases", "batch_size", "tiny_steps"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("devices", 1 if self.devices is None else self.devices, 1)
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(bool(self.model), "--model needs at least one folder or name")
        require(len(set(self.model)) == len(self.model), "--model: give each model once")
        require(bool(self.template), "--template needs at least one template")
        require(self.revision is None or len(self.model) == 1, "--revision goes with one --model, got several")
        require(
            self.descriptions is None or not self.compare_templates,
            "--compare-templates has no effect with --descriptions: drop one of the two",
        )
        default = type(self).__dataclass_fields__["template"].default
        require(
            self.descriptions is None or self.template == default,
            "--template has no effect with --descriptions: drop one of the two",
        )


def run(config: Config) -> list[Path]:
    """Load pictures and models, classify, report."""
    from jaxdiff.io.labelled_images import load_labelled
    from jaxdiff.io.runs import as_json, check_writable, make_folder
    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.zeroshot import classify, make_prompts, prepare_encoder
    from jaxdiff.recipes.zeroshot_report import write_outputs

    started = time.perf_counter()
    mesh = make_mesh(config.devices)
    check_writable(config.out)
    images = load_labelled(config.images, config.labels, config.clean_names)
    prompts = make_prompts(images.class_names, config.template, config.descriptions)
    per_class = len(prompts.by_class[0])
    print(f"{len(images.names):,} pictures of {len(images.class_names):,} classes, {per_class} prompts a class")
    results = []
    for name in config.model:
        encoder = prepare_encoder(name, config.revision, config.dtype, config.tiny_steps, mesh)
        result = classify(
            encoder,
            images,
            prompts,
            config.compare_templates,
            config.truncate,
            config.batch_size,
            config.seed,
        )
        found = result.figures
        print(
            f"{name}: top-1 {found['top1']:.1%} ({found['top1_low']:.1%} to {found['top1_high']:.1%}), "
            f"{found['images_per_second']:,.0f} images/s"
            + (f", {found['skipped']} skipped" if found["skipped"] else "")
        )
        results.append(result)
    out = make_folder(config.out)
    return write_outputs(out, results, images, prompts, config.cases, config.seed, as_json(config), mesh, started)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("zeroshot", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
