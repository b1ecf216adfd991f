import hashlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.io import checkpoint
from jaxdiff.io.checkpoint import DIGESTS, Checkpoints
from jaxdiff.io.weight_files import weight_files
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes.training import create_state, make_optimizer


def state_at(step, mesh=None):
    optimizer, _ = make_optimizer(1e-3, 1, 10, 0.1, 1.0)
    params = {"dense": {"kernel": jnp.full((8, 3), float(step)), "bias": jnp.arange(3.0)}}
    state = create_state(params, optimizer, jax.random.key(step), mesh or make_mesh(1))
    return state.replace(step=state.step + step)


def assert_same(first, second):
    chex.assert_trees_all_equal(first.replace(key=None), second.replace(key=None))
    np.testing.assert_array_equal(jax.random.key_data(first.key), jax.random.key_data(second.key))


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", report=lambda _: None)
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)):
        checkpoints.save(step, state_at(step), loss)
    checkpoints.close()
    return tmp_path / "c"


def test_keeps_the_best_and_the_last_two(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    restored, step = checkpoints.restore(state_at(0))
    assert step == 5
    assert_same(restored, state_at(5))
    assert_same(checkpoints.restore(state_at(0), 2)[0], state_at(2))


def test_restores_onto_another_number_of_devices(saved):
    eight = state_at(0, make_mesh(8))
    restored, _ = Checkpoints(saved).restore(eight)
    assert_same(restored, state_at(5))
    assert len(restored.params["dense"]["kernel"].sharding.device_set) == 8


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS and path.stat().st_size)


def test_one_flipped_bit_anywhere_is_found_and_the_one_before_used(saved, tmp_path):
    rng = np.random.default_rng(0)
    for number, path in enumerate(rng.permutation(files_of(saved / "5"))[:8]):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(saved, copy)
        victim = copy / path.relative_to(saved)
        content = bytearray(victim.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        victim.write_bytes(content)
        said = []
        restored, step = Checkpoints(copy, report=said.append).restore(state_at(0))
        assert step == 4
        assert float(restored.params["dense"]["kernel"][0, 0]) == 4.0
        assert len(said) == 1
        assert path.name in said[0]


def damage(folder, how):
    """Damage the checkpoint in a folder; return what must be said of it."""
    largest = max(files_of(folder), key=lambda path: path.stat().st_size)
    if how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-1])
        return f"{largest.relative_to(folder)} has changed since it was written"
    if how == "emptied":
        largest.write_bytes(b"")
        return f"{largest.relative_to(folder)} has changed since it was written"
    if how == "deleted":
        largest.unlink()
        return f"{largest.relative_to(folder)}: No such file or directory"
    if how == "added":
        (folder / "state" / "more").write_text("")
        return "state/more was not there when it was written"
    if how == "unsealed":
        # A flip that only the missing digests could tell.
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        (folder / DIGESTS).unlink()
        return "digests.json: No such file or directory"
    (folder / DIGESTS).write_text({"cut": "{", "a list": "[]", "outside": '{"/x": ""}', "null": '{"\\u0000": ""}'}[how])
    return "../../../x: No such file or directory" if how == "outside" else "digests.json is not readable"


HOW = ["truncated", "emptied", "deleted", "added", "unsealed", "cut", "a list", "null"]


@pytest.mark.parametrize("how", HOW)
def test_other_damage_is_named_and_set_aside(saved, how):
    sentence = damage(saved / "5", how)
    said = []
    _, step = Checkpoints(saved, report=said.append).restore(state_at(0))
    assert step == 4
    assert said == [f"{saved}: checkpoint 5 is damaged ({sentence}); it was set aside as damaged-5"]
    assert (saved / "damaged-5").is_dir()


def test_digests_may_name_files_outside_without_harm(saved):
    damage(saved / "5", "outside")
    said = []
    assert Checkpoints(saved, report=said.append).restore(state_at(0))[1] == 4
    assert "/x: No such file or directory" in said[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", HOW)
def test_to_be_read_only_damage_is_passed_over_and_nothing_is_touched(saved, how):
    damage(saved / "5", how)
    (saved / "6.orbax-checkpoint-tmp").mkdir()
    before, said = contents(saved), []
    checkpoints = Checkpoints(saved, report=said.append, read_only=True)
    assert checkpoints.steps() == [2, 4]
    assert checkpoints.best_step() == 2
    restored, step = checkpoints.restore(state_at(0))
    checkpoints.close()
    assert step == 4
    assert_same(restored, state_at(4))
    assert contents(saved) == before
    assert (saved / "6.orbax-checkpoint-tmp").is_dir()
    assert [text.endswith("it was passed over") for text in said] == [True]


def test_a_folder_that_is_only_called_like_a_number_is_left_alone(saved):
    (saved / "007").mkdir()
    said = []
    assert Checkpoints(saved, report=said.append).restore(state_at(0))[1] == 5
    assert said == []
    assert (saved / "007").is_dir()


def test_the_digests_of_what_was_read_are_on_record(saved):
    Checkpoints(saved).restore(state_at(0))
    assert weight_files() == {}  # a run that goes on writes its own
    Checkpoints(saved, read_only=True).restore(state_at(0), 4)
    digest = hashlib.sha256((saved / "4" / DIGESTS).read_bytes()).hexdigest()
    assert weight_files() == {str((saved / "4" / DIGESTS).resolve()): digest}


def test_a_folder_without_checkpoints_is_not_made_by_reading(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.restore(state_at(0)) is None
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_committed_is_sealed_and_what_killed_runs_left_is_cleared(saved):
    for step in (2, 4, 5):
        table = json.loads((saved / str(step) / DIGESTS).read_text())
        assert set(table) == {str(path.relative_to(saved / str(step))) for path in files_and_empty(saved / str(step))}
    for name in ("6.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-whole", "expired"):
        shutil.copytree(saved / "4", saved / name / "state")
    (saved / "notes").mkdir()
    said = []
    Checkpoints(saved, report=said.append)
    assert sorted(path.name for path in saved.iterdir()) == ["2", "4", "5", "notes"]
    assert said == []


def files_and_empty(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS]


def test_a_file_that_may_not_be_read_is_no_damage(saved, monkeypatch):
    victim = files_of(saved / "5")[0]

    def refuse(path):
        if path == victim:
            raise PermissionError(13, "Permission denied", str(path))
        return digest(path)

    digest = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    with pytest.raises(InputError, match=f"{victim}: Permission denied; give yourself the right to read it"):
        Checkpoints(saved)
    assert (saved / "5").is_dir()


def test_a_place_that_cannot_be_written_is_found_before_the_first_save(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(InputError, match=r"c: cannot be written \(File exists\)"):
        Checkpoints(tmp_path / "c")


def test_another_dtype_is_an_error_that_names_the_leaf_unless_asked_for(saved):
    other = state_at(0)
    other = other.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), other.params))
    checkpoints = Checkpoints(saved)
    sentence = r"5: params\.dense\.(kernel|bias) is float32, but the run asks for bfloat16"
    with pytest.raises(InputError, match=sentence):
        checkpoints.restore(other)
    restored, step = checkpoints.restore(other, cast=True)
    assert step == 5
    assert restored.params["dense"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored.params["dense"]["kernel"], np.full((8, 3), 5.0))


def test_nothing_there_and_nothing_good(saved, tmp_path):
    assert Checkpoints(tmp_path / "empty").restore(state_at(0)) is None
    for step in (2, 4, 5):
        digests = saved / str(step) / DIGESTS
        table = json.loads(digests.read_text())
        digests.write_text(json.dumps(dict.fromkeys(table, "0" * 64)))
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        Checkpoints(saved, report=lambda _: None).restore(state_at(0))


def test_a_save_survives_the_donation_of_its_buffers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    state = state_at(3)
    checkpoints.save(3, state)
    jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 if leaf.dtype == jnp.float32 else leaf, s), donate_argnums=0)(
        state
    )
    checkpoints.close()
    assert_same(Checkpoints(tmp_path / "c").restore(state_at(0))[0], state_at(3))


def test_a_whole_checkpoint_of_another_model_is_refused_and_kept(saved):
    before = sorted(path.name for path in saved.iterdir())
    other = state_at(0)
    other = other.replace(params={"dense": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(3)}})
    with pytest.raises(InputError, match=r"5: whole, but of another model; did config or data change since\?"):
        Checkpoints(saved).restore(other)
    assert sorted(path.name for path in saved.iterdir()) == before


def test_a_disk_that_is_full_is_told_by_the_step_that_was_not_saved(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state_at(3))

    def fail():
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore about it")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(OSError, match=r"checkpoint 3 cannot be written \(.*No space left on device\)$"):
        checkpoints.close()
