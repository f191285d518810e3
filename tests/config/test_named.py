"""Methods from outside: found by module:Class wherever a method is named, and what is forgotten in one line."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from torch import nn

import kd
from kd.config import METHODS, DistillConfig, NoneConfig, method_name, named_method
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.config.named import common_flags
from kd.errors import UserError
from kd.losses import loss_class
from kd.study import plan
from tests.losses.test_methods import FEW
from tests.run_scripts import differences, distil, metrics_of
from tests.training.test_resume import Killed, die_at

HEAD = """
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from kd.config.methods import FeatureFlags, MethodFlags, NoneConfig
from kd.losses import DistillationLoss, FeatureLoss

@dataclass(frozen=True)
class Flags(MethodFlags):
    '''Differences of logits.'''
    my_flag: int = 2
    '''How many.'''
    names: tuple[str, ...] = ()
    plain: bool = True

class Loss(DistillationLoss):
    config: Flags
    def forward(self, student, teacher, batch):
        difference = (student.logits - teacher.logits).abs().mean()
        return {"ce": self.cross_entropy(student.logits, batch), "mine": self.config.my_flag * difference}
"""

MODULE = (
    HEAD
    + """
class Twin(Loss): pass

class Quoted(Loss):
    config: "Flags"

class Unsaid(DistillationLoss):
    forward = Loss.forward

class Silent(DistillationLoss):
    config: Flags

class Layerless(FeatureLoss):
    forward = Loss.forward

class NotFlags: pass
class Elsewhere(Loss):
    config: NotFlags
class Nowhere(Loss):
    config: "Flagz"

class Undecorated(MethodFlags):
    weight: float = 1.0
class Plain(Loss):
    config: Undecorated

@dataclass(frozen=True)
class SeedFlags(MethodFlags):
    seed: int = 1
class Seeded(Loss):
    config: SeedFlags

@dataclass(frozen=True)
class ViewFlags(MethodFlags):
    views: int = 1
class Viewed(Loss):
    config: ViewFlags

@dataclass(frozen=True)
class FreezeFlags(MethodFlags):
    freeze: int = 1
class Frozen(Loss):
    config: FreezeFlags

@dataclass(frozen=True)
class RoleFlags(MethodFlags):
    role: str = "a"
class Cast(Loss):
    config: RoleFlags

@dataclass(frozen=True)
class LossFlags(MethodFlags):
    loss: str = "x"
class Lossy(Loss):
    config: LossFlags

@dataclass(frozen=True, kw_only=True)
class BareFlags(MethodFlags):
    weight: float
class Bare(Loss):
    config: BareFlags

@dataclass(frozen=True)
class PathFlags(MethodFlags):
    file: Path = Path("x")
class Filed(Loss):
    config: PathFlags

class Three(Loss):
    def forward(self, student, teacher): pass

class Alone(Loss):
    def __init__(self): pass

@dataclass(frozen=True)
class TypedFlags(MethodFlags):
    weight: "Floaty" = 1.0
class Typed(Loss):
    config: TypedFlags

class Network(nn.Linear): pass
def function(): pass

class Wrapped(nn.Module):
    def __init__(self, student):
        super().__init__()
        Path("built").touch()
        self.student, self.scale = student, nn.Parameter(torch.ones(()))
    def forward(self, image):
        return self.scale * self.student(image)

Path("imported").touch()

class Lost(Loss):
    def deployed(self, student):
        return Wrapped(student)

class Kept(Lost):
    def __init__(self, config, pair):
        super().__init__(config, pair)
        self.recipe = {"any": "thing"}
    @classmethod
    def rebuild(cls, student, recipe):
        assert recipe["any"] == "thing"
        return Wrapped(student)
"""
)


@pytest.fixture(autouse=True)
def module(tmp_path):
    """A module `mine` in the working folder, as a user has it."""
    (tmp_path / "mine.py").write_text(MODULE)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)
    named_method.cache_clear()


def student(*args: str) -> DistillConfig:
    return parse(distill_defaults, "", list(args))


@pytest.mark.parametrize(
    "args",
    [
        ["mine:Loss", "--my-flag", "3"],
        ["--teacher", "A", "B", "mine:Loss", "--my-flag", "3", "--epochs", "7"],
        ["--student", "net:small", "--no-flip", "mine:Loss", "--my-flag", "3"],
        ["--preset=crd", "mine:Loss", "--my-flag=3", "--names", "a", "b:c"],
        ["--nesterov", "mine:Loss", "--my-flag", "3", "--no-plain"],
    ],
    ids=" ".join,
)
def test_a_name_is_found_wherever_it_stands(args):
    config = student(*args)
    assert isinstance(config, DistillConfig)
    assert (method_name(config.method), config.method.my_flag) == ("mine:Loss", 3)
    assert config.teacher == (("A", "B") if "A" in args else ())
    assert config.student == ("net:small" if "net:small" in args else distill_defaults(config.preset).student)
    assert config.method.names == (("a", "b:c") if "a" in args else ())
    assert config.job().role == "mine:Loss"
    assert type(student(*args).method) is type(config.method)


def test_a_value_of_that_form_is_no_method():
    assert method_name(student("--student", "mine:net", "--data", "mine:data").method) == "kd"
    assert method_name(student("--student", "mine:net", "dkd").method) == "dkd"


def test_two_losses_may_share_a_class_of_flags():
    one, other = named_method("mine:Loss"), named_method("mine:Twin")
    assert one is named_method("mine:Loss")
    assert one is not other
    assert loss_class(one).__name__ == "Loss"
    assert (loss_class(other).__name__, method_name(other())) == ("Twin", "mine:Twin")
    assert named_method("mine:Quoted")().my_flag == 2
    assert named_method("dkd") is METHODS["dkd"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dkdd", "dkdd: no such method; did you mean .*dkd.* of your own is named as module:Class"),
        ("mind:Loss", r"cannot import mind from .*; did you mean mine\?"),
        ("mine:Los", r"mine has no class Los; did you mean .*Loss"),
        ("mine:function", "mine:function: is a function, no class; "),
        ("mine:Network", "mine:Network: is no method; derive the class from kd.losses.DistillationLoss"),
        ("mine:Unsaid", "mine:Unsaid: does not say which flags it has; write `config: MyFlags`"),
        ("mine:Silent", "mine:Silent: has no forward;"),
        ("mine:Layerless", "mine:Layerless: has no default_layers;"),
        ("mine:Three", r"mine:Three: defines forward\(self, student, teacher\); write forward\(self, student, tea"),
        ("mine:Alone", r"mine:Alone: defines __init__\(self\); write __init__\(self, config, pair\)"),
        (
            "mine:Typed",
            "mine:Typed: the types of its flags: name 'Floaty' is not defined; import it where TypedFlags is",
        ),
        ("mine:Elsewhere", "config: NotFlags, do not derive from kd.config.methods.MethodFlags"),
        ("mine:Nowhere", "config: 'Flagz', do not derive"),
        ("mine:Plain", r"Undecorated is no dataclass; put @dataclass\(frozen=True\) on it"),
        ("mine:Seeded", "mine:Seeded: --seed: is a common flag already"),
        ("mine:Viewed", "mine:Viewed: --views: is a common flag already"),
        ("mine:Frozen", "mine:Frozen: --freeze: is a common flag already"),
        ("mine:Cast", "mine:Cast: --role: the flags' class has that name already"),
        ("mine:Lossy", "mine:Lossy: --loss: the flags' class has that name already"),
        ("mine:Bare", "mine:Bare: --weight: has no default; give it one"),
        ("mine:Filed", "mine:Filed: --file: config.json cannot hold its PosixPath; take int"),
    ],
)
def test_what_is_forgotten_is_named_in_one_line(name, words):
    with pytest.raises(UserError, match=words) as caught:
        named_method(name)
    assert "\n" not in str(caught.value)
    if ":" in name:
        with pytest.raises(UserError, match=words):
            student(name)


def test_the_names_that_flags_must_not_have_are_those_that_scripts_take():
    assert {"seed", "views", "count", "data", "source", "teacher", "cache_teacher", "model", "freeze"} <= common_flags()
    for name, kind in METHODS.items():
        assert not common_flags() & {field.name for field in dataclasses.fields(kind)}, name


def test_its_help_lists_its_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        student("--preset", "digits", "mine:Loss", "--help")
    assert not stop.value.code
    page = capsys.readouterr().out
    assert page.startswith("Differences of logits.\n")
    assert re.search(r"--my-flag N +How many. \[2\]\n", page)
    assert re.findall(r"^  --(?:\[no-\])?([a-z-]+)", page, re.M) == ["my-flag", "label-smoothing", "names", "plain"]


def test_a_study_takes_it():
    study = plan.read_command_line(["--preset", "digits", "--methods", "mine:Loss", "kd", "--grid", "my-flag=1,2"])
    assert study.methods == ("mine:Loss", "kd")
    assert study.settings("mine:Loss") == [("--my-flag", "1"), ("--my-flag", "2")]
    assert study.lacks("kd") == ["my_flag"]
    task = study.student("mine:Loss", 0, "--my-flag", "2")
    assert task.args[0] == "mine:Loss"
    assert task.needs_teacher
    with pytest.raises(UserError, match="mine has no class Lost_"):
        plan.read_command_line(["--methods", "mine:Lost_"])


def test_a_run_of_it_is_named_resumed_and_read_without_its_code(monkeypatch):
    small = ["--student", "resnet8", "--teacher-model", "resnet8", *FEW, "mine:Loss", "--my-flag", "3"]
    distil(*small)
    (whole,) = Path("runs/report").glob("mine.Loss-resnet8-seed0-*")
    config = json.loads((whole / "config.json").read_text())
    assert (config["identity"]["role"], config["identity"]["my_flag"]) == ("mine:Loss", 3)
    assert metrics_of(whole)[0]["train/mine"] > 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        distil(*small, "--out", "run")
    distil(*small, "--out", "run", "--resume")
    assert differences(whole, Path("run")) == []
    Path("mine.py").unlink()
    sys.modules.pop("mine")
    named_method.cache_clear()
    assert not kd.load("run").training, "the network is a plain resnet8"


def test_a_network_that_an_outside_method_deploys_is_built_only_if_its_code_is_trusted():
    small = ["--student", "resnet8", "--teacher-model", "resnet8", *FEW]
    with pytest.raises(UserError, match=r"mine:Lost: deploys another network .* define rebuild, and self.recipe"):
        distil(*small, "mine:Lost", "--out", "lost")
    distil(*small, "mine:Kept", "--out", "run")
    info = json.loads(Path("run/model.json").read_text())
    assert info["deployed"] == {"method": "mine:Kept", "any": "thing"}
    Path("built").unlink()
    Path("imported").unlink()
    sys.modules.pop("mine")
    named_method.cache_clear()
    for method in ("mine:Kept", "kd+mine:Kept", "mine:Kept+kd"):
        Path("run/model.json").write_text(json.dumps(info | {"deployed": {"method": method, "any": "thing"}}))
        with pytest.raises(UserError, match=r"mine:Kept|cannot be rebuilt"):
            kd.load("run")
    Path("run/model.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="building mine:Kept runs its author's code; --trust-code"):
        kd.load("run")
    assert not Path("built").exists()
    assert not Path("imported").exists()
    network = kd.load("run", trust_code=True)
    assert isinstance(network.scale, nn.Parameter)
    assert network.scale.item() != 1


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ('{"loss": (student.logits - teacher.logits).mean()}', "'loss' has the name of another number"),
        ('{"agreement": (student.logits - teacher.logits).mean()}', "'agreement' has the name of another number"),
        ('{"mine": (student.logits - teacher.logits)[0]}', "its term 'mine' is no scalar tensor"),
        ('{"mine": 1.0}', "its term 'mine' is no scalar tensor"),
        ('{"mine": (student.logits > 0).any()}', "its term 'mine' is no scalar tensor"),
        ("student.logits.mean()", "its forward returns Tensor; return the loss terms by name"),
        ("None", "its forward returns NoneType; return the loss terms by name"),
        ("{}", "its forward returns an empty dict; return"),
        ('{"mine": teacher.logits.mean()}', "no term has a gradient, so nothing would be trained"),
    ],
)
def test_terms_that_cannot_be_summed_or_logged_are_named(returned, words, resnet8_run, module):
    forward = f"    def forward(self, student, teacher, batch):\n        return {returned}\n"
    module.write_text(HEAD + f"class Bad(Loss):\n{forward}")
    with pytest.raises(UserError, match=f"^mine:Bad: .*{words}"):
        distil("--student", "resnet8", "--teacher", str(resnet8_run), "mine:Bad", "--out", "run")


def test_a_term_without_a_gradient_is_logged_beside_others(resnet8_run, module):
    module.write_text(
        HEAD
        + """
class Noted(Loss):
    def forward(self, student, teacher, batch):
        return {"ce": self.cross_entropy(student.logits, batch), "note": teacher.logits.abs().mean()}
"""
    )
    distil("--student", "resnet8", "--teacher", str(resnet8_run), *FEW, "mine:Noted", "--out", "run")
    line = metrics_of(Path("run"))[0]
    assert line["train/note"] > 0
    assert line["train/gradient_ratio"] == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def __init__(self, config, pair):\n        self.config = config", "its __init__ must call super"),
        ("def _made(self): return {'a': torch.zeros(1)}", r"self.recipe is no JSON \(Object of type Tensor"),
        (
            "@classmethod\n    def rebuild(cls, student, recipe): return nn.Sequential(Wrapped(student))",
            "rebuild makes",
        ),
        ("@classmethod\n    def rebuild(cls, student, recipe): return student", r"rebuild makes .* 1?\d+ tensors diff"),
    ],
)
def test_a_class_that_could_not_be_built_again_is_refused_before_it_trains(body, words, module):
    made = MODULE.replace('{"any": "thing"}', "self._made()")
    module.write_text(
        made
        + f"""
    def _made(self): return {{"any": "thing"}}

class Wrong(Kept):
    {body}
"""
    )
    small = ["--student", "resnet8", "--teacher-model", "resnet8", *FEW]
    with pytest.raises(UserError, match=f"^mine:Wrong: .*{words}"):
        distil(*small, "mine:Wrong", "--out", "run")
    assert not Path("run/metrics.jsonl").exists()


@pytest.mark.parametrize("given", ["None", "'layer1'"])
def test_default_layers_that_are_no_tuple_are_named(given, resnet8_run, module):
    module.write_text(
        HEAD
        + f"""
@dataclass(frozen=True)
class Layers(FeatureFlags): pass
class Wrong(FeatureLoss):
    config: Layers
    @classmethod
    def default_layers(cls, config, stages): return {given}
    forward = Loss.forward
"""
    )
    with pytest.raises(UserError, match=f"default_layers gives {given}; let it return a tuple of layer names"):
        distil("--student", "resnet8", "--teacher", str(resnet8_run), "mine:Wrong", "--out", "run")


def test_flags_from_none_have_no_teacher(module):
    module.write_text(HEAD + "class Alone(Loss):\n    config: NoneConfig\n")
    kind = named_method("mine:Alone")
    assert not kind.needs_teacher
    assert type(kind()) is not NoneConfig
