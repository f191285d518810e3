"""Methods with weights of their own, and methods on standardised logits, against their authors' code.

The classes that train are compared, with the authors' weights copied in; reference_modules.json has the values. A file
with all samples' gradients is read too where it is at hand.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd.config import METHODS
from kd.losses import DistillationLoss, correlation_congruence_loss, loss_class
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages
from tests.conftest import ROOT

HERE, WHOLE = Path(__file__).parent / "reference_modules.json", ROOT.parent / "shared" / "reference_losses_2.json"
CASES = [
    pytest.param(case["inputs"], case["losses"][name], id=f"{path.stem}-seed{case['seed']}-{name}")
    for path in (HERE, WHOLE)
    if path.exists()
    for case in json.loads(path.read_text())["cases"]
    for name in json.loads(HERE.read_text())["cases"][0]["losses"]
    if name in case["losses"]
]
SAMPLES = 24  # in crd's banks


def cases(*names: str):
    return pytest.mark.parametrize(("inputs", "case"), [case for case in CASES if case.id.endswith(names)])


def tensors(inputs: dict, case: dict) -> list[Tensor]:
    """The case's inputs in float64, of which those of the student have gradients."""
    made = []
    for name in case["inputs"]:
        whole = name.endswith(("labels", "index"))
        tensor = torch.tensor(inputs[name], dtype=torch.long if whole else torch.double)
        made.append(tensor if whole else tensor.requires_grad_("teacher" not in name))
    return made


def batch_of(label: Tensor, index: Tensor | None = None) -> Batch:
    """In an epoch in which no ramp is left."""
    index = torch.arange(len(label)) if index is None else index
    return Batch(torch.zeros(len(label), 3, 8, 8), label, index, *[torch.tensor(50)] * 3)


def outputs_of(*features: Tensor) -> Outputs:
    logits = torch.zeros(len(features[0]), 10, dtype=torch.double)
    return Outputs(logits, {f"layer{place}": feature for place, feature in enumerate(features)})


def build(method: str, student: Outputs, teacher: Outputs, labels: Tensor | None = None, **flags) -> DistillationLoss:
    return loss_class(METHODS[method])(METHODS[method](**flags), Pair(student, teacher, labels)).double().train()


@torch.no_grad()
def copy_weights(target: nn.Module, weights: dict, names: dict[str, str] | None = None) -> None:
    """Give each tensor of `target` the weight of its name; `names`: parts of their names -> of ours."""
    given = {}
    for key, value in weights.items():
        for theirs, ours in (names or {}).items():
            key = key.replace(theirs, ours)
        given[key] = torch.tensor(value, dtype=torch.double)
    state = target.state_dict()
    assert given.keys() <= state.keys()
    left = {key for key in state.keys() - given.keys() if "running" not in key and "batches" not in key}
    assert not left, "a weight that the authors' code lacks"
    for key, value in given.items():
        state[key].copy_(value)


def check_gradient(got: Tensor, case: dict, name: str | None = None) -> None:
    """Against the first input's gradient, or the named one's; where some samples are left out, also the norm of all."""
    expected = torch.tensor(case["gradients"][name] if name else case["gradient"], dtype=torch.double)
    torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())
    if name is None and "gradient_norm" in case:
        assert got.norm().item() == pytest.approx(case["gradient_norm"], rel=1e-6)


def check_value(got: Tensor, case: dict) -> None:
    assert got.item() == pytest.approx(case["value"], rel=1e-6)
    got.backward()


@cases("tfkd_reg")
def test_tfkd_is_its_authors_regularisation_loss(inputs, case):
    logits, labels = tensors(inputs, case)
    params = case["params"]
    assert params["multiplier"] == logits.shape[1], "their mean over classes, times this, is our sum"
    flags = {key: params[key] for key in ("alpha", "temperature", "correct")}
    loss = build("tfkd", Outputs(logits), Outputs(logits), **flags)
    check_value(sum(loss(Outputs(logits), None, batch_of(labels)).values()), case)
    check_gradient(logits.grad, case)


@cases("dkd_standardized_b8_T2", "dist_standardized_T4")
def test_standardised_dkd_and_dist(inputs, case):
    student, teacher, *labels = tensors(inputs, case)
    label = labels[0] if labels else torch.arange(len(student))
    method = "dkd" if "alpha" in case["params"] else "dist"
    weight = {"weight": 1.0} if method == "dist" else {}
    loss = build(method, Outputs(student), Outputs(teacher), **case["params"], **weight)
    check_value(loss(Outputs(student), Outputs(teacher), batch_of(label))[method], case)
    check_gradient(student.grad, case)


@cases("cc_paper")
def test_correlation_congruence_as_in_the_paper(inputs, case):
    student, teacher = tensors(inputs, case)
    check_value(correlation_congruence_loss(student, teacher, **case["params"]), case)
    check_gradient(student.grad, case)


@cases("-vid")
def test_vid_with_the_authors_weights(inputs, case):
    student, teacher = map(outputs_of, tensors(inputs, case))
    loss = build("vid", student, teacher)
    names = {"regressor.0": "mean.0.weight", "regressor.2": "mean.2.weight", "regressor.4": "mean.4.weight"}
    copy_weights(loss.predictors[0], case["weights"], names | {"log_scale": "spread"})
    (student_map,) = student.features.values()
    check_value(loss(student, teacher, batch_of(torch.arange(4)))["vid"], case)
    check_gradient(student_map.grad, case)
    spread = torch.tensor(case["weight_gradients"]["log_scale"], dtype=torch.double)
    torch.testing.assert_close(loss.predictors[0].spread.grad, spread, rtol=1e-6, atol=1e-9)


class Fixed(nn.Module):
    """A layer that outputs this map, whatever it sees."""

    def __init__(self, feature_map: Tensor):
        super().__init__()
        self.feature_map = feature_map

    def forward(self, image: Tensor) -> Tensor:
        return self.feature_map


@cases("-simkd")
def test_simkds_deployed_network_with_the_authors_weights(inputs, case):
    student_map, teacher_map = tensors(inputs, case)
    teacher, head = outputs_of(teacher_map), nn.Linear(6, 10).double()
    copy_weights(head, {key: case["weights"][f"classifier.{key}"] for key in ("weight", "bias")})
    teacher = teacher._replace(logits=head(teacher_map.mean(dim=(2, 3))).detach())
    pooled = nn.Sequential(Fixed(student_map), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    known = Stages(("0",), "3", pooled="0")
    pair = Pair(Outputs(torch.zeros(4, 10), {"0": student_map}), teacher, None, known, known, head)
    loss = loss_class(METHODS["simkd"])(METHODS["simkd"](), pair)
    network = loss.deployed(pooled).double().train()
    weights = {key: value for key, value in case["weights"].items() if "classifier" not in key}
    copy_weights(network.projector, weights)
    outputs = Tap(network, loss.student_layers)(torch.zeros(4, 3, 8, 8))
    check_value(loss(outputs, teacher, batch_of(torch.arange(4)))["simkd"], case)
    check_gradient(student_map.grad, case)
    torch.testing.assert_close(outputs.logits.tolist(), case["outputs"]["logits"], rtol=1e-6, atol=1e-7)


@cases("-reviewkd")
def test_reviewkd_with_the_authors_weights(inputs, case):
    features = tensors(inputs, case)
    student, teacher = outputs_of(*features[:3]), outputs_of(*features[3:])
    loss = build("reviewkd", student, teacher, weight=1.0)
    copy_weights(loss.fusions, case["weights"], {"att_conv": "attention", "conv1": "narrow", "conv2": "out"})
    check_value(loss(student, teacher, batch_of(torch.arange(4)))["reviewkd"], case)
    check_gradient(features[0].grad, case)
    for name, feature in zip(case["inputs"][1:3], features[1:3], strict=True):
        check_gradient(feature.grad, case, name)


class Given(nn.Module):
    """In place of crd's own draw of negatives."""

    def __init__(self, negatives: Tensor):
        super().__init__()
        self.negatives = negatives

    def forward(self, batch: Batch) -> Tensor:
        return self.negatives


@cases("-crd")
def test_crds_first_step_with_the_authors_banks(inputs, case):
    student, teacher, index, pairs = tensors(inputs, case)
    assert torch.equal(pairs[:, 0], index)
    params, weights, labels = case["params"], case["weights"], torch.arange(SAMPLES) % 10
    flags = {"contrast_temperature": params["temperature"], "bank_momentum": params["momentum"]}
    loss = build("crd", outputs_of(student), outputs_of(teacher), labels, width=4, weight=1.0, **flags)
    loss.negatives = Given(pairs[:, 1:])
    copy_weights(
        loss.embed,
        {key: weights[key] for key in weights if "embed" in key},
        {"embed_s": "0.linear", "embed_t": "1.linear"},
    )
    loss.banks.copy_(torch.tensor([weights["memory_v1"], weights["memory_v2"]], dtype=torch.double))
    check_value(loss(outputs_of(student), outputs_of(teacher), batch_of(labels[index], index))["crd"], case)
    check_gradient(student.grad, case)
    after = case["outputs"]
    torch.testing.assert_close(loss.banks.tolist(), [after["memory_v1"], after["memory_v2"]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.normalizers.tolist(), after["Z"], rtol=1e-6, atol=0)


def test_no_case_is_left_out():
    tested = {case.id.rpartition("-")[2] for case in CASES}
    assert tested == {
        "tfkd_reg",
        "dkd_standardized_b8_T2",
        "dist_standardized_T4",
        "cc_paper",
        "vid",
        "simkd",
        "reviewkd",
        "crd",
    }
