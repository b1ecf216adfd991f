"""How many steps are enough: deterministic samplers at several step counts against DDIM with very many.

All of them walk the same probability flow from the same noises, so they would agree if steps cost nothing. One compiled
program takes one step of any of them: the network stands in it once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxdiff.diffusion.samplers import Move, make_draw
from jaxdiff.io.grids import labelled_grid
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.report import Curve, Picture, Section, Table
from jaxdiff.io.runs import Figures
from jaxdiff.mesh import put_batch, replicated, round_up
from jaxdiff.recipes.ddim_modes import COLUMNS, STYLE, Drawing, FloatImages, Shown, grey_rmse
from jaxdiff.recipes.sampling import REVERSE_PROCESSES, keep_to_pixels
from jaxdiff.settings import SamplerName

COMPARED: tuple[SamplerName, ...] = ("ddim", "heun", "dpm++2m", "unipc", "pndm")
"""Euler without churn is DDIM; DDPM and the SDE form of DPM-Solver++ do not follow the flow."""


def show_steps(
    drawing: Drawing,
    names: Sequence[str],
    noises: FloatImages,
    counts: Sequence[int],
    reference_steps: int,
) -> Shown:
    """Draw a few noises by every sampler and step count; rows of the grid are samplers, columns step counts."""
    names, model = names[:COLUMNS], drawing.model
    samplers = [name for name in COMPARED if (name, model.spacing) != ("pndm", "karras")]
    # With an offset, leading spacing has no timestep for the last of T steps.
    reference_steps = min(reference_steps, model.schedule.num_train_timesteps - model.steps_offset)
    legs = [(name, count) for name in samplers for count in counts] + [("ddim", reference_steps)]
    plans = [REVERSE_PROCESSES[name].plan(model.walk(count)) for name, count in legs]
    images = dict(zip(legs, _run(drawing, noises[: len(names)], [name for name, _ in legs], plans)))
    looks = {leg: len(plan.t) for leg, plan in zip(legs, plans)}
    reference = images.pop(legs[-1])
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


def _run(
    drawing: Drawing, noises: FloatImages, names: Sequence[SamplerName], plans: Sequence[Move]
) -> list[FloatImages]:
    """Return what each leg ends at, all from the same noises."""
    model, mesh, samplers = drawing.model, drawing.mesh, [REVERSE_PROCESSES[name] for name in COMPARED]
    schedule, numbers = model.schedule, np.arange(len(noises), dtype=np.int32)
    chosen = np.arange(round_up(len(noises), mesh)).clip(max=len(noises) - 1)
    x_T, numbers, condition = put_batch((noises[chosen], numbers[chosen], model.condition_of(numbers[chosen])), mesh)
    keys = drawing.keys(numbers)

    def advance(params: Any, which: Int[jax.Array, ""], x_t: jax.Array, memories: tuple, move: Move):
        denoise = keep_to_pixels(model.make_denoiser(params, condition), schedule, drawing.threshold)
        # Without churn every sampler looks at x_t where `seen_at` says, so that the network need not be in each branch.
        prediction = denoise(x_t, move.seen_at)

        def branch(index: int):
            def take_step(x_t: jax.Array, memories: tuple):
                draw = make_draw(keys, x_t, move.number)
                x_s, memory, _ = samplers[index].step(
                    schedule, lambda x, t: prediction, x_t, memories[index], move, draw
                )
                return x_s, (*memories[:index], memory, *memories[index + 1 :])

            return take_step

        return jax.lax.switch(which, [branch(index) for index in range(len(samplers))], x_t, memories)

    program = jax.jit(advance, out_shardings=replicated(mesh))
    ends = []
    with progress_bar(sum(len(plan.t) for plan in plans), "comparing", "step", leave=False) as bar:
        for name, plan in zip(names, plans):
            x_t, memories = x_T, tuple(sampler.start(x_T) for sampler in samplers)
            rows = jax.tree.map(np.asarray, plan)
            for row in range(len(rows.t)):
                move = jax.tree.map(lambda column, row=row: column[row], rows)
                x_t, memories = program(model.params, COMPARED.index(name), x_t, memories, move)
                bar.update()
            ends.append(np.asarray(x_t)[: len(noises)])
    return ends
