"""Draw pictures from texts with Stable Diffusion.

    python -m jaxdiff.text2image --model DIR --prompt "a photo of a cat" --num-images 4 --out runs/cat
    python -m jaxdiff.text2image --model DIR --embeddings learned_embeds.safetensors --task input.json --out out

Writes into --out: one PNG file a picture, which says how it was made, grid.png, results.json and report.html. With
--task the files are {key}/{prompt number}/source{key}_prompt{prompt number}_{n}.png.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.settings import require, require_at_least
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

PICTURES_OF_A_TASK = 25
"""What the course's grader counts."""

Group = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Config:
    """Draw pictures from texts with Stable Diffusion."""

    prompt: tuple[str, ...] = ()
    """What to draw; several make a row of pictures each."""
    prompts: Path | None = None
    """Text file with more prompts, one a line."""
    task: Path | None = None
    """The course's input.json, which names learned words and prompts; draws all its pictures under its file names."""
    num_images: int | None = None
    """Pictures of each prompt; None means 25 with --task, else 1."""
    model: Annotated[LatentModelSettings, Group] = field(default_factory=LatentModelSettings)
    pictures: Annotated[PictureSettings, Group] = field(default_factory=PictureSettings)
    devices: Annotated[ProcessSettings, Group] = field(default_factory=ProcessSettings)
    out: Path = Path("runs/text2image")
    """Folder to write into; pictures that jaxdiff drew there with other settings are replaced, other files kept."""
    dry_run: bool = False
    """Only say how much memory it would take, whatever the prompts; reads no weights."""

    def __post_init__(self):
        require_at_least("num_images", 1 if self.num_images is None else self.num_images, 1)
        named = bool(self.prompt) or self.prompts is not None
        require(self.task is None or not named, "--task brings its own prompts: drop --prompt and --prompts")
        require(named or self.task is not None or self.dry_run, "--prompt, --prompts or --task must say what to draw")
        require(all(text.strip() for text in self.prompt), "--prompt: one is empty")


def run(config: Config) -> list[Path]:
    """Load the model, draw what is missing, write everything down."""
    from jaxdiff.mesh import open_mesh, own_mesh

    started = time.perf_counter()
    mesh = own_mesh(open_mesh(config.devices))  # before the others, because some of them compute
    from jaxdiff.io.prompts import read_prompts
    from jaxdiff.io.runs import as_json, check_writable, make_folder
    from jaxdiff.processes import is_leader, leader_first
    from jaxdiff.recipes.course_delivery import check_no_others, check_words, list_delivery
    from jaxdiff.recipes.memory import explain_want_of_memory, list_memory
    from jaxdiff.recipes.text_to_image import draw_missing, make_jobs
    from jaxdiff.recipes.text_to_image_model import check_said, estimate_drawing, prepare
    from jaxdiff.recipes.text_to_image_report import write_outputs

    def estimate():
        return estimate_drawing(config.model, config.pictures, mesh)

    if config.dry_run:
        print(list_memory(estimate()))
        return []
    check_writable(config.out)
    if config.task is None:
        prompts = [*config.prompt, *(read_prompts(config.prompts) if config.prompts else ())]
        jobs = make_jobs(prompts, config.num_images or 1)
    else:
        prompts, jobs = list_delivery(config.task, config.num_images or PICTURES_OF_A_TASK)
        check_no_others(config.out, jobs)
    check_said(config.model, [*prompts, config.pictures.negative])
    with explain_want_of_memory(estimate, "lower --batch-size, --height or --width, or use --dtype bfloat16"):
        drawing = leader_first(lambda: prepare(config.model, config.pictures, mesh))
        if config.task is not None:
            check_words(config.task, drawing.tokenizer, drawing.learned)
        drawing.tokenize([*prompts, config.pictures.negative])  # refuses what is too long before anything is written
        out = make_folder(config.out)
        drawn = draw_missing(drawing, prompts, jobs, out)
    if not is_leader():
        return []
    return write_outputs(out, drawing, prompts, jobs, drawn, as_json(config), started)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("text2image", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
