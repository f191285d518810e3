"""The study: what it runs, in which order, and that a failure or a kill costs nothing but itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.progress import Progress

from kd.config import METHODS, DataConfig
from kd.data import load_data
from kd.errors import Preempted, UserError, require
from kd.runs.handover import FOLDERS_FILE, announce, announced
from kd.study import __main__ as study
from kd.study import plan, runner
from kd.study.runner import Runner, Task
from kd.utils.files import write_json, write_weights
from tests import networks
from tests.conftest import ROOT
from tests.report.test_report import edit, fake_run
from tests.run_scripts import teach

# Stands in for distill_student.py: notes its arguments, trains no network, and leaves the little that the study reads.
FAKE = """
import json, os, pathlib, sys
from kd.runs.handover import announce

args = sys.argv[1:]
text = " ".join(args)
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(args) + "\\n")


def train(role, folder, top1=80, loss=2.0):
    announce(role, folder)
    print(f"{role} epoch 1/2  val/top1 3", flush=True)
    if f"{role} {text}".startswith(os.environ.get("BREAKS", "nothing")):
        sys.exit("error: it broke")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"val_top1_last": top1}))
    (folder / "metrics.jsonl").write_text(json.dumps({"val/loss": loss}))


if text.startswith(os.environ.get("REFUSES", "nothing")):
    sys.exit("error: refused")
if args[0] in ("kd", "dkd", "simkd") and not pathlib.Path("runs/teacher/summary.json").exists():
    train("teacher", pathlib.Path("runs/teacher"))
top1 = 90 - abs(float(args[args.index("--temperature") + 1]) - 5) if "--temperature" in args else 80
name = "".join(c if c.isalnum() else "_" for c in text.replace(" --no-test", ""))
train(args[0], pathlib.Path("runs") / name, top1, 1.0 if "0.9" in args else 2.0)
"""


@pytest.fixture
def fake(monkeypatch):
    """Run the stand-in directly instead of the script through the launcher."""
    Path("distill_student.py").write_text(FAKE)
    monkeypatch.setattr(plan, "script_path", lambda name: Path(name))
    monkeypatch.setattr("kd.study.runner.LAUNCHER", (sys.executable,))
    monkeypatch.setattr("kd.study.runner.ALONE", ())
    monkeypatch.setattr(runner, "POLL", 0.01)


def asked(*args: str) -> plan.Study:
    return plan.read_command_line(["--preset", "digits", *args])


def calls() -> list[str]:
    lines = [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]
    return [" ".join(words).replace("--preset digits ", "") for words in lines]


def test_everything_runs_once_with_equal_budgets(fake):
    done = study.run_study(asked("--seeds", "0", "1", "--epochs", "3", "--threads", "1"))
    assert not any(task.failure for task in done)
    common = "--epochs 3 --threads 1 --wandb-group study-digits-resnet20-resnet8"
    run = lambda method, seed, *flags: " ".join((method, common, f"--seed {seed} --auto-resume --no-control", *flags))  # noqa: E731
    assert calls() == [
        run("kd", 0),
        *(run("none", seed) for seed in (0, 1)),
        *(run("none", seed, "--label-smoothing 0.1") for seed in (0, 1)),
        run("kd", 1),
    ]
    assert [task.teachers for task in done if "kd" in task.label] == [[Path("runs/teacher")], []]


def test_methods_without_a_teacher_have_none_trained(fake):
    done = study.run_study(asked("--seeds", "0", "--methods", "tfkd", "apprentice"))
    assert [task.label for task in done] == [
        f"{name} seed 0" for name in ("none", "none --label-smoothing 0.1", "tfkd", "apprentice")
    ]


@pytest.mark.parametrize(("grid", "cached"), [("alpha=0.5", False), ("alpha=0.5,0.9", True)])
def test_only_a_grid_of_several_settings_shares_a_cache_of_few_views(grid, cached):
    rest = asked("--seeds", "0", "--grid", grid).rest
    assert ("--cache-teacher" in rest, "--views" in rest) == (cached, cached)


def test_a_grid_picks_on_validation_and_only_the_picked_setting_is_tested(fake, capsys):
    grid = ["--grid", "temperature=2,5,10", "alpha=0.5,0.9"]
    done = study.run_study(asked("--seeds", "4", "7", "--jobs", "2", *grid))
    assert not any(task.failure for task in done)
    swept = [call for call in calls() if "--temperature" in call]
    assert len(swept) == 6 + 2
    assert all("--seed 4" in call and call.endswith("--no-test") for call in swept[:6])
    assert all("--temperature 5 --alpha 0.9" in call and "--no-test" not in call for call in swept[6:])
    assert "picked --temperature 5 --alpha 0.9 on validation" in capsys.readouterr().out


def failures(done: list[Task]) -> dict[str, str]:
    return {task.label: task.failure.split(" (log")[0] for task in done if task.failure}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_failure_loses_only_itself(fake, monkeypatch, jobs):
    monkeypatch.setenv("BREAKS", "kd kd")
    done = study.run_study(asked("--seeds", "0", "1", "2", "--methods", "kd", "dkd", "--jobs", jobs))
    assert failures(done) == dict.fromkeys([f"kd seed {seed}" for seed in range(3)], "error: it broke")
    assert len(done) == 12


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_failed_teacher_is_reported_once_and_no_other_student_is_started(fake, monkeypatch, jobs):
    monkeypatch.setenv("BREAKS", "teacher")
    methods = ["--methods", "kd", "dkd", "tfkd"]
    done = study.run_study(asked("--seeds", "0", "--jobs", jobs, *methods, "--grid", "alpha=0.1,0.2"))
    skipped = "not started: the teacher of kd --alpha 0.1 seed 0 failed"
    unpicked = "not started: no setting of the grid has a validation score to pick by"
    assert [(task.label, task.failure.split(" (log")[0]) for task in done if task.failure] == [
        ("kd --alpha 0.1 seed 0", "its teacher runs/teacher failed: error: it broke"),
        ("kd --alpha 0.2 seed 0", skipped),
        ("dkd --alpha 0.1 seed 0", skipped),
        ("dkd --alpha 0.2 seed 0", skipped),
        ("kd --alpha 0.1 seed 0", unpicked),
        ("dkd --alpha 0.1 seed 0", unpicked),
    ]
    assert sorted(call.split()[0] for call in calls()) == ["kd", "none", "none", "tfkd", "tfkd", "tfkd"]
    assert len(done) == 2 + 6 + 3


def test_a_student_that_fails_before_its_teacher_leaves_it_to_the_next(fake, monkeypatch):
    monkeypatch.setenv("REFUSES", "kd")
    done = study.run_study(asked("--seeds", "0", "1", "--methods", "kd", "dkd"))
    assert failures(done) == dict.fromkeys(["kd seed 0", "kd seed 1"], "error: refused")
    assert [task.teachers for task in done if task.label == "dkd seed 0"] == [[Path("runs/teacher")]]


def test_the_last_teacher_to_try_fails_the_rest(fake, monkeypatch):
    monkeypatch.setenv("REFUSES", "kd")
    monkeypatch.setenv("BREAKS", "teacher")
    done = study.run_study(asked("--seeds", "0", "1", "--methods", "kd", "dkd"))
    assert failures(done)["dkd seed 0"] == "its teacher runs/teacher failed: error: it broke"
    assert failures(done)["dkd seed 1"] == "not started: the teacher of dkd seed 0 failed"


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_bars_count_every_run(fake, monkeypatch, jobs):
    shown = []
    update = Progress.update

    def noted(self, bar, **fields):
        update(self, bar, **fields)
        shown.append((self.tasks[0].completed, self.tasks[0].total, fields.get("description")))

    monkeypatch.setattr(Progress, "update", noted)
    study.run_study(asked("--seeds", "0", "1", "--jobs", jobs, "--grid", "alpha=0.1,0.2"))
    counts = [count for count, _, _ in shown]
    assert counts == sorted(counts)
    assert {total for _, total, _ in shown} == {counts[-1]} == {4 + 2 + 2}


def test_folders_are_handed_over_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDERS_FILE, str(tmp_path / "folders"))
    odd = Path(os.fsdecode(b"runs/\xff\nrun folder: x"))
    announce("teacher", odd)
    announce("kd", Path("runs/kd"))
    with open(tmp_path / "folders", "a") as file:
        file.write('["kd", "runs/ha')  # a process was killed here
    assert announced(tmp_path / "folders") == [("teacher", odd), ("kd", Path("runs/kd"))]
    assert announced(tmp_path / "gone") == []
    monkeypatch.setenv(FOLDERS_FILE, str(tmp_path / "gone" / "folders"))
    announce("kd", odd)  # its study is gone, and its folder with it: the run goes on


def test_a_failed_run_is_in_the_report_and_the_exit_code(monkeypatch, capsys):
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    ended = [Task("none seed 0", Path(), [], Path("runs/alone")), Task("kd <b> seed 0", Path(), [], None, "it broke")]
    monkeypatch.setattr(study, "run_study", lambda asked: ended)
    assert study.main(["--preset", "digits"]) == ended[1:]
    assert "| kd &lt;b&gt; seed 0 | failed | it broke |" in Path("report/report.md").read_text()
    assert "1 finished run; 1 more listed below" in capsys.readouterr().out


def test_row_49_a_strangers_code_is_not_run_by_the_report_either(fake, resnet8_run, tmp_path, monkeypatch):
    """Row 49 of the faults: the study trusts what its own runs have trained, and no --teacher without --trust-code."""
    shutil.copytree(resnet8_run, "stranger")
    edit(Path("stranger/model.json"), model="strangers_code:build")
    (tmp_path / "strangers_code.py").write_text("import os; os.mkdir('exploded')")
    ours = fake_run("runs/kd", "kd", 0)
    monkeypatch.setattr(study, "run_study", lambda asked: [Task("kd seed 0", Path(), [], ours)])
    with pytest.raises(UserError, match="--trust-code"):
        study.main(["--preset", "digits", "--teacher", "stranger"])
    monkeypatch.setattr(study, "check_networks", lambda config: None)
    study.main(["--preset", "digits", "--teacher", "stranger"])
    assert not Path("exploded").exists()
    text = Path("report/report.md").read_text()
    assert "stranger: cost not measured: stranger: building strangers" in text
    assert text.count("cost not measured") == 1, "the study's own run is trusted"


def test_the_teachers_of_finished_students_are_in_the_report(monkeypatch):
    """They are trained on the way, and are no tasks of the study's."""
    fake_run("runs/head", "teacher", 0)
    student = fake_run("runs/kd", "kd", 0)
    edit(student / "summary.json", teacher="runs/head", teacher_model="resnet20", teacher_test_top1=50.0)
    monkeypatch.setattr(study, "run_study", lambda asked: [Task("kd seed 0", Path(), [], student)])
    study.main(["--preset", "digits"])
    assert "2 finished runs." in Path("report/report.md").read_text()


def test_asked_to_stop_it_stops_what_it_runs():
    Path("slow.py").write_text(
        "import os, signal, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), os._exit(3)))\n"
        "pathlib.Path('started').touch()\ntime.sleep(60)\n"
    )

    def interrupt():
        while not Path("started").exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd.study.runner.LAUNCHER", (sys.executable,))
        patch.setattr("kd.study.runner.ALONE", ())
        threading.Thread(target=interrupt).start()
        with pytest.raises(Preempted, match="the same command goes on"), Runner(1, (), Path("logs"), 1) as runner:
            runner.run([Task("slow", Path("slow.py"), [])])
    assert Path("saved").exists()


def test_all_jobs_are_asked_to_stop_at_once(monkeypatch, tmp_path):
    """A scheduler's grace is for all of them together."""
    Path("slow.py").write_text(
        "import os, signal, sys, time, pathlib\n"
        "def save(*_):\n"
        "    pathlib.Path(f'asked-{sys.argv[1]}').write_text(str(time.monotonic()))\n"
        "    time.sleep(1)\n"
        "    os._exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(f'started-{sys.argv[1]}').touch()\ntime.sleep(60)\n"
    )

    def interrupt():
        while not all(Path(f"started-{number}").exists() for number in "12"):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("kd.study.runner.LAUNCHER", (sys.executable,))
    monkeypatch.setattr("kd.study.runner.ALONE", ())
    threading.Thread(target=interrupt).start()
    with pytest.raises(Preempted), Runner(2, (), Path("logs"), 2) as runner:
        runner.run([Task(f"slow {number}", Path("slow.py"), [number]) for number in "12"])
    first, second = (float(Path(f"asked-{number}").read_text()) for number in "12")
    assert abs(first - second) < 0.9


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "kdd"], "no such method; did you mean kd"),
        (["--methods", "none"], "always run"),
        (["--seed", "3"], "--seeds chooses"),
        (["--no-control"], "the study sets it itself"),
        (["--jobs", "0"], "--jobs 0"),
        (["--grid", "temperature"], "write FLAG=VALUE,VALUE"),
        (["--grid", "beta=1,2"], "none of kd has these"),
        (["--grid", "temperature=0,1"], "--temperature 0"),
        (["--grid", "temperature=1,2", "--val-fraction", "0"], "picks on validation"),
        (["--epochs", "0"], "--epochs 0"),
        (["--grid", "temperature=2,5", "temperature=7,8"], "temperature is given twice"),
        (["--grid", "temperature=2,2.0,2"], "two trials of one run"),
        (["--out", "file"], "is a file"),
        (["--out", "file/x"], "choose another"),
        (["--out", "/proc/x"], "choose another"),
        (["--launch", "'"], "No closing quotation"),
        (["--launch=--num_processes=2", "--jobs", "2"], "each job gets one GPU"),
        (["--launch", "--config-file two.yaml", "--jobs", "2"], "wants 2 processes"),
        (["--launch", "--config_file gone.yaml"], "no such file"),
        (["--no_test"], "the study sets it itself"),
        (["--student", "resnet9"], "unknown model 'resnet9'"),
        (["--teacher-model", "resnet9"], "unknown model 'resnet9'"),
        (["--teacher", "nosuch"], "no such run folder"),
        (["--teacher", "gone.pth"], "no such file"),
        (["--push-to", "me/net"], "--push-to: every run would replace the one before"),
        (["--grid", "temperature=1,2", "--no-cache-teacher"], "--no-cache-teacher: the settings of a grid share one"),
        (["--methods", "embed", "--teacher", "nosuch"], "no such run folder"),
        (["--methods", "embed"], "embed: needs --teacher"),
        (["--config", "untested.yaml"], "--config: has test, out, push-to or resume"),
        (["--config", "smooth.yaml"], "--config: has label-smoothing, which is of methods"),
        (["--config=smooth.yaml"], "--config: has label-smoothing, which is of methods"),
        (["--config", "dkd.yaml"], "--config: has the method dkd; a study's methods are those of --methods"),
        (
            ["--methods", "embed", "--teacher", "x", "--grid", "temperature=0.1,0.2"],
            "which embed without labels has none of",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_did_wrong_is_said_before_anything_runs(args, words, fake):
    Path("file").write_text("")
    Path("two.yaml").write_text("num_processes: 2\n")
    Path("untested.yaml").write_text("test: false\n")
    Path("dkd.yaml").write_text("method: dkd\n")
    Path("smooth.yaml").write_text("label_smoothing: 0.1\n")
    with pytest.raises(UserError, match=words):
        study.main(["--preset", "digits", *args])
    assert not Path("calls.jsonl").exists()


@pytest.mark.parametrize("methods", [["kd", "dkd"], ["dkd"]])
def test_a_methods_own_check_comes_before_any_run(fake, methods, monkeypatch):
    monkeypatch.setattr(METHODS["dkd"], "check", lambda self: require(False, "dkd takes none of this"))
    with pytest.raises(UserError, match="dkd takes none"):
        study.run_study(asked("--seeds", "0", "--methods", *methods))
    assert not Path("calls.jsonl").exists()


def test_a_method_that_is_not_swept_is_named(fake, capsys):
    study.run_study(asked("--seeds", "0", "--methods", "kd", "dkd", "--grid", "temperature=2,5", "beta=1,2"))
    said = capsys.readouterr().out
    assert "kd: not swept; it has no beta" in said
    assert "dkd: not swept" not in said


def test_a_studys_own_defaults_give_way_to_those_of_a_file():
    Path("mine.yaml").write_text("wandb_group: mine\nthreads: 1\n")
    rest = asked("--jobs", "2", "--config", "mine.yaml").rest
    assert [word for word in rest if word.startswith("--")] == ["--config"]
    rest = asked("--jobs", "2").rest
    assert [word for word in rest if word.startswith("--")] == ["--threads", "--wandb-group"]


def test_the_usual_preset_of_a_method_is_the_studys():
    assert plan.read_command_line(["--data", "x", "--teacher", "t", "--methods", "embed"]).preset == "embed"
    assert plan.read_command_line(["--data", "x", "--teacher", "t", "--methods", "kd", "embed"]).preset == "own"


def test_the_teacher_of_embed_may_be_of_any_classes_or_none(monkeypatch):
    """A file without class names, and a function of one's own, are refused as teachers of logits alone."""
    write_weights(Path("w.safetensors"), networks.plain(10).state_dict())
    write_json(Path("w.json"), {"image_size": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3})
    monkeypatch.setattr(study, "run_study", lambda asked: [Task("embed seed 0", Path(), [], None, "tried")])
    common = ["--data", "synthetic", "--teacher-model", "tests.networks:plain", "--student", "resnet8"]
    for teacher in ("w.safetensors", "tests.networks:plain"):
        (task,) = study.main([*common, "--methods", "embed", "--teacher", teacher, "--trust-code"])
        assert task.failure == "tried"
    with pytest.raises(UserError, match="its classes have no names"):
        study.main([*common, "--methods", "kd", "--teacher", "w.safetensors"])


def test_the_report_goes_where_the_runs_go(monkeypatch):
    """--track tensorboard: nothing is uploaded."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    started = []
    monkeypatch.setattr("kd.training.tracking.start_wandb", lambda *given: started.append(given))
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    monkeypatch.setattr(study, "run_study", lambda asked: [Task("none seed 0", Path(), [], Path("runs/alone"))])
    study.main(["--preset", "digits", "--track", "tensorboard", "--wandb", "offline"])
    assert started == []


@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("strong", ["--min-lr", "0.01"]),
        ("modern", ["--mix-off-epochs", "15"]),
        ("crd", ["--milestones", "0.5", "0.75"]),
        ("imagenet", ["--fine-tune-teacher"]),
    ],
)
def test_flags_are_checked_against_the_preset_that_was_given(preset, flags):
    assert plan.read_command_line(["--preset", preset, *flags]).preset == preset
    Path("more.yaml").write_text("val_fraction: 0.2\n")
    assert plan.read_command_line(["--preset", preset, "--config", "more.yaml", *flags]).preset == preset


def test_flags_of_the_recipes_own_teacher_are_accepted(fake, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_study", lambda asked: [Task("kd seed 0", Path(), [], None, "tried")])
    flags = ["--teacher-model", "tests.networks:dropped", "--teacher-model-args", "width=6"]
    (task,) = study.main(["--preset", "digits", *flags])
    assert task.failure == "tried"
    assert "changes nothing" not in capsys.readouterr().out


def test_an_underscore_hides_no_flag():
    assert [word for word in asked("--wandb_group=my_name").rest if "group" in word] == ["--wandb-group=my_name"]


def test_a_launcher_around_the_study_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it once"):
        asked()


def test_a_picked_configuration_reaches_the_launcher():
    Path("one.yaml").write_text("num_processes: 1\n")
    assert asked("--jobs", "2", "--launch", "--config_file one.yaml").launch == ("--config_file", "one.yaml")
    assert asked("--launch", "--num_processes 2").launch == ("--num_processes", "2")


def test_runs_that_somebody_has_touched_since_are_not_picked(tmp_path):
    def task(name: str, summary: str, metrics: str) -> Task:
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(summary)
        (tmp_path / name / "metrics.jsonl").write_text(metrics)
        return Task(name, tmp_path, [], tmp_path / name)

    touched = [("{", "{}"), ("{}", "{}"), ('{"val_top1_last": "x"}', '{"val/loss": 1}'), ('{"val_top1_last": 9}', "")]
    tasks = [task(f"touched{number}", *texts) for number, texts in enumerate(touched)]
    with pytest.raises(UserError, match="no setting of the grid has a validation score"):
        study.pick_setting(tasks)
    assert study.pick_setting([*tasks, task("sound", '{"val_top1_last": 1.0}', '{"val/loss": 2.0}')]) == len(tasks)


@pytest.mark.slow
def test_a_real_study():
    """Through accelerate launch, tiny networks; the report at its end has all four rows and the verdicts."""
    args = ["--data", "synthetic", "--batch-size", "50", "--epochs", "1", "--lr", "0.05", "--seeds", "0", "--jobs", "2"]
    models = ["--student", "tests.networks:normalised", "--teacher-model", "tests.networks:plain"]
    command = [sys.executable, "-m", "kd.study", *args, *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=os.getcwd())
    assert done.returncode == 0, done.stdout + done.stderr
    text = Path("report/report.md").read_text()
    assert "4 finished runs." in text
    assert all(row in text for row in ("| teacher |", "| student alone |", "student (kd) against student alone:"))
    assert text.count("one seed says nothing about the seeds' noise") == 4, "two controls, in words and in the table"
    teacher = next(Path("runs/report").glob("teacher-*"))
    assert json.loads(next(Path("runs/report").glob("kd-*/summary.json")).read_text())["teacher"] == str(teacher)
    assert len(list(Path("runs/report").iterdir())) == 4, "the students found the study's teacher"


@pytest.mark.slow
def test_a_study_killed_twice_ends_in_the_same_report():
    """SIGKILL to the study, its launchers and their scripts at once, in the teacher's time and in the students'."""
    args = ["--data", "synthetic", "--batch-size", "50", "--epochs", "2", "--lr", "0.05", "--seeds", "0"]
    args += ["--threads", "1", "--student", "tests.networks:normalised", "--teacher-model", "tests.networks:plain"]
    command = [sys.executable, "-m", "kd.study", *args]
    reports = []
    for folder, kills in (("undisturbed", ()), ("killed", ("teacher-*", "kd-*"))):
        Path(folder).mkdir()
        for pattern in kills:
            kill_study_in(command, folder, pattern)
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = Path(folder, "report/report.md").read_text().splitlines()
        lines = [line for line in lines if not line.startswith("- **written:**")]
        reports.append([re.sub(r"[\d.]+ ms", "ms", line) for line in lines])
    assert reports[0] == reports[1]
    assert any("student (kd) against student alone:" in line for line in reports[0])


def kill_study_in(command: list[str], folder: str, run: str) -> None:
    """Start it, and kill all of it as soon as there is a checkpoint of a run so named."""
    found = lambda: list(Path(folder, "runs/report").glob(f"{run}/checkpoint/step-*"))  # noqa: E731
    assert not found()
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    deadline = time.monotonic() + 300
    while not found():
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGSTOP)  # so that it starts nothing more; each of its runs is a session of its own
    family = psutil.Process(started.pid).children(recursive=True)
    for process in (*family, started):
        process.kill()
    started.wait()
    psutil.wait_procs(family, timeout=30)
    assert not list(Path(folder, "runs/report").glob(f"{run}/summary.json")), "killed in the middle"


@pytest.mark.slow
def test_a_grid_of_nine_asks_its_teacher_once(monkeypatch):
    """Counted by the teacher itself: every training image in every view once, and the picked setting's test images."""
    teach("--out", "teacher", "--model", "tests.networks:counted")
    monkeypatch.setenv("KD_COUNT", os.path.abspath("asked"))
    args = ["--data", "synthetic", "--batch-size", "50", "--epochs", "2", "--lr", "0.05", "--seeds", "0", "--jobs", "2"]
    args += ["--teacher", "teacher", "--trust-code", "--student", "tests.networks:plain", "--out", "study"]
    grid = ["--grid", "temperature=2,4,8", "alpha=0.5,0.7,0.9"]
    done = subprocess.run([sys.executable, "-m", "kd.study", *args, *grid], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kd --temperature") == 10, "nine settings, and the picked one once more"
    asked = [int(line) for line in Path("asked").read_text().split()]
    data = load_data(DataConfig("synthetic"))
    views, training, test = 2, len(data.train.labels), len(data.test.labels)
    compared = 10 * views * 50  # each run asks it about one batch of each view, and compares with what is kept
    assert sum(number for number in asked if number > 2) == views * training + test + compared, "2 probe its shapes"


def test_help_imports_no_torch_and_no_scipy():
    code = """
import sys
from kd.runs.handover import FOLDERS_FILE, announce, announced
from kd.study import __main__ as study
try:
    study.main(["--help"])
except SystemExit:
    print({"torch", "scipy"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--grid" in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ((), ["--num_processes", "1"]),
        (("--quiet",), ["--num_processes", "1", "--quiet"]),
        (("--num-processes=2",), ["--num-processes=2"]),
    ],
)
def test_a_run_has_one_process_unless_the_launch_says_otherwise(monkeypatch, launch, words):
    """`accelerate launch` alone would take every GPU, and BatchNorm see a share of the batch that no other run has."""
    Path("echo.py").write_text("")
    monkeypatch.setattr("kd.study.runner.LAUNCHER", (sys.executable, "-c", "import sys; print(sys.argv[1:])"))
    with Runner(1, launch, Path("logs"), 1) as started:
        started.run([Task("one", Path("echo.py"), ["kd"])])
    assert str([*words, "echo.py", "kd"]) in Path("logs/one.log").read_text()
