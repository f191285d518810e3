"""--config and --print-config: what is written is read again, and what is typed wins."""

import json
import shutil

import pytest

from kd.config import jobs
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.config.presets import PRESETS
from kd.errors import UserError
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from tests.conftest import ROOT

OLD_RUNS = ROOT / "tests/runs/written_by_9b93d35"


def student(*args: str) -> jobs.DistillConfig:
    return parse(distill_defaults, "", list(args))


@pytest.fixture
def written(tmp_path, capsys):
    """Writes the YAML of these arguments, and returns its path."""

    def write(*args: str, defaults=distill_defaults) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(defaults, "", [*args, "--print-config"])
        assert not stop.value.code
        (tmp_path / "flags.yaml").write_text(capsys.readouterr().out)
        return str(tmp_path / "flags.yaml")

    return write


def yaml_file(tmp_path, text: str) -> str:
    (tmp_path / "some.yaml").write_text(text)
    return str(tmp_path / "some.yaml")


@pytest.mark.parametrize("defaults", [train_defaults, distill_defaults])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_printed_is_read_again(preset, defaults, written):
    path = written("--preset", preset, "--no-drop-last", "--seed", "3", defaults=defaults)
    assert parse(defaults, "", ["--config", path]) == parse(
        defaults, "", ["--preset", preset, "--no-drop-last", "--seed", "3"]
    )


def test_lists_words_and_a_method_survive(written):
    args = [
        "--teacher",
        "a",
        "b",
        "--schedule",
        "step",
        "--milestones",
        ".1",
        ".2",
        "--mixed-precision",
        "no",
        "--lr",
        "5e-4",
    ]
    args += ["dkd", "--beta", "3"]
    assert student("--config", written(*args)) == student(*args)


def test_several_methods_survive_and_what_is_typed_wins_over_them(tmp_path, written):
    path = yaml_file(tmp_path, "data: digits\nmethod: mlkd+at\nat-weight: 10\n")
    config = student("--config", path)
    assert (config.data.source, config.method) == ("digits", student("mlkd+at", "--at-weight", "10").method)
    assert student("--config", path, "mlkd+at", "--mlkd-weight", "2").method.parts()["at"].weight == 10
    assert type(student("--config", path, "dkd").method).__name__ == "DKDConfig"
    assert student("--config", path, "kd+sp").method.name == "kd+sp"
    args = ["kd+at", "--kd-alpha", "0.5"]
    assert student("--config", written(*args)).method == student(*args).method


def test_what_is_typed_wins(written):
    path = written("--preset", "crd", "--lr", "0.1", "dkd", "--beta", "3", "--alpha", "2")
    typed = student("--config", path, "--lr", "0.2", "dkd", "--beta", "4")
    assert (typed.fit.lr, typed.fit.epochs, typed.method.beta, typed.method.alpha) == (0.2, 240, 4, 2)
    other = student("at", "--config", path, "--weight", "5")
    assert (other.fit.lr, type(other.method).__name__, other.method.weight) == (0.1, "ATConfig", 5)
    assert student("--config", path, "--preset", "strong").fit.schedule == "step"  # the file says so
    assert student("--config", path, "--preset", "strong").preset == "strong"


def test_a_short_file_needs_only_what_differs(tmp_path):
    path = yaml_file(tmp_path, "data: digits\nbatch_size: 32\nmethod: dkd\nbeta: 2\n")
    config = student("--config", path)
    assert (config.data.source, config.fit.batch_size, config.method.beta) == ("digits", 32, 2)


def test_a_run_is_repeated_from_its_own_config(tmp_path):
    """The flags of the run, in a folder of their own; newer runs also say which teacher they had."""
    config = student("--config", str(OLD_RUNS / "student/config.json"), "--seed", "1")
    flags = json.loads((OLD_RUNS / "student/config.json").read_text())["flags"]
    assert (config.student, config.fit.seed, config.run.out) == (flags["model"], 1, None)
    job = json.loads(json.dumps(flags["fit"]))
    repeated = {key: getattr(config.fit, key) for key in job if key not in ("seed", "milestones")}
    assert repeated == {key: value for key, value in job.items() if key not in ("seed", "milestones")}
    assert DEFAULTS_OF_NEWER_FLAGS["drop_last"] == config.fit.drop_last

    shutil.copy(OLD_RUNS / "student/config.json", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"teacher": ["runs/a", "runs/b"]}
    content["flags"]["run"] |= {"push_to": "me/net", "push_every": 2}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert student("--config", str(tmp_path / "config.json")).teacher == ("runs/a", "runs/b")
    assert student("--config", str(tmp_path / "config.json"), "--teacher", "c").teacher == ("c",)
    content["teacher_flags"] = {"teacher_model": "timm/vit", "teacher_model_args": "img_size=224"}
    (tmp_path / "config.json").write_text(json.dumps(content | {"teacher": ["x.safetensors"]}))
    same = student("--config", str(tmp_path / "config.json"))
    assert (same.teacher_model, same.teacher_model_args) == ("timm/vit", "img_size=224")
    again = student("--config", str(tmp_path / "config.json"), "--seed", "1").run
    assert (again.push_to, again.push_every) == (None, 0), "another seed does not take its place on the Hub"
    teacher = parse(train_defaults, "", ["--config", str(OLD_RUNS / "teacher/config.json")])
    assert teacher.fit.epochs == json.loads((OLD_RUNS / "teacher/config.json").read_text())["flags"]["fit"]["epochs"]


def test_a_new_last_layer_is_not_repeated_as_a_whole_network(tmp_path):
    content = json.loads((OLD_RUNS / "teacher/config.json").read_text())
    content["flags"] |= {"origin": {"source": "timm/x"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"distill_student\.py --teacher timm/x --fine-tune-teacher trains it"):
        parse(train_defaults, "", ["--config", str(tmp_path / "config.json")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "there is no flag epoch: did you mean epochs"),
        ("flip: 1", "flip is 1; give true or false"),
        ("mixed_precision: no", "mixed-precision is False; a word such as no needs quotes"),
        ("fit: {epochs: 3}", "there is no flag fit"),
        ("epochs: {a: 3}", "epochs holds flags of its own"),
        ("method: dkkd", "dkkd: no such method; did you mean dkd"),
        ("- epochs", "holds no flags"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=r"--config .*some\.yaml") as error:
        student("--config", yaml_file(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_or_name_is_said(tmp_path):
    for args in (["--config", str(tmp_path / "none.yaml")], ["--config"]):
        with pytest.raises(UserError, match=r"name a YAML, or a run's config\.json"):
            student(*args)


def test_a_wrong_value_is_refused_as_if_typed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        student("--config", yaml_file(tmp_path, "epochs: three"))
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "defaults", "name"),
    [("student", train_defaults, "distill_student.py"), ("teacher", distill_defaults, "train_teacher.py")],
)
def test_a_run_of_the_other_script_is_named_as_such(run, defaults, name):
    with pytest.raises(UserError, match=f"config.json: has the flags of {name}; give it to that"):
        parse(defaults, "", ["--config", str(OLD_RUNS / run / "config.json")])


def test_a_file_without_a_method_has_flags_of_the_one_that_is_typed(tmp_path):
    common = yaml_file(tmp_path, "label-smoothing: 0.1\nepochs: 7\n")
    kd, dkd, none = (student("--config", common, *method) for method in ([], ["dkd"], ["none"]))
    assert {config.fit.epochs for config in (kd, dkd, none)} == {7}
    assert {config.method.label_smoothing for config in (kd, dkd, none)} == {0.1}
    assert student("--config", common, "dkd", "--label-smoothing", "0.2").method.label_smoothing == 0.2
    beta = yaml_file(tmp_path, "beta: 2\n")
    assert student("--config", beta, "dkd").method.beta == 2
    with pytest.raises(UserError, match="there is no flag beta"):
        student("--config", beta)
    own = yaml_file(tmp_path, "method: kd\nlabel-smoothing: 0.1\n")
    assert student("--config", own, "dkd").method.label_smoothing == 0, "another method than the file's"


@pytest.mark.parametrize("name", ["preset", "data", "method"])
def test_what_defaults_depend_on_is_one_word(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name} is \['own'\]; give one word"):
        student("--config", yaml_file(tmp_path, f"{name}: [own]\n"))
    assert student("--config", yaml_file(tmp_path, "data: 2024\n")).data.source == "2024"
