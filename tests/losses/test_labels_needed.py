"""Which methods need labels, and that those that do not never look at one."""

import pytest
import torch

from kd.config import METHODS, NoneConfig, named_method
from kd.config.methods import methods_without_labels
from kd.errors import UserError
from kd.training.setup import check_labels
from tests.pairs import LABELS, batch_of, build, terms_of

INDEX = torch.arange(12)
FREE = [
    ("kd", {"alpha": 1.0}),
    ("mimic", {"label_weight": 0.0}),
    ("skd", {"ce_weight": 0.0}),
    ("ctkd", {"alpha": 1.0}),
    ("mlkd", {"ce_weight": 0.0}),
    ("crld", {"ce_weight": 0.0}),
    ("simkd", {}),
    ("kd+at", {"kd_alpha": 1.0}),
    ("kd+dist+reviewkd", {"kd_alpha": 1.0}),
    ("mimic+simkd", {"mimic_label_weight": 0.0}),
]


def flags_of(method: str, flags: dict):
    return named_method(method)(**flags)


@pytest.mark.parametrize(("method", "flags"), FREE, ids=lambda value: str(value))
def test_a_method_without_labels_looks_at_none(method, flags):
    assert not flags_of(method, flags).uses_labels
    batch = batch_of(INDEX, method=method)
    found = {}
    for name, labels in (("without", torch.full_like(batch.label, -1)), ("poison", batch.label.flip(0))):
        distiller, teacher = build(method, labels=None, **flags)
        found[name] = terms_of(distiller, teacher, batch._replace(label=labels))
    assert "ce" not in found["without"]
    assert found["without"].keys() == found["poison"].keys()
    assert all(torch.equal(found["without"][name], found["poison"][name]) for name in found["without"])


@pytest.mark.parametrize(("method", "flags"), FREE, ids=lambda value: str(value))
def test_its_other_terms_are_those_of_labelled_data(method, flags):
    batch = batch_of(INDEX, method=method)
    terms, expected = (terms_of(*build(method, labels=labels, **flags), batch) for labels in (None, LABELS))
    labelled = {name: value for name, value in expected.items() if name != "ce"}
    assert terms.keys() == labelled.keys()
    assert all(torch.equal(terms[name], labelled[name]) for name in terms)


@pytest.mark.parametrize(("method", "flags"), FREE, ids=lambda value: str(value))
def test_nothing_is_measured_against_labels(method, flags):
    distiller, teacher = build(method, labels=None, **flags)
    batch = batch_of(INDEX, method=method)
    measured = distiller(batch, teacher.of_batch(batch)).measures
    assert "teacher_top1" not in measured
    assert {"agreement", "kl"} <= measured.keys()


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        *((name, {}) for name in METHODS if name not in ("simkd", "embed")),
        ("kd", {"alpha": 0.999}),
        ("at+kd", {"kd_alpha": 1.0}),  # its cross-entropy is at's
        ("kd+crd", {"kd_alpha": 1.0}),  # crd contrasts with other classes
        ("simkd+at", {}),
        ("kd+dkd", {"kd_alpha": 1.0}),
    ],
    ids=str,
)
def test_all_others_need_labels_and_say_who_does_not(method, flags):
    flags = flags_of(method, flags)
    assert flags.uses_labels
    with pytest.raises(UserError, match=r"trained by labels.*a method that needs none \(kd --alpha 1, mimic"):
        check_labels(flags, method, labelled=False)
    check_labels(flags, method, labelled=True)


def test_the_flags_that_are_advised_are_those_that_need_no_labels():
    for part in methods_without_labels().split(", "):
        name, *flags = part.split()
        values = {flag.removeprefix("--").replace("-", "_"): float(value) for flag, value in zip(*[iter(flags)] * 2)}
        assert not METHODS[name](**values).uses_labels, part
    with pytest.raises(UserError, match="a network alone is trained by labels"):
        check_labels(NoneConfig(), "teacher", labelled=False)


def test_weights_of_cross_entropy_may_not_be_negative():
    with pytest.raises(UserError, match=r"--label-weight -1.0: give 0 or more"):
        METHODS["mimic"](label_weight=-1.0).check()


def test_mimic_weighs_its_cross_entropy():
    batch = batch_of(INDEX, method="mimic")
    half, whole = (terms_of(*build("mimic", label_weight=weight), batch) for weight in (0.5, 1.0))
    torch.testing.assert_close(2 * half["ce"], whole["ce"])
    assert torch.equal(half["mimic"], whole["mimic"])
