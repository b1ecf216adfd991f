"""A compilation cache that is damaged, or another's."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from chaos_table import Effort, Outcome, Row, scratch_folder, spread

PROGRAM = """
import sys
from jaxdiff.io.cache import keep_compiled
keep_compiled()
import os, jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
answer = jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x).T).sum(axis=1))(jnp.arange(64.0).reshape(8, 8))
print(os.environ.get("JAX_COMPILATION_CACHE_DIR", "none"), answer.tolist())
"""


def compiled(effort: Effort) -> Iterator[Row]:
    """Damage a cache of compiled programs, and offer one that others can write."""
    row = Row(
        "a compilation cache damaged, or another's, or open to others",
        "the right result; the folder is made with mode 0700, and one that is not private is not used",
    )
    row.add(spread(damage_cache, [(effort.scratch, effort.seed + part, effort.times(12)) for part in range(2)]))
    yield row


def ask(cache: Path) -> tuple[str, str]:
    """Run the program; return the folder that it used and its answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**environment, "JAXDIFF_CACHE": str(cache), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    folder, _, numbers = answer.stdout.strip().partition(" ")
    return folder, numbers if answer.returncode == 0 else answer.stderr


def damage_cache(job: tuple[Path, int, int]) -> list[Outcome]:
    """Damage a cache in several ways, and see what the program answers."""
    scratch, seed, times = job
    rng, outcomes = random.Random(seed), []
    with scratch_folder(scratch) as folder:
        place, expected = ask(folder)
        used = Path(place)
        modes = {oct(path.stat().st_mode & 0o777) for path in (used, used.parent)}
        if used.parent.parent != folder or modes != {"0o700"} or not list(used.iterdir()):
            return [Outcome("not private", f"{place}, {modes}: {expected}")]
        kinds = ["a bit flipped", "truncated", "emptied", "bytes of another", "open to others", "a link", "another's"]
        for number in range(times):
            kind = kinds[(seed + number) % len(kinds)]
            if kind == "open to others":
                used.parent.chmod(0o777)
            elif kind == "a link":
                used.parent.rename(folder / "elsewhere")
                used.parent.symlink_to(folder / "elsewhere")
            elif kind == "another's" and os.geteuid() == 0:
                os.chown(used, 65534, 65534)
            else:
                for path in [path for path in used.iterdir() if path.name.endswith("-cache")]:
                    path.write_bytes(_damage(path.read_bytes(), kind, rng))
            place, answer = ask(folder)
            shut_out = kind in ("open to others", "a link") or (kind == "another's" and os.geteuid() == 0)
            if answer != expected:
                outcomes.append(Outcome("wrong result", f"{kind}: {answer}"))
            elif shut_out and place != "none":
                outcomes.append(Outcome("used", f"{kind}: {place}"))
            else:
                outcomes.append(Outcome("not used, right result" if shut_out else "recompiled, right result"))
            if used.parent.is_symlink():
                used.parent.unlink()
                (folder / "elsewhere").rename(used.parent)
            used.parent.chmod(0o700)
            if os.geteuid() == 0:
                os.chown(used, 0, 0)
    return outcomes


def _damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "truncated":
        return content[: rng.randrange(len(content))] if content else b""
    if kind == "emptied":
        return b""
    if kind == "bytes of another" or not content:
        return rng.randbytes(len(content) or 100)
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
