"""The report: one file, nothing from outside, every figure and pixel given is on the page, readable in both schemes."""

import base64
import itertools
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.report import Confusion, Curve, Figure, Picture, Report, Section, Table, write_report

VOID = {"meta", "img", "line", "circle", "polyline", "br", "hr", "input", "link"}
COUNTS = np.array([[90, 9, 1], [0, 25, 75], [0, 0, 0]])
RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((12, 20, 3), (7, 5, 1), (8, 8, 4))]
ROWS = [["all", "97.2 %", "96 % to 98 %"], ["cat", "1", "2"]]


class Page(HTMLParser):
    """Elements and texts of a page; an element left open or closed twice fails."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.stack:
            self.texts.append(data.strip().replace("\N{NO-BREAK SPACE}", " "))

    def attributes(self, tag, name):
        return [attrs[name] for t, attrs in self.elements if t == tag and name in attrs]


def make_report(text="text"):
    return Report(
        f"title {text}",
        f"subtitle {text}",
        [Figure("97.2 %", f"caption {text}", f"detail {text}"), Figure("12,345,678", "bare")],
        [
            Section("Pictures", [Picture(pixels, f"picture {text}") for pixels in PIXELS], f"note {text}"),
            Section(
                "Numbers",
                [
                    Table(["class", "accuracy", "interval"], ROWS, f"table {text}"),
                    Confusion(COUNTS, ["cat", "dog", f"third {text}"], f"matrix {text}"),
                    Curve({f"raw {text}": ([1, 2, 3], [0.3, 0.1, 0.2])}, f"curve {text}", "step", "loss"),
                ],
            ),
        ],
        {"Config": {"seed": "0", f"key {text}": f"value {text}"}, "Hashes": {"params": "ab" * 32}},
    )


def read_page(tmp_path, report):
    return write_report(tmp_path / "report.html", report).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_holds_every_text(tmp_path):
    page = Page(read_page(tmp_path, make_report()))
    wanted = ["title text", "subtitle text", "97.2 %", "caption text", "detail text", "bare", "note text", "Numbers"]
    wanted += ["picture text", "table text", "matrix text", "curve text", "raw text", "step", "loss", "ab" * 32]
    wanted += ["key text", "value text", "96 % to 98 %", "accuracy"]
    assert [text for text in wanted if text not in page.texts] == []


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path):
    text = read_page(tmp_path, make_report())
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "a", "form"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], tag
        assert all(attrs[name].startswith("data:image/png;base64,") for name in ("src", "href") if name in attrs)
    assert re.findall(r"(?:https?:)?//\w|@import|url\(", re.sub(r"base64,[^\"]*", "", text)) == []
    assert page.attributes("meta", "content")[-1].startswith("default-src 'none'")


def test_every_picture_decodes_to_the_pixels_given(tmp_path):
    page = Page(read_page(tmp_path, make_report()))
    sources = page.attributes("img", "src")
    assert len(sources) == len(PIXELS)
    for source, pixels, attrs in zip(sources, PIXELS, (a for t, a in page.elements if t == "img")):
        decoded = np.asarray(Image.open(BytesIO(base64.b64decode(source.split(",")[1]))))
        np.testing.assert_array_equal(decoded.reshape(pixels.shape), pixels)
        assert (int(attrs["height"]), int(attrs["width"])) == pixels.shape[:2]
        assert attrs["alt"] == "picture text"


HOSTILE = "<script>alert(1)</script></style><img src=x onerror=alert(1)> \"'&amp;"


def test_hostile_text_stays_text(tmp_path):
    plain = Page(read_page(tmp_path, make_report()))
    hostile = Page(read_page(tmp_path, make_report(HOSTILE)))
    assert [(tag, sorted(attrs)) for tag, attrs in hostile.elements] == [
        (tag, sorted(attrs)) for tag, attrs in plain.elements
    ]
    assert f"title {HOSTILE}" in hostile.texts
    assert f"value {HOSTILE}" in hostile.texts
    assert f"picture {HOSTILE}" in hostile.attributes("img", "alt")


def table_cells(text, opening):
    """Return the texts of the cells of the body of the first table whose tag begins with `opening`."""
    body = re.search(rf"{opening}.*?<tbody>(.*?)</tbody>", text, re.S).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    return [[re.sub("<.*?>", "", c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows]


def test_tables_read_back(tmp_path):
    text = read_page(tmp_path, make_report()).replace("\N{NO-BREAK SPACE}", " ")
    assert table_cells(text, "<table>") == ROWS
    cells = table_cells(text, '<table class="confusion"')
    assert [row[0] for row in cells] == ["cat", "dog", "third text"]
    assert [[int(c.replace("·", "0")) for c in row[1:]] for row in cells] == COUNTS.tolist()


def test_a_confusion_marks_right_and_wrong_answers_by_their_share(tmp_path):
    text = read_page(tmp_path, make_report())
    shades = {
        (kind, int(count)): float(shade)
        for kind, shade, count in re.findall(r'<td( class="right")? style="--s: ([\d.]+)">(\d+)</td>', text)
    }
    assert {count for kind, count in shades if kind} == {90, 25}
    assert {count for kind, count in shades if not kind} == {9, 1, 75}
    shares = {90: 0.9, 9: 0.09, 1: 0.01, 25: 0.25, 75: 0.75}
    ranked = sorted(shades, key=lambda key: shades[key])
    assert [count for _, count in ranked] == sorted(shares, key=lambda count: shares[count])
    assert max(shades.values()) <= 1


def test_a_percent_sign_never_starts_a_line(tmp_path):
    assert " %" not in re.sub(r"<style>.*?</style>", "", read_page(tmp_path, make_report()), flags=re.S)


def test_of_several_lines_the_first_stands_behind():
    points = ([1, 2], [0.1, 0.2])
    assert Curve({"a": points}, "c", "x", "y").legend == [("line0", "a")]
    smoothed = Curve({"a": points, "b": points, "c": points}, "c", "x", "y")
    assert smoothed.legend == [("faint line0", "a"), ("line0", "b"), ("line1", "c")]
    equal = Curve(smoothed.lines, "c", "x", "y", raw_first=False)
    assert equal.legend == [("line0", "a"), ("line1", "b"), ("line2", "c")]


def colours(text, scheme):
    """Return the colour variables of a scheme, each as three numbers in 0..255."""
    root = re.findall(r":root \{(.*?)\}", text, re.S)[scheme]
    hexes = {n: [int(h[i : i + 2], 16) for i in (0, 2, 4)] for n, h in re.findall(r"--(\w+): #(\w{6});", root)}
    triples = {n: [int(v) for v in t.split()] for n, t in re.findall(r"--(\w+): (\d+ \d+ \d+);", root)}
    return {name: np.array(value, float) for name, value in {**hexes, **triples}.items()}


def contrast(one, other):
    """Contrast ratio of two sRGB colours, WCAG 2.2."""

    def luminance(colour):
        c = colour / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_is_readable_on_every_ground(tmp_path, scheme):
    text = read_page(tmp_path, make_report())
    colour = colours(text, scheme)
    for ink, ground in itertools.product(("ink", "faint"), ("page", "card")):
        assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
    strongest = re.findall(r"rgb\(var\(--(\w+)\) / calc\(var\(--s\) \* ([\d.]+)\)\)", text)
    assert {name for name, _ in strongest} == {"heat", "error"}
    for name, opacity in strongest:
        for shade in np.linspace(0, 1, 11):
            alpha = float(opacity) * shade
            ground = alpha * colour[name] + (1 - alpha) * colour["card"]
            assert contrast(colour["ink"], ground) >= 4.5, (name, shade)
    for number in range(4):
        assert contrast(colour[f"line{number}"], colour["card"]) >= 3, number
