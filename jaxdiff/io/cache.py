"""Where jaxdiff keeps what it can make again: trained small models, embeddings of prompts, compiled programs."""

import hashlib
import os
import platform
import stat
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return $JAXDIFF_CACHE, or jaxdiff's folder in the user's cache; it need not exist."""
    given = os.environ.get("JAXDIFF_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdiff"


def keep_compiled() -> None:
    """Have JAX keep compiled programs in a private folder of the cache; call it before JAX is imported.

    A program from a cache is run as it is, so nobody else may be able to write there: the folder is made with mode
    0700, and one that is another's, or that others can write to, is not used. JAX itself recompiles where a file is
    damaged. $JAX_COMPILATION_CACHE_DIR names another folder, or, empty, none.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "compiled" / _machine()
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # a home that cannot be written costs time, not the run
        return
    if all(is_private(path) for path in (folder.parent, folder)):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def is_private(folder: Path) -> bool:
    """Tell whether a folder, no link to one, is this user's, and nobody else can write there."""
    status = folder.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & others


def _machine() -> str:
    """Return a name for this kind of processor: a program compiled for another would crash on it."""
    kind = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(kind.encode()).hexdigest()[:12]
