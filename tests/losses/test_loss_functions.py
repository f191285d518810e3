"""Every loss function: agrees with a naive loop, has its identity for equal networks, is finite for huge inputs."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd import losses
from kd.errors import UserError
from kd.losses.features import check_batches
from tests import naive
from tests.pairs import build


class Case(NamedTuple):
    function: Callable
    naive: Callable
    inputs: str  # a key of SHAPES
    extra: tuple = ()
    at_equal: float | None = 0.0  # value for equal networks
    repeats: bool = True  # a repeated batch gives the same value


B, K = 6, 7
LABELS = torch.arange(B) % K
QUEUE = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double())
CASES = {
    "mimic": Case(losses.mimic_loss, naive.mimic, "logits"),
    "dkd": Case(losses.dkd_loss, naive.dkd, "logits", (LABELS, 1.5, 8.0, 3.0)),
    "dist": Case(losses.dist_loss, naive.dist, "logits", (1.0, 2.0, 4.0)),
    "nkd": Case(losses.nkd_loss, naive.nkd, "logits", (LABELS, 3.5, 3.0), None),
    "wttm": Case(losses.wttm_loss, naive.wttm, "logits", (0.3, True), None),
    "rld": Case(losses.rld_loss, naive.rld, "logits", (LABELS, 1.5, 8.0, 3.0, 2.0), None),
    "pld": Case(losses.pld_loss, naive.pld, "logits", (LABELS, 4.0), None),
    "skd": Case(losses.skd_loss, naive.skd, "logits", (0.1,), repeats=False),
    "tfkd": Case(
        lambda s, t, *rest: losses.tfkd_loss(s, *rest),
        lambda s, t, *rest: naive.tfkd(s, *rest),
        "logits",
        (LABELS, 0.9, 20.0),
        None,
    ),
    "at": Case(losses.attention_transfer_loss, naive.at, "maps"),
    "sp": Case(losses.similarity_preserving_loss, naive.sp, "maps", repeats=False),
    "nst": Case(losses.nst_loss, naive.nst, "maps"),
    "hint": Case(losses.hint_loss, lambda s, t: ((s - t) ** 2).mean().item(), "same maps"),
    "vid": Case(losses.vid_loss, naive.vid, "same maps", (torch.tensor([0.5, 1.0, 2.0]).double(),), None),
    "hierarchical": Case(losses.hierarchical_context_loss, lambda s, t: naive_levels(s, t), "same maps"),
    "pkt": Case(losses.pkt_loss, naive.pkt, "embeddings", repeats=False),
    "rkd": Case(losses.rkd_loss, naive.rkd, "embeddings", (25.0, 50.0), repeats=False),
    "cc": Case(losses.correlation_congruence_loss, naive.correlation_congruence, "embeddings"),
    "queue": Case(losses.embedding_queue_loss, naive.embedding_queue, "same embeddings", (QUEUE, 0.07)),
    "cosine": Case(losses.cosine_embedding_loss, lambda s, t: 1 - F.cosine_similarity(s, t).mean().item(), "same maps"),
    "mse": Case(losses.mse_embedding_loss, lambda s, t: ((s - t) ** 2).mean().item(), "same embeddings"),
    "neighbours": Case(
        losses.neighbour_product_loss,
        lambda s, t: (
            sum(((s[i] - t[i]).abs() * (s[i + 1] - t[i + 1]).abs()).sum().item() for i in range(B - 1)) / (B - 1)
        ),
        "same embeddings",
        repeats=False,
    ),
}
SHAPES = {
    "logits": ((K,), (K,)),
    "maps": ((3, 5, 5), (4, 5, 5)),
    "same maps": ((3, 5, 5), (3, 5, 5)),
    "embeddings": ((4,), (9,)),
    "same embeddings": ((4,), (4,)),
}


def naive_levels(student: Tensor, teacher: Tensor) -> float:
    """For 5 x 5 maps: the maps, and pools to 4 x 4, 2 x 2 and 1 x 1, with weights 1, 1/2, 1/4 and 1/8."""
    total = ((student - teacher) ** 2).mean().item()
    for side, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        edges = [(i * 5 // side, -(-(i + 1) * 5 // side)) for i in range(side)]
        cells = [(student - teacher)[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in edges]
        total += weight * (torch.stack(cells) ** 2).mean().item()
    return total / 1.875


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, *shape).double() for shape in SHAPES[case.inputs])


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_agrees_with_a_naive_loop(case):
    student, teacher = inputs(case)
    expected = case.naive(student, teacher, *case.extra)
    assert case.function(student, teacher, *case.extra).item() == pytest.approx(expected, rel=1e-5)


def test_equal_networks_give_the_identity(case):
    if case.at_equal is not None:
        student, _ = inputs(case)
        assert case.function(student, student.clone(), *case.extra).item() == pytest.approx(
            case.at_equal, abs=2e-4
        )  # dist's eps


def test_repeating_the_batch_changes_nothing_if_samples_are_independent(case):
    if case.repeats:
        student, teacher = inputs(case)
        extra = [torch.cat([part, part]) if part is LABELS else part for part in case.extra]
        twice = case.function(torch.cat([student, student]), torch.cat([teacher, teacher]), *extra)
        torch.testing.assert_close(twice, case.function(student, teacher, *case.extra), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_finite_for_huge_and_for_constant_outputs(case, scale):
    student, teacher = (scale * part.float().sign() for part in inputs(case))
    student.requires_grad_()
    extra = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in case.extra]
    value = case.function(student, teacher, *extra)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_dkds_two_terms_recombine_to_kd():
    """kd is TCKD + (1 - p(label)) * NCKD with the teacher's p; one sample has one such weight."""
    student, teacher = torch.randn(1, K).double(), torch.randn(1, K).double()
    label = torch.tensor([3])
    doubt = 1 - (teacher / 4).softmax(1)[0, 3].item()
    whole = losses.dkd_loss(student, teacher, label, 1.0, doubt, 4.0)
    torch.testing.assert_close(whole, losses.kd_loss(student, teacher, 4.0))


def test_dkd_of_two_classes_is_kd():
    student, teacher = torch.randn(5, 2), torch.randn(5, 2)
    dkd = losses.dkd_loss(student, teacher, torch.arange(5) % 2, 1.0, 8.0, 4.0)
    torch.testing.assert_close(dkd, losses.kd_loss(student, teacher, 4.0))


def test_standardized_logits_have_mean_0_and_deviation_1_and_forget_scale_and_offset():
    logits = torch.randn(4, 9).double()
    z = losses.standardize(logits)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double())
    torch.testing.assert_close(z.std(1), torch.ones(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.standardize(5 * logits - 3), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["standardized", "dist"])
def test_a_classifier_that_starts_at_zero_gets_no_gradient_of_millions(loss):
    """All its logits are equal, and the quotient by their deviation would be the gradient's size."""
    flat, teacher = torch.zeros(6, 9, requires_grad=True), torch.randn(6, 9)
    if loss == "dist":
        losses.dist_loss(flat, teacher, 1.0, 1.0, 4.0).backward()
    else:
        losses.kd_loss(losses.standardize(flat), losses.standardize(teacher), 2.0).backward()
    assert 0 < flat.grad.abs().max() < 10, "it has to leave zero"
    small = torch.full((6, 9), 1e-3) * torch.randn(6, 9)
    assert losses.standardize(small).std(1).min() > 0.9


def test_standardized_logits_of_two_classes_teach_nothing():
    """Why setup refuses them: a gradient that is rounding alone."""
    student = torch.tensor([[1.0, -1.0], [0.5, 2.0], [3.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0], [4.0, 1.0], [-1.0, 0.0]])
    losses.kd_loss(losses.standardize(student), losses.standardize(teacher), 2.0).backward()
    assert student.grad.abs().max() < 1e-4


def test_the_contrastive_loss_agrees_with_a_naive_loop_and_does_not_overflow():
    scores, normalizer = torch.randn(4, 6).double(), torch.tensor(2.5).double()
    value = losses.contrastive_loss(scores, normalizer, 50)
    assert value.item() == pytest.approx(naive.contrastive(scores, normalizer, 50), rel=1e-10)
    assert torch.isfinite(losses.contrastive_loss(1e4 * scores.float(), normalizer.float(), 50))


def test_the_papers_correlation_depends_on_no_order_and_the_codes_does():
    student, teacher = inputs(CASES["neighbours"])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    congruence, product = losses.correlation_congruence_loss, losses.neighbour_product_loss
    torch.testing.assert_close(congruence(student[order], teacher[order]), congruence(student, teacher))
    assert not torch.isclose(product(student[order], teacher[order]), product(student, teacher))


def test_one_image_has_no_neighbours():
    """The mean over none would be no number: an accumulated batch may have parts of one image."""
    one = torch.randn(1, 4, requires_grad=True)
    losses.neighbour_product_loss(one, torch.randn(1, 4)).backward()
    assert not one.grad.any()


def test_features_of_another_batch_are_refused():
    """Without the tests' checks of shapes, one sample would be compared with all."""
    with pytest.raises(ValueError, match="features of 8 samples of the student and 1 of the teacher"):
        check_batches(torch.ones(8, 3), torch.ones(1, 3))
    maps, embeddings = (torch.ones(8, 3, 2, 2), torch.ones(1, 3, 2, 2)), (torch.ones(8, 3), torch.ones(1, 3))
    both = (losses.similarity_preserving_loss, losses.attention_transfer_loss, losses.nst_loss)
    calls = [(loss, maps) for loss in both]
    calls += [(loss, embeddings) for loss in (losses.pkt_loss, losses.neighbour_product_loss)]
    calls += [(losses.correlation_congruence_loss, embeddings), (losses.cosine_embedding_loss, embeddings)]
    calls += [(losses.rkd_loss, (*embeddings, 1.0, 1.0)), (losses.mse_embedding_loss, embeddings)]
    calls += [(losses.embedding_queue_loss, (*embeddings, torch.ones(5, 3), 1.0))]
    for loss, arguments in calls:
        with pytest.raises(ValueError, match="give the same batch"):
            inspect.unwrap(loss)(*arguments)


def test_crd_keeps_one_bank_row_an_image():
    with pytest.raises(UserError, match="crd: --balance sampler may draw an image twice in a batch"):
        build("crd", balance="sampler")


def test_mimic_is_blind_to_offsets():
    logits = torch.randn(4, 10)
    assert losses.mimic_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-10)
