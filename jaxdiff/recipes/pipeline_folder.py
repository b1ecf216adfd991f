"""The folder of a diffusers pipeline: which parts it must have, and the networks that their configs describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch, open_model
from jaxdiff.io.pretrained_files import read_config
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.recipes.diffusers_scheduler import read_scheduler
from jaxdiff.recipes.pretrained import FlaxCLIPTextModel
from jaxdiff.recipes.pretrained_diffusion import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from jaxdiff.recipes.pretrained_model import FlaxPreTrainedModel
from jaxdiff.recipes.stable_diffusion import StableDiffusion

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
CLASSES = {
    "text_encoder": ("CLIPTextModel", "FlaxCLIPTextModel"),
    "unet": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "vae": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""What model_index.json may say that the parts are; the scheduler's class is checked with its config."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
"""Classes of pipelines that have these parts and no others, or "Flax" before them."""
LEFT_ASIDE = ("scheduler", "safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
"""Other keys of model_index.json, but for those that begin with an underscore."""

NETWORKS: dict[str, type[FlaxPreTrainedModel]] = {
    "text_encoder": FlaxCLIPTextModel,
    "unet": FlaxUNet2DConditionModel,
    "vae": FlaxAutoencoderKL,
}


def read_models(
    name: str, revision: str | None, dtypes: Mapping[str, DTypeLike], **options: Any
) -> tuple[dict[str, Any], StableDiffusion]:
    """Return the networks by name, without parameters, and the whole; only configs are read.

    Args:
      name: as `FlaxStableDiffusionPipeline.from_pretrained` takes it, and so `revision` and `options`.
      revision: on the hub.
      dtypes: what each network computes in.
      **options: as in huggingface_hub.

    Raises:
      InputError: a config is missing, or says what jaxdiff does not have.
    """
    if Path(name).expanduser().is_file():
        raise InputError(
            f"{name}: is a single file; `python -m weights_convert stable_diffusion {name} DIR` makes a folder of it"
        )
    check_index(name, open_model(name, revision, **options))
    models = {}
    for part, kind in NETWORKS.items():
        fetch = open_model(name, revision, part, **options)
        try:
            config = kind.read_config(read_config(name, fetch, kind.files))
        except InputError as error:
            raise InputError(f"{part}: {error}") from error
        models[part] = kind(config, dtype=dtypes[part], _do_init=False)
    scheduler = open_model(name, revision, "scheduler", **options)(SCHEDULER)
    if scheduler is None:
        raise InputError(f"{name}: has no scheduler/{SCHEDULER}; download the whole folder")
    text_encoder: Any = models["text_encoder"].module
    unet: Any = models["unet"].module
    vae: Any = models["vae"].module
    model = StableDiffusion(text_encoder, unet, vae, *read_scheduler(scheduler))
    check_fit(name, model)
    return models, model


def check_index(name: str, fetch: Fetch) -> None:
    """Raise InputError unless model_index.json is there and names parts that jaxdiff has."""
    path = fetch(INDEX)
    if path is None:
        raise InputError(
            f"{name}: has no {INDEX}, so it is no folder of a diffusers pipeline; a single .safetensors or .ckpt file "
            "becomes one by `python -m weights_convert stable_diffusion FILE DIR`"
        )
    index = read_strict_json(path)
    pipeline = index.get("_class_name")
    if str(pipeline).removeprefix("Flax") not in PIPELINES:
        raise InputError(f"{path}: _class_name is {pipeline!r}; jaxdiff only has {', '.join(PIPELINES)}")
    check_no_more_parts(path, index)
    for part, known in CLASSES.items():
        entry = index.get(part)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind not in known:
            raise InputError(f"{path}: {part} is {kind!r}; jaxdiff only has {known[0]}")


def check_no_more_parts(path: Path, index: Mapping[str, Any]) -> None:
    """Raise InputError if a model_index.json has keys that no such pipeline has; parts that are null are none."""
    known = {*CLASSES, *LEFT_ASIDE}
    for name, value in index.items():
        if name not in known and not name.startswith("_") and value not in (None, [None, None]):
            raise InputError(f"{path}: {name} is {value!r}, but jaxdiff does not know this key")


def check_fit(name: str, model: StableDiffusion) -> None:
    """Raise InputError unless the parts were made for each other."""
    text, unet, vae = model.text_encoder.config, model.unet.config, model.autoencoder.config
    for what, found, wanted in (
        ("cross_attention_dim", unet.cross_attention_dim, text.hidden_size),
        ("out_channels", unet.out_channels, vae.latent_channels),
        ("in_channels", unet.in_channels, vae.latent_channels),
    ):
        if found != wanted:
            raise InputError(
                f"{name}: the UNet's {what} is {found}, but the parts around it make {wanted}; this is no "
                "text-to-image model, or its parts come from different ones"
            )


def describe_pipeline(scheduler: str, flax: str) -> dict[str, Any]:
    """Return the model_index.json of a pipeline.

    Args:
      scheduler: its class.
      flax: what the classes of its networks begin with: "Flax", or nothing for torch's.
    """
    return {
        "_class_name": f"{flax}StableDiffusionPipeline",
        **{
            part: ["transformers" if part == "text_encoder" else "diffusers", flax + CLASSES[part][0]]
            for part in NETWORKS
        },
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
