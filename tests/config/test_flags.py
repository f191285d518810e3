"""Flags: what parses, what is refused, and what --help shows."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import tyro

import distill_student
import train_teacher
from kd.config import METHODS, KDConfig, NoneConfig, cli, flags, help, jobs
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.config.methods import method_name
from kd.config.presets import PRESETS
from kd.errors import UserError
from tests.conftest import ROOT


def student(*args: str) -> jobs.DistillConfig:
    return parse(distill_defaults, "", list(args))


def test_the_default_is_the_report():
    parsed = student()
    assert (parsed.teacher_model, parsed.student, parsed.data.source) == ("resnet34", "resnet18", "cifar100")
    assert (parsed.fit.epochs, parsed.fit.lr, parsed.fit.batch_size) == (10, 0.001, 64)
    assert not parsed.fit.nesterov
    assert parsed.method == KDConfig(temperature=5.0, alpha=0.7, direction="forward")


@pytest.mark.parametrize(
    ("args", "check"),
    [
        (["--data", "X", "--epochs", "3"], lambda c: c.data.source == "X" and c.fit.epochs == 3),
        (["none", "--label-smoothing", "0.1", "--epochs", "3"], lambda c: c.method == NoneConfig(0.1)),
        (["--epochs", "3", "--temperature", "4"], lambda c: c.method.temperature == 4),
        (["--teacher", "A", "none"], lambda c: c.teacher == ("A",) and c.method == NoneConfig()),
        (["--teacher", "A", "B", "dkd", "--beta", "2"], lambda c: c.teacher == ("A", "B") and c.method.beta == 2),
        (["at", "--student-layers", "a", "b", "--epochs", "3"], lambda c: c.method.student_layers == ("a", "b")),
        (["kd", "--preset", "digits"], lambda c: c.preset == "digits" and c.control),
        (["--preset=crd"], lambda c: c.data.val_fraction == 0 and c.method.temperature == 4),
        (["--preset", "crd", "kd"], lambda c: c.method == KDConfig(temperature=4.0, alpha=0.9)),
        (["--no-flip", "--nesterov"], lambda c: not c.views.flip and c.fit.nesterov),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_parse_in_any_order(args, check):
    assert check(student(*args))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_one_recipe_for_both_networks(preset):
    teacher, distilled = train_defaults(preset), distill_defaults(preset)
    distilled.check()
    teacher.check()
    assert teacher.job() == dataclasses.replace(
        distilled.teacher_job(), run=teacher.run, role="teacher", model=teacher.model
    )
    assert teacher.model == distilled.teacher_model


def test_the_literatures_schedule_falls_at_its_epochs():
    fit = distill_defaults("crd").fit
    assert [round(milestone * fit.epochs) for milestone in fit.milestones] == [150, 180, 210]


def test_crd_trains_its_mobile_students_with_a_smaller_lr_and_their_teacher_as_always(help_of):
    """As its authors' code does; an --lr that is given holds for all networks."""
    config = parse(distill_defaults, "", ["--preset", "crd", "--student", "shufflenetv2", "--control"])
    assert (config.job().fit.lr, config.control_job().fit.lr, config.teacher_job().fit.lr) == (0.01, 0.01, 0.05)
    assert config.head_job("mobilenetv2", None).fit.lr == 0.01
    assert parse(train_defaults, "", ["--preset", "crd", "--model", "mobilenetv2"]).job().fit.lr == 0.01
    assert distill_defaults("crd").job().fit.lr == 0.05
    given = parse(distill_defaults, "", ["--preset", "crd", "--student", "shufflenetv2", "--lr", "0.05"])
    assert (given.job().fit.lr, given.teacher_job().fit.lr) == (0.05, 0.05)
    assert "Peak learning rate. [0.05; mobile networks 0.01]" in help_of(distill_defaults, "--preset", "crd")


def test_reviewkds_weight_follows_from_the_student_unless_it_is_given():
    weights = {"resnet20": 0.6, "resnet32": 1, "resnet8x4": 5, "wrn-16-2": 5, "shufflenetv1": 5, "shufflenetv2": 8}
    for student, weight in (weights | {"resnet18": 1, "my.module:network": 1}).items():
        assert parse(distill_defaults, "", ["--student", student, "reviewkd"]).job().method.weight == weight
    given = parse(distill_defaults, "", ["--student", "resnet20", "reviewkd", "--weight", "3"])
    assert given.job().method.weight == 3


def test_no_method_flag_repeats_a_common_one():
    parts = (flags.DataConfig, flags.ViewConfig, flags.FitConfig, flags.RunConfig, flags.CompressConfig)
    parts += (flags.StartConfig, jobs.DistillConfig)
    common = {field.name for part in parts for field in dataclasses.fields(part)}
    for method in METHODS.values():
        assert not common & {field.name for field in dataclasses.fields(method)}


def test_students_of_several_seeds_share_one_teacher():
    made = [student("--seed", seed).teacher_job() for seed in ("0", "1")]
    assert made[0] == made[1]
    assert student("--teacher-seed", "3").teacher_job().fit.seed == 3


@pytest.mark.parametrize("switch", ["--no-labels", "--no_labels"])
def test_a_method_after_a_switch_is_found_however_that_is_written(switch):
    assert student("--data", "photos", "--teacher", "timm/x", switch, "embed").preset == "embed"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "0"], "--temperature 0"),
        (["--alpha", "1.5"], "--alpha 1.5"),
        (["dkd", "--beta", "-1"], "--beta -1"),
        (["crd", "--negatives", "0"], "--negatives 0"),
        (["at", "--kd-weight", "nan"], "--kd-weight nan"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--val-fraction", "1"], "--val-fraction 1"),
        (["--classes", "1"], "--classes 1"),
        (["none", "--label-smoothing", "1"], "--label-smoothing 1"),
        (["--resume", "--auto-resume"], "--resume and --auto-resume"),
        (["--momentum", "0", "--nesterov"], "--nesterov"),
        (["at", "--kd-temperature", "8"], "--kd-temperature 8: changes nothing without --kd-weight"),
        (["deit", "--temperature", "5"], "--temperature 5: changes nothing with hard labels; add --kind soft"),
        (["fitnet", "--student-layers", "layer3"], "--student-layers and --teacher-layers: name a map of each network"),
        (
            ["fitnet", "--student-layers", "a", "--teacher-layers", "b", "--hint-stage", "1"],
            "--hint-stage 1: layers are named in its place",
        ),
        (["cc", "--definition", "paper"], "--definition paper: 0.02 is the weight of neighbours"),
        (["cc", "--definition", "paper", "--width", "64"], "--width 64: --definition paper learns no embeddings"),
        (["--extend"], "--extend: name the finished run by --out"),
        (["--shuffle-rows", "100"], "--shuffle-rows 100: needs --stream"),
        (["--track", "tensorboard", "--wandb", "online"], "--wandb online: --track tensorboard leaves W&B out"),
    ],
)
def test_row_44_values_out_of_range_are_named(args, words):
    with pytest.raises(UserError, match=words):
        student(*args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizer", "adamw", "--momentum", "0.5"], "--momentum: --optimizer adamw takes none"),
        (["--optimizer", "muon", "--nesterov"], "--nesterov: is of --optimizer sgd, and this is muon"),
        (["--optimizer=timm/nadamw", "--nesterov"], "--nesterov: is of --optimizer sgd"),
        (["--milestones", "0.5"], "--milestones: needs --schedule step, and this is cosine"),
        (["--view_seed", "3"], "--view-seed: needs --views"),
        (["--resized-crop", "0.5", "--crop-padding", "2"], "--crop-padding: --resized-crop 0.5 crops in its place"),
        (["--teacher", "runs/big", "--teacher-seed", "3"], "--teacher-seed: is of the recipe's own teacher"),
        (["--preset", "imagenet", "--teacher-seed", "3"], "--teacher-seed: is of the recipe's own teacher"),
        (
            ["--preset", "own", "--optimizer", "adamw"],
            "--optimizer adamw: the learning rate of --preset own is for sgd",
        ),
        (["--preset", "vit", "--optimizer", "sgd"], "--optimizer sgd: the learning rate of --preset vit is for adamw"),
    ],
)
def test_a_typed_flag_that_another_makes_void_is_refused(args, words):
    with pytest.raises(UserError, match=f"^{words}"):
        student(*args)


@pytest.mark.parametrize(
    ("args", "taken"),
    [
        # The preset's Nesterov is not the user's.
        (
            ["--preset", "strong", "--optimizer", "adamw", "--lr", "0.001"],
            lambda c: c.fit.optimizer == "adamw" and c.fit.nesterov,
        ),
        # Of its teacher's SGD.
        (["--preset", "vit", "--momentum", "0.8"], lambda c: c.teacher_job().fit.momentum == 0.8),
        (["--optimizer", "timm/lars", "--momentum", "0.8"], lambda c: c.fit.momentum == 0.8),
        (["--optimizer", "adamw", "--no-nesterov"], lambda c: not c.fit.nesterov),
        (["--resized-crop", "0.5", "--crop-padding", "0"], lambda c: c.views.padding == 0),
        (["--schedule", "step", "--milestones", "0.5"], lambda c: c.fit.milestones == (0.5,)),
        (["--views", "2", "--view-seed", "3"], lambda c: c.views.view_seed == 3),
        (["--preset", "strong", "--optimizer", "adamw", "--lr-per-256", "0.001"], lambda c: c.fit.lr_per_256 == 0.001),
        (["--optimizer", "adamw"], lambda c: c.fit.lr == 0.001),
        (["--preset", "vit"], lambda c: (c.fit.optimizer, c.teacher_job().fit.lr) == ("adamw", 0.1)),
        (["--preset", "vit", "--optimizer", "adam", "--lr", "0.001"], lambda c: c.teacher_job().fit.lr == 0.001),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_do_something_pass(args, taken):
    assert taken(student(*args))


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_the_teachers_recipe_has_a_rate_of_its_own(optimizer):
    """train_teacher.py with vit trains by SGD."""
    with pytest.raises(UserError, match=f"--optimizer {optimizer}: the learning rate of --preset vit is for sgd"):
        parse(train_defaults, "", ["--preset", "vit", "--optimizer", optimizer])


def test_a_given_teacher_model_stands_in_place_of_the_presets_teacher():
    assert student("--preset", "imagenet").teachers == ("torchvision/resnet34",)
    assert student("--preset", "imagenet", "--teacher-model", "resnet20").teachers == ()
    assert student("--preset", "imagenet", "--teacher-init", "pretrained").teachers == ()
    assert student("--preset", "imagenet", "--teacher-model", "resnet20", "--teacher", "a").teachers == ("a",)


def test_a_files_flags_may_be_void(tmp_path):
    """A run's config.json has every flag, used or not."""
    (tmp_path / "mine.yaml").write_text("momentum: 0.5\nmilestones: [0.5]\noptimizer: adamw\n")
    assert student("--config", str(tmp_path / "mine.yaml")).fit.momentum == 0.5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preset", "digitz"], ["digitz", "digits"]),
        (["dkdd"], ["dkdd", "kd"]),
        (["--epocs", "3"], ["--epocs", "--epochs"]),
        (["--schedule", "linear"], ["linear", "cosine"]),
        (["--batch-size", "x"], ["x", "--batch-size"]),
    ],
)
def test_row_44_flags_that_do_not_parse_exit_with_2_and_the_names_there_are(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        student(*args)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words)


@pytest.mark.parametrize("name", ["train_teacher", "distill_student"])
def test_help_imports_no_torch(name):
    code = f"""
import sys, runpy
sys.argv = ["{name}.py", "--preset", "digits", "--help"]
try:
    runpy.run_path("{ROOT / name}.py", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
heavy = {{"torch", "numpy", "datasets", "accelerate", "wandb", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--epochs N .* \[30\]\n", done.stdout), "the preset's own epochs"
    assert "--batch-size" in done.stdout


SCRIPTS = [(train_teacher, train_defaults), (distill_student, distill_defaults)]


@pytest.fixture
def help_of(capsys, monkeypatch):
    """The function that shows a script's help, at 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def show(defaults, *args: str, description: str = "") -> str:
        with pytest.raises(SystemExit) as stop:
            parse(defaults, description, [*args] if "--help" in args else [*args, "--help"])
        assert not stop.value.code
        return capsys.readouterr().out

    return show


def flags_in(page: str) -> list[str]:
    return re.findall(r"^  --(?:\[no-\])?([a-z0-9-]+)", page, re.MULTILINE)


@pytest.mark.parametrize(("script", "defaults"), SCRIPTS, ids=["train", "distill"])
@pytest.mark.parametrize("preset", PRESETS)
def test_help_is_short_and_opens_with_commands(script, defaults, preset, help_of):
    lines = help_of(defaults, "--preset", preset, description=script.__doc__).splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
    commands = [line.strip() for line in lines[:10] if line.startswith("    accelerate launch ")]
    assert 4 <= len(commands) <= 5
    for command in commands:
        args = re.split(r"\s{2,}", command)[0].split()[3:]  # without the words beside it
        parse(defaults, "", args)


@pytest.mark.parametrize("defaults", [train_defaults, distill_defaults])
def test_help_shows_every_flag_once(defaults, help_of, capsys):
    """The flags that tyro's own help lists, which come from its own walk through the dataclasses."""
    page = help_of(defaults)
    shown = flags_in(page)
    for group in re.findall(r"more with --help (\w+):", page):
        whole = flags_in(help_of(defaults, group))
        named = page.split(f"more with --help {group}: ")[1].split("\n\n")[0]
        rare = re.split(r",\s+", named.strip())
        assert set(rare) < set(whole)
        assert not set(rare) & set(shown)
        shown += rare
    with pytest.raises(SystemExit):
        tyro.cli(type(defaults("report")), default=defaults("report"), args=["--help"], config=cli.FLAT)
    listed = re.findall(r"^[│ ] --([a-z][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == sorted([*listed, "config", "print-config"])


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_help_shows_its_own_flags(method, help_of):
    page = help_of(distill_defaults, "--preset", "crd", method)
    own = {field.name.replace("_", "-") for field in dataclasses.fields(METHODS[method])}
    assert sorted(flags_in(page)) == sorted(own)
    assert page.startswith(METHODS[method].__doc__)


def test_a_methods_help_has_the_presets_defaults_and_a_presets_name_is_no_method(help_of):
    assert re.search(r"--temperature X .* \[4\]\n", help_of(distill_defaults, "--preset=crd", "kd"))
    assert "--epochs N" in help_of(distill_defaults, "--preset", "crd")


@pytest.mark.parametrize("subject", ["training", "augmentation", "dkd", "kd+at"])
def test_help_may_stand_before_its_subject(subject, help_of):
    """As every `more with --help GROUP` line writes it."""
    assert help_of(distill_defaults, "--help", subject) == help_of(distill_defaults, subject, "--help")
    assert help_of(distill_defaults, "--help", subject) != help_of(distill_defaults, "--help")


def test_help_reads_each_class_once(help_of, monkeypatch):
    """Reading all of them for every flag took five seconds."""
    read, real = [], help.inspect.getsource
    monkeypatch.setattr(help.inspect, "getsource", lambda kind: read.append(kind) or real(kind))
    help._docstrings.cache_clear()
    help_of(distill_defaults)
    assert 0 < len(read) <= sum(len(kind.__mro__) - 1 for kind in set(read))  # with the bases of each


@pytest.mark.parametrize("method", [[], ["dkd"]], ids=["longer than a buffer", "shorter"])
def test_help_into_a_closed_pipe_ends_quietly(method, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide the flush at exit
    reader, writer = os.pipe()
    os.close(reader)  # as after `--help | head`
    command = [sys.executable, str(ROOT / "distill_student.py"), *method, "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("args", "source", "method"),
    [
        (["--cache-teacher", "--views", "2"], None, "kd"),
        (["--views", "2", "--cache-teacher", "dkd"], None, "dkd"),
        (["--cache-teacher", "hub:me/x@v2", "dkd"], "hub:me/x@v2", "dkd"),
        (["--cache_teacher=hub:me/x"], "hub:me/x", "kd"),
        (["dkd", "--cache-teacher", "./here", "--beta", "2"], "./here", "dkd"),
    ],
)
def test_cache_teacher_is_a_flag_and_may_name_a_source(args, source, method):
    config = parse(distill_defaults, "", args)
    assert (config.cache.cache_teacher, config.cache.cache_from, method_name(config.method)) == (True, source, method)


def test_a_file_may_name_a_source_too(tmp_path):
    (tmp_path / "flags.yaml").write_text("cache-teacher: hub:me/x\n")
    config = parse(distill_defaults, "", ["--config", str(tmp_path / "flags.yaml")])
    assert (config.cache.cache_teacher, config.cache.cache_from) == (True, "hub:me/x")
    live = parse(distill_defaults, "", ["--config", str(tmp_path / "flags.yaml"), "--no-cache-teacher"])
    assert (live.cache.cache_teacher, live.cache.cache_from) == (False, None)


def test_a_function_among_the_teachers_is_no_method():
    words = ["--data", "photos", "--teacher", "timm/vit", "mine:network", "embed", "--trust-code"]
    config = parse(distill_defaults, "", words)
    assert (config.preset, config.teacher, method_name(config.method)) == (
        "embed",
        ("timm/vit", "mine:network"),
        "embed",
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cache-from", "hub:me/x"], "--cache-from hub:me/x: write it as --cache-teacher hub:me/x"),
        (["--cache-teacher", "hub:x"], "--cache-teacher hub:x: is no Hub id; give hub:USER/NAME"),
        (["--cache-teacher", "hub:me/x", "--teacher-seed", "2"], "--teacher-seed: hub:me/x has the teacher's answers"),
        (["--cache-teacher", "hub:me/x", "--cache-top-k", "2"], "--cache-top-k: hub:me/x has the teacher's answers"),
        (["--cache-teacher", "hub:me/x", "--teacher", "runs/a"], "--teacher runs/a: --cache-teacher hub:me/x has the"),
    ],
)
def test_what_a_shared_cache_makes_void_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        parse(distill_defaults, "", args)


def test_a_class_made_at_run_time_has_the_texts_of_its_base():
    """For a method that is not in METHODS: no file has the source of such a class."""
    wider = dataclasses.make_dataclass("DistillConfig", [("method", int, 0)], bases=(jobs.DistillConfig,), frozen=True)
    assert help._docstrings(wider) == help._docstrings(jobs.DistillConfig) != {}
