"""The array shapes that jaxdiff speaks of, as jaxtyping aliases.

Axes: B batch (images or prompts), H height, W width, C channels (always last), T training timesteps,
N sampling steps. The test run checks every annotation made of these; in production they cost nothing.
"""

import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

Images = Float[Array, "B H W C"]
"""Pixels in [-1, 1], or noise of the same shape."""

Pixels = UInt8[np.ndarray, "B H W C"]
"""Pixels in 0..255, as files hold them."""

Labels = Int[Array | np.ndarray, "B"]
"""One integer condition (class or domain) for each image."""

Timesteps = Int[Array, "B"] | Float[Array, "B"]
"""One timestep for each image, 0 (least noise) to T-1 (pure noise); real numbers lie between those of training."""

Timestep = Int[Array, ""] | Float[Array, ""]
"""One timestep shared by the whole batch; -1 means clean data."""

ImageKeys = Key[Array, "B"]
"""One random key for each image."""

PRNGKey = Key[Array, ""]
"""One typed random key, as `jax.random.key` makes it."""

Scalar = Float[Array, ""]
