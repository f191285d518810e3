"""The embedding loss: what its queue holds and when, which of it counts, and what the forms and the patches compare."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd import losses
from kd.config.methods import EmbedConfig
from kd.errors import UserError
from kd.losses.embed import Embed, queue_length
from kd.models import build_model, probe, stages
from kd.types import Batch, Outputs, Pair
from tests import naive

WIDTH_IN, WIDTH, ROWS = 6, 4, 300
NO_BATCH = Batch(*[None] * 6)


def method(**flags) -> Embed:
    torch.manual_seed(0)
    config = EmbedConfig(**flags)
    config.check()
    outputs = Outputs(torch.zeros(2, WIDTH_IN)), Outputs(torch.zeros(2, WIDTH))
    return Embed(config, Pair(*outputs, rows=ROWS))


def answers(seed: int, count: int = 5) -> tuple[Outputs, Outputs]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(Outputs(torch.randn(count, width, generator=draw)) for width in (WIDTH_IN, WIDTH))


def loss_of(part: Embed, student: Outputs, teacher: Outputs) -> Tensor:
    return part(student, teacher, NO_BATCH)["embed"]


@pytest.mark.parametrize(
    ("images", "length"),
    [
        *((1, 128), (100, 128), (255, 128), (256, 128), (511, 128), (512, 256), (1437, 512)),
        *((16_383, 4096), (16_384, 8192), (50_000, 8192), (1_281_167, 8192)),
    ],
)
def test_the_queue_holds_a_quarter_to_a_half_of_the_images(images, length):
    assert queue_length(images) == length
    if 256 <= images < 32_768:
        assert images / 4 < length <= images / 2


def test_the_default_length_is_by_the_number_of_images_and_a_given_one_stays():
    assert method().queue.shape == (128, WIDTH)
    assert method(queue=7).queue.shape == (7, WIDTH)


def test_a_batch_is_pushed_before_it_is_compared_and_the_oldest_fall_out():
    part = method(queue=12, temperature=1.0)  # at 0.07 zeros in place of what is not filled would hardly be seen
    for seed in range(3):
        student, teacher = answers(seed)
        loss = loss_of(part, student, teacher)
        pushed = [F.normalize(answers(step)[1].logits) for step in range(seed, -1, -1)]
        queue = torch.cat(pushed)[:12]
        torch.testing.assert_close(part.queue[: len(queue)], queue)
        expected = naive.embedding_queue(part.head(student.logits), teacher.logits, queue, 1.0)
        assert loss.item() == pytest.approx(expected, rel=1e-4), "places that are not filled do not count"
    assert int(part.pushed) == 15


def test_a_batch_larger_than_the_queue_is_refused():
    """Its last images would be compared with a queue that lacks their own embedding."""
    student, teacher = answers(0)
    with pytest.raises(UserError, match=f"a batch of {len(teacher.logits)} images does not fit the queue of 3"):
        loss_of(method(queue=3), student, teacher)


def test_scoring_pushes_nothing_and_an_empty_queue_gives_no_loss():
    part = method(queue=12).eval()
    assert loss_of(part, *answers(0)).item() == 0
    assert int(part.pushed) == 0
    loss_of(part.train(), *answers(0))
    before = part.queue.clone()
    assert loss_of(part.eval(), *answers(1)).item() > 0
    assert torch.equal(part.queue, before)


def test_the_queue_is_saved_with_the_weights():
    part = method(queue=12)
    loss_of(part, *answers(0))
    assert {"queue", "pushed", "head.weight", "head.bias"} <= part.state_dict().keys()


def test_an_accumulated_batch_pushes_each_part_and_its_gradients_stay_those_of_their_own_queue():
    part = method(queue=12)
    first, second = loss_of(part, *answers(0)), loss_of(part, *answers(1))
    (first + second).backward()
    together = part.head.weight.grad.clone()
    part = method(queue=12)
    for seed in range(2):
        loss_of(part, *answers(seed)).backward()
    torch.testing.assert_close(part.head.weight.grad, together)


def test_masked_places_are_as_if_they_were_not_there_and_their_gradient_is_finite():
    student, teacher, queue = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4), F.normalize(torch.randn(9, 4))
    filled = torch.arange(9) < 6
    masked = losses.embedding_queue_loss(student, teacher, queue, 0.07, filled)
    torch.testing.assert_close(masked, losses.embedding_queue_loss(student, teacher, queue[:6], 0.07))
    masked.backward()
    assert torch.isfinite(student.grad).all()
    assert losses.embedding_queue_loss(student, teacher, queue, 0.07, filled & False).item() == 0


def test_lengths_do_not_matter_to_the_queue_and_cosine_and_do_to_mse():
    student, teacher, queue = torch.randn(5, 4), torch.randn(5, 4), F.normalize(torch.randn(9, 4))
    for loss in (lambda s, t: losses.embedding_queue_loss(s, t, queue, 0.07), losses.cosine_embedding_loss):
        torch.testing.assert_close(loss(3 * student, 5 * teacher), loss(student, teacher))
    assert losses.mse_embedding_loss(3 * student, teacher) > losses.mse_embedding_loss(student, teacher)


def test_with_more_temperature_the_loss_is_the_smaller():
    student, teacher, queue = torch.randn(5, 4), torch.randn(5, 4), F.normalize(torch.randn(9, 4))
    sharp, soft = (losses.embedding_queue_loss(student, teacher, queue, value) for value in (0.07, 1.0))
    assert sharp > 5 * soft > 0


@pytest.mark.parametrize("form", ["queue", "cosine", "mse"])
def test_every_form_trains_head_and_student(form):
    part, (student, teacher) = method(form=form), answers(0)
    student.logits.requires_grad_()
    teacher.logits.requires_grad_()
    loss_of(part, student, Outputs(teacher.logits.detach())).backward()
    assert student.logits.grad.abs().sum() > 0
    assert part.head.weight.grad.abs().sum() > 0
    assert ("queue" in part.state_dict()) == (form == "queue")


def test_equal_embeddings_have_a_cosine_of_one():
    part, (student, _) = method(), answers(0)
    same = Outputs(part.head(student.logits).detach())
    assert part.measures(student, same, NO_BATCH)["cosine"].item() == pytest.approx(1)


def patched(**flags) -> tuple[Embed, Outputs, Outputs]:
    config, names = EmbedConfig(patches=0.5, **flags), ("resnet8", "resnet8x4")
    networks = [build_model(name, 0, (16, 16)) for name in names]
    found = [stages(name, network, 0) for name, network in zip(names, networks)]
    layers = Embed.layers(config, *found)
    assert Embed.layers(config, found[0], None) == (layers[0], ())
    outputs = [probe(network, (16, 16), name, layer) for name, network, layer in zip(names, networks, layers)]
    return Embed(config, Pair(*outputs, rows=ROWS)), *outputs


def test_patches_compare_the_last_maps_place_by_place():
    part, student, teacher = patched()
    assert part.project.weight.shape == (256, 64, 1, 1)
    terms = part(student, teacher, NO_BATCH)
    maps = part.project(student.features["layer3"]), teacher.features["layer3"]
    similar = [
        F.cosine_similarity(maps[0][image, :, row, column], maps[1][image, :, row, column], 0)
        for image in range(2)
        for row in range(4)
        for column in range(4)
    ]
    torch.testing.assert_close(terms["patches"], 0.5 * (1 - torch.stack(similar).mean()))


def test_patches_of_maps_of_two_sizes_are_pooled_to_the_smaller():
    part, student, teacher = patched(student_layers=("layer2",))
    assert student.features["layer2"].shape[2:] == (8, 8)
    smaller = part.project(F.avg_pool2d(student.features["layer2"], 2))
    expected = 0.5 * losses.cosine_embedding_loss(smaller, teacher.features["layer3"])
    torch.testing.assert_close(part(student, teacher, NO_BATCH)["patches"], expected)


def test_patches_without_a_map_are_refused():
    with pytest.raises(UserError, match=r"^--patches: the teacher's layer fc outputs .*, no map b x c x h x w"):
        patched(teacher_layers=("fc",))
    network = build_model("tests.networks:plain", 0, (16, 16))
    with pytest.raises(UserError, match=r"^--patches: the student's model has no known maps; .* --student-layers"):
        Embed.layers(EmbedConfig(patches=1.0), stages("tests.networks:plain", network, 0), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"form": "mse", "queue": 64}, "--form mse: has no queue"),
        ({"form": "cosine", "temperature": 0.1}, "--form cosine: has no queue"),
        ({"queue": 0}, "--queue 0: give 1 or more"),
        ({"temperature": 0.0}, "--temperature 0.0: give a number above 0"),
        ({"patches": -1.0}, "--patches -1.0: give 0 or more"),
        ({"student_layers": ("layer3",)}, "--student-layers layer3: names the map of --patches"),
    ],
)
def test_flags_that_change_nothing_or_are_out_of_range_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        EmbedConfig(**flags).check()
