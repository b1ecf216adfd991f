"""Damage to the files of a checkpoint: flipped bits, other damage, wrong permissions."""

import ctypes
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chaos_run
from chaos_table import Child, Effort, Outcome, Row, scratch_folder, spread

DAMAGE = ("truncated", "deleted", "emptied", "a file added", "digests deleted and a bit flipped")
_CAPABILITIES_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2


@dataclass(frozen=True)
class Damages:
    """Damages of the newest checkpoint of a run, one at a time: a file's name, and a kind or the number of a bit."""

    run: Path
    damages: tuple[tuple[str, str | int], ...]
    seed: int


def damaged(effort: Effort) -> Iterator[Row]:
    """Flip bits in every file of a checkpoint, then damage its files otherwise."""
    flips = Row(
        "one bit flipped in a file of a checkpoint", "none goes unseen; the file is named; the one before is used"
    )
    other = Row(
        "a file of a checkpoint truncated, deleted, emptied or added; digests.json deleted and a bit flipped",
        "found before the first step; the file is named; the one before is used",
    )
    with scratch_folder(effort.scratch) as folder:
        run, rng = make_run(folder), random.Random(effort.seed)
        newest = run / "checkpoints" / "12"
        files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
        with_content = [name for name in files if (newest / name).stat().st_size]
        # Every file, then more of them at random.
        chosen = (with_content * (1 + effort.times(1200) // len(with_content)))[: effort.times(1200)]
        bits: list[tuple[str, str | int]] = [(n, rng.randrange(8 * (newest / n).stat().st_size)) for n in chosen]
        flips.add(spread(damage_in_turn, in_parts(run, bits, 8, effort.seed)))
        flips.notes.append(f"in all {len(with_content)} files")
        yield flips
        kinds: list[tuple[str, str | int]] = [(name, kind) for name in files for kind in DAMAGE]
        rng.shuffle(kinds)
        other.add(spread(damage_in_turn, in_parts(run, kinds[: max(5, effort.times(len(kinds)))], 4, effort.seed)))
        yield other
        yield unreadable(effort, run)


def make_run(folder: Path) -> Path:
    """Train a small run that leaves checkpoints 8 and 12."""
    run = folder / "run"
    ended = Child.start(chaos_run.command(f"--out={run}", "--train-steps=12", "--width=8"), folder / "said").wait()
    if ended.code:
        raise RuntimeError(ended.said)
    return run


def in_parts(run: Path, damages: list[tuple[str, str | int]], parts: int, seed: int) -> list[Damages]:
    """Split damages into jobs."""
    return [Damages(run, tuple(damages[part::parts]), seed + part) for part in range(min(parts, len(damages)))]


def damage_in_turn(job: Damages) -> list[Outcome]:
    """Damage a copy of the run, open it, see what is said and restored, and repair it, again and again."""
    import jax
    import numpy as np

    from jaxdiff.io.checkpoint import Checkpoints

    outcomes, rng = [], random.Random(job.seed)
    with scratch_folder(job.run.parent) as folder:
        checkpoints = shutil.copytree(job.run / "checkpoints", folder / "checkpoints")
        like = state_like()
        expected = values_of(Checkpoints(checkpoints, read_only=True).restore(like, 8))
        for name, kind in job.damages:
            before = (checkpoints / "12" / name).read_bytes()
            digests = (checkpoints / "12" / "digests.json").read_bytes()
            named = inflict(checkpoints / "12", name, kind, rng)
            said: list[str] = []
            opened = Checkpoints(checkpoints, report=said.append, read_only=True)
            restored = opened.restore(like)
            opened.close()
            (checkpoints / "12" / "digests.json").write_bytes(digests)
            (checkpoints / "12" / "added").unlink(missing_ok=True)
            (checkpoints / "12" / name).write_bytes(before)
            good = all(np.array_equal(*pair) for pair in zip(values_of(restored), expected, strict=True))
            if restored is None or restored[1] != 8 or not good:
                outcomes.append(Outcome("silent", f"{name}, {kind}: {said}"))
            elif not any(word in "".join(said) for word in named):
                outcomes.append(Outcome("not named", f"{name}, {kind}: {said}"))
            else:
                outcomes.append(Outcome("found and named, the one before restored"))
    jax.clear_caches()
    return outcomes


def inflict(folder: Path, name: str, kind: str | int, rng: random.Random) -> tuple[str, ...]:
    """Damage one file; return the words of which one must be said."""
    path = folder / name
    content = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
    elif kind == "a file added":
        (folder / "added").write_bytes(content)
        return ("added",)
    elif kind == "truncated" and content:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "emptied" and content:
        path.write_bytes(b"")
    elif isinstance(kind, str):  # an empty file cannot be emptied: its like is one that has grown
        path.write_bytes(flipped(content, rng.randrange(8 * len(content))) if content else b"x")
        if "digests" in kind:
            (folder / "digests.json").unlink()
            return ("digests.json",)
    else:
        path.write_bytes(flipped(content, kind))
        if name == "digests.json":  # a name in it may have changed, which then is the one that is not there
            return ("digests.json", "No such file", "was not there", "has changed", "name too long")
    return (name, "is not readable") if name == "digests.json" else (name,)


def flipped(content: bytearray, bit: int) -> bytes:
    """Return content with one bit changed."""
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def state_like() -> Any:
    """Return the state of the run that `make_run` trains, at step 0."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.training import create_state, make_optimizer

    optimizer, _ = make_optimizer(1e-2, 2, 12, 0.1, 1.0)
    return create_state({"kernel": jnp.zeros((8, 8))}, optimizer, jax.random.key(0), make_mesh(1))


def values_of(restored: Any) -> list[Any]:
    """Return the numbers of a restored state."""
    import jax
    import numpy as np

    state = restored[0]
    leaves = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
    return [np.asarray(leaf) for leaf in leaves]


def unreadable(effort: Effort, run: Path) -> Row:
    """Take the right to read away, file by file and folder by folder, also from root."""
    row = Row(
        "a file or folder of a checkpoint without the right to read, or to write",
        "found before the first step and named; nothing is set aside",
    )
    newest = run / "checkpoints" / "12"
    places = sorted([*newest.rglob("*"), newest])
    chosen = random.Random(effort.seed).sample(places, min(len(places), effort.times(len(places))))
    row.add(spread(_forbid, [(run, place) for place in [*chosen, run / "checkpoints"]]))
    return row


def obey_permissions() -> None:
    """Have the permissions of files hold for this process even if it is root's (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)
    words = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of capabilities 0 to 31, then of 32 to 63
    if libc.capget(header, words) == 0:
        words[0] &= ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    if libc.capset(header, words) != 0:
        raise OSError(ctypes.get_errno(), "the right to read any file could not be given up")


def _forbid(job: tuple[Path, Path]) -> list[Outcome]:
    run, place = job
    with scratch_folder(run.parent) as folder:
        copy = shutil.copytree(run, folder / "run")
        (copy / "results.json").unlink()
        forbidden = copy / place.relative_to(run)
        writing = forbidden == copy / "checkpoints"
        mode = forbidden.stat().st_mode
        forbidden.chmod(0o500 if writing else 0)

        def with_no_more_rights() -> int:
            obey_permissions()
            flags = [f"--out={copy}", "--train-steps=12", "--width=8"]
            return chaos_run.command(*flags)()

        ended = Child.start(with_no_more_rights, folder / "said").wait()
        forbidden.chmod(mode)
        kept = (copy / "checkpoints" / "12").is_dir() and not list((copy / "checkpoints").glob("damaged*"))
    name = str(place.relative_to(run))
    sentence = "cannot be written (Permission denied)" if writing else "Permission denied; give yourself the right"
    if ended.code != 2 or sentence not in ended.said or name not in ended.said or "Traceback" in ended.said or not kept:
        return [Outcome("not named", f"{name}: exit code {ended.code}: {ended.said}")]
    return [Outcome("refused in a sentence that names it")]
