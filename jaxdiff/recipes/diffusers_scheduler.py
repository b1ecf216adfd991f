"""The scheduler_config.json of diffusers in jaxdiff's words: how a network was trained, and how it wants to be sampled.

A key that only another of the known classes has is left aside, as in diffusers.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.recipes.diffusers_config import check_class, look_up, with_defaults
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults
from jaxdiff.settings import SamplerName

_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
_STEPS = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {**_BETAS, **_STEPS, "timestep_spacing": "linspace", "use_karras_sigmas": False}
_CLIPS = {"clip_sample": True, "clip_sample_range": 1.0}
_TERMINAL = {"rescale_betas_zero_snr": False}
SCHEDULERS: dict[str, tuple[SamplerName, dict[str, Any]]] = {
    "DDPMScheduler": ("ddpm", {**_BETAS, **_STEPS, **_CLIPS, **_TERMINAL}),
    "DDIMScheduler": ("ddim", {**_BETAS, **_STEPS, **_CLIPS, **_TERMINAL, "set_alpha_to_one": True}),
    "PNDMScheduler": ("pndm", {**_BETAS, **_STEPS, "set_alpha_to_one": False}),
    "EulerDiscreteScheduler": ("euler", {**_LINSPACE, **_TERMINAL}),
    "EulerAncestralDiscreteScheduler": (
        "euler-ancestral",
        {**_BETAS, **_STEPS, "timestep_spacing": "linspace", **_TERMINAL},
    ),
    "HeunDiscreteScheduler": (
        "heun",
        {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012, **_CLIPS, "clip_sample": False},
    ),
    "DPMSolverMultistepScheduler": ("dpm++2m", {**_LINSPACE, **_TERMINAL, "algorithm_type": "dpmsolver++"}),
    "UniPCMultistepScheduler": ("unipc", {**_LINSPACE, **_TERMINAL}),
}
"""By class: the sampler that it is, and the defaults of the keys that may vary."""
_KARRAS = {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012}
_FEW_STEPS = {**_BETAS, **_STEPS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
              **_CLIPS, "clip_sample": False, **_TERMINAL, "set_alpha_to_one": True}  # fmt: skip
WITHOUT_SAMPLER: dict[str, dict[str, Any]] = {
    "LMSDiscreteScheduler": _LINSPACE,
    "DEISMultistepScheduler": _LINSPACE,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "SASolverScheduler": _LINSPACE,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
    "LCMScheduler": _FEW_STEPS,
    "TCDScheduler": _FEW_STEPS,
}
"""Classes whose files tell how the network was trained, but whose sampler jaxdiff does not have: the same defaults."""
STOCHASTIC: SamplerName = "dpm++2m-sde"
"""The sampler of the same class as `dpm++2m` and another algorithm_type."""
FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "timestep_values": (None,),
    "predict_epsilon": (True,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    # The choice is the user's when sampling.
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
    "skip_prk_steps": (False, True),
    "tensor_format": ("pt", "np"),
}
"""Keys with the few values that jaxdiff has, of any class."""
SOLVERS = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
OF_SOLVERS = {"solver_order", "solver_type", "lower_order_final", "euler_at_final", "predict_x0", "disable_corrector"}
"""Keys of those alone."""
WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "lambda_min_clipped",
}
"""Keys that mean nothing where the keys above have those values."""
OF_OTHERS = {
    "original_inference_steps",
    "timestep_scaling",
    "predictor_order",
    "corrector_order",
    "tau_func",
    "noise_sampler_seed",
}
"""Keys that only classes have whose sampler jaxdiff does not have."""

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}


Scheduler = tuple[ForwardProcess, dict[SamplerName, SamplingDefaults], str]
"""How a network was trained, how each sampler goes through the timesteps, and which sampler is its own.

The last is the name of the class where jaxdiff does not have its sampler."""


def read_scheduler(path: Path) -> Scheduler:
    """Return what a scheduler_config.json says; raises as `translate_scheduler`, and where it cannot be read."""
    return translate_scheduler(path, read_strict_json(path))


def translate_scheduler(path: Path | str, config: Mapping[str, Any]) -> Scheduler:
    """Return what a scheduler's config says.

    Another sampler than its own takes the defaults of that one's class where the config says nothing, as `from_config`
    does in diffusers.

    Args:
      path: what error messages begin with.
      config: the entries.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = dict(config)
    if isinstance(given.get("_class_name"), str):
        # The Flax classes, whose files begin so, differ in nothing that is written here.
        given["_class_name"] = given["_class_name"].removeprefix("Flax")
    kind = check_class(path, given, WITHOUT_SAMPLER if given.get("_class_name") in WITHOUT_SAMPLER else SCHEDULERS)
    if kind == "PNDMScheduler" and not given.get("skip_prk_steps", False):
        _say_no_runge_kutta(path)
    for name, values in FIXED.items():
        # Files keep what another class had.
        foreign = name in OF_SOLVERS and kind not in SOLVERS
        if name in given and not foreign and not any(given[name] == value for value in values):
            raise InputError(f"{path}: {name} is {given[name]!r}; jaxdiff only has {', '.join(map(repr, values))}")
    fields = _fields_of(path, given, kind)
    if fields["clip_sample"] and fields["clip_sample_range"] != 1:
        raise InputError(f"{path}: clip_sample_range is {fields['clip_sample_range']!r}; jaxdiff only has 1")
    sampler = kind
    if kind in SCHEDULERS:
        kinds = {"dpmsolver++": SCHEDULERS[kind][0], "sde-dpmsolver++": STOCHASTIC}
        sampler = look_up(path, "algorithm_type", fields, kinds)
    diffusion = {
        "schedule": look_up(path, "beta_schedule", fields, SCHEDULES),
        "num_train_timesteps": fields["num_train_timesteps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "prediction_type": look_up(path, "prediction_type", fields, PREDICTION_TYPES),
        "zero_terminal_snr": fields["rescale_betas_zero_snr"],
    }
    try:
        defaults = {name: _sampling(path, _fields_of(path, given, other)) for other, (name, _) in SCHEDULERS.items()}
        return decode(ForwardProcess, diffusion), {**defaults, STOCHASTIC: defaults["dpm++2m"]}, sampler
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _fields_of(path: Path | str, given: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what the file says to a class, with that one's defaults."""
    defaults = SCHEDULERS[kind][1] if kind in SCHEDULERS else WITHOUT_SAMPLER[kind]
    everywhere = {*FIXED, *WITHOUT_EFFECT, *OF_OTHERS, *(name for _, other in SCHEDULERS.values() for name in other)}
    own = {name: value for name, value in given.items() if name in defaults or name not in everywhere}
    return {
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": True,
        "use_karras_sigmas": False,
        "algorithm_type": "dpmsolver++",
        **with_defaults(path, own, defaults, {}),
    }


def _sampling(path: Path | str, fields: dict[str, Any]) -> SamplingDefaults:
    """Return how the steps are taken; raise ValueError where a value is of another type."""
    spacing = look_up(path, "timestep_spacing", fields, SPACINGS)
    ends_clean, karras = (decode(bool, fields[name], name) for name in ("set_alpha_to_one", "use_karras_sigmas"))
    sampling = {
        "spacing": "karras" if karras else spacing,
        "steps_offset": fields["steps_offset"],
        "final": -1 if ends_clean else 0,
        "clip": fields["clip_sample"],
    }
    return decode(SamplingDefaults, sampling)


@functools.cache
def _say_no_runge_kutta(path: Path | str) -> None:
    print(f"{path}: skip_prk_steps is false, but jaxdiff's PNDM has no Runge-Kutta steps: it begins as if it were true")
