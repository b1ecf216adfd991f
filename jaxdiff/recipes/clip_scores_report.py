"""Scores of pictures as a table, sheets of the pictures beside their scores, results.json and report.html."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.io.case_sheet import PICTURE, fit
from jaxdiff.io.concept_pictures import read_photograph
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_overview
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.report import Figure, Picture, Report, Section, Table, facts_of, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.mesh import device_name
from jaxdiff.recipes.clip_features import Encoder
from jaxdiff.recipes.clip_grading import Graded

SHOWN = 5
"""Pictures on the sheet of a group, and references beside them."""
MEANINGS = {
    "image_score": "100 cosine to the references, mean",
    "text_score": "exp(logit scale) cosine to the prompt, mean",
    "best.image_score": "image score of the best five",
    "best.text_score": "text score of the best five",
    "clip_i": "CLIP-I, mean cosine to the references",
    "clip_i_times_2.5": "the same, 2.5 max(cosine, 0)",
    "clip_t": "CLIP-T, mean cosine to the prompt",
    "clip_t_times_2.5": "CLIPScore, 2.5 max(cosine, 0)",
    "clip_t_with_word": "CLIP-T to the prompt with the learned word",
    "clip_t_with_word_times_2.5": "the same, 2.5 max(cosine, 0)",
    "clip_t_stripped": "CLIP-T to the prompt without the learned word",
    "clip_t_stripped_times_2.5": "the same, 2.5 max(cosine, 0)",
    "cmmd": "CMMD to the references, by the CLIP above, pairs of a picture with itself left out",
    "cmmd_with_self_pairs": "the same with those pairs, as the published code, which takes ViT-L/14 at 336 pixels",
    "all_present": "share of pictures with all concepts",
}


def write_outputs(
    out: Path, encoder: Encoder, graded: Sequence[Graded], config: Mapping[str, Any], started: float
) -> list[Path]:
    """Write every file and return their paths; `started` is `time.perf_counter()` when the command began."""
    table = write_table(out / "scores.csv", graded)
    paths, sections = [table], []
    for result in graded:
        sheet = draw_sheet(result)
        write_overview(out / f"sheet_{result.group.name}.png", sheet)
        paths.append(out / f"sheet_{result.group.name}.png")
        sections.append(section_of(result, sheet))
    figures: Figures = {f"{r.group.name}.{name}": value for r in graded for name, value in r.figures.items()}
    judged = [result.passed for result in graded if result.passed is not None]
    if judged:
        figures |= {"passed": sum(judged), "graded": len(judged)}
    figures["seconds"] = time.perf_counter() - started
    results = write_results(
        out, figures, config, {"params": tree_hash(encoder.model.params)}, device_name(encoder.mesh)
    )
    record = read_json(results)
    head = [Figure(f"{sum(judged)} of {len(judged)}", "prompts reach their baselines")] if judged else []
    for name in ("image_score", "text_score"):
        found = [result.figures[name] for result in graded if name in result.figures]
        if found:
            head.append(Figure(f"{np.mean(found):.1f}", MEANINGS[name]))
    report = Report(
        "CLIP scores",
        f"What {Path(encoder.name).name} makes of the pictures. Intervals are 95 %, bootstrapped over pictures.",
        head,
        sections,
        facts_of(record),
    )
    return [*paths, results, write_report(out / "report.html", report)]


def write_table(path: Path, graded: Sequence[Graded]) -> Path:
    """Write one line a picture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "picture", "image_score", "text_score", "among_best"])
        for result in graded:
            for number, picture in enumerate(result.group.files):
                scores = [f"{values[number]:.4f}" if len(values) else "" for values in (result.image, result.text)]
                writer.writerow([result.group.name, picture, *scores, int(number in result.best)])
    return path


def draw_sheet(result: Graded) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the first references, and the best pictures, or the first ones, with their scores."""
    group = result.group
    chosen = list(result.best) if len(result.best) else list(range(min(SHOWN, len(group.files))))
    rows = [("pictures", [square(group.files[number]) for number in chosen])]
    if group.references:
        originals = [square(file) for file in group.references[: len(chosen)]]
        rows.append(("references", originals))
    blank = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    cells = [row[number] if number < len(row) else blank for _, row in rows for number in range(len(chosen))]
    labels = [
        " / ".join(f"{values[number]:.1f}" for values in (result.image, result.text) if len(values))
        for number in chosen
    ]
    axis = " / ".join(
        name for name, values in (("image score", result.image), ("text score", result.text)) if len(values)
    )
    title = group.prompt or group.name
    return labelled_grid(
        np.stack(cells), [name for name, _ in rows], labels, title, column_axis=axis, style=GridStyle(cell=PICTURE)
    )


def square(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture in the middle of a white square."""
    image = fit(read_photograph(file))
    canvas = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    top, left = (PICTURE - image.height) // 2, (PICTURE - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return canvas


def section_of(result: Graded, sheet: UInt8[np.ndarray, "h w 3"]) -> Section:
    """Return the part of the page about one group."""
    figures, group = result.figures, result.group
    rows = []
    for name, value in figures.items():
        if name.endswith(("_low", "_high")) or name in ("pictures", "references", "passed"):
            continue
        interval = f"{figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f}" if f"{name}_low" in figures else ""
        rows.append([meaning(name), f"{value:.3f}", interval])
    chosen = "the best five by image score + 2.5 text score" if len(result.best) else "the first ones"
    picture = Picture(sheet, f"Pictures: {chosen}, of {len(group.files)}.", wide=True)
    note = ""
    if group.baseline is not None:
        verdict = "reach" if result.passed else "do not reach"
        note = f"The best five {verdict} the baseline of {group.baseline[0]:g} / {group.baseline[1]:g}."
    return Section(group.prompt or group.name, [picture, Table(["figure", "mean", "95 % interval"], rows)], note)


def meaning(name: str) -> str:
    """Return what a figure is, for the page."""
    if name.startswith("presence_margin."):
        return f"how much better a text with “{name.split('.', 1)[1]}” fits than one without"
    if name.startswith("present."):
        return f"share of pictures that show “{name.split('.', 1)[1]}”"
    return MEANINGS[name]
