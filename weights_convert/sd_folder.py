"""A Stable Diffusion pipeline as a folder of diffusers: one sub-folder a part, weights in any format people hold."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch, open_model
from jaxdiff.io.msgpack_files import read_msgpack
from jaxdiff.io.pretrained_files import (
    CONFIG,
    DIFFUSERS,
    TRANSFORMERS,
    candidates,
    find_weights,
    read_tensors,
    say_if_variant,
)
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.tokenizer import (
    BEGIN,
    END,
    SETTINGS_FILE,
    SPECIAL_FILE,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    read_tokenizer,
    read_vocabulary,
)
from jaxdiff.io.torch_layout import modern_name, torch_axes, torch_name
from jaxdiff.io.weights import LazyTensors, flatten_params, list_faults, write_safetensors
from jaxdiff.recipes.pipeline_folder import INDEX, check_no_more_parts
from jaxdiff.recipes.pipeline_folder import SCHEDULER as SCHEDULER_CONFIG
from weights_convert.sd_configs import CLASSES, DIFFUSERS_VERSION, Pipeline, read_configs
from weights_convert.sd_layout import Layout
from weights_convert.sd_tables import to_single
from weights_convert.source import Open

MARK = "_converted_by"
SCHEDULER = f"scheduler/{SCHEDULER_CONFIG}"
FILES = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS}
"""What the library of each network calls its weights."""
WEIGHTS = {part: files.safetensors for part, files in FILES.items()}
PIPELINES = {9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
"""Classes of pipelines by the channels that their UNet reads: latents, a picture's latents, a mask."""
PIPELINE = "StableDiffusionPipeline"
POSITION_IDS = "text_model.embeddings.position_ids"
"""A buffer that older versions of transformers wrote."""

Files = Mapping[str, bytes]
"""Contents of the tokenizer's files by name."""


def fetch_folder(name: str, open_part: Open) -> None:
    """Fetch what is converted of a pipeline, of each network the weights that `read_folder` will read.

    Raises:
      InputError: a network has no weights.
    """
    networks = {part: open_part(part) for part in FILES}
    for fetch in networks.values():
        fetch(CONFIG)
    for part, files in {"scheduler": (SCHEDULER_CONFIG,), "tokenizer": TOKENIZER_FILES}.items():
        fetch = open_part(part)
        for file in files:
            fetch(file)
    for part, fetch in networks.items():
        _find_part(f"{name}/{part}", fetch, part)


def _find_part(name: str, fetch: Fetch, part: str) -> Path:
    # msgpack files come last, because they are read as a whole.
    return find_weights(name, fetch, candidates(FILES[part], "last"))


def read_folder(folder: Path) -> Pipeline:
    """Open a pipeline of diffusers, of its torch or its Flax classes.

    Raises:
      InputError: a part is missing, damaged or of another kind, or a tensor does not fit its config.
    """
    index = read_strict_json(folder / INDEX)
    name, known = index.get("_class_name"), (PIPELINE, "StableDiffusionImg2ImgPipeline", *PIPELINES.values())
    if str(name).removeprefix("Flax") not in known:
        raise InputError(f"{folder / INDEX}: _class_name is {name!r}; jaxdiff only converts {', '.join(known)}")
    check_no_more_parts(folder / INDEX, index)
    layout, configs = read_configs(folder)
    scheduler = read_strict_json(folder / SCHEDULER)
    if not isinstance(name := scheduler.get("_class_name"), str):
        raise InputError(f"{folder / SCHEDULER}: _class_name is {name!r}, not the name of a scheduler")
    scheduler["_class_name"] = name.removeprefix("Flax")
    networks = {}
    for part in FILES:
        path = _find_part(str(folder / part), open_model(folder, subfolder=part), part)
        say_if_variant(str(folder / part), path)
        tensors = read_msgpack_tensors(path) if path.suffix == ".msgpack" else read_tensors(path)
        networks[part] = to_modern(part, tensors)
        to_single(str(path), configs[part].rows, networks[part])  # which checks names and shapes
    return Pipeline(layout, configs, networks, scheduler)


def read_msgpack_tensors(path: Path) -> LazyTensors:
    """Return the arrays of a Flax file as torch would have them: their axes, and but for indices their names."""
    leaves = flatten_params(read_msgpack(path))
    if odd := [name for name, leaf in leaves.items() if not isinstance(leaf, np.ndarray)]:
        raise InputError(f"{path}: {odd[0]} is no array")
    names = {torch_name(name): name for name in leaves}
    specs = {}
    for torch, name in names.items():
        leaf = leaves[name]
        try:
            specs[torch] = leaf.transpose(torch_axes(name, leaf.ndim)).shape, leaf.dtype.name
        except KeyError as error:
            raise InputError(f"{path}: {name} has {leaf.ndim} axes, which no kernel has") from error

    def read(name: str) -> np.ndarray:
        leaf = leaves[names[name]]
        return leaf.transpose(torch_axes(names[name], leaf.ndim))

    return LazyTensors(specs, read)


def to_modern(part: str, tensors: Mapping[str, Any]) -> LazyTensors:
    """Return the tensors under the names, and matrices in the shape, that today's classes have."""
    places = {modern_name(name): name for name in tensors}
    if part == "text_encoder":
        # transformers 5 leaves the prefix away, and reads both.
        if not any(name.startswith("text_model.") for name in places):
            places = {f"text_model.{name}": place for name, place in places.items()}
        places.pop(POSITION_IDS, None)
    specs = {name: tensors.specs[place] for name, place in places.items()}  # type: ignore[attr-defined]
    flat = {name for name, (shape, _) in specs.items() if ".attentions.0.to_" in name and shape[2:] == (1, 1)}
    specs |= {name: (specs[name][0][:2], specs[name][1]) for name in flat if part == "vae"}
    return LazyTensors(specs, lambda name: tensors[places[name]].reshape(specs[name][0]))


def find_tokenizer(name: str, layout: Layout) -> Files:
    """Return a tokenizer's files, with settings for a version of Stable Diffusion.

    Args:
      name: folder of a tokenizer, or of a pipeline with a sub-folder tokenizer; or a name on the hub.
      layout: of the model that it is for.

    Raises:
      InputError: they are not there, the hub cannot be reached, or they are of another model.
    """
    try:
        places = [open_model(name, subfolder=folder) for folder in ("", "tokenizer")]
        found = next((fetch for fetch in places for file in ("vocab.json", "tokenizer.json") if fetch(file)), None)
        if found is None and not Path(name).expanduser().is_dir():
            places[0]("config.json")  # tells whether the hub can be reached
        files = read_files(name, found or places[0], layout)
    except InputError as error:
        raise InputError(f"--tokenizer {error}") from error
    # OpenCLIP pads with token 0.
    pad = "!" if layout.version == 2 else END
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": layout.text_encoder.positions}
    return {
        **{file: data for file, data in files.items() if file in VOCABULARY_FILES},
        SETTINGS_FILE: to_json({**settings, **special, "add_prefix_space": False}),
        SPECIAL_FILE: to_json(special),
    }


def read_files(name: str, fetch: Fetch, layout: Layout) -> Files:
    """Return those files of a tokenizer that are there, having checked that they fit the text encoder.

    Raises:
      InputError: they do not, or one is missing.
    """
    text = layout.text_encoder
    read_tokenizer(name, fetch, text.positions, text.tokens)
    files = {file: path.read_bytes() for file in TOKENIZER_FILES if (path := fetch(file))}
    if {"vocab.json", "merges.txt"} <= files.keys():
        files.pop("tokenizer.json", None)
    return files


def read_own_tokenizer(folder: Path, layout: Layout) -> Files:
    """Return the tokenizer's files of a pipeline's folder.

    Raises:
      InputError: as `read_files`.
    """
    return read_files(str(folder / "tokenizer"), open_model(folder, subfolder="tokenizer"), layout)


def check_no_added_words(folder: Path) -> None:
    """Check that the tokenizer of a pipeline's folder, where it has one, has the words of its vocabulary alone.

    Raises:
      InputError: it has more, of which a single file could not tell.
    """
    name, fetch = str(folder / "tokenizer"), open_model(folder, subfolder="tokenizer")
    if not any(fetch(file) for file in VOCABULARY_FILES):
        return
    _, vocab, _, added = read_vocabulary(name, fetch)
    if words := [word for word in added if word not in vocab]:
        raise InputError(
            f"{name}: {list_faults(has_added_words=words)}, which programs that read single files do not know: save "
            "their rows of the token table as learned embeddings instead, or convert to a folder"
        )


def write_folder(folder: Path, pipeline: Pipeline, tokenizer: Files) -> list[Path]:
    """Write a pipeline into a new folder, one network after another; return the files."""
    written = []

    def place(name: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append(path)
        return path

    for part, config in pipeline.configs.items():
        write_safetensors(place(f"{part}/{WEIGHTS[part]}"), pipeline.networks[part], {"format": "pt"})
        place(f"{part}/config.json").write_bytes(to_json(config.json))
    for name, data in tokenizer.items():
        place(f"tokenizer/{name}").write_bytes(data)
    place(SCHEDULER).write_bytes(to_json(pipeline.scheduler))
    index = {
        "_class_name": PIPELINES.get(pipeline.layout.unet.in_channels, PIPELINE),
        "_diffusers_version": DIFFUSERS_VERSION,
        MARK: "jaxdiff",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", pipeline.scheduler["_class_name"]],
        "text_encoder": ["transformers", CLASSES["text_encoder"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
    }
    place(INDEX).write_bytes(to_json(index))
    return written


def is_conversion(folder: Path) -> bool:
    """Tell whether a folder is an earlier conversion, with nothing else in it."""
    parts = [*CLASSES, "tokenizer", "scheduler"]
    known = {
        INDEX,
        SCHEDULER,
        *(f"{part}/config.json" for part in CLASSES),
        *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    }
    known |= {*parts, *(f"{part}/{name}" for part, name in WEIGHTS.items())}
    try:
        inside = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        return inside <= known and read_strict_json(folder / INDEX).get(MARK) == "jaxdiff"
    except InputError:
        return False


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(dict(value), indent=2, sort_keys=True) + "\n").encode()


def move_into_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name, in the place of an earlier conversion."""
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)
