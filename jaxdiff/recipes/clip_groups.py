"""Groups of pictures, one a prompt, with what they are held to."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.concept_pictures import MAX_PIXELS
from jaxdiff.io.course_task import COUNTED, read_task
from jaxdiff.io.images import read_image
from jaxdiff.io.labelled_images import Pixels, pictures, single_pictures
from jaxdiff.recipes.learned_words import longest_of, words_said


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt.

    Attributes:
      name: in tables and in results.json.
      files: in order of name.
      references: pictures of the concept; may be none.
      prompt: text that they shall show; empty for none.
      spoken: the text that they were drawn from, with the learned word; empty where `prompt` is that.
      stripped: the same without learned words; empty where that is not known.
      baseline: least image and text score of the best five; None where nothing is asked.
      words: concepts whose presence is asked for.
      concepts: by word, the references of each of several concepts that the pictures shall show together.
    """

    name: str
    files: tuple[Path, ...]
    references: tuple[Path, ...]
    prompt: str
    spoken: str = ""
    stripped: str = ""
    baseline: tuple[float, float] | None = None
    words: tuple[str, ...] = ()
    concepts: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def all_references(self) -> dict[str, tuple[Path, ...]]:
        """References by the name of their row on the sheet; none twice."""
        known = {"references": self.references} if self.references else {}
        others = {word: files for word, files in self.concepts.items() if files != self.references}
        return known | {f"references: {word}": files for word, files in others.items()}

    @property
    def texts(self) -> dict[str, str]:
        """What the pictures are compared with, by the name of the figure; a text may be empty."""
        return {"clip_t": self.prompt, "clip_t_with_word": self.spoken, "clip_t_stripped": self.stripped}


def task_groups(task: Path, generated: Path, references: Path, count: int, words: Sequence[str] = ()) -> list[Group]:
    """Return one group for each prompt of the course's task.

    A prompt that says words of several of its concepts is held to the references of each, beside its grade, which is
    by those of its own key.

    Args:
      task: the JSON file.
      generated: holds {key}/{prompt number}/.
      references: holds {key}/.
      count: pictures that each prompt must have.
      words: whose presence is asked for where a prompt to grade by says them.

    Raises:
      InputError: the file is not such a task, a folder is missing, or holds another number of pictures, or no prompt
        says a word.
    """
    groups, concepts = [], read_task(task)
    originals = {concept.key: list_counted(references / concept.key, "--references") for concept in concepts}
    # A word that stands for two concepts says neither.
    tokens = Counter(concept.token for concept in concepts)
    key_of = {concept.token: concept.key for concept in concepts if tokens[concept.token] == 1}
    for concept in concepts:
        own = {**key_of, concept.token: concept.key}
        for number, (prompt, plain, baseline) in enumerate(
            zip(concept.prompts, concept.plain_prompts, concept.baselines)
        ):
            folder = generated / concept.key / str(number)
            files = list_counted(folder, "--generated")
            if len(files) != count:
                raise InputError(f"--generated {folder}: {len(files)} pictures, must be {count}; --count says how many")
            said = words_said(prompt, dict.fromkeys(own, (None,)))
            together = {token: originals[key] for token, key in own.items() if token in said}
            groups.append(
                Group(
                    f"{concept.key}.{number}",
                    files,
                    originals[concept.key],
                    plain,
                    prompt,
                    without(list(tokens), prompt),
                    baseline,
                    tuple(word for word in words if says(plain, word)),
                    together if len(together) > 1 else {},
                )
            )
    for word in words:
        if not any(word in group.words for group in groups):
            raise InputError(
                f"--words {word}: no prompt_4_clip_eval of --task says it: give words as those prompts do, or drop it"
            )
    return groups


def says(text: str, word: str) -> bool:
    """Tell whether a text says a word by itself, not as a part of another one, whatever its case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def parse_references(given: Sequence[str]) -> tuple[tuple[Path, ...], dict[str, tuple[Path, ...]]]:
    """Return the pictures of the one concept, or those of each of several by its word.

    Args:
      given: one FOLDER, or WORD:FOLDER of each concept.

    Raises:
      InputError: several without a word of their own, no such folder, or no pictures in it.
    """
    concepts: dict[str, tuple[Path, ...]] = {}
    for text in given:
        word, _, folder = text.partition(":")
        if not folder or not word.strip() or Path(text).expanduser().is_dir():
            if len(given) > 1:
                raise InputError(f"--references {text}: of several folders each needs its own word, WORD:FOLDER")
            return list_pictures(Path(text), "--references"), {}
        word = word.strip()
        if word in concepts:
            raise InputError(f"--references {text}: the word {word!r} has references already; give each word once")
        concepts[word] = list_pictures(Path(folder), f"--references {word}:")
    return (), concepts


def without(tokens: Sequence[str], prompt: str) -> str:
    """Return the prompt with the learned words left out."""
    return re.sub(r"\s+", " ", longest_of(tokens).sub(" ", prompt)).strip()


def list_pictures(folder: Path, flag: str) -> tuple[Path, ...]:
    """Return the pictures of a folder in order of name, without our own grids and sheets of them.

    Raises:
      InputError: no such folder, or no pictures in it.
    """
    return _list(folder, flag, single_pictures)


def list_counted(folder: Path, flag: str) -> tuple[Path, ...]:
    """Return all that the course's grader counts in a folder, likewise."""
    return _list(folder, flag, lambda folder: pictures(folder, COUNTED))


def _list(folder: Path, flag: str, list_files: Callable[[Path], list[Path]]) -> tuple[Path, ...]:
    if not folder.expanduser().is_dir():
        raise InputError(f"{flag} {folder}: no such folder")
    found = tuple(list_files(folder.expanduser()))
    if not found:
        raise InputError(f"{flag} {folder}: holds no pictures")
    return found


def read_as_grader(path: Path) -> Pixels:
    """Decode a picture as the course's grader does, who does not turn it; raise OSError as `read_image` does."""
    return read_image(path, MAX_PIXELS)
