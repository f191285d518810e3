"""Whole pairs of zoo networks against the authors' code: layers, loss and gradients, not formulas alone."""

import json
from pathlib import Path

import pytest
import torch

from tests import zoo_pairs

AUTHORS = json.loads((Path(__file__).parent / "authors_pairs.json").read_text())["pairs"]
ALWAYS = {
    "wrn-40-2 -> wrn-16-2": tuple(zoo_pairs.FLAGS),
    "resnet56 -> resnet20": tuple(zoo_pairs.FLAGS),
    "vgg13 -> mobilenetv2": ("sp", "simkd"),
    "resnet32x4 -> shufflenetv2": ("sp", "simkd"),
}
CASES = [
    pytest.param(pair, method, marks=() if method in ALWAYS.get(pair, ()) else pytest.mark.slow)
    for pair, methods in AUTHORS.items()
    for method in methods
]


@pytest.mark.parametrize(("pair", "method"), CASES)
def test_a_pair_agrees_with_the_authors_code_in_value_and_gradients(pair, method):
    teacher, student = pair.split(" -> ")
    built = zoo_pairs.build(method, student, teacher)
    outputs, term = built.step()
    ours = {"value": term.item(), **zoo_pairs.gradient_norms(built)}
    if method == "crd":
        student_bank, teacher_bank = built.loss.banks
        ours["banks"] = [student_bank.norm().item(), student_bank.sum().item(), teacher_bank.sum().item()]
        ours["normalizers"] = built.loss.normalizers.tolist()
    if method == "simkd":
        ours["logits"] = [outputs.logits.sum().item(), outputs.logits.norm().item()]
    theirs = AUTHORS[pair][method]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(
    ("method", "pair", "layers"),
    [
        ("at", "wrn-40-2 -> wrn-16-2", (("layer1", "layer2", "head"),) * 2),
        ("sp", "vgg13 -> mobilenetv2", (("head",), ("layer4",))),
        ("nst", "resnet32x4 -> shufflenetv2", (("layer1", "layer2", "head"), ("layer1", "layer2", "layer3"))),
        ("reviewkd", "resnet56 -> resnet20", (("layer1", "layer2", "layer3", "fc.input"),) * 2),
    ],
)
def test_another_layer_is_seen_in_the_value(method, pair, layers):
    """What these methods compared before: the pooled maps, and a teacher after its ReLU."""
    teacher, student = pair.split(" -> ")
    _, term = zoo_pairs.build(method, student, teacher, student_layers=layers[0], teacher_layers=layers[1]).step()
    assert term.item() != pytest.approx(AUTHORS[pair][method]["value"], rel=1e-3)


def test_the_students_logits_say_that_the_networks_are_built_as_they_were():
    """In case a later version of NumPy or torch computes something else: not a layer's fault, then."""
    logits = zoo_pairs.zoo_network("resnet20", zoo_pairs.STUDENT_SEED).double().train()(zoo_pairs.batch().image)
    written = json.loads((Path(__file__).parent / "authors_pairs.json").read_text())["resnet20 logits"]
    torch.testing.assert_close(logits[0].tolist(), written, rtol=1e-9, atol=1e-9)
