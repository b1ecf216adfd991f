"""One file with all of Stable Diffusion, as CompVis published it and A1111 and ComfyUI read it.

Beside the three networks such files hold what training leaves: tables of the noise schedule, averaged weights under
names without dots, optimiser states. What is not a network is ignored by name; all else must fit. Two tensors say
something by their names alone: `v_pred`, that the network predicts v, and `ztsnr`, that its last timestep is pure noise
(arXiv 2305.08891). Both are read and neither is written: the prediction type stands in the metadata, and of a model
with the other no single file is made.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.file_kinds import check_kind
from jaxdiff.io.torch_files import read_checkpoint
from jaxdiff.io.weights import LazyTensors, TensorFile, list_faults, write_safetensors
from weights_convert.sd_configs import SCHEDULE, Pipeline, check_standard, implied_configs, implied_scheduler
from weights_convert.sd_layout import TEXT_V1, TEXT_V2, UNET, VAE, read_layout
from weights_convert.sd_tables import to_folder, to_single

SCHEDULE_TABLES = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    "posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|lvlb_weights|logvar|scale_factor"
)
EMA = "model_ema."
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Empty tensors that trainers put beside the networks."""
IGNORED = (
    SCHEDULE_TABLES,
    r"model_ema\.(decay|num_updates)",
    r"first_stage_model\.(loss|model_ema)\..*",
    r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids",
    r"cond_stage_model\.transformer\.vision_model\..*",
    r"embedding_manager\..*",
    f"{V_MARKER}|{ZERO_SNR_MARKER}",
    r"cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)",
)
"""Whole names of what is no part of the networks."""
POSITION_IDS = f"{TEXT_V1}embeddings.position_ids"
RESOLUTION, PREDICTION_TYPE = "modelspec.resolution", "modelspec.prediction_type"
"""Entries of a safetensors file's metadata, as the Stability AI Model Metadata Standard calls them."""
PREDICTION_TYPES = MappingProxyType({"epsilon": "epsilon", "v": "v_prediction"})
"""Prediction types, as the standard and the flag call them, in diffusers' words."""
MARK = MappingProxyType({"converted_by": "jaxdiff"})


def read_single_file(path: Path, ema: bool = False, prediction_type: str | None = None) -> Pipeline:
    """Open a single file, safetensors or a checkpoint of torch.

    Args:
      path: of the file.
      ema: take the averaged weights of the denoising network, which full checkpoints hold beside the last.
      prediction_type: epsilon or v; None means as the file's metadata or its marker say, else epsilon for 1.x.

    Raises:
      InputError: it is another kind of file, or a tensor is missing, not expected or of another shape, or it is
        a 2.x file that does not say what it predicts.
    """
    is_safetensors = path.suffix == ".safetensors"
    source = TensorFile(path) if is_safetensors else read_checkpoint(path)
    check_kind(str(path), source, "checkpoint")
    metadata = source.metadata if isinstance(source, TensorFile) else {}
    tensors = rename(str(path), source, ema)
    try:
        layout = read_layout(tensors.specs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    prediction_type = prediction_type or read_prediction_type(path, metadata, tensors.specs)
    if prediction_type is None and layout.version == 2:
        raise InputError(
            f"{path}: nothing in it says what this Stable Diffusion 2.x predicts: set --prediction-type, which is "
            "epsilon for the 512x512 models (2-base, 2.1-base) and v for the 768x768 ones (2, 2.1)"
        )
    prediction_type = prediction_type or "epsilon"
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(f"{path}: its metadata say {PREDICTION_TYPE} {prediction_type!r}; set --prediction-type")
    zero_terminal_snr = ZERO_SNR_MARKER in tensors.specs
    if zero_terminal_snr and prediction_type != "v":
        raise InputError(
            f"{path}: its tensor {ZERO_SNR_MARKER} says that the last timestep is pure noise, of which a network that "
            "predicts epsilon says nothing: set --prediction-type v, if that is what it predicts"
        )
    size = 768 if layout.version == 2 and prediction_type == "v" else 512
    if match := re.fullmatch(r"(\d{1,5})x\1", metadata.get(RESOLUTION, "")):
        size = int(match[1])
    unused = re.escape(f"{TEXT_V2}transformer.resblocks.{layout.text_encoder.layers}.") + ".*"
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in (*IGNORED, unused)))
    specs = {name: spec for name, spec in tensors.specs.items() if not ignored.fullmatch(name)}
    prefixes = {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model."}
    if faults := list_faults(not_expected=[name for name in specs if not name.startswith(tuple(prefixes.values()))]):
        raise InputError(f"{path}: not Stable Diffusion 1.x or 2.x alone ({faults})")
    parts = {
        part: LazyTensors({n: spec for n, spec in specs.items() if n.startswith(prefix)}, tensors.read)
        for part, prefix in prefixes.items()
    }
    try:
        configs = implied_configs(layout, size, PREDICTION_TYPES[prediction_type])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    networks = {part: to_folder(str(path), configs[part].rows, parts[part]) for part in parts}
    scheduler = implied_scheduler(PREDICTION_TYPES[prediction_type], zero_terminal_snr)
    return Pipeline(layout, configs, networks, scheduler)


def read_prediction_type(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> str | None:
    """Return what a file says of its prediction type, by its metadata or its marker; None if it says nothing.

    Raises:
      InputError: the two contradict each other.
    """
    told = metadata.get(PREDICTION_TYPE)
    if V_MARKER not in names:
        return told
    if told not in (None, "v"):
        raise InputError(
            f"{path}: its metadata say {PREDICTION_TYPE} {told!r}, but its tensor {V_MARKER} says v; set "
            "--prediction-type"
        )
    return "v"


def rename(origin: str, source: Mapping[str, np.ndarray], ema: bool) -> LazyTensors:
    """Return the tensors under CompVis' names: averaged weights in the place of the last, and other spellings undone.

    Raises:
      InputError: averaged weights are asked for, and there are none, or not one for each tensor.
    """
    specs = source.specs  # type: ignore[attr-defined]
    averaged = re.compile(rf"{re.escape(EMA)}(?!decay$|num_updates$).*")
    places = {}
    for name in specs:
        if not averaged.fullmatch(name):
            old_text = re.sub(
                r"^cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)", TEXT_V1, name
            )
            places[old_text] = name
    if len(places) < sum(not averaged.fullmatch(name) for name in specs):
        raise InputError(f"{origin}: holds the text encoder twice, with and without text_model in its names")
    if ema:
        if not any(averaged.fullmatch(name) for name in specs):
            raise InputError(f"{origin}: holds no averaged weights ({EMA}*): drop --ema; often they stand in its place")
        # The names of an average are those of its parameters without the dots.
        means = {name: EMA + name.removeprefix("model.").replace(".", "") for name in places if name.startswith(UNET)}
        missing = [mean for mean in means.values() if mean not in specs]
        unknown = {name for name in specs if averaged.fullmatch(name)} - set(means.values())
        if faults := list_faults(missing=missing, not_expected=unknown):
            raise InputError(f"{origin}: its averaged weights are not of this model ({faults}); drop --ema")
        places |= means
    elif any(averaged.fullmatch(name) for name in specs):
        print(f"{origin}: holds averaged weights too, which --ema takes")
    return LazyTensors({name: specs[place] for name, place in places.items()}, lambda name: source[places[name]])


def write_single_file(path: Path, origin: str, pipeline: Pipeline) -> None:
    """Write a pipeline to a single safetensors file.

    Args:
      path: of the file, which is replaced.
      origin: what the user named, for messages.
      pipeline: of which a single file must be able to tell everything.

    Raises:
      InputError: a setting is not the one that the programs which read single files assume.
    """
    prediction_type = check_standard(origin, pipeline)
    networks = [
        to_single(f"{origin}, {part}", config.rows, pipeline.networks[part])
        for part, config in pipeline.configs.items()
    ]
    tables = schedule_tables()
    if pipeline.layout.version == 1:
        tables[POSITION_IDS] = np.arange(pipeline.layout.text_encoder.positions)[None]
    specs = {name: (table.shape, table.dtype.name) for name, table in tables.items()}
    readers = dict.fromkeys(tables, tables.__getitem__)
    for network in networks:
        specs |= network.specs
        readers |= dict.fromkeys(network.specs, network.read)
    size = pipeline.image_size
    metadata = {
        "format": "pt",
        **MARK,
        "modelspec.architecture": f"stable-diffusion-v{pipeline.layout.version}",
        RESOLUTION: f"{size}x{size}",
        PREDICTION_TYPE: {word: standard for standard, word in PREDICTION_TYPES.items()}[prediction_type],
    }
    write_safetensors(path, LazyTensors(specs, lambda name: readers[name](name)), metadata)


def schedule_tables() -> dict[str, np.ndarray]:
    """Return the tables of DDPM (arXiv 2006.11239) that CompVis' programs store, float32, made in float64.

    The posterior q(x_{t-1} | x_t, x_0) of eq. 6 and 7 has variance beta_t (1 - abar_{t-1}) / (1 - abar_t), and a mean
    that weighs x_0 by coef1 and x_t by coef2.
    """
    roots = np.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, SCHEDULE["num_train_timesteps"])
    betas = roots**2
    now = np.cumprod(1 - betas)
    before = np.append(1.0, now[:-1])
    variance = betas * (1 - before) / (1 - now)
    tables = {
        "betas": betas,
        "alphas_cumprod": now,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(now),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - now),
        "log_one_minus_alphas_cumprod": np.log(1 - now),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / now),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / now - 1),
        "posterior_variance": variance,
        # The first is 0, and so raised to what float32 can tell from it.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - now),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - now),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}
