"""What each flag of a method does to its terms: at other values than the defaults, against the loss functions."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import losses
from kd.config import METHODS
from kd.config.methods import FeatureFlags
from kd.losses import DistillationLoss
from kd.types import Mix
from tests.pairs import batch_of, build

ROWS = torch.tensor([3, 17, 8, 30, 21, 5])


class Seen(NamedTuple):
    """What a method sees of one batch."""

    loss: DistillationLoss
    student: Tensor  # logits
    teacher: Tensor
    label: Tensor
    maps: list[tuple[Tensor, Tensor]]  # (student's, teacher's), or the student's alone
    strong: tuple[Tensor | None, Tensor | None]  # logits of the strong view
    image: Tensor

    @property
    def ce(self) -> Tensor:
        return F.cross_entropy(self.student, self.label)

    @property
    def kd(self) -> Tensor:
        """The term of the flags FEATURE."""
        return 0.5 * losses.kd_loss(self.student, self.teacher, 2.0)


class Case(NamedTuple):
    flags: dict
    terms: Callable[[Seen], dict[str, Tensor]]


FEATURE = {"kd_weight": 0.5, "kd_temperature": 2.0}


def feature(name: str, term: Callable[[Seen], Tensor], weight: float = 7.0, **flags) -> Case:
    """A method of features with its own weight and kd's term beside it."""
    return Case({**FEATURE, "weight": weight, **flags}, lambda z: {"ce": z.ce, "kd": z.kd, name: weight * term(z)})


def over_maps(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Seen], Tensor]:
    return lambda z: sum(function(*maps) for maps in z.maps)


def vid(z: Seen) -> Tensor:
    parts = zip(z.loss.predictors, z.maps)
    return sum(losses.vid_loss(part.mean(s), t, torch.full((t.shape[1],), 2.0)) for part, (s, t) in parts)


def rkd(z: Seen) -> Tensor:
    ((student, teacher),) = z.maps
    return losses.rkd_loss(student.flatten(1), teacher.flatten(1), 3.0, 5.0)


def neighbours(z: Seen) -> Tensor:
    ((student, teacher),) = z.maps
    ours, theirs = z.loss.embed
    return losses.neighbour_product_loss(ours(student.flatten(1)), theirs(teacher.flatten(1)))


def crld(z: Seen) -> dict[str, Tensor]:
    terms = losses.crld_loss(z.student, z.strong[0], z.teacher, z.strong[1], 3.0, 0.3, 0.25)
    ce = z.ce + F.cross_entropy(z.strong[0], z.label)
    return {"ce": 0.3 * ce, "within": 3 * terms["within"], "across": 0.7 * terms["across"]}


def mlkd(z: Seen) -> dict[str, Tensor]:
    terms = losses.mlkd_loss(z.student, z.strong[0], z.teacher, z.strong[1], (2.0, 3.0), True, False)
    ce = z.ce + F.cross_entropy(z.strong[0], z.label)
    return {"ce": 0.3 * ce} | {name: 0.4 * term for name, term in terms.items()}


def apprentice(z: Seen) -> dict[str, Tensor]:
    teacher = z.loss.teacher(z.image)
    soft = -(teacher.softmax(1) * z.student.log_softmax(1)).sum(1).mean()
    return {"teacher_ce": 0.3 * F.cross_entropy(teacher, z.label), "ce": 0.7 * z.ce, "soft": 0.9 * soft}


def deit(z: Seen) -> dict[str, Tensor]:
    (first,), (second,) = z.maps
    return {"ce": 0.7 * F.cross_entropy(first, z.label), "deit": 0.3 * losses.kd_loss(second, z.teacher, 2.0)}


def ofa(z: Seen) -> dict[str, Tensor]:
    exits = [part(own) for part, (own,) in zip(z.loss.exits, z.maps)]
    loss = lambda logits: losses.ofa_loss(logits, z.teacher, z.label, 1.5, 2.0)  # noqa: E731
    return {"ce": z.ce, "ofa": 3 * loss(z.student), "exits": 0.5 * sum(map(loss, exits))}


def queue(z: Seen) -> dict[str, Tensor]:
    pushed = F.normalize(z.teacher)
    return {"embed": losses.embedding_queue_loss(z.loss.head(z.student), z.teacher, pushed, 0.2)}


def patches(z: Seen) -> dict[str, Tensor]:
    ((student, teacher),) = z.maps
    maps = losses.cosine_embedding_loss(z.loss.project(student), teacher)
    return {"embed": losses.mse_embedding_loss(z.loss.head(z.student), z.teacher), "patches": 0.5 * maps}


RAMP = 0.5  # of tests.pairs' two epochs, in the first

CASES = {
    "kd": Case(
        {"temperature": 3.0, "alpha": 0.4, "boost": 10.0, "direction": "reverse"},
        lambda z: {"ce": 0.6 * z.ce, "kd": 4 * losses.kd_loss(z.teacher, z.student, 3.0)},
    ),
    "mimic": Case(
        {"weight": 7.0, "label_weight": 0.3},
        lambda z: {"ce": 0.3 * z.ce, "mimic": 7 * losses.mimic_loss(z.student, z.teacher)},
    ),
    "dkd": Case(
        {"temperature": 3.0, "alpha": 1.5, "beta": 6.0},
        lambda z: {"ce": z.ce, "dkd": RAMP * losses.dkd_loss(z.student, z.teacher, z.label, 1.5, 6.0, 3.0)},
    ),
    "dist": Case(
        {"temperature": 3.0, "weight": 5.0, "beta": 1.5, "gamma": 0.7},
        lambda z: {"ce": z.ce, "dist": 5 * losses.dist_loss(z.student, z.teacher, 1.5, 0.7, 3.0)},
    ),
    "nkd": Case(
        {"temperature": 2.0, "gamma": 4.0},
        lambda z: {"ce": z.ce, "nkd": losses.nkd_loss(z.student, z.teacher, z.label, 4.0, 2.0)},
    ),
    "wttm": Case(
        {"exponent": 0.3, "weight": 5.0, "unweighted": True},
        lambda z: {"ce": z.ce, "wttm": 5 * losses.wttm_loss(z.student, z.teacher, 0.3, False)},
    ),
    "rld": Case(
        {"temperature": 3.0, "binary_temperature": 2.0, "alpha": 1.5, "beta": 6.0},
        lambda z: {"ce": z.ce, "rld": RAMP * losses.rld_loss(z.student, z.teacher, z.label, 1.5, 6.0, 3.0, 2.0)},
    ),
    "pld": Case({"temperature": 2.0}, lambda z: {"pld": losses.pld_loss(z.student, z.teacher, z.label, 2.0)}),
    "skd": Case(
        {"temperature": 3.0, "ce_weight": 0.3, "kd_weight": 2.0, "direction_weight": 5.0, "ridge": 0.2},
        lambda z: {
            "ce": 0.3 * z.ce,
            "kd": 2 * losses.kd_loss(z.student, z.teacher, 3.0) / 9,
            "skd": 5 * losses.skd_loss(z.student, z.teacher, 0.2),
        },
    ),
    "ctkd": Case(  # decay_epochs is of the gradient alone
        {"alpha": 0.4, "lowest_temperature": 2.0, "highest_temperature": 10.0, "decay_epochs": 3.0},
        lambda z: {
            "ce": 0.6 * z.ce,
            "ctkd": 0.4 * losses.kd_loss(z.student, z.teacher, 2 + 8 * torch.tensor(1.0).sigmoid()),
        },
    ),
    "mlkd": Case({"temperatures": (2.0, 3.0), "weight": 0.4, "ce_weight": 0.3, "as_in_paper": True}, mlkd),
    "crld": Case(
        {
            "temperature": 3.0,
            "within_weight": 3.0,
            "across_weight": 0.7,
            "weak_threshold": 0.3,
            "strong_threshold": 0.25,
            "ce_weight": 0.3,
        },
        crld,
    ),
    "tfkd": Case(
        {"temperature": 10.0, "alpha": 0.3, "correct": 0.9},
        lambda z: {"ce": 0.7 * z.ce, "tfkd": 0.3 * losses.tfkd_loss(z.student, z.label, 0.9, 10.0)},
    ),
    "apprentice": Case({"alpha": 0.3, "beta": 0.7, "gamma": 0.9}, apprentice),
    "fitnet": feature("fitnet", lambda z: losses.hint_loss(z.loss.regressor(z.maps[0][0]), z.maps[0][1]), hint_stage=1),
    "at": feature("at", over_maps(losses.attention_transfer_loss)),
    "sp": feature("sp", over_maps(losses.similarity_preserving_loss)),
    "nst": feature("nst", over_maps(losses.nst_loss)),
    "pkt": feature("pkt", over_maps(lambda s, t: losses.pkt_loss(s.flatten(1), t.flatten(1)))),
    "rkd": feature("rkd", rkd, distance_weight=3.0, angle_weight=5.0),
    "vid": feature("vid", vid, initial_variance=2.0),
    "cc": feature("cc", neighbours),
    "cc-paper": feature(
        "cc",
        over_maps(lambda s, t: losses.correlation_congruence_loss(s.flatten(1), t.flatten(1))),
        definition="paper",
        width=128,
    ),
    "deit": Case({"kind": "soft", "alpha": 0.3, "temperature": 2.0}, deit),
    "ofa": Case({"weight": 3.0, "exit_weight": 0.5, "exponent": 1.5, "temperature": 2.0}, ofa),
    "embed": Case({"temperature": 0.2}, queue),
    "embed-patches": Case({"form": "mse", "patches": 0.5, "queue": None}, patches),
}

ELSEWHERE = {  # flags that another test compares with a reference or with a naive loop
    "label_smoothing": "test_reference, test_labels_needed",
    "standardize": "test_logits",
    "student_layers": "test_distiller",
    "teacher_layers": "test_distiller",
    "ramp_epochs": "test_distiller",
    "partner": "tests/compress/test_quantize.py",
    "queue": "test_embed",
    "width": "test_reference_modules",
}
MODULES = ("crd", "reviewkd", "simkd")  # in test_reference_modules with weight 1; their weight is compared below


def terms_and_seen(method: str, mixed: bool = False, **flags) -> tuple[dict[str, Tensor], Seen]:
    distiller, teacher = build(method, **flags)
    distiller.train()
    for part in distiller.modules():  # one step must not change the next
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    batch = batch_of(ROWS, method=method)
    if mixed:
        batch = batch._replace(mix=Mix(batch.label.flip(0), torch.tensor([0.9, 0.2, 0.7, 0.4, 0.1, 0.6])))
    student = distiller.tap.of_batch(batch)
    with torch.no_grad():
        answers = teacher.of_batch(batch)
    terms = distiller.loss(student, answers, batch)
    ours, theirs = (tuple(outputs.features.values()) for outputs in (student, answers))
    maps = list(zip(ours, theirs)) if theirs else [(one,) for one in ours]
    strong = student.strong, answers.strong
    return terms, Seen(distiller.loss, student.logits, answers.logits, batch.label, maps, strong, batch.image)


@pytest.mark.parametrize("name", CASES)
def test_terms_are_the_loss_functions_with_the_flags(name):
    method = name.partition("-")[0]
    terms, seen = terms_and_seen(method, **CASES[name].flags)
    expected = CASES[name].terms(seen)
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value, rtol=1e-5, atol=1e-6, msg=lambda text, t=term: f"{t}: {text}")


@pytest.mark.parametrize("method", METHODS)
def test_no_flag_is_forgotten(method):
    """A case gives it another value than its default, or another test does."""
    given = [case.flags for name, case in CASES.items() if name.partition("-")[0] == method]
    for flag in fields(METHODS[method]):
        values = [flags[flag.name] for flags in given if flag.name in flags]
        left_out = method in ("none", *MODULES) or flag.name in ELSEWHERE
        assert left_out or any(value != flag.default for value in values), flag.name


def weighted_methods() -> list[str]:
    return [name for name, kind in METHODS.items() if "weight" in {field.name for field in fields(kind)}]


@pytest.mark.parametrize("method", weighted_methods())
def test_twice_the_weight_is_twice_the_term(method):
    once, twice = (terms_and_seen(method, weight=weight)[0] for weight in (1.5, 3.0))
    own = [name for name in once if name not in ("ce", "exits")]
    assert own
    for name in own:
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if issubclass(kind, FeatureFlags)])
def test_a_method_of_features_takes_kd_beside_it(method):
    terms, seen = terms_and_seen(method, **FEATURE)
    torch.testing.assert_close(terms["kd"], seen.kd)


def test_ofas_label_of_a_mixed_image_is_the_one_with_the_larger_share():
    terms, seen = terms_and_seen("ofa", mixed=True, exponent=1.5)
    main = torch.where(torch.tensor([False, True, False, True, True, False]), seen.label.flip(0), seen.label)
    torch.testing.assert_close(terms["ofa"], losses.ofa_loss(seen.student, seen.teacher, main, 1.5))
