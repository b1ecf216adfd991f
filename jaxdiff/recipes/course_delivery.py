"""The pictures that the course asks for: which prompts, which files, and nothing else beside them."""

from collections.abc import Sequence
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.course_task import COUNTED, read_task
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.recipes.learned_words import words_said
from jaxdiff.recipes.text_to_image import Job


def list_delivery(path: Path, num_images: int) -> tuple[list[str], list[Job]]:
    """Return the prompts of a task and one job for each picture of each.

    Noises depend on a prompt's number under its own key, so that no key's pictures change with another key's prompts.

    Raises:
      InputError: the file is no task.
    """
    prompts: list[str] = []
    jobs = []
    for concept in read_task(path, graded=False):
        for row, prompt in enumerate(concept.prompts):
            start = f"{concept.key}/{row}/source{concept.key}_prompt{row}_"
            jobs += [Job(len(prompts), number, f"{start}{number}.png", row) for number in range(num_images)]
            prompts.append(prompt)
    return prompts, jobs


def check_words(path: Path, tokenizer: CLIPTokenizer, learned: Learned) -> None:
    """Raise InputError unless every word of a task was added to the tokenizer; print which prompts lack theirs.

    Args:
      path: of the task.
      tokenizer: of the model.
      learned: all words of files, by which it is found what a prompt says.
    """
    concepts = read_task(path, graded=False)
    words = {concept.token: (None,) for concept in concepts} | learned
    for concept in concepts:
        if not tokenizer.was_given(concept.token):
            raise InputError(
                f"--task {path}: {concept.key!r} needs the learned word {concept.token}, which neither the model nor a "
                "file of --embeddings holds"
            )
        for row, prompt in enumerate(concept.prompts):
            if concept.token not in words_said(prompt, words):
                print(f"--task {path}: prompt {row} of {concept.key!r} does not say {concept.token}: {prompt!r}")


def check_no_others(out: Path, jobs: Sequence[Job]) -> None:
    """Raise InputError where a folder of the delivery holds a picture that is none of it: the grader would count it."""
    out = out.expanduser()
    wanted = {out / job.file for job in jobs}
    for folder in sorted({path.parent for path in wanted}):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in COUNTED and path not in wanted:
                raise InputError(f"--out {path}: is none of the task's pictures; move it away, or choose another --out")
