"""Prompts from files, and templates that turn a class name into one: published sets, one's own, or descriptions.

`imagenet-80` and `imagenet-7` are the sets that OpenAI published with CLIP (arXiv 2103.00020, section 3.1.4; the seven
were chosen by forward selection for a low-resolution ResNet).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import read_strict_json

COURSE = "A photo of {}."

_PICTURES = (
    "a photo of a {}.|a photo of the {}.|a photo of one {}.|a photo of many {}.|a photo of my {}.|"
    "a bad photo of a {}.|a bad photo of the {}.|a good photo of a {}.|a good photo of the {}.|"
    "a bright photo of a {}.|a bright photo of the {}.|a dark photo of a {}.|a dark photo of the {}.|"
    "a blurry photo of a {}.|a blurry photo of the {}.|a cropped photo of a {}.|a cropped photo of the {}.|"
    "a close-up photo of a {}.|a close-up photo of the {}.|"
    "a black and white photo of a {}.|a black and white photo of the {}.|"
    "a low resolution photo of a {}.|a low resolution photo of the {}.|"
    "a pixelated photo of a {}.|a pixelated photo of the {}.|"
    "a jpeg corrupted photo of a {}.|a jpeg corrupted photo of the {}.|"
    "a photo of a hard to see {}.|a photo of the hard to see {}.|"
    "a photo of a clean {}.|a photo of the clean {}.|a photo of a dirty {}.|a photo of the dirty {}.|"
    "a photo of a cool {}.|a photo of the cool {}.|a photo of a nice {}.|a photo of the nice {}.|"
    "a photo of a weird {}.|a photo of the weird {}.|a photo of a large {}.|a photo of the large {}.|"
    "a photo of a small {}.|a photo of the small {}.|itap of a {}.|itap of the {}.|itap of my {}."
)
_ART = (
    "a sculpture of a {}.|a sculpture of the {}.|a rendering of a {}.|a rendering of the {}.|"
    "graffiti of a {}.|graffiti of the {}.|a tattoo of a {}.|a tattoo of the {}.|a embroidered {}.|the embroidered {}.|"
    "a drawing of a {}.|a drawing of the {}.|a plastic {}.|the plastic {}.|a painting of a {}.|a painting of the {}.|"
    "a {} in a video game.|the {} in a video game.|a doodle of a {}.|a doodle of the {}.|a origami {}.|the origami {}.|"
    "a sketch of a {}.|a sketch of the {}.|a toy {}.|the toy {}.|a rendition of a {}.|a rendition of the {}.|"
    "a cartoon {}.|the cartoon {}.|art of a {}.|art of the {}.|a plushie {}.|the plushie {}."
)
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "imagenet-80": tuple(f"{_PICTURES}|{_ART}".split("|")),
    "imagenet-7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


def expand_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Return templates, with the names of published sets replaced by what they hold, each template once.

    Raises:
      InputError: a template is empty or has no `{}` where the class name goes.
    """
    templates: list[str] = []
    for template in given:
        if template not in TEMPLATE_SETS:
            check_template(template)
        templates += TEMPLATE_SETS.get(template, (template,))
    return tuple(dict.fromkeys(templates))


def check_template(template: str) -> None:
    """Raise InputError unless a template holds exactly one `{}`."""
    if template.count("{}") != 1 or set(template.replace("{}", "")) & {"{", "}"}:
        sets = " or ".join(TEMPLATE_SETS)
        raise InputError(
            f"--template {template!r}: must hold {{}} once, where the class name goes, or be the name of a set, {sets}"
        )


def fill(templates: Sequence[str], class_names: Sequence[str]) -> list[list[str]]:
    """Return for every class the prompts that the templates make of its name."""
    return [[template.replace("{}", name) for template in templates] for name in class_names]


def clean_name(name: str) -> str:
    """Return a class name as it is spoken: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def read_descriptions(path: Path, class_names: Sequence[str]) -> list[list[str]]:
    """Return every class's prompts from a JSON object of class name -> list of descriptions (arXiv 2209.03320).

    Raises:
      InputError: not such a file, a class is missing or unknown, or has no description.
    """
    found: Mapping[str, object] = read_strict_json(path)
    missing, unknown = [n for n in class_names if n not in found], [n for n in found if n not in class_names]
    if missing or unknown:
        fault = f"no descriptions of {missing[0]!r}" if missing else f"{unknown[0]!r} is no class of the images"
        raise InputError(f"{path}: {fault}; it must describe every class, and no other")
    prompts = []
    for name in class_names:
        texts = found[name]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{path}: {name!r} must have a list of texts, has {texts!r}")
        prompts.append(texts)
    return prompts


def read_prompts(path: Path, flag: str = "--prompts") -> list[str]:
    """Return the prompts of a text file, one a line; empty lines are left out.

    Raises:
      InputError: it cannot be read, or holds none.
    """
    try:
        # With or without Windows' mark of UTF-8; other separators than line ends are part of a prompt.
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{flag} {path}: holds no prompt; write one a line")
    return prompts
