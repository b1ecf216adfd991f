"""Classify pictures by the names of their classes alone, with CLIP, and explain the result.

    python -m jaxdiff.zeroshot --images DIR --labels id2label.json --model openai/clip-vit-base-patch32 --out runs/clip

Writes into --out: predictions.csv, per_class.csv, sheets of successes and failures, results.json and report.html.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.settings import as_flag, require, require_at_least

FEATURES = "features"


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
    prompt_weights: Literal["equal", "autoclip", "zpe"] = "equal"
    """Weights of several templates, found without labels: AutoCLIP (arXiv 2309.16414) or ZPE (arXiv 2302.06235)."""
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
    devices: Annotated[ProcessSettings, tyro.conf.arg(name="")] = dataclass_field(default_factory=ProcessSettings)
    tiny_steps: int | None = None
    """Training steps of tiny-digits; None means 900."""

    def __post_init__(self):
        for name in ("cases", "batch_size", "tiny_steps"):
            value = getattr(self, name)
            require_at_least(name, 1 if value is None else value, 1)
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(bool(self.model), "--model needs at least one folder or name")
        require(len(set(self.model)) == len(self.model), "--model: give each model once")
        require(bool(self.template), "--template needs at least one template")
        require(len(set(self.template)) == len(self.template), "--template: give each template once")
        require(self.revision is None or len(self.model) == 1, "--revision goes with one --model, got several")
        trained = "tiny-digits" in self.model
        require(self.tiny_steps is None or trained, "--tiny-steps has no effect without --model tiny-digits: drop it")
        require(self.revision is None or not trained, "--revision has no effect with --model tiny-digits: drop it")
        for name in ("labels", "clean_names"):
            given = getattr(self, name) not in (None, False)
            require(
                not given or self.images != "digits", f"{as_flag(name)} has no effect with --images digits: drop it"
            )
        if self.descriptions is not None:
            for field in fields(self):
                given = getattr(self, field.name) != field.default
                clash = given and field.name in ("template", "prompt_weights", "compare_templates")
                require(not clash, f"{as_flag(field.name)} has no effect with --descriptions: drop one of the two")


def run(config: Config) -> list[Path]:
    """Load pictures and models, classify, report."""
    from jaxdiff.io.labelled_images import load_labelled
    from jaxdiff.io.runs import as_json, check_writable, make_folder
    from jaxdiff.mesh import open_mesh, own_mesh
    from jaxdiff.processes import is_leader
    from jaxdiff.recipes.zeroshot import classify, make_prompts, prepare_encoder
    from jaxdiff.recipes.zeroshot_report import write_outputs

    started = time.perf_counter()
    mesh = own_mesh(open_mesh(config.devices))
    check_writable(config.out)
    images = load_labelled(config.images, config.labels, config.clean_names)
    prompts = make_prompts(images.class_names, config.template, config.descriptions, config.prompt_weights)
    if len(prompts.templates) == 1:
        for name in ("prompt_weights", "compare_templates"):
            given = getattr(config, name) not in ("equal", False)
            require(not given, f"{as_flag(name)} has no effect with one template: give several, or drop it")
    counts = f"{len(images.names):,} pictures of {len(images.class_names):,} classes, {len(prompts.flat):,} prompts"
    print(counts + ("" if config.prompt_weights == "equal" else f", weighted by {config.prompt_weights}"))
    features = config.out.expanduser().resolve() / FEATURES
    results, too_long = [], 0
    for number, name in enumerate(config.model):
        encoder = prepare_encoder(name, config.revision, config.dtype, config.tiny_steps, mesh)
        too_long += encoder.tokenizer.count_too_long(prompts.flat)
        needless = config.truncate and name == config.model[-1] and not too_long
        require(not needless, "--truncate has no effect: no prompt is too long; drop it")
        result = classify(
            encoder,
            images,
            prompts,
            config.compare_templates,
            config.truncate,
            config.batch_size,
            config.seed,
            features / str(number),
        )
        if result is None:
            continue
        found = result.figures
        print(
            f"{name}: top-1 {found['top1']:.1%} ({found['top1_low']:.1%} to {found['top1_high']:.1%})"
            + (f", {found['images_per_second']:,.0f} images/s" if "images_per_second" in found else "")
            + (f", {found['skipped']} skipped" if found["skipped"] else "")
        )
        results.append(result)
    if not is_leader():
        return []
    out = make_folder(config.out)
    written = write_outputs(out, results, images, prompts, config.cases, config.seed, as_json(config), mesh, started)
    # Only for a run that is killed before its end.
    shutil.rmtree(features)
    return written


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("zeroshot", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
