"""Tables that say where each published tensor goes: strict in both directions.

A rule has a pattern for whole names and, for each tensor that it makes of one, a target (a template of the match) and a
transform. Every source tensor is used by exactly one rule, every target is filled once, and shapes and dtypes are those
of the network; else one error lists what is left over.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.weights import Spec, check_finite, check_specs, list_faults, spec_of

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose whole name matches a pattern.

    Attributes:
      pattern: regular expression.
      outputs: target name, as `re.Match.expand` takes it, and transform of each tensor that is made; none for a buffer
        that the network does not need.
    """

    pattern: str
    outputs: tuple[tuple[str, Transform], ...]


def keep(tensor: np.ndarray) -> np.ndarray:
    """Return the tensor as it is."""
    return tensor


def conv_kernel(tensor: np.ndarray) -> np.ndarray:
    """Turn torch's (out, in, height, width) into Flax's (height, width, in, out)."""
    return tensor.transpose(2, 3, 1, 0)


def dense_kernel(tensor: np.ndarray) -> np.ndarray:
    """Turn torch's (out, in), which may be stored as a 1x1 convolution, into Flax's (in, out)."""
    return (tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor).T


def convert(
    origin: str, source: Mapping[str, np.ndarray], rules: Iterable[Rule], wanted: Mapping[str, Spec]
) -> dict[str, np.ndarray]:
    """Return the target tensors under their flat names.

    Args:
      origin: what the user named, for messages.
      source: tensors by name, read one at a time; floats of another width are cast.
      rules: of which exactly one fits each name.
      wanted: shape and dtype of every target.

    Raises:
      InputError: a tensor has no rule, a target is filled twice or not at all, or does not fit; the message lists them.
    """
    compiled = [(re.compile(rule.pattern), rule.outputs) for rule in rules]
    converted: dict[str, np.ndarray] = {}
    unknown, twice, misshapen = [], [], []
    for name in source:
        matches = [(match, outputs) for pattern, outputs in compiled if (match := pattern.fullmatch(name))]
        if not matches:
            unknown.append(name)
            continue
        (match, outputs), *others = matches
        assert not others, f"two rules for {name}"
        tensor = source[name]
        for template, transform in outputs:
            target = match.expand(template)
            try:
                value = transform(tensor)
            except ValueError:  # another number of axes
                misshapen.append(f"{name} has shape {tensor.shape}")
                continue
            if target in converted:
                twice.append(f"{target} (again by {name})")
            converted[target] = _as_wanted(value, wanted.get(target))
            check_finite(origin, name, converted[target])
    if faults := list_faults(no_rule_for=unknown, filled_twice=twice, wrong=misshapen):
        raise InputError(f"{origin}: not the weights of this model ({faults}); is it another model's?")
    check_specs(origin, {name: spec_of(value) for name, value in converted.items()}, wanted)
    return converted


def _as_wanted(value: np.ndarray, spec: Spec | None) -> np.ndarray:
    """Cast a float to the float that is wanted, and leave the rest to the check of all specs."""
    is_float = value.dtype.name in ("float16", "bfloat16", "float32", "float64")
    with np.errstate(over="ignore"):  # what becomes infinite is found by check_finite
        return value.astype(spec[1], copy=False) if spec and is_float else value
