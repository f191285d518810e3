"""README.md and docs/: the marked commands run as written, on photographs made here; every command parses.

`<!-- runnable -->` marks the block below it. Indented lines are commands, one per line, which run in the order of the
page; a fenced block of Python begins with `# NAME.py` and is written to that file.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch
from PIL import Image

from kd.config import METHODS
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.data import show
from kd.losses.deit import ALPHA
from kd.models import build_model
from kd.runs.table import COLUMNS
from kd.study.plan import read_command_line
from kd.teachers import __main__ as teachers
from kd.utils.operators import define_operators
from tests.conftest import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
MARK = "<!-- runnable -->\n\n"
RUN = {"README.md": 7, "docs/data.md": 1, "docs/extend.md": 5, "docs/foundation.md": 4}
"""Page -> its marked commands, so that none goes missing unseen."""
EXAMPLES = {"my_networks.py", "own_loop.py", "my_data.py", "my_method.py", "from_python.py"}

SCRIPTS = {"train_teacher.py": train_defaults, "distill_student.py": distill_defaults}
PARSERS = {name: partial(parse, defaults, "") for name, defaults in SCRIPTS.items()}
PARSERS |= {
    "kd.teachers": teachers.parse,
    "kd.study": read_command_line,
    "kd.data.show": partial(parse, show.defaults, ""),
}
CLASSES = {"brick": (170, 80, 60), "grass": (80, 150, 60), "sky": (90, 130, 200)}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def joined(text: str) -> list[str]:
    """The indented lines of a page as commands, one for each, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip().split(" #")[0] for line in lines if line.startswith("    ")]


def runnable(page: str) -> tuple[list[str], dict[str, str]]:
    """The marked commands of a page in order, and the marked files by name."""
    commands, files = [], {}
    for text in read(page).split(MARK)[1:]:
        if text.startswith("```python\n# "):
            code = text.removeprefix("```python\n").split("```")[0]
            files[code.splitlines()[0].removeprefix("# ")] = code
        else:
            commands += joined(text.split("\n\n")[0])
    return commands, files


def parsable_commands() -> list:
    """Every command of PARSERS' programs on every page; of a loop its first round."""
    found = []
    for page in PAGES:
        values = {}  # of shell variables
        for line in joined(read(page)):
            values |= dict(re.findall(r'^ *(\w+)="(.*)"$', line) + re.findall(r"^ *for (\w+) in (\S+)", line))
            line = Template(line).safe_substitute(values)
            program = re.search("|".join(map(re.escape, PARSERS)), line)
            if program and "$" not in line:
                args = shlex.split(re.split(r" > | &|; ", line[program.end() :])[0])
                found.append(pytest.param(program[0], args, id=f"{page}: {line[:60]}"))
    return found


def photographs(folder: Path) -> None:
    """Three classes of one colour each, under noise, in many sizes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for label, colour in CLASSES.items():
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                high, wide = draw.integers(36, 90, 2)
                pixels = np.array(colour) + draw.normal(0, 40, (high, wide, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.jpg")


def pretrained(folder: Path) -> None:
    """What torchvision would download, made here: weights of its resnet18 that have learned nothing."""
    define_operators()
    from torchvision.models import ResNet18_Weights, resnet18

    folder.mkdir(parents=True)
    torch.save(resnet18().state_dict(), folder / Path(ResNet18_Weights.DEFAULT.url).name)


def checkpoint(folder: Path) -> None:
    """weights.pth of a resnet20, with the README's weights.json beside it."""
    torch.save(build_model("resnet20", len(CLASSES), (32, 32)).state_dict(), folder / "weights.pth")
    (expects,) = re.findall(r'^`(\{"image_size".*\})`$', read("README.md"), re.M)
    (folder / "weights.json").write_text(expects)


@pytest.fixture
def user_folder(monkeypatch, tmp_path) -> Path:
    """What a reader of the pages has: the project's files, photographs, and somebody's weights."""
    photographs(tmp_path / "photos")
    pretrained(tmp_path / "torch" / "hub" / "checkpoints")
    checkpoint(tmp_path)
    for name in ("kd", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # The tests may run in an environment that was never activated.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield tmp_path
    shutil.rmtree(tmp_path / "torch")


def run_page(page: str, folder: Path) -> None:
    commands, files = runnable(page)
    for name, code in ({**runnable("docs/extend.md")[1], **files}).items():
        (folder / name).write_text(code)
    for command in commands:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (command, done.stderr[-2000:])


def test_the_marked_commands_are_all_found():
    marks = {page: len(re.findall(f"^{MARK.strip()}$", read(page), re.M)) for page in PAGES}
    marked = {page: runnable(page) for page, count in marks.items() if count}
    assert {page: len(commands) for page, (commands, _) in marked.items()} == RUN
    assert set(marked["docs/extend.md"][1]) == EXAMPLES
    assert all(read(page).count(MARK) == marks[page] for page in marked), "a blank line follows each mark"


def test_a_method_from_outside_is_as_short_as_the_page_says():
    lines = runnable("docs/extend.md")[1]["my_method.py"].splitlines()[1:]  # without the file's name
    assert f"in {len(lines)} lines" in read("docs/extend.md")
    assert len(lines) < 60


@pytest.mark.slow
def test_the_readmes_commands_run_as_written(user_folder):
    run_page("README.md", user_folder)
    fine_tuned = [json.loads(path.read_text())["resized"] for path in Path("runs/own").glob("teacher-*/model.json")]
    assert [224, 224] in fine_tuned, "the size at which the network from elsewhere sees them"
    distilled = json.loads(Path("runs/small/summary.json").read_text())
    assert distilled["test_images"] == 36
    assert "model.int8.onnx" in Path("runs/small/export/export.md").read_text()


@pytest.mark.slow
def test_the_data_pages_commands_run_as_written(user_folder):
    run_page("docs/data.md", user_folder)
    assert "Common and rare classes" in Path("report/report.md").read_text()


@pytest.mark.slow
def test_the_extend_pages_commands_run_as_written(user_folder):
    run_page("docs/extend.md", user_folder)
    config = json.loads(Path("runs/mine/config.json").read_text())
    assert config["identity"]["role"] == "my_method:Absolute"
    assert config["flags"]["method"] == {"label_smoothing": 0.0, "weight": 2.0}


@pytest.mark.slow
def test_the_foundation_pages_commands_run_as_written(user_folder):
    run_page("docs/foundation.md", user_folder)
    assert json.loads(Path("runs/embedder/model.json").read_text())["embedding"] == 64
    assert json.loads(Path("runs/classifier/model.json").read_text())["classes"] == sorted(CLASSES)
    assert Path("runs/embedder/export/model.onnx").exists()


@pytest.mark.parametrize(("program", "args"), parsable_commands())
def test_every_command_parses(program, args, monkeypatch):
    Path("my_method.py").write_text(runnable("docs/extend.md")[1]["my_method.py"])
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    monkeypatch.syspath_prepend("")
    for flag, file in itertools.pairwise(args):
        if flag == "--config":  # which an earlier command wrote, or a run of the reader's own
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("preset: crd")
    stops = pytest.raises(SystemExit, match=r"^0$") if "--print-config" in args else contextlib.nullcontext()
    with stops:
        PARSERS[program](args)


def test_the_readmes_table_has_the_columns_that_the_program_prints():
    (header,) = re.findall(r"^    ┃ (network .*) ┃$", read("README.md"), re.M)
    titles = [title.strip() for title in header.split("┃")]
    assert titles[:3] == ["network", "model", "params"]
    assert [column.title for column in COLUMNS if column.title in titles] == titles[3:]


# Flags whose defaults the README's table of methods gives, in the order of its numbers.
PUBLISHED = {
    "none": ("label_smoothing",),
    "tfkd": ("alpha", "temperature", "correct"),
    "apprentice": ("alpha", "beta", "gamma"),
    "kd": ("temperature", "alpha"),
    "mimic": ("weight",),
    "dkd": ("temperature", "alpha", "beta"),
    "dist": ("temperature", "weight", "beta", "gamma"),
    "nkd": ("temperature", "gamma"),
    "wttm": ("exponent", "used_weight"),
    "rld": ("temperature", "alpha", "beta", "ramp_epochs"),
    "pld": ("temperature",),
    "skd": ("temperature", "ce_weight", "kd_weight", "direction_weight", "ridge"),
    "ctkd": ("alpha", "lowest_temperature", "highest_temperature", "decay_epochs"),
    "mlkd": ("lowest", "highest", "weight", "ce_weight"),
    "crld": ("temperature", "within_weight", "across_weight"),
    "deit": ("used_alpha",),
    "ofa": ("weight", "exponent"),
    "fitnet": ("weight", "hint_stage"),
    **dict.fromkeys(("at", "sp", "nst", "pkt", "cc", "reviewkd", "simkd"), ("weight",)),
    "rkd": ("distance_weight", "angle_weight"),
    "vid": ("weight", "initial_variance"),
    "crd": ("weight", "negatives"),
    "embed": ("temperature",),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_those_of_the_readmes_table(method):
    (cell,) = re.findall(rf"^\| `{method}` \|[^|]*\|[^|]*\|([^|]*)\|", read("README.md"), re.M)
    numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", cell.partition("(")[0])  # in brackets are those of other cases
    config = METHODS[method]().settled("a student of nobody's")
    found = {name: getattr(config, name, None) for name in PUBLISHED[method]}
    if method == "mlkd":
        found |= {"lowest": config.temperatures[0], "highest": config.temperatures[-1]}
    if method == "deit":
        found["used_alpha"] = ALPHA[config.kind]
    assert [float(number.replace(",", "")) for number in numbers] == list(found.values())


def headings(page: Path) -> set[str]:
    """The anchors of a page: those that GitHub gives to its headings, and its own."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return set(re.findall(r'<a id="([^"]+)"', text)) | {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("page", [*PAGES, "tests/README.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        place = (ROOT / page).parent / name if name else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in headings(place), target


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_git_ignores_what_runs_studies_and_reports_write_by_default_and_nothing_of_ours():
    written = ["runs/report/kd-x/config.json", "runs/cache/x/logits.npy", "report/report.html", "report/logs/x.log"]
    ours = ["kd/report/build.py", "kd/runs/folder.py", "tests/report/test_report.py", "tests/runs/test_integrity.py"]
    command = ["git", "check-ignore", "--no-index", *written, *ours]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == written, done.stderr
