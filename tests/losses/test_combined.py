"""Several methods at once: the sum of the parts, each with its own layers, and one cross-entropy."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from kd.config import KDConfig, method_name, named_method
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.errors import UserError
from kd.losses import loss_class
from kd.losses.combined import Combined
from kd.types import Stages
from tests.pairs import STAGES, batch_of, build, network, terms_of

INDEX = torch.arange(12)

OTHERS = """
from kd.config.methods import FeatureFlags
from kd.losses import FeatureLoss
from torch import nn

class Loss(FeatureLoss):
    config: FeatureFlags
    default_layers = classmethod(lambda cls, config, stages: stages.maps[:1])
    def forward(self, student, teacher, batch):
        (mine,), (theirs,) = student.features.values(), teacher.features.values()
        return self.common_terms(student, teacher, batch) | {"at": mine.square().mean()}

class Wrapping(Loss):
    def __init__(self, config, pair):
        super().__init__(config, pair)
        self.recipe = {"x": 1}
        self.student_layers = ()
    def forward(self, student, teacher, batch):
        return {"ce": self.cross_entropy(student.logits, batch)}
    def deployed(self, student):
        return nn.Sequential(student)
    rebuild = classmethod(lambda cls, student, recipe: nn.Sequential(student))

class Replacing(Wrapping):
    def deployed(self, student):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
"""


@pytest.fixture
def others(tmp_path):
    (tmp_path / "others.py").write_text(OTHERS)
    yield
    sys.modules.pop("others", None)
    named_method.cache_clear()


def gradients(distiller, total) -> dict[str, torch.Tensor]:
    named = [(name, part) for name, part in distiller.student.named_parameters() if part.requires_grad]
    found = torch.autograd.grad(total, [part for _, part in named], materialize_grads=True)
    return {name: gradient for (name, _), gradient in zip(named, found)}


@pytest.fixture
def precision(request):
    """float64 for sp's weight of 3000, which magnifies what float32 rounds when it sums in another order."""
    torch.set_default_dtype(torch.float64 if "+sp" in request.node.name else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("combination", "flags"),
    [
        ("kd+at", {}),
        ("at+kd", {"kd_alpha": 0.3, "at_weight": 7.0}),
        ("dkd+rkd+sp", {"label_smoothing": 0.1}),
        ("fitnet+vid", {"fitnet_hint_stage": 1}),
        ("crd+kd", {"crd_kd_weight": 0.5}),
        ("tfkd+reviewkd", {}),
    ],
)
def test_terms_and_gradients_are_the_sum_of_the_parts(combination, flags, precision):
    names = combination.split("+")
    together, teacher = build(combination, **flags)
    batch, before = batch_of(INDEX, epoch=1), copy.deepcopy(together.state_dict())  # crd fills its banks
    terms = terms_of(together, teacher, batch)
    wanted, summed = {}, {}
    for name in names:
        own = {key.removeprefix(f"{name}_"): value for key, value in flags.items() if key.startswith(f"{name}_")}
        smoothing = {key: value for key, value in flags.items() if key == "label_smoothing"}
        alone, its_teacher = build(name, **own, **smoothing)
        for part, prefix in ((alone.student, "student."), (alone.loss, f"loss.parts.{name}.")):
            part.load_state_dict({key.removeprefix(prefix): before[key] for key in before if key.startswith(prefix)})
        parts = terms_of(alone, its_teacher, batch)
        if name != names[0]:
            del parts["ce"]
        wanted |= {f"{name}_{term}" if term in wanted else term: value for term, value in parts.items()}
        for key, gradient in gradients(alone, sum(parts.values())).items():
            summed[key] = summed.get(key, 0) + gradient
    assert list(terms) == list(wanted)
    for name, term in wanted.items():
        torch.testing.assert_close(terms[name], term)
    for name, gradient in gradients(together, sum(terms.values())).items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_the_first_methods_and_a_term_of_that_name_gets_its_methods():
    batch = batch_of(INDEX)
    distiller, teacher = build("kd+at", kd_alpha=0.75, at_kd_weight=2.0)
    terms = terms_of(distiller, teacher, batch)
    assert list(terms) == ["ce", "kd", "at_kd", "at"]
    other = terms_of(*build("at+kd", kd_alpha=0.75), batch)
    assert list(other) == ["ce", "at", "kd"]
    torch.testing.assert_close(terms["ce"], 0.25 * other["ce"])
    assert list(terms_of(*build("simkd+kd"), batch)) == ["simkd", "ce", "kd"], "simkd has none of its own"


def test_cross_entropy_is_that_of_the_first_that_returns_one(monkeypatch):
    """A class from outside may say that it has one, as is the default, and have none."""
    real = loss_class(named_method("mimic")).forward
    without = lambda *args: {name: term for name, term in real(*args).items() if name != "ce"}  # noqa: E731
    monkeypatch.setattr(loss_class(named_method("mimic")), "forward", without)
    assert list(terms_of(*build("mimic+kd"), batch_of(INDEX))) == ["mimic", "ce", "kd"]


def test_each_sees_its_own_layers_also_inside_a_network_that_another_deploys():
    distiller, teacher = build("simkd+at+rkd")
    loss = distiller.loss
    assert loss.student_layers == ("projector", "student.0", "student.2", "student.6.input")
    assert loss.teacher_layers == ("2", "0", "6.input")
    assert loss.recipe["method"] == "simkd"
    assert loss.recipe == distiller.recipe
    terms = terms_of(distiller, teacher, batch_of(INDEX))
    assert list(terms) == ["simkd", "ce", "at", "rkd"]
    reached = gradients(distiller, terms["at"])
    assert reached["student.0.weight"].abs().sum() > 0
    assert reached["projector.0.weight"].abs().sum() == 0
    rebuilt = loss_class(named_method(loss.recipe["method"])).rebuild(network(4), loss.recipe)
    assert rebuilt.state_dict().keys() == distiller.deployed.state_dict().keys()


def test_what_follows_from_the_parts():
    kind = named_method("tfkd+apprentice")
    assert not kind.needs_teacher
    assert named_method("tfkd+kd").needs_teacher
    assert loss_class(named_method("kd+dkd")).needs_hard_labels
    assert not loss_class(named_method("kd+at")).needs_hard_labels
    assert loss_class(named_method("simkd+kd")).has_cross_entropy
    assert loss_class(kind) is loss_class(kind())
    assert issubclass(loss_class(kind), Combined)
    assert loss_class(kind).partner(kind(), "resnet8") == "resnet8"
    assert loss_class(named_method("kd+at")).partner(named_method("kd+at")(), "resnet8") is None
    distiller, teacher = build("at+dkd+kd")
    outputs = teacher(batch_of(INDEX).image)
    torch.testing.assert_close(distiller.loss.soft_labels(outputs), outputs.logits / 4)
    assert "teacher_ce" in terms_of(*build("apprentice+kd"), batch_of(INDEX))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none+kd", "none is the student alone, with nothing to add; leave it out"),
        ("kd+at+kd", r"kd\+at\+kd: has kd twice; name it once"),
        ("kd+ta", "ta: no such method; did you mean at"),
        ("kd+", r"^kd\+: a method is missing before or after a \+"),
        ("kd+others:Missing", "others has no class Missing"),
        ("simkd+others:Wrapping", "simkd and wrapping each deploy another network than the student; leave one out"),
        ("at+others:Replacing", "replacing deploys a network without the student inside, where at finds no 0, 2"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(name, words, others):
    with pytest.raises(UserError, match=words) as caught:
        build(name)
    assert "\n" not in str(caught.value)


def test_outside_methods_join_in(others):
    distiller, teacher = build("at+others:Loss", loss_kd_weight=1.0)
    terms = terms_of(distiller, teacher, batch_of(INDEX))
    assert list(terms) == ["ce", "at", "kd", "loss_at"]
    assert distiller.loss.parts["loss"].student_layers == ("0",)
    assert method_name(distiller.loss.config) == "at+others:Loss"
    wrapped, teacher = build("at+others:Wrapping")
    assert wrapped.recipe == {"method": "others:Wrapping", "x": 1}
    assert wrapped.loss.student_layers == ("0.0", "0.2")
    assert list(terms_of(wrapped, teacher, batch_of(INDEX))) == ["ce", "at"]


def test_on_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    student = lambda *args: parse(distill_defaults, "", list(args))  # noqa: E731
    config = student(
        "--teacher", "A", "B", "at+kd", "--kd-alpha", "0.2", "--at-student-layers", "a", "b", "--epochs", "3"
    )
    assert (config.method.kd_alpha, config.method.at_student_layers, config.teacher) == (0.2, ("a", "b"), ("A", "B"))
    assert config.job().role == "at+kd"
    parts = student("--preset", "crd", "kd+at", "--label-smoothing", "0.1").method.parts()
    assert parts["kd"] == KDConfig(temperature=4.0, alpha=0.9, label_smoothing=0.1), "the preset's own"
    assert parts["at"].label_smoothing == 0.1
    quick = student("--preset", "quick", "kd+at").method.parts()
    assert quick["kd"].label_smoothing == quick["at"].label_smoothing == 0.1, "the preset's own, as for kd alone"
    with pytest.raises(UserError, match=r"^--kd-alpha 2.0: give a share"):
        student("kd+at", "--kd-alpha", "2")
    with pytest.raises(UserError, match=r"^--at-kd-weight -1.0: give 0 or more"):
        student("kd+at", "--at-kd-weight", "-1")
    with pytest.raises(SystemExit):
        student("--preset", "crd", "kd+at", "--help")
    page = capsys.readouterr().out
    assert page.startswith("kd and at at once: ")
    assert re.search(r"--kd-temperature X .* \[4\]\n", page)
    assert "the kd that --at-kd-weight adds" in " ".join(page.split())
    assert len(re.findall(r"^  --(?:kd|at)-", page, re.M)) == 5 + 5
    assert page.count("--label-smoothing X") == 1


def test_layers_that_do_not_exist_are_named_with_the_methods_flag():
    config = named_method("kd+at")()
    with pytest.raises(UserError, match="name layers with --at-student-layers"):
        loss_class(config).layers(config, Stages(modules=("0", "1")), STAGES)
    assert loss_class(config).layers(config, STAGES, None) == (("0", "2"), ())


def test_a_folder_is_no_method():
    Path("kd+at").mkdir()
    assert method_name(parse(distill_defaults, "", ["kd+at"]).method) == "kd+at"
    assert (
        method_name(parse(distill_defaults, "", ["--teacher", "runs/kd+at-resnet8", "runs/a+b", "at"]).method) == "at"
    )
