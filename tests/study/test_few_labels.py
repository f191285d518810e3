"""A study over shares of the labels: what it runs, what starts from what, and what the report says of it."""

import re
from pathlib import Path

import pytest

import distill_student
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.errors import UserError
from kd.report.groups import by_data, compare_groups
from kd.report.tables import share_table
from kd.runs.comparison import Answers
from kd.runs.handover import FOLDERS_FILE, announced
from kd.runs.results import collect_runs
from kd.study import __main__ as study
from kd.study import few_labels
from kd.utils.files import read_json, write_json
from tests.report.test_report import edit, fake_run
from tests.study.test_study import asked, calls, failures, fake  # noqa: F401  a fixture

UNLABELLED = "simkd"  # reads no labels
SHARES = ["--seeds", "0", "1", "--label-shares", "0.1", "1"]


def arms() -> list[str]:
    """The calls without what all of them have, and the folder that a stand-in made up as FOLDER."""
    common = r" --wandb-group \S+| --auto-resume| --no-control"
    return [re.sub(r"--init \S+", "--init FOLDER", re.sub(common, "", call)) for call in calls()]


def test_every_share_runs_scratch_taught_and_fine_tuned(fake):  # noqa: F811
    done = study.run_study(
        asked(*SHARES, "--methods", "dkd", "--pretrain", f"{UNLABELLED} --weight 2", "--fine-tune", "--lr 0.01")
    )
    assert failures(done) == {}
    both = lambda words: [words.format(seed) for seed in (0, 1)]  # noqa: E731
    assert arms() == [
        "simkd --seed 0 --weight 2",
        *both("none --seed {} --label-share 0.1"),
        *both("none --seed {} --label-share 0.1 --label-smoothing 0.1"),
        *both("none --seed {} --label-share 1"),
        *both("none --seed {} --label-share 1 --label-smoothing 0.1"),
        "simkd --seed 1 --weight 2",
        *both("dkd --seed {} --label-share 1 --teacher runs/teacher --trust-code"),
        *both("dkd --seed {} --label-share 0.1 --teacher runs/teacher --trust-code"),
        *both("none --seed {} --lr 0.01 --init FOLDER --label-share 0.1"),
        *both("none --seed {} --lr 0.01 --init FOLDER --label-share 1"),
    ]


def test_what_a_runs_own_flags_say_wins_over_what_the_study_says_otherwise():
    """--lr-per-256 and --steps win over --lr and --epochs in one command line."""
    Path("mine.yaml").write_text("steps: 400\nlr_per_256: 0.1\n")
    first, then = f"{UNLABELLED} --epochs 9", "--lr 0.001"
    for given in (["--steps", "400", "--lr-per-256", "0.1"], ["--config", "mine.yaml"]):
        plan = asked(*SHARES, *given, "--pretrain", first, "--fine-tune", then)
        fit = lambda task: parse(distill_defaults, "", task.args).fit  # noqa: E731
        pretraining, fine_tuning = fit(plan.pretraining(0)), fit(plan.fine_tuning(0, "1", "RUN"))
        assert (pretraining.steps, pretraining.epochs, pretraining.lr_per_256) == (None, 9, 0.1)
        assert (fine_tuning.steps, fine_tuning.lr_per_256, fine_tuning.peak_lr) == (400, None, 0.001)


def test_a_first_training_begins_where_those_that_it_is_compared_with_do():
    with pytest.raises(UserError, match="--pretrain: nothing that it is compared with begins with --init"):
        asked(*SHARES, "--pretrain", f"{UNLABELLED} --init pretrained")


def test_pruning_is_not_repeated_by_the_fine_tuning():
    with pytest.raises(UserError, match="--prune: the fine-tuning after --pretrain would prune once more"):
        asked(*SHARES, "--init", "runs/full", "--prune", "0.5", "--teacher", "x", "--pretrain", UNLABELLED)


def test_a_first_training_of_other_length_teaches_only_itself(fake):  # noqa: F811
    """Its teacher has its epochs; the methods' has the study's, and is trained by the first that needs it."""
    study.run_study(asked(*SHARES, "--pretrain", f"{UNLABELLED} --epochs 9"))
    assert "kd --seed 0 --label-share 1" in arms()


def test_flags_of_the_recipes_own_teacher_are_left_out_where_the_study_names_it(fake):  # noqa: F811
    done = study.run_study(asked(*SHARES, "--teacher-seed", "1", "--teacher-init=pretrained"))
    assert failures(done) == {}
    taught = [call for call in arms() if call.startswith("kd")]
    assert all("--teacher-seed 1" in call and "--teacher-init=pretrained" in call for call in taught[:2])
    assert all("--teacher runs/teacher" in call and "--teacher-" not in call for call in taught[2:])


def test_a_lost_teacher_of_the_first_training_leaves_the_methods_theirs(fake, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BREAKS", "teacher simkd")
    failed = failures(study.run_study(asked(*SHARES, "--pretrain", f"{UNLABELLED} --epochs 9")))
    assert failed["simkd to start from, seed 0"].startswith("its teacher runs/teacher failed")
    assert failed["simkd to start from, seed 1"] == "not started: the teacher of simkd to start from, seed 0 failed"
    assert not [label for label in failed if label.startswith("kd")]


def test_the_teacher_of_the_first_training_is_looked_for_before_anything_starts():
    missing = ["--preset", "digits", "--label-shares", "1", "--pretrain", "embed --preset embed --teacher no/such"]
    with pytest.raises(UserError, match=r"--teacher no/such: .*no/such"):
        study.main(missing)
    assert not Path("runs").exists()


def test_other_labelled_images_may_be_pretrained_on():
    allowed = asked("--label-shares", "0.1", "1", "--pretrain", "mimic --data synthetic")
    assert allowed.pretraining(0).args[-2:] == ["--data", "synthetic"]
    with pytest.raises(UserError, match="learns from all labels"):
        asked("--label-shares", "0.1", "1", "--pretrain", "mimic --data digits")


@pytest.mark.parametrize("steps", [("--steps", "40"), ("--steps=40",)])
def test_epochs_of_the_first_training_win_over_the_studys_steps(fake, steps):  # noqa: F811
    study.run_study(asked("--seeds", "0", "--label-shares", "1", "--pretrain", "kd --epochs 9", *steps))
    kept = " ".join(steps).replace("=", " ")
    first, *others = (call.replace("=", " ") for call in arms())
    assert first == "kd --seed 0 --epochs 9"
    assert all(kept in call for call in others)


def test_fine_tuning_starts_from_the_run_of_the_same_seed(fake):  # noqa: F811
    done = study.run_study(asked(*SHARES, "--pretrain", UNLABELLED))
    folders = {task.label: str(task.folder) for task in done}
    for seed in (0, 1):
        starts = {
            task.args[task.args.index("--init") + 1]
            for task in done
            if task.label.endswith(f"{seed}") and "--init" in task.args
        }
        assert starts == {folders[f"simkd to start from, seed {seed}"]}
    assert "simkd, then fine-tuned --label-share 0.1 seed 1" in folders


def test_the_teacher_of_all_labels_teaches_every_share(fake):  # noqa: F811
    study.run_study(asked(*SHARES))
    taught = [call for call in arms() if call.startswith("kd")]
    assert taught == [
        "kd --seed 0 --label-share 1",
        "kd --seed 1 --label-share 1",
        *(f"kd --seed {seed} --label-share 0.1 --teacher runs/teacher --trust-code" for seed in (0, 1)),
    ]


def test_a_failed_start_loses_the_fine_tuning_of_its_seed_only(fake, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BREAKS", "simkd simkd --preset digits --wandb-group study-digits-resnet20-resnet8 --seed 1")
    done = study.run_study(asked(*SHARES, "--pretrain", UNLABELLED))
    assert failures(done) == {
        "simkd to start from, seed 1": "error: it broke",
        **dict.fromkeys(
            [f"simkd, then fine-tuned --label-share {share} seed 1" for share in ("0.1", "1")],
            "not started: the run to start from failed",
        ),
    }
    assert len(done) == 2 + 8 + 4 + 4


def test_without_a_teacher_no_small_share_trains_one(fake, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BREAKS", "teacher")
    done = study.run_study(asked(*SHARES))
    failed = failures(done)
    assert failed["kd --label-share 1 seed 0"].startswith("its teacher runs/teacher failed")
    assert failed["kd --label-share 0.1 seed 0"] == few_labels.UNTAUGHT
    assert len([call for call in calls() if call.startswith("kd")]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--label-shares", "0"], "--label-shares 0: give shares above 0, up to 1"),
        (["--label-shares", "some"], "--label-shares some: give shares above 0"),
        (["--label-shares", "0.1", "0.10"], "has a share twice"),
        (["--label-shares", "0.1"], "--label-shares 0.1: add 1, whose run trains the teacher with all labels"),
        (["--label-shares", "1", "--grid", "alpha=0.1,0.2"], "--grid: leave --label-shares and --pretrain out"),
        (["--label-shares", "1", "--label-share", "0.1"], "--label-share: the study sets it itself"),
        (["--pretrain", "kd --seed 3"], "--seed: the study sets it itself"),
        (["--pretrain", "kd", "--fine-tune", "--init x"], "--fine-tune --init: the study sets it itself"),
        (["--fine-tune", "--lr 0.1"], "--fine-tune: needs --pretrain"),
        (["--pretrain", "none"], "--pretrain none: needs a method with a teacher"),
        (["--pretrain", "kdd"], "kdd"),
        (["--pretrain", "--epochs 3"], "--pretrain --epochs 3: name the method first"),
        (["--pretrain", "kd 'x"], "quote it as for a shell"),
        (["--pretrain", "kd --epochs 0"], "--epochs 0: give 1 or more"),
        (["--pretrain", "embed"], "embed: needs --teacher"),
        (["--label-shares", "0.1", "1", "--pretrain", "mimic"], "--pretrain mimic: learns from all labels"),
        (["--label-shares", "0.1", "1", "--pretrain", "kd+at"], "--pretrain kd+at: learns from all labels"),
        (["--label-shares", "0.1", "--methods", "tfkd", "kd"], "--label-shares 0.1: add 1, whose run trains"),
        (["--label-shares", "0.1", "--pretrain", f"{UNLABELLED} --epochs 9"], "--label-shares 0.1: add 1, whose run"),
        (
            ["--label-shares", "0.1", "1", "--methods", "embed", "--teacher", "x"],
            "--methods embed: reads no labels, of which --label-shares takes shares; name it with --pretrain",
        ),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        asked(*flags)


def test_a_batch_that_the_smallest_share_cannot_fill_is_refused_before_anything_starts():
    few = ["--label-shares", "0.01", "1", "--pretrain", UNLABELLED]
    with pytest.raises(
        UserError, match=r"--label-shares 0\.01: --batch-size 64: larger than the training split of 10 im"
    ):
        study.main(["--preset", "digits", *few])
    with pytest.raises(
        UserError, match=r"--label-shares 0\.01: --batch-size 32: larger than the training split of 10 im"
    ):
        study.main(["--preset", "digits", "--batch-size", "10", *few, "--fine-tune", "--batch-size 32"])
    assert not Path("runs").exists()


class InThisProcess(few_labels.Runner):
    """Runs the tasks' scripts here, which saves a start of Python each."""

    def run(self, tasks):
        for number, task in enumerate(tasks):
            file = Path(f"announced-{len(self.done)}-{number}").resolve()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(FOLDERS_FILE, str(file))
                distill_student.main(parse(distill_defaults, "", task.args))
            runs = announced(file)
            task.folder, task.teachers = runs[-1][1], [folder for role, folder in runs if role == "teacher"]
            self.done.append(task)


TINY = ["--preset", "report", "--data", "synthetic", "--classes", "3", "--batch-size", "25", "--lr", "0.05", *SHARES]
TINY += ["--teacher-model", "tests.networks:plain", "--student", "tests.networks:deep", "--epochs", "1"]
TINY += ["--wandb", "disabled", "--threads", "1", "--pretrain", "mimic --label-weight 0 --epochs 2"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A whole study with tiny networks: its folder."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(few_labels, "Runner", InThisProcess)
        assert study.main([*TINY, "--out", "report"]) == []
    return folder


@pytest.mark.slow
def test_the_report_compares_all_three_at_every_share(studied, monkeypatch):
    monkeypatch.chdir(studied)
    runs, others = collect_runs(["runs"])
    assert others == []
    groups = next(iter(by_data(runs).values()))
    assert {group.label: len(group.seeds) for group in groups if group.fine_tuned} == {
        f"student (mimic, then fine-tuned), label share {share}": 2 for share in (0.1, 1.0)
    }
    pairs = {(one.group.label, one.control.label): one for one in compare_groups(groups, Answers())}
    for share in (0.1, 1.0):
        tuned, taught, alone = (
            f"{name}, label share {share}"
            for name in ("student (mimic, then fine-tuned)", "student (kd)", "student alone")
        )
        for pair in ((tuned, alone), (tuned, taught), (taught, alone)):
            assert pairs[pair].difference.seeds == [0, 1]
    assert any(one.difference.interval for one in pairs.values())
    table = share_table(groups)
    assert table.head[2:] == ("10% of the labels", "100% of the labels")
    assert all("±" in cell for row in table.rows for cell in row[2:] if cell)
    report = Path("report/report.md").read_text()
    assert "Accuracy by share of the labels" in report
    assert report.count("against student alone, label share") >= 2, "a verdict for every share"


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(studied, monkeypatch, capsys):
    monkeypatch.chdir(studied)
    monkeypatch.setattr(few_labels, "Runner", InThisProcess)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.name != "lock"}
    study.main([*TINY, "--out", "again"])
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.name != "lock"}


def started(folder: str, start: Path, **identity) -> None:
    """A made-up run of the student alone that began with the weights of `start`."""
    config = fake_run(folder, "none", 0, label_smoothing=0.0) / "config.json"
    edit(start / "summary.json", weights_sha256=str(start))
    content = read_json(config)
    content["identity"] |= {"init": str(start), **identity}
    content["flags"]["method"] = {"label_smoothing": 0.0}
    write_json(config, content)


def controls_of(label: str) -> set[str]:
    groups = next(iter(by_data(collect_runs(["runs"])[0]).values()))
    return {control.label for group in groups if group.name == label for control in group.controls}


def test_a_recipe_of_its_own_is_compared_on_the_same_task():
    """--fine-tune '--lr 0.01': no control has that rate, and the gain is shown all the same."""
    fake_run("runs/alone", "none", 0, label_smoothing=0.0)
    fake_run("runs/kd", "kd", 0, temperature=4.0)
    start, name = fake_run("runs/start", "mimic", 0, width=1), "student (mimic, then fine-tuned)"
    started("runs/tuned", start)
    assert controls_of(name) == {"student alone", "student (kd)", "student (mimic)"}
    started("runs/slow", start, lr=0.7)
    assert controls_of(name) == {"student alone", "student (kd)", "student (mimic)"}
    edit(start / "summary.json", weights_sha256="another")
    assert controls_of(name) == set(), "without the run that it began with it is a student alone"
