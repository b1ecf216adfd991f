import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.io.checkpoint import DIGESTS, Checkpoints
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


@pytest.mark.parametrize("damage", ["truncate", "delete", "digests"])
def test_other_damage_is_found(saved, damage):
    largest = max(files_of(saved / "5"), key=lambda path: path.stat().st_size)
    if damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif damage == "delete":
        largest.unlink()
    else:
        (saved / "5" / DIGESTS).write_text("{")
    said = []
    _, step = Checkpoints(saved, report=said.append).restore(state_at(0))
    assert step == 4
    assert "checkpoint 5 is damaged" in said[0]
    assert (saved / "damaged-5").is_dir()


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
