import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from jaxdiff import settings
from jaxdiff.diffusion import timesteps
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.timesteps import check_reach, timestep_spacing, with_final

SCHEDULE = make_schedule("linear")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 999, 1000])
def test_spacing_as_in_diffusers(spacing, num_steps):
    theirs = DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    ours = timestep_spacing(spacing, num_steps, SCHEDULE)
    # NumPy makes linspace(0, T-1, 1) = 0: diffusers then samples from pure noise as if it were clean data.
    if not (spacing == "linspace" and num_steps == 1):
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy())
    assert ours.max() < 1000
    assert np.all(np.diff(with_final(ours)) < 0)


def test_offset_as_in_diffusers_and_in_the_course():
    theirs = DDIMScheduler(steps_offset=1)
    theirs.set_timesteps(50)
    ours = timestep_spacing("leading", 50, SCHEDULE, offset=1)
    np.testing.assert_array_equal(ours, theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours, np.arange(1, 1000, 20)[::-1])


@pytest.mark.parametrize("num_steps", [5, 40])
def test_karras_levels_as_in_diffusers(num_steps):
    theirs = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True, timestep_spacing="linspace")
    theirs.set_timesteps(num_steps)
    ours = timestep_spacing("karras", num_steps, SCHEDULE)
    # diffusers interpolates in float32: its levels keep 1e-6 of themselves, of which a timestep is as little as 1e-4.
    np.testing.assert_allclose(ours, theirs.timesteps.numpy(), atol=0.02)
    np.testing.assert_allclose(SCHEDULE.noise_level(jnp.asarray(ours)), theirs.sigmas.numpy()[:-1], rtol=1e-4)


def test_wrong_values_are_named(unchecked):
    schedule = make_schedule("linear", 10)
    with pytest.raises(ValueError, match=r"num_steps must lie in 1\.\.10, got 11"):
        timestep_spacing("leading", 11, schedule)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        timestep_spacing("even", 5, schedule)
    with pytest.raises(ValueError, match="offset 1 moves 10 leading timesteps out of"):
        timestep_spacing("leading", 10, schedule, offset=1)
    with pytest.raises(ValueError, match="an offset belongs to leading spacing, got 1 with trailing"):
        timestep_spacing("trailing", 5, schedule, offset=1)
    with pytest.raises(ValueError, match="needs a finite noise level at the last timestep"):
        timestep_spacing("karras", 5, make_schedule("linear", 10, zero_terminal_snr=True))
    with pytest.raises(ValueError, match="600 leading timesteps end at 599, far below 999"):
        check_reach(timestep_spacing("leading", 600, SCHEDULE), SCHEDULE)
    check_reach(timestep_spacing("leading", 50, SCHEDULE), SCHEDULE)
    for wrong in ([5, 5, 1], [5, 1, 3], [], [5.0, np.nan], [np.inf, 5.0], [5.0, -0.5]):
        with pytest.raises(ValueError, match="fall strictly"):
            with_final(np.array(wrong))
    with pytest.raises(ValueError, match="fall strictly down to 0"):
        with_final(np.array([3, 0]), final=0)
    with pytest.raises(ValueError, match="fall strictly down to -2"):
        with_final(np.array([3, 0]), final=-2)


def test_the_flag_names_the_same_spacings():
    assert settings.Spacing == timesteps.Spacing
