"""Run folders and a teacher's cache that an older version wrote: resumed, reused and read as it would have done.

`written_by_9b93d35` was made by that commit, one thread, on the CPU (pictures and locks removed):

    SMALL="--data synthetic --classes 4 --batch-size 50 --epochs 2 --lr 0.2 --log-every 3 --threads 1 --wandb disabled"
    STUDENT="distill_student.py $SMALL --student tests.networks:plain --teacher teacher --trust-code
             --views 2 --cache-teacher --save-every 3 --out student kd"
    python train_teacher.py --model tests.networks:plain $SMALL --out teacher
    python $STUDENT && mv student finished
    python -m tests.faults kill:11 $STUDENT         (saved at step 9 of 14; 7 are an epoch)
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kd
from kd.config import DataConfig
from kd.data import load_data
from kd.data.rows import normalize
from kd.report.__main__ import main as report
from kd.runs.checkpoint import steps
from kd.utils.files import read_json, sha256_file
from tests.run_scripts import differences, distil, metrics_of

FIXTURE = Path(__file__).parent / "written_by_9b93d35"
FLAGS = ["--classes", "4", "--lr", "0.2", "--student", "tests.networks:plain", "--teacher", "teacher", "--trust-code"]
FLAGS += ["--threads", "1", "--views", "2", "--cache-teacher", "--save-every", "3"]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # another processor sums in another order


@pytest.fixture(autouse=True)
def old(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)


def machine() -> str:
    """What the last bits of a CPU's sums depend on: torch's version, and the processor with all its features."""
    processor = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = ("cpu family", "model", "stepping", "cache size", "flags")
        processor = "\n".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(names)}))
    digest = hashlib.sha256(processor.encode()).hexdigest()[:12]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, cpuinfo {digest}"


def cache() -> dict[str, str]:
    """The caches' files; about.json, which newer code adds, describes them and is not read in training."""
    files = (path for path in Path("runs/cache").glob("*/*") if path.name not in ("lock", "about.json"))
    return {str(path): sha256_file(path) for path in files}


def test_an_unfinished_run_and_its_cache_are_continued_to_the_end_that_they_had(capsys):
    before = cache()
    assert steps(Path("student/checkpoint"))[0] == 9
    distil(*FLAGS, "--out", "student", "--resume", "kd")
    assert cache() == before
    assert "of 2 stored" not in capsys.readouterr().out, "the teacher's logits were computed anew"
    expected, summary = (read_json(Path(name, "summary.json")) for name in ("finished", "student"))
    assert summary.keys() - {"test_split"} == expected.keys()  # which newer code adds
    if machine() == Path("machine.txt").read_text().strip():
        assert not differences(Path("finished"), Path("student"))
        assert sha256_file(Path("student/model.safetensors")) == expected["weights_sha256"]
    weights = [load_file(Path(name, "model.safetensors")) for name in ("student", "finished")]
    torch.testing.assert_close(*weights, **CLOSE)
    for line, wanted in zip(metrics_of(Path("student")), metrics_of(Path("finished")), strict=True):
        shares = [key for key in wanted if "top1" in key]  # a rounding may tip an image over
        assert [line.pop(key) for key in shares] == pytest.approx([wanted.pop(key) for key in shares], abs=2)
        assert line == pytest.approx(wanted, rel=1e-3)


def test_a_finished_run_is_found_finished():
    before = sha256_file(Path("finished/summary.json"))
    distil(*FLAGS, "--out", "finished", "kd")
    assert sha256_file(Path("finished/summary.json")) == before


@pytest.mark.parametrize("name", ["teacher", "finished"])
def test_a_finished_run_is_loaded(name):
    network = kd.load(name, trust_code=True)
    info, scored = read_json(Path(name, "model.json")), load_file(f"{name}/test_logits.safetensors")
    data = load_data(DataConfig(source="synthetic", classes=4))
    with torch.no_grad():
        logits = network(normalize(data.test.images, torch.tensor(info["mean"]), torch.tensor(info["std"])))
    torch.testing.assert_close(logits, scored["logits"], **CLOSE)
    assert torch.equal(data.test.labels, scored["labels"])


def test_old_runs_are_reported(capsys):
    report(["teacher", "finished", "student", "--out", "report", "--trust-code"])
    page = Path("report/report.md").read_text()
    assert "2 finished runs" in page
    assert "step 9 is saved" in page
    summary = json.loads(Path("finished/summary.json").read_text())
    assert f"{summary['test_top1']:.2f}" in page
    assert "could not be shown" not in page
