"""The personalisation task of the course: which concepts, which prompts, and what their pictures must reach.

    {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."],
           "prompt_4_clip_eval": ["A dog on a bench."], "baseline": [[79, 34]]}}

Pictures lie in {key}/{prompt number}/, references in {key}/.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import read_strict_json

COUNTED = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif"})
"""What the grader takes for a picture."""


@dataclass(frozen=True)
class TaskConcept:
    """One concept and what is asked of it.

    Attributes:
      key: its name in the file and of its folders.
      source: what it is, in words.
      token: the learned word.
      prompts: texts with the learned word.
      plain_prompts: the same texts without it, as the grader reads them; none where only pictures are asked for.
      baselines: least image score and least text score of each prompt; none likewise.
    """

    key: str
    source: str
    token: str
    prompts: tuple[str, ...]
    plain_prompts: tuple[str, ...]
    baselines: tuple[tuple[float, float], ...]


def read_task(path: Path, graded: bool = True) -> tuple[TaskConcept, ...]:
    """Return the concepts of a task, in the order of the file.

    Args:
      path: the file.
      graded: whether it must say what pictures are graded by; else that is not read.

    Raises:
      InputError: it is no such file, or a concept lacks prompts, or has not as many of everything.
    """
    concepts = tuple(_read_concept(path, key, value, graded) for key, value in read_strict_json(path).items())
    if not concepts:
        raise InputError(f"{path}: names no concept")
    return concepts


def _read_concept(path: Path, key: str, value: Any, graded: bool) -> TaskConcept:
    if not isinstance(value, Mapping) or not key or {"/", "\\"} & set(key) or key[0] == "." or not key.isprintable():
        raise InputError(f"{path}: {key!r} must be the name of a folder, and an object")
    source, token = (_text(path, key, value, name) for name in ("src_image", "token_name"))
    prompts = _texts(path, key, value, "prompt")
    if not graded:
        return TaskConcept(key, source, token, prompts, (), ())
    plain = _texts(path, key, value, "prompt_4_clip_eval")
    baselines: Any = value.get("baseline")
    fits = isinstance(baselines, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(least) in (int, float) and math.isfinite(least) for least in pair)
        for pair in baselines
    )
    if not fits:
        raise InputError(f"{path}: baseline of {key!r} must be a list of pairs of numbers, is {baselines!r}")
    if not len(prompts) == len(plain) == len(baselines):
        raise InputError(
            f"{path}: {key!r} has {len(prompts)} prompts, {len(plain)} prompts to grade by and {len(baselines)} "
            "baselines; it needs one of each"
        )
    return TaskConcept(
        key, source, token, prompts, plain, tuple((float(image), float(text)) for image, text in baselines)
    )


def _text(path: Path, key: str, value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{path}: {name} of {key!r} must be a text, is {found!r}")
    return found


def _texts(path: Path, key: str, value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = value.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise InputError(f"{path}: {name} of {key!r} must be a list of texts, is {found!r}")
    return tuple(found)
