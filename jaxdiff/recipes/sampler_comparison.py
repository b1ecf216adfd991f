"""How many steps are enough: deterministic samplers at several step counts against DDIM with very many.

All of them walk the same probability flow from the same noises, so with more steps they come to agree. (With leading
spacing, few steps also begin at a lower timestep.) One compiled program takes one step of any of them: the network
stands in it once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxdiff.diffusion.samplers import Move, make_draw
from jaxdiff.io.grids import labelled_grid
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.report import Curve, Picture, Section, Table
from jaxdiff.io.runs import Figures
from jaxdiff.mesh import put_batch, replicated, round_up
from jaxdiff.recipes.ddim_modes import COLUMNS, STYLE, Shown, grey_rmse
from jaxdiff.recipes.drawing import Drawing, FloatImages
from jaxdiff.recipes.pixel_model import PixelModel
from jaxdiff.recipes.sampling import REVERSE_PROCESSES, keep_to_pixels
from jaxdiff.settings import SamplerName

COMPARED: tuple[SamplerName, ...] = ("ddim", "heun", "dpm++2m", "unipc", "pndm")
"""Euler without churn is DDIM; DDPM and the SDE form of DPM-Solver++ do not follow the flow."""


def show_steps(
    drawing: Drawing,
    names: Sequence[str],
    noises: FloatImages,
    counts: Sequence[int],
    reference_steps: int | None,
) -> Shown:
    """Draw a few noises by every sampler and step count; rows of the grid are samplers, columns step counts."""
    names, model = names[:COLUMNS], drawing.model
    reference_steps = reference_steps or most_steps(model)
    samplers = [name for name in COMPARED if (name, model.spacing) != ("pndm", "karras")]
    legs = [(name, count) for name in samplers for count in counts]
    plans = [REVERSE_PROCESSES[name].plan(model.walk(count, "--step-counts")) for name, count in legs]
    reference_plan = REVERSE_PROCESSES["ddim"].plan(model.walk(reference_steps, "--reference-steps"))
    ends = draw_legs(drawing, noises[: len(names)], [*(name for name, _ in legs), "ddim"], [*plans, reference_plan])
    images, reference = dict(zip(legs, ends)), ends[-1]
    looks = {leg: len(plan.t) for leg, plan in zip(legs, plans)}
    errors = {leg: grey_rmse(image, reference) for leg, image in images.items()}
    figures: Figures = {f"steps.rmse.{name}.{count}": error for (name, count), error in errors.items()}
    shown = [[images[name, count][0] for count in counts] + [reference[0]] for name in samplers]
    grid = labelled_grid(
        drawing.to_pixels(np.concatenate(shown).reshape(-1, *model.image_shape)),
        samplers,
        [*map(str, counts), f"DDIM {reference_steps}"],
        f"Noise {names[0]} by sampler and number of steps",
        row_axis="sampler",
        column_axis="steps",
        style=STYLE,
    )
    files = {
        f"{name}_{count}_{stem}.png": pixels
        for (name, count), drawn in [*images.items(), (("reference", reference_steps), reference)]
        for stem, pixels in zip(names, drawing.to_pixels(drawn))
    }
    lines: dict[str, Any] = {
        name: ([looks[name, count] for count in counts], [errors[name, count] for count in counts]) for name in samplers
    }
    chart = Curve(
        lines,
        f"Root mean square difference to DDIM with {reference_steps} steps, over {len(names)} noises.",
        "evaluations of the network",
        "grey levels of 255",
        raw_first=False,
    )
    rows = [[name, *(f"{errors[name, count]:.2f}" for count in counts)] for name in samplers]
    table = Table(["sampler", *(f"{count} steps" for count in counts)], rows, "The same differences.")
    note = (
        f"{len(samplers)} samplers along the same probability flow, {model.spacing} spacing. Heun evaluates "
        "the network twice a step, PNDM once more than it has steps; Euler is DDIM."
    )
    picture = Picture(grid, "Rows are samplers, columns step counts; last, the reference.", wide=True)
    return Shown("steps", files, grid, Section("How many steps are enough", [picture, chart, table], note), figures)


def most_steps(model: PixelModel) -> int:
    """Return the steps of a walk through every timestep; an offset leaves out the first."""
    return model.schedule.num_train_timesteps - model.steps_offset


def draw_legs(
    drawing: Drawing, noises: FloatImages, names: Sequence[SamplerName], plans: Sequence[Move]
) -> list[FloatImages]:
    """Return what each leg ends at, all from the same noises."""
    model, mesh, samplers = drawing.model, drawing.mesh, [REVERSE_PROCESSES[name] for name in COMPARED]
    schedule, numbers = model.schedule, np.arange(len(noises), dtype=np.int32)
    chosen = np.arange(round_up(len(noises), mesh)).clip(max=len(noises) - 1)
    x_T, numbers, condition = put_batch((noises[chosen], numbers[chosen], model.condition_of(numbers[chosen])), mesh)
    keys = drawing.keys(numbers)
    start = x_T, tuple(sampler.start(x_T) for sampler in samplers)
    shardings = jax.tree.map(lambda leaf: _split_images(leaf, mesh), start)
    start = jax.device_put(start, shardings)

    def advance(params: Any, which: Int[jax.Array, ""], state: tuple[jax.Array, tuple], move: Move):
        denoise = keep_to_pixels(model.make_denoiser(params, condition), schedule, drawing.threshold)
        # Without churn every sampler looks at x_t where `seen_at` says, so that the network need not be in each branch.
        prediction = denoise(state[0], move.seen_at)

        def branch(index: int):
            def take_step(x_t: jax.Array, memories: tuple):
                draw, memory = make_draw(keys, x_t, move.number), memories[index]
                x_s, memory, _ = samplers[index].step(schedule, lambda *_: prediction, x_t, memory, move, draw)
                return x_s, (*memories[:index], memory, *memories[index + 1 :])

            return take_step

        return jax.lax.switch(which, [branch(index) for index in range(len(samplers))], *state)

    program = jax.jit(advance, out_shardings=shardings)
    ends = []
    with progress_bar(sum(len(plan.t) for plan in plans), "comparing", "step", leave=False) as bar:
        for name, plan in zip(names, plans):
            state, rows = start, jax.tree.map(np.asarray, plan)
            for row in range(len(rows.t)):
                move = jax.tree.map(lambda column, row=row: column[row], rows)
                state = jax.block_until_ready(program(model.params, COMPARED.index(name), state, move))
                bar.update()
            ends.append(np.asarray(state[0])[: len(noises)])
    return ends


def _split_images(leaf: jax.Array, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a state or of a sampler's memory: by image, which is the fourth axis from the end."""
    if leaf.ndim < 4:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 4), "data"))
