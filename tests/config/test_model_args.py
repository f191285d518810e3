"""--model-args: typed values, one text for equal arguments, nothing run."""

import pytest

from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.config.model_args import asked_size, format_model_args, parse_model_args
from kd.errors import UserError


def test_values_have_their_types():
    text = "rate=0.1, size=(64,(3,2)),act=gelu,bias=False,norm=None,depth=-2,name='x y'"
    values = {"rate": 0.1, "size": (64, (3, 2)), "act": "gelu", "bias": False, "norm": None, "depth": -2, "name": "x y"}
    assert parse_model_args(text) == values
    assert parse_model_args(format_model_args(values)) == values
    assert format_model_args(parse_model_args("b=1,a=2")) == format_model_args(parse_model_args("a=2,b=1"))
    assert parse_model_args(None) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drop", "--model-args drop: write KEY=VALUE"),
        ("a=1,", "write KEY=VALUE"),
        ("a=[1]", "--model-args a=.1.: is a list"),
        ("a=true", "a=true: the value cannot be read"),
        ("a=(1,", "the value cannot be read"),
        ("a=1,a=2", "a is given twice"),
        ("a=1e999", "a=1e999: is a float"),
        ("a=__import__('os')", "the value cannot be read"),
        ("a=" + "(" * 600, "the value cannot be read"),
        ("a=" + "1" * 2000, "has more than 1000 letters"),
    ],
)
def test_row_44_what_is_no_argument_is_refused(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse(train_defaults, "", ["--model-args", text])
    assert "\n" not in str(caught.value)


def test_the_size_of_the_images_is_the_librarys_own_argument():
    assert asked_size("timm/vit", {"img_size": 64}) == (64, 64)
    assert asked_size("torchvision/vit_b_16", {"image_size": (32, 48)}) == (32, 48)
    assert asked_size("timm/vit", {"image_size": 64}) is None
    assert asked_size("mine:vit", {"img_size": 64}) is None
    with pytest.raises(UserError, match="--model-args img_size=0: give pixels"):
        asked_size("timm/vit", {"img_size": 0})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--freeze-epochs", "2"], "--freeze-epochs 2: name the layers with --freeze"),
        (["--freeze", "conv1", "--freeze-epochs", "0"], "--freeze-epochs 0: give 1 or more"),
        (["--teacher", "A", "--teacher-init", "B"], "--teacher-init B: is for the recipe's own teacher, and A teaches"),
        (["--teacher-model-args", "x"], "--teacher-model-args x: write KEY=VALUE"),
    ],
)
def test_row_44_flags_that_mean_nothing_are_refused(args, words):
    with pytest.raises(UserError, match=words):
        parse(distill_defaults, "", args)


def test_each_network_has_its_own_start():
    flags = ["--init", "a", "--model-args", "x=1", "--freeze", "conv1"]
    config = parse(distill_defaults, "", [*flags, "--teacher-init", "b", "--teacher-model-args", "y=2"])
    assert config.job().start == config.control_job().start
    assert config.job().compress.init == config.control_job().compress.init == "a"
    teacher = config.teacher_job()
    assert (teacher.compress.init, teacher.start.model_args, teacher.start.freeze) == ("b", "y=2", ())
