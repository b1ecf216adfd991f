"""What becomes of memory that programs free on a CPU; Linux with glibc alone, elsewhere all is left as it is."""

import ctypes
import functools
import importlib.util
import sys

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What `jax.monitoring` calls the seconds that XLA took to compile a program."""
LONG = 1.0
"""Seconds; programs that take less to compile leave little behind."""


def keep_freed_memory() -> None:
    """Have the C library keep the memory that XLA's CPU programs free; call it before JAX makes its devices.

    A program takes its scratch memory anew at every call. By default glibc gives it back to the system in between, and
    a small train step spends a tenth of its time on the page faults that fetch it again. Processes that may compute on
    an accelerator are left as they are.
    """
    if importlib.util.find_spec("jax_plugins") is not None:
        return
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        # malloc.h: M_ARENA_MAX (one heap for all threads), M_MMAP_MAX (no mapping of its own for a large block),
        # M_TRIM_THRESHOLD (bytes free at the heap's end before it shrinks).
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
            mallopt(option, value)


@functools.cache
def return_memory_after_compiling() -> None:
    """Have the C library give back, after each long compilation, what that has freed.

    Compiling a large network leaves holes of some hundred megabytes, in which its own scratch memory does not fit.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is None:
        return
    import jax

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
