import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxdiff.errors import InputError
from jaxdiff.io.noises import read_noises

SHAPE = (4, 6, 3)
NOISE = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def test_every_format_and_order_of_axes(tmp_path):
    torch.save(torch.from_numpy(NOISE[0].transpose(2, 0, 1)[None].copy()), tmp_path / "10.pt")
    np.save(tmp_path / "02.npy", NOISE[1])
    np.savez(tmp_path / "1_a.npz", NOISE[2][None])
    save_file({"noise": np.ascontiguousarray(NOISE[0].transpose(2, 0, 1))}, tmp_path / "other.safetensors")
    (tmp_path / "README.txt").write_text("not a noise")
    names, noises = read_noises(tmp_path, SHAPE)
    assert names == ["1_a", "02", "10", "other"]
    np.testing.assert_array_equal(noises, NOISE[[2, 1, 0, 0]])


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        (NOISE[0].astype(np.float64), "is float64 instead of float32"),
        (NOISE[0][:, :-1], r"has the shape \(4, 5, 3\); this model takes \(1, 3, 4, 6\) or \(4, 6, 3\)"),
        (NOISE, r"has the shape \(3, 4, 6, 3\)"),
        (np.where(NOISE[0] > 1, np.nan, NOISE[0]), "holds values that are not finite"),
        (np.array([{"a": 1}]), "cannot be read"),
    ],
)
def test_wrong_noise_is_named(tmp_path, noise, sentence):
    np.save(tmp_path / "00.npy", NOISE[0])
    np.save(tmp_path / "01.npy", noise, allow_pickle=True)
    with pytest.raises(InputError, match=rf"01\.npy: {sentence}"):
        read_noises(tmp_path, SHAPE)


def test_folders_that_hold_no_clear_set_of_noises(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_noises(tmp_path / "none", SHAPE)
    with pytest.raises(InputError, match=r"no \.pt, \.npy, \.npz, \.safetensors files there"):
        read_noises(tmp_path, SHAPE)
    np.save(tmp_path / "00.npy", NOISE[0])
    np.savez(tmp_path / "00.npz", NOISE[0])
    with pytest.raises(InputError, match=r"00\.npy and 00\.npz would both be drawn as 00\.png"):
        read_noises(tmp_path, SHAPE)
    (tmp_path / "00.npy").unlink()
    np.savez(tmp_path / "00.npz", NOISE[0], NOISE[1])
    with pytest.raises(InputError, match="holds 2 arrays instead of one"):
        read_noises(tmp_path, SHAPE)
    (tmp_path / "00.npz").write_bytes((tmp_path / "00.npz").read_bytes()[:50])
    with pytest.raises(InputError, match=r"00\.npz: cannot be read"):
        read_noises(tmp_path, SHAPE)


def test_a_noise_that_is_code_is_refused(tmp_path):
    torch.save({"noise": torch.nn.Linear(1, 1)}, tmp_path / "00.pt")
    with pytest.raises(InputError, match=r"asks to import torch\.nn\.modules\.linear\.Linear"):
        read_noises(tmp_path, SHAPE)
    torch.save({"noise": torch.zeros(1)}, tmp_path / "00.pt")
    with pytest.raises(InputError, match="holds a dict instead of one tensor"):
        read_noises(tmp_path, SHAPE)
