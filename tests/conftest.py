"""Shared test settings: eight CPU devices, strict ranks, and the tolerances with their reasons."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def unchecked(monkeypatch):
    """Run without the type checks that only the test run has, as users do."""
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)


FLOAT32_ATOL = 1e-5
"""One float32 module against another implementation: sums are taken in another order."""

SAMPLER_ATOL = 1e-4
"""Many float32 steps in a row: the errors of `FLOAT32_ATOL` add up."""

FLOAT64_RTOL = 1e-6
"""A float32 table against the same closed form in NumPy float64: half an ulp is 6e-8, sums cost more."""
