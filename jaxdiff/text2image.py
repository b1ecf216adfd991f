"""Draw pictures from texts with Stable Diffusion.

    python -m jaxdiff.text2image --model DIR --prompt "a photo of a cat" --num-images 4 --out runs/cat

Writes into --out: one PNG file a picture, which says how it was made, grid.png, results.json and report.html.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxdiff.command import run_command
from jaxdiff.settings import require, require_at_least
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings


@dataclass(frozen=True)
class Config:
    """Draw pictures from texts with Stable Diffusion."""

    prompt: tuple[str, ...] = ()
    """What to draw; several make a row of pictures each."""
    prompts: Path | None = None
    """Text file with more prompts, one a line."""
    num_images: int = 1
    """Pictures of each prompt."""
    model: LatentModelSettings = field(default_factory=LatentModelSettings)
    pictures: PictureSettings = field(default_factory=PictureSettings)
    devices: int | None = None
    """Devices that share a batch; None means all."""
    out: Path = Path("runs/text2image")
    """Folder to write into; pictures made with other settings are replaced, the others kept."""
    dry_run: bool = False
    """Only say how much memory it would take; reads no weights."""

    def __post_init__(self):
        require_at_least("num_images", self.num_images, 1)
        require_at_least("devices", 1 if self.devices is None else self.devices, 1)
        require(
            bool(self.prompt) or self.prompts is not None or self.dry_run, "--prompt or --prompts must say what to draw"
        )
        require(all(text.strip() for text in self.prompt), "--prompt: one is empty")


def run(config: Config) -> list[Path]:
    """Load the model, draw what is missing, write everything down."""
    from jaxdiff.io.prompts import read_prompts
    from jaxdiff.io.runs import as_json, check_writable, make_folder
    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.text_to_image import draw_missing
    from jaxdiff.recipes.text_to_image_model import describe_memory, prepare
    from jaxdiff.recipes.text_to_image_report import write_outputs

    started = time.perf_counter()
    mesh = make_mesh(config.devices)
    if config.dry_run:
        print(describe_memory(config.model, config.pictures, mesh))
        return []
    check_writable(config.out)
    prompts = [*config.prompt, *(read_prompts(config.prompts) if config.prompts else ())]
    drawing = prepare(config.model, config.pictures, mesh)
    drawing.tokenize(prompts)  # refuses what is too long before anything is written
    out = make_folder(config.out)
    drawn = draw_missing(drawing, prompts, config.num_images, out)
    return write_outputs(out, drawing, prompts, drawn, as_json(config), started)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("text2image", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
