"""deit and ofa: the authors' numbers, the two heads and what is deployed, the exits."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.config import METHODS
from kd.errors import UserError
from kd.losses import deit_loss, kd_loss, loss_class, ofa_loss
from kd.losses.deit import DeiT
from kd.losses.ofa import Merge, main_label, map_exit, token_exit
from kd.types import Mix, Outputs, Pair, Stages
from tests.pairs import STAGES, batch_of, build, network, terms_of

CASES = json.loads((Path(__file__).parent / "reference_deit_ofa.json").read_text())["cases"]
INDEX = torch.arange(12)


def logits_of(case: dict, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(case[name], dtype=torch.double, requires_grad=True) for name in names]


def zipped(kind: str) -> list:
    return [pytest.param(case, entry, id=f"{case['seed']}-{n}") for case in CASES for n, entry in enumerate(case[kind])]


@pytest.mark.parametrize(("case", "entry"), zipped("ofa"))
def test_ofa_agrees_with_the_authors_code_in_value_and_gradient(case, entry):
    student, teacher = logits_of(case, "student_logits", "teacher_logits")
    value = ofa_loss(student, teacher.detach(), torch.tensor(case["labels"]), **entry["params"])
    value.backward()
    assert value.item() == pytest.approx(entry["value"], rel=1e-6)
    expected = torch.tensor(entry["gradient"], dtype=torch.double)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("case", "entry"), zipped("deit"))
def test_deit_agrees_with_the_authors_code_in_value_and_gradient(case, entry):
    one, two, teacher = logits_of(case, "student_logits", "distilled_logits", "teacher_logits")
    params = dict(entry["params"])
    alpha = params.pop("alpha")
    # Theirs divides the soft loss by the classes as well; the paper, and so ours, does not.
    classes = one.shape[1] if params["kind"] == "soft" else 1
    term = deit_loss(two, teacher.detach(), **params) / classes
    value = (1 - alpha) * F.cross_entropy(one, torch.tensor(case["labels"])) + alpha * term
    value.backward()
    assert value.item() == pytest.approx(entry["value"], rel=1e-6)
    for logits, key in ((one, "gradient"), (two, "gradient2")):
        expected = torch.tensor(entry[key], dtype=torch.double)
        torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-9)


def test_the_functions_at_equal_logits_and_their_special_cases():
    logits, labels = torch.randn(6, 7).double(), torch.arange(6)
    assert deit_loss(logits, logits, "soft", 3.0).abs() < 1e-12
    assert deit_loss(logits, logits).item() == pytest.approx(F.cross_entropy(logits, logits.argmax(1)).item())
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ofa_loss(logits, logits, labels, 1.0), entropy)
    other = torch.randn(6, 7).double()
    gap = ofa_loss(other, logits, labels, 1.0) - ofa_loss(logits, logits, labels, 1.0)
    torch.testing.assert_close(gap, kd_loss(other, logits, 1.0))
    for function in (lambda s, t: ofa_loss(s, t, labels, 1.5), deit_loss):
        assert torch.isfinite(function(1e4 * logits, 1e4 * other))


@pytest.mark.parametrize(
    ("flags", "alpha"), [({}, 0.5), ({"kind": "soft"}, 0.1), ({"kind": "soft", "alpha": 0.3}, 0.3)]
)
def test_deit_weighs_its_terms_and_predicts_the_mean_of_both_heads(flags, alpha):
    distiller, teacher = build("deit", **flags)
    batch, deployed = batch_of(INDEX), distiller.deployed
    answers = teacher(batch.image).logits
    one, embedding = deployed.student(batch.image), deployed.student[:6](batch.image)
    two = deployed.distillation_head(embedding)
    terms = terms_of(distiller, teacher, batch)
    expected = F.cross_entropy(two, answers.argmax(1)) if not flags else kd_loss(two, answers, 3.0)
    torch.testing.assert_close(terms["ce"], (1 - alpha) * F.cross_entropy(one, batch.label))
    torch.testing.assert_close(terms["deit"], alpha * expected)
    torch.testing.assert_close(distiller(batch, Outputs(answers)).logits, (one + two) / 2)


def test_deits_heads_learn_from_the_labels_and_from_the_teacher():
    distiller, teacher = build("deit")
    parts = {"ce": distiller.deployed.student[6], "deit": distiller.deployed.distillation_head}
    for name, head in parts.items():
        distiller.zero_grad()
        terms_of(distiller, teacher, batch_of(INDEX))[name].backward()
        reached = {other for other, part in parts.items() if part.weight.grad is not None and part.weight.grad.any()}
        assert reached == {name}
        assert head.bias.grad.any()
        assert distiller.deployed.student[0].weight.grad.any()


def test_a_mixed_image_has_both_labels_for_one_head_and_the_teachers_answer_for_the_other():
    distiller, teacher = build("deit")
    batch = batch_of(INDEX)
    mix = Mix(batch.label.roll(1), torch.linspace(0, 1, 12))
    terms, hard = (terms_of(distiller, teacher, part) for part in (batch._replace(mix=mix), batch))
    assert torch.equal(terms["deit"], hard["deit"])
    logits = distiller.deployed.student(batch.image)
    each = [F.cross_entropy(logits, label, reduction="none") for label in (batch.label, mix.label)]
    torch.testing.assert_close(terms["ce"], 0.5 * (mix.weight * each[0] + (1 - mix.weight) * each[1]).mean())
    assert main_label(batch._replace(mix=mix)).tolist() == [*mix.label[:6].tolist(), *batch.label[6:].tolist()]


def test_deits_deployed_network_is_rebuilt_from_its_recipe_and_exported():
    distiller, _ = build("deit")
    deployed, recipe = distiller.deployed.eval(), json.loads(json.dumps(distiller.loss.recipe))
    again = DeiT.rebuild(network(4), recipe).eval()
    again.load_state_dict(deployed.state_dict())
    image = torch.randn(3, 3, 12, 12)
    assert torch.equal(again(image), deployed(image))
    assert torch.equal(torch.export.export(copy.deepcopy(deployed), (image,)).module()(image), deployed(image))


def pair_of(stages: Stages, *features: torch.Tensor, logits: torch.Tensor | None = None, head=None) -> Pair:
    logits = torch.zeros(2, 5) if logits is None else logits
    student = Outputs(logits, {str(place): feature for place, feature in enumerate(features)})
    return Pair(student, Outputs(torch.zeros(2, 5)), None, stages, Stages(), head)


@pytest.mark.parametrize(
    ("method", "stages", "features", "words"),
    [
        ("deit", Stages(), (), "deit: the student ends in no linear layer over the classes"),
        ("deit", STAGES, (torch.zeros(2, 4, 3),), r"deit: 0 is \(2, 4, 3\) for two images, not one vector each"),
        ("deit", STAGES._replace(heads=("a", "b")), (torch.ones(2, 5), torch.zeros(2, 5)), "the mean of 0 and 1"),
        ("ofa", Stages(modules=("body",)), (), "no known stages to put exits on; name layers with --student-layers"),
        ("ofa", STAGES, (torch.zeros(2, 4),), r"layer '0': outputs \(2, 4\), and ofa puts its exits on maps"),
        (
            "ofa",
            STAGES._replace(tokens=True),
            (torch.zeros(2, 6, 3, 3),),
            "6 channels do not divide among the exits' 4",
        ),
    ],
)
def test_students_that_do_not_fit_are_refused_with_the_reason(method, stages, features, words):
    config = METHODS[method]()
    kind = loss_class(config)
    with pytest.raises(UserError, match=words):
        kind.layers(config, stages, None)
        kind(config, pair_of(stages, *features))


def test_ofa_puts_an_exit_on_each_stage_and_adds_their_losses():
    distiller, teacher = build("ofa", exponent=1.5, weight=2.0, exit_weight=0.5)
    batch, loss = batch_of(INDEX), distiller.loss.eval()
    assert len(loss.exits) == 2
    answers = teacher(batch.image).logits
    maps = {layer: distiller.student[: int(layer) + 1](batch.image) for layer in ("0", "2")}
    logits = distiller.student(batch.image)
    exits = [part(feature) for part, feature in zip(loss.exits, maps.values())]
    terms = terms_of(distiller, teacher, batch)
    torch.testing.assert_close(terms["ofa"], 2 * ofa_loss(logits, answers, batch.label, 1.5))
    torch.testing.assert_close(terms["exits"], 0.5 * sum(ofa_loss(z, answers, batch.label, 1.5) for z in exits))
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, batch.label))
    assert distiller.deployed.state_dict().keys() == network(4).state_dict().keys(), "exits are not deployed"


def test_exits_have_the_authors_shapes():
    """A 64-channel first map of four, a 384-wide transformer as teacher: three halvings, then 384 channels."""
    widths = [layer.out_channels for layer in map_exit(64, 384, 3, 10) if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 64, 64, 128, 128, 128, 128, 256, 256, 256, 256, 384]
    assert [layer.out_channels for layer in map_exit(512, 768, 0, 10) if isinstance(layer, nn.Conv2d)] == [768]
    kinds = [type(layer).__name__ for layer in token_exit(torch.Size((2, 192, 14, 14)), 192, 3, 10)]
    assert kinds == ["Merge", "GELU", "ToTokens", "Block", "Block", "Block", "MeanToken", "Linear"]
    kinds = [type(layer).__name__ for layer in token_exit(torch.Size((2, 96, 28, 28)), 768, 0, 10)]
    assert kinds == ["Merge", "GELU", "Merge", "ToTokens", "Block", "MeanToken", "Linear"]
    for exit_head in (token_exit(torch.Size((2, 8, 2, 2)), 12, 1, 5), map_exit(8, 12, 2, 5)):
        assert exit_head(torch.randn(3, 8, 2, 2)).shape == (3, 5)


def test_a_merge_puts_four_neighbours_side_by_side():
    merge = Merge(1, 4)
    merge.norm = nn.Identity()
    merge.reduction.weight.data = torch.eye(4)
    merged = merge(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert merged[0, :, 0, 1].tolist() == [2, 3, 6, 7]
