"""Score pictures of learned concepts with CLIP: likeness to references, fit to prompts, and the course's grade.

    python -m jaxdiff.clip_scores --task input.json --generated out --references concepts --out runs/grade
    python -m jaxdiff.clip_scores --generated DIR --references DIR --prompt "a dog on a beach" --words dog beach
    python -m jaxdiff.clip_scores --generated DIR --references dog:DIR cat:DIR --prompt "a dog, a cat" --words dog cat

Writes into --out: scores.csv, a sheet of pictures for each prompt, results.json and report.html.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.settings import require, require_at_least

SHOWN = ("best.image_score", "best.text_score", "image_score", "text_score", "clip_i", "cmmd", "all_present")
"""Figures on the screen, before those of each word and of each text."""
FEATURES = "features"


@dataclass(frozen=True)
class Config:
    """Score pictures of learned concepts with CLIP."""

    generated: Path
    """Folder of pictures; with --task it holds {key}/{prompt number}/."""
    references: tuple[str, ...] = ()
    """Folder of pictures of the concept, or WORD:FOLDER of each of several; with --task one that holds {key}/."""
    task: Path | None = None
    """The course's input.json: concepts, prompts and baselines."""
    prompt: str = ""
    """What the pictures shall show. Not with --task."""
    token: tuple[str, ...] = ()
    """Learned words in --prompt, left out for the scores that go without them."""
    words: tuple[str, ...] = ()
    """Concepts whose presence in each picture is scored; with --task where the prompt that is graded by says them."""
    count: int = 25
    """Pictures that each prompt of --task must have."""
    model: str = "openai/clip-vit-base-patch32"
    """Folder or Hugging Face name of a CLIP; the course grades with the default. `tiny-digits` needs no download."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    batch_size: int = 64
    """Pictures encoded at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the networks compute in."""
    devices: Annotated[ProcessSettings, tyro.conf.arg(name="")] = field(default_factory=ProcessSettings)
    seed: int = 0
    """Seed of the bootstrap."""
    out: Path = Path("runs/clip_scores")
    """Folder to write into; files of the same name are replaced, sheets of earlier runs deleted."""

    def __post_init__(self):
        for name in ("count", "batch_size"):
            require_at_least(name, 1 if getattr(self, name) is None else getattr(self, name), 1)
        tiny = self.model == "tiny-digits"
        require(self.revision is None or not tiny, "--revision has no effect with --model tiny-digits: drop it")
        require(0 <= self.seed < 2**32, f"--seed must lie in [0, 2^32), got {self.seed}")
        require(all(word.strip() for word in self.words), "--words: one is empty")
        require(len(set(self.words)) == len(self.words), "--words: give each word once")
        if self.task is not None:
            require(len(self.references) == 1, "--task needs one --references, which holds a folder for each key")
            require(not (self.prompt or self.token), "--task brings its own prompts: drop --prompt and --token")
            return
        require(
            bool(self.references) or bool(self.prompt) or bool(self.words),
            "nothing to score by: give --references, --prompt, --words, or --task",
        )
        require(self.count == 25, "--count has no effect without --task: drop it")
        for token in self.token:
            require(bool(token) and token in self.prompt, f"--token {token!r} is not in --prompt {self.prompt!r}")


def run(config: Config) -> list[Path]:
    """List the pictures, score them, write everything down."""
    from jaxdiff.io.concept_pictures import read_photograph
    from jaxdiff.io.runs import as_json, check_writable, make_folder
    from jaxdiff.mesh import open_mesh, own_mesh
    from jaxdiff.recipes.clip_grading import grade
    from jaxdiff.recipes.clip_groups import (
        Group,
        list_pictures,
        parse_references,
        read_as_grader,
        task_groups,
        without,
    )
    from jaxdiff.recipes.clip_scores_report import write_outputs
    from jaxdiff.recipes.zeroshot import prepare_encoder

    started = time.perf_counter()
    mesh = own_mesh(open_mesh(config.devices))
    check_writable(config.out)
    if config.task is not None:
        groups = task_groups(config.task, config.generated, Path(config.references[0]), config.count, config.words)
    else:
        references, concepts = parse_references(config.references)
        stripped = without(config.token, config.prompt) if config.token else ""
        files = list_pictures(config.generated, "--generated")
        groups = [Group("pictures", files, references, config.prompt, "", stripped, None, config.words, concepts)]
    encoder = prepare_encoder(config.model, config.revision, config.dtype, None, mesh)
    features = config.out.expanduser().resolve() / FEATURES
    read = read_photograph if config.task is None else read_as_grader
    graded = grade(encoder, groups, config.batch_size, config.seed, features, read)
    if graded is None:
        return []
    for result in graded:
        of_words = (f"image_score.{word}" for word in result.group.concepts)
        shown = [*SHOWN, *of_words, *(f"present.{word}" for word in result.group.words)]
        scores = [f"{name} {result.figures[name]:.2f}" for name in shown if name in result.figures]
        verdict = {None: "", True: "PASS ", False: "FAIL "}[result.passed]
        print(f"{result.group.name}: {verdict}{', '.join(scores)}")
        for name, text in result.group.texts.items():
            if text:
                print(f"  {name} {result.figures[name]:.3f}, x2.5 {result.figures[f'{name}_times_2.5']:.3f}: {text!r}")
    written = write_outputs(make_folder(config.out), encoder, graded, as_json(config), started)
    # Only for a run that is killed before its end.
    shutil.rmtree(features)
    return written


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("clip_scores", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
