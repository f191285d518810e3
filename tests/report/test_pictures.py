"""The report's figures: colours, ticks and markers; and the page in a real browser, where there is one."""

import html
import io
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from kd.report import plots
from kd.report.__main__ import main as report
from kd.report.document import STYLE
from kd.report.figures import shown_method
from kd.report.groups import by_data
from kd.runs.results import collect_runs
from kd.training.summary import UNTESTED
from tests.report.test_report import edit, fake_run, study


def contrast(one: str, other: str) -> float:
    """WCAG's, of two colours written #rrggbb."""

    def luminance(colour: str) -> float:
        shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def written(pixel) -> str:
    red, green, blue = pixel
    return f"#{red:02x}{green:02x}{blue:02x}"


def test_pictures_read_on_light_and_on_dark_pages():
    papers = re.findall(r"--paper: (#\w{6})", STYLE)
    assert papers == ["#ffffff", "#0d1117"] == [plots.LIGHT.paper, plots.DARK.paper]
    history = [{"epoch": epoch, "train/loss": 1.0, "train/top1": 9.0, "val/loss": 2.0} for epoch in (1, 2)]
    for theme in (plots.LIGHT, plots.DARK):
        assert len(theme.colours) == len(plots.COLOURS)
        assert min(contrast(colour, theme.paper) for colour in (*theme.colours, theme.ink)) > 4.5
        png = plots.render((4.0, 3.0), plots.draw_curves({"one": [history]}), theme)
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
        shown = Counter(map(written, pixels))
        assert shown.most_common(1)[0][0] == theme.paper
        assert shown[theme.colours[0]] > 500, "the line"
        assert shown[theme.ink] > 100, "the axes"


def drawn(size: tuple[float, float], draw):
    """The figure, laid out."""
    with rc_context(plots.settings(plots.LIGHT)):
        figure = Figure(figsize=size, dpi=plots.DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.draw_without_rendering()
    return figure


def colliding(figure) -> list[tuple[str, str]]:
    """Neighbouring tick labels that touch each other."""
    touching = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            ticks += [tick for tick in axis.get_minor_ticks() if low <= tick.get_loc() <= high]
            labels = [label for label in (tick.label1 for tick in ticks) if label.get_text()]
            boxes = [(label, label.get_window_extent()) for label in labels]
            for (one, first), (other, second) in itertools.combinations(boxes, 2):
                if one.get_rotation():  # of 45 degrees: the lines of text are this far apart
                    apart = abs(first.x1 - second.x1) * 0.7
                    one.set_rotation(0)
                    near = apart < one.get_window_extent().height
                    one.set_rotation(45)
                else:
                    near = first.overlaps(second)
                if near:
                    touching.append((one.get_text(), other.get_text()))
    return touching


def epochs(count: int, step: int = 1) -> dict:
    history = [
        {"epoch": n * step, "train/loss": 1 / n, "train/top1": 9.0, "val/loss": 2.0} for n in range(1, count + 1)
    ]
    return {"a student of a rather long name": [history]}


@pytest.mark.parametrize(("count", "step"), [(1, 1), (2, 1), (3, 1), (6, 1), (37, 1), (240, 1), (12, 1000)])
def test_epochs_are_whole_numbers(count, step):
    figure = drawn(plots.CURVES, plots.draw_curves(epochs(count, step)))
    for axes in figure.axes:
        low, high = axes.get_xlim()
        shown = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
        assert shown
        assert all(re.fullmatch(r"\d+", text) for text in shown), shown
    assert not colliding(figure)


CROWDED = {
    "close": plots.draw_pareto([(f"n{n}", 78_042 + n, 0.2 + n / 1000, 97.0, 0.1) for n in range(5)]),
    "near": plots.draw_pareto([("a", 78_042, 0.24, 97.0, 0.1), ("b", 272_474, 0.63, 97.1, 0.1)]),
    "single": plots.draw_pareto([("a", 1, 0.0003, 97.0, 0.0)]),
    "far": plots.draw_pareto([("a", 900, 0.004, 97.0, 0.1), ("b", 7_000_000_000, 90_000.0, 97.1, 0.1)]),
    "unmeasured": plots.draw_pareto([("a", 900, None, 97.0, 0.1)]),
    "classes": plots.draw_class_gain([f"a class of a long name {n}" for n in range(100)], torch.linspace(-99, 99, 100)),
    "confused": plots.draw_confusion(
        [f"a class of a long name {n}" for n in range(20)], torch.eye(20), torch.arange(20)
    ),
    "gains": plots.draw_gains(
        [(f"student (m{n}), alpha 0.5, temperature 4.0", c, float(n), 9.0) for n in range(20) for c in "ab"]
    ),
    "one seed": plots.draw_gains([("student (kd)", "student alone", 0.3, None)]),
}


@pytest.mark.parametrize("name", CROWDED)
def test_ticks_do_not_collide(name):
    size = (plots.WIDTH, plots.gains_height([(str(n), c, 0.0, 0.0) for n in range(20) for c in "ab"]))
    size = size if name == "gains" else (plots.WIDTH, 8.0) if name == "classes" else (plots.WIDTH, 4.6)
    figure = drawn(size, CROWDED[name])
    assert not colliding(figure)
    if name in ("close", "near", "single", "far"):
        for axes in figure.axes:
            shown = [text.get_text() for text in axes.get_xticklabels()]
            assert 1 <= len(shown) <= 6
            assert all(re.fullmatch(r"[\d.]+(e-\d+|[kMG])?", text) for text in shown), shown


def test_a_grid_of_many_settings_has_room(monkeypatch):
    for number in range(12):
        fake_run(f"runs/kd{number}", "kd", 0, temperature=2.0 + number / 8, alpha=0.5 + number % 2 / 4)
    figures = []
    monkeypatch.setattr(plots, "render", lambda size, draw, *_: figures.append((size, draw)) or b"png")
    report(["runs"])
    for size, draw in figures:
        assert size[0] == plots.WIDTH, "one width"
        assert not colliding(drawn(size, draw))


def test_reliability_shows_how_many_images_a_bin_has_and_no_line_through_empty_ones():
    # 300 images of confidence 0.98, 100 of 0.7, 4 of 0.2 in each of ten classes, and no others.
    confidence = torch.tensor([0.98] * 300 + [0.7] * 100 + [0.2] * 4)
    logits = torch.log(torch.cat([confidence[:, None], ((1 - confidence) / 9)[:, None].expand(-1, 9)], dim=1))
    (axes,) = drawn((plots.WIDTH, 5.6), plots.draw_reliability({"one": (logits, torch.zeros(404).long())})).axes
    diagonal = axes.lines
    assert [list(line.get_xdata()) for line in diagonal] == [[0, 1]], "no other line"
    (markers,) = axes.collections
    few, some, most = markers.get_sizes()
    assert few < some < most
    assert (some - few) / (most - few) == pytest.approx((100 - 4) / (300 - 4)), "area in proportion to images"
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "15 images", "75 images", "300 images"]


def test_the_curve_is_the_mean_over_seeds_of_each_epoch():
    """One of them ended an epoch earlier, and one has no validation in its first."""
    losses = [[8.0, 4.0, 2.0], [2.0, 1.0]]
    histories = [
        [{"epoch": place, "train/loss": loss, "val/loss": 10 * loss} for place, loss in enumerate(values, start=1)]
        for values in losses
    ]
    histories[0][0]["val/loss"] = None
    loss, _ = drawn(plots.CURVES, plots.draw_curves({"one": histories})).axes
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines]
    assert curves == [([1, 2, 3], [5.0, 2.5, 2.0]), ([1, 2, 3], [20.0, 25.0, 20.0])]


def heat_map(figure) -> tuple[list[str], list[str], dict[tuple[int, int], str]]:
    """Labels of the rows and columns, and the text at each (row, column)."""
    (axes,) = figure.axes
    rows, columns = ([tick.get_text() for tick in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))
    return rows, columns, {text.get_position()[::-1]: text.get_text() for text in axes.texts}


def test_the_confusion_has_true_classes_in_its_rows():
    """Of four birds three are called planes; planes and cats are right."""
    predicted = torch.tensor([1, 1, 1, 0, 1, 1, 2])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    draw = plots.draw_confusion(["bird", "plane", "cat"], torch.eye(3)[predicted], labels)
    figure = drawn((plots.WIDTH, 4.6), draw)
    rows, columns, texts = heat_map(figure)
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("true", "predicted")
    assert rows[0] == columns[0] == "bird", "the worst first"
    assert columns == [*rows, "others"]
    share = {(rows[row], columns[column]): text for (row, column), text in texts.items()}
    off = {pair: text for pair, text in share.items() if pair[0] != pair[1] and text != "0"}
    assert off == {("bird", "plane"): "75"}
    assert [share[name, name] for name in ("bird", "plane", "cat")] == ["25", "100", "100"]


def test_the_worst_classes_mistaken_for_others_are_counted_so(monkeypatch):
    monkeypatch.setattr(plots, "WORST", 1)
    draw = plots.draw_confusion(["a", "b"], torch.eye(2)[torch.tensor([1, 1, 0, 1])], torch.tensor([0, 0, 0, 1]))
    rows, columns, texts = heat_map(drawn((plots.WIDTH, 4.6), draw))
    assert (rows, columns, texts) == (["a"], ["a", "others"], {(0, 0): "33", (0, 1): "67"})


def test_the_grid_has_the_mean_validation_accuracy_of_the_seeds_that_all_settings_have(monkeypatch):
    scores = {}
    for number, (t, a, seed) in enumerate(itertools.product((10.0, 2.0), (0.5, 0.9), (0, 1))):
        run = fake_run(f"runs/{t}-{a}-{seed}", "kd", seed, temperature=t, alpha=a)
        scores.setdefault((t, a), []).append(50.0 + number**2)
        edit(run / "summary.json", val_top1_last=50.0 + number**2)
    picked = fake_run("runs/more", "kd", 2, temperature=2.0, alpha=0.9)
    edit(picked / "summary.json", val_top1_last=0.0)
    figures = []
    monkeypatch.setattr(plots, "render", lambda size, draw, *_: figures.append((size, draw)) or b"png")
    report(["runs"])
    assert "validation accuracy (seeds 0, 1)" in Path("report/report.html").read_text()
    rows, columns, texts = heat_map(drawn(*figures[-1]))
    assert (rows, columns) == (["2.0", "10.0"], ["0.5", "0.9"])
    shown = {(float(rows[row]), float(columns[column])): text for (row, column), text in texts.items()}
    assert shown == {setting: f"{np.mean(values):.2f}" for setting, values in scores.items()}


def test_the_method_that_figures_show_was_chosen_on_validation():
    for role, validation, tested in (("kd", 90.0, 50.0), ("dkd", 85.0, 99.0), ("at", 95.0, None)):
        for seed in (0, 1):
            run = fake_run(f"runs/{role}{seed}", role, seed)
            edit(run / "summary.json", val_top1_last=validation + seed, test_top1=tested)
            if tested is None:
                edit(run / "summary.json", **UNTESTED)
    (groups,) = by_data(collect_runs(["runs"])[0]).values()
    assert shown_method(groups).name == "student (kd)"


CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *QUIET, "--user-data-dir=profile"]
PHONE = 400  # pixels; a window of the browser has at least 500, a frame in it need not

# Tells the frame's owner what the browser made of a page; colours: those of more than 200
# of a figure's pixels, the most frequent first.
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, paper = getComputedStyle(document.body).backgroundColor;
  const inside = e => { const r = e.getBoundingClientRect(); return r.left >= 0 && r.right <= root.clientWidth; };
  const colours = image => {
    const canvas = document.createElement("canvas"), counts = {};
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    for (let n = 0; n < data.length; n += 4) {
      const number = 65536 * data[n] + 256 * data[n + 1] + data[n + 2];
      counts[number] = (counts[number] || 0) + 1;
    }
    const many = Object.keys(counts).filter(number => counts[number] > 200);
    many.sort((one, other) => counts[other] - counts[one]);
    return many.map(number => "#" + Number(number).toString(16).padStart(6, "0"));
  };
  const figure = f => { const image = f.querySelector("img"); return {
    caption: f.querySelector("figcaption").textContent, decoded: image.complete && image.naturalWidth > 0,
    whole: inside(image), width: image.getBoundingClientRect().width, colours: colours(image) }; };
  const table = t => ({ inside: inside(t), scrolls: t.scrollWidth > t.clientWidth });
  const all = (name, look) => [...document.querySelectorAll(name)].map(look);
  const found = { paper, width: root.clientWidth, fits: root.scrollWidth <= root.clientWidth,
    figures: all("figure", figure), tables: all(".table", table) };
  parent.postMessage(JSON.stringify(found), "*");
})</script>"""
FRAME = """<body style="margin:0"><script>addEventListener("message", m => { document.title = m.data; })</script>
<iframe src="probe.html" style="width:WIDTHpx; height:900px; border:0"></iframe>"""


def themed(dark: bool) -> str:
    """The page as a reader of dark pages sees it, or of light ones.

    A query that always holds or never does stands in for the reader's setting, which no flag sets dependably.
    """
    query = "(min-width: 0px)" if dark else "(max-width: 0px)"
    return Path("report/report.html").read_text().replace("(prefers-color-scheme: dark)", query)


def browse(page: str, width: int) -> dict:
    """What the browser made of the page in a frame of this width."""
    Path("probe.html").write_text(page.replace("</body>", PROBE + "</body>"))
    Path("frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    shown = ["--virtual-time-budget=20000", f"--window-size={max(width, 500)},900", "--dump-dom"]
    command = [CHROMIUM, *HEADLESS, *shown, Path("frame.html").resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[:2000] + done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


def photograph(page: str, width: int) -> np.ndarray:
    Path("themed.html").write_text(page)
    shown = [f"--screenshot={Path('shot.png').resolve()}", f"--window-size={width},900"]
    command = [CHROMIUM, *HEADLESS, *shown, Path("themed.html").resolve().as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    with Image.open("shot.png") as shot:
        return np.asarray(shot.convert("RGB")).astype(int)


@pytest.fixture
def crowded_page():
    """A report with long names, a grid, and every figure."""
    study()
    for temperature in (2.0, 10.0):
        fake_run(f"runs/kd_{temperature}_{'very_' * 12}long", "kd", 0, temperature=temperature, alpha=0.9)
    report(["runs", "--trust-code"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page with")
@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1400])
def test_a_real_browser_shows_the_page(crowded_page, theme, width):
    """Nothing scrolls sideways but tables inside themselves, figures are whole, and their lines contrast."""
    page = themed(dark=theme is plots.DARK)
    found = browse(page, width)
    assert (found["width"], found["fits"]) == (width, True), "the page does not scroll sideways"
    paper = [int(number) for number in re.findall(r"\d+", found["paper"])]
    assert written(paper) == theme.paper
    figures = found["figures"]
    assert [figure["caption"].split(":")[0] for figure in figures] == [f"Figure {n}" for n in range(1, 9)]
    assert all(figure["decoded"] and figure["whole"] for figure in figures)
    assert len({figure["width"] for figure in figures}) == 1, "one width"
    assert figures[0]["width"] > min(0.85 * width, 600), "and no narrower than need be"
    for figure in figures:
        lines = [colour for colour in figure["colours"] if is_vivid(colour)]
        if not re.search("worst classes|the grid|reliability", figure["caption"]):  # heat maps, and pale faces
            assert lines[0] in theme.colours, figure["caption"]
            assert contrast(lines[0], written(paper)) > 4.5
    assert all(table["inside"] for table in found["tables"])
    assert any(table["scrolls"] for table in found["tables"]) or width > PHONE
    pixels = photograph(page, max(width, 500))
    apart = np.abs(pixels - paper).max(axis=2)
    assert apart[5, 5] < 3, f"the paper is {pixels[5, 5]}, not {paper}"
    assert (apart < 3).mean() > 0.3, "paper"
    assert (apart > 150).mean() > 0.001, "ink"


def is_vivid(colour: str) -> bool:
    """Whether it is a line's, and not ink, paper or grid."""
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return max(parts) - min(parts) > 60
