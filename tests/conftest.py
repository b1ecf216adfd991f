"""Shared test settings: eight CPU devices, strict ranks, and the tolerances with their reasons."""

import fcntl
import functools
import json
import os

from commands import TINY_RUN, Answer, finish, start, xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdiff.io.weight_files import forget_weights

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def unchecked(monkeypatch):
    """Run without the type checks that only the test run has, as users do."""
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def no_weights_on_record():
    """Begin each test as a command begins: without a record of weights read by those before it in this process."""
    forget_weights()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this test run that all of pytest-xdist's processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def quick_settings(shared_folder):
    """Settings of jax for tests of whole commands, which compile the same few programs again and again."""
    return {
        "jax_compilation_cache_dir": str(shared_folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_disable_most_optimizations": True,
        # As above: a program is only found in the cache by a process of the same settings.
        "jax_numpy_rank_promotion": "raise",
        "jax_default_matmul_precision": "highest",
    }


@pytest.fixture(scope="session")
def drawn_digits():
    """The embedded digits, drawn once for all tests; no test may change them."""
    from jaxdiff.io import digits

    return functools.cache(digits.embedded_digits)


@pytest.fixture(scope="module")
def quick_commands(quick_settings, drawn_digits):
    """Compile quickly, and only once, in this process and in those that it starts; draw the digits once."""
    from jaxdiff.io import digits

    # jax.config shows all of them but the optimisations, which are on unless they are turned off.
    before = {name: getattr(jax.config, name, False) for name in quick_settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        patch.setattr(digits, "embedded_digits", drawn_digits)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    # Nothing compiled without optimisation is left to tests that compare numbers.
    jax.clear_caches()


@pytest.fixture(scope="session")
def finished_run(shared_folder, quick_settings):
    """Train the tiny run in a process of its own; return its folder, which no test may change, and its answer."""
    folder, kept = shared_folder / "finished" / "run", shared_folder / "finished.json"
    environment = {name.upper(): str(value) for name, value in quick_settings.items()}
    with (shared_folder / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            answer = finish(start("jaxdiff.train_cfg", *TINY_RUN, f"--out={folder}", environment=environment))
            kept.write_text(json.dumps(answer))
    return folder, Answer(*json.loads(kept.read_text()))


FLOAT32_ATOL = 1e-5
"""One float32 module against another implementation: sums are taken in another order."""

SAMPLER_ATOL = 1e-4
"""Many float32 steps in a row: the errors of `FLOAT32_ATOL` add up."""

FLOAT64_RTOL = 1e-6
"""A float32 table against the same closed form in NumPy float64: half an ulp is 6e-8, sums cost more."""
