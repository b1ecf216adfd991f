"""What becomes of freed memory, as the operating system counts it, in a process of its own."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.freed_memory import COMPILED

PROGRAM = """
import re
from pathlib import Path
from jaxdiff.freed_memory import COMPILED, LONG, keep_freed_memory, return_memory_after_compiling
keep_freed_memory()
import jax
import numpy as np

def megabytes():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

return_memory_after_compiling()
return_memory_after_compiling()
before = megabytes()
blocks = [np.ones(2**18) for _ in range(200)]
print(megabytes() - before)
blocks = blocks[::2]
print(megabytes() - before)
for seconds in (LONG / 2, 2 * LONG):
    jax.monitoring.record_event_duration_secs(COMPILED, seconds)
    print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has malloc_trim")
def test_what_is_freed_is_kept_until_a_long_compilation_ends():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    taken, kept, still, returned = map(float, answer.stdout.split())
    # 200 blocks of 2 MiB, of which every second one is freed.
    assert taken == pytest.approx(400, abs=10)
    assert kept == pytest.approx(400, abs=10)
    assert still == pytest.approx(400, abs=10)
    assert returned == pytest.approx(200, abs=10)


def test_jax_calls_a_compilation_what_is_listened_for():
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    jax.jit(lambda x: x + jnp.float32(0.1234)).lower(jnp.ones(7)).compile()
    assert COMPILED in events
