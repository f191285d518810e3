"""On fake CUDA: no step makes the host wait, copies between host and GPU, or mixes them; launches are counted."""

import inspect
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from kd.config import METHODS, CacheConfig, NoneConfig, ViewConfig, named_method
from kd.config.methods import CRLDConfig, KDConfig, MethodFlags
from kd.data import draws
from kd.data.loader import TrainingImages
from kd.losses import DistillationLoss
from kd.teachers.cache import _query
from kd.training.evaluate import predict_logits
from kd.types import Batch, Outputs
from tests.fake_cuda import (
    CLASSES,
    COPY,
    DEVICE,
    HostWaits,
    Setting,
    batches,
    counting,
    fake_cuda,
    load_guard,
    training,
)

# Launches more than with torch 2.13 for CPUs, by which they were counted, that another version or build may need.
SPARE = 0 if torch.__version__.startswith("2.13.") and torch.version.cuda is None else 3


def launches_of_a_step(setting: Setting) -> int:
    """Launches of the first step without its teacher's and its backward pass. Raises where the host waits."""
    with training(setting) as (trainer, found):
        batch = next(found)
        with counting():
            answers = trainer.teacher and trainer.teacher(batch)
        trainer.teacher = trainer.teacher and (lambda batch: answers)
        with counting() as launches:
            trainer.step(batch)
    return sum(launches.values())


# Of resnet8 that learns from resnet14: its forward pass with the loss, the optimizer and the meter. A larger number
# needs a reason.
STEPS = {
    "none": 49,
    "kd": 91,
    "mimic": 78,
    "dkd": 130,
    "dist": 118,
    "nkd": 103,
    "wttm": 92,
    "rld": 138,
    "pld": 89,
    "skd": 119,
    "ctkd": 108,
    "mlkd": 377,
    "crld": 177,
    "fitnet": 79,
    "at": 118,
    "sp": 86,
    "nst": 133,
    "pkt": 96,
    "rkd": 99,
    "vid": 121,
    "cc": 81,
    "crd": 214,
    "reviewkd": 184,
    "simkd": 88,
    "deit": 83,
    "ofa": 181 if torch.version.cuda is None else 185,
    "embed": 91,
    "tfkd": 65,
    "apprentice": 101,
    "kd+at": 140,
    "simkd+at": 138,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_every_method_never_waits_and_launches_no_more(name):
    assert launches_of_a_step(Setting(named_method(name)())) <= STEPS[name] + SPARE


def test_every_method_has_its_number():
    assert set(METHODS) < set(STEPS)


# Of a batch in the middle of an epoch: with one view, and with a weak and a strong one. Most are crop and flip as well.
VIEWS = {
    "crop and flip": ({}, 8, 203),
    "no crop, no flip": ({"crop_padding": 0, "flip": False}, 3, 193),
    "alternating flip": ({"alternating_flip": True}, 8, 203),
    "vertical flip": ({"vertical_flip": True}, 9, 205),
    "repeated": ({"count": 2}, 8, 203),
    "resized crop": ({"resized_crop": 0.3}, 28, 243),
    "jitter": ({"colour_jitter": 0.4}, 33, 253),
    "resized crop, jitter": ({"resized_crop": 0.3, "colour_jitter": 0.4}, 53, 293),
    "hue": ({"hue": 0.1}, 36, 259),
    "grey": ({"grey": 0.2}, 16, 219),
    "blur": ({"blur": 0.5}, 22, 231),
    "mixup": ({"mixup": 0.2}, 11, 207),
    "cutmix": ({"cutmix": 1.0}, 18, 221),
    "mixup, cutmix": ({"mixup": 0.2, "cutmix": 1.0}, 20, 225),
    "erase": ({"erase": 0.25}, 16, 219),
    "mixup, cutmix, erase": ({"mixup": 0.2, "cutmix": 1.0, "erase": 0.25}, 28, 241),
    "trivial": ({"policy": "trivial"}, 98, 383),
    "rand": ({"policy": "rand"}, 188, 563),
    "augmix": ({"policy": "augmix"}, 287, 761),
}


@pytest.mark.parametrize("two_views", [False, True], ids=["one view", "two views"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_never_wait_and_launch_no_more(name, two_views):
    flags, *most = VIEWS[name]
    method = CRLDConfig() if two_views else NoneConfig()
    with batches(Setting(method, ViewConfig(**flags))) as found, counting() as launches:
        next(found)
    assert sum(launches.values()) <= most[two_views] + SPARE


def test_the_numbers_keep_to_the_budgets():
    """20 with crops and flips alone, 60 with anything but a policy."""
    assert max(VIEWS[name][1] for name in ("crop and flip", "alternating flip", "vertical flip", "repeated")) <= 20
    assert max(most for flags, most, _ in VIEWS.values() if "policy" not in flags) <= 60


@pytest.mark.parametrize("views", [ViewConfig(), ViewConfig(mixup=0.2, erase=0.2)], ids=["crop", "mixup"])
def test_of_images_on_the_host_the_pixels_alone_are_copied_batch_by_batch(views, monkeypatch):
    """Row numbers, labels and draws are there already; all copies are from pinned memory."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.dtype) or tensor)
    monkeypatch.setattr("kd.data.rows.DEVICE_SHARE", 0)
    with batches(Setting(views=views)) as found:
        assert sorted(map(str, pinned)) == ["torch.int64"] * 2 + ["torch.uint8"] * (1 + views.mixes)
        pinned.clear()
        with counting(may_copy=True) as launches:
            next(found)
    assert pinned == [torch.uint8] * launches[COPY]
    assert launches[COPY] == 1 + views.mixes


def test_what_is_drawn_for_many_batches_at_once_takes_few_launches():
    """Once in 16,384 images: one launch a step at batch 128, with every flag nine."""
    flags = {"resized_crop": 0.3, "colour_jitter": 0.4, "hue": 0.1, "grey": 0.2, "blur": 0.4, "policy": "rand"}
    for views, most in ((ViewConfig(), 107), (ViewConfig(mixup=0.2, cutmix=1.0, erase=0.2, **flags), 1101)):
        images = draws.Draws(views, draws.Sizes((32, 32), (32, 32)), 0, two_views=False)
        with fake_cuda():
            batch = [torch.zeros(128, dtype=torch.long, device=DEVICE)] * 128
            list(images.of_batches(batch[:1], 0, views.mixes))  # tables are there
            with counting() as launches:
                assert len(list(images.of_batches(batch, 0, views.mixes))) == 128
        assert sum(launches.values()) <= most + SPARE


@pytest.mark.parametrize("top_k", [None, 10])
@pytest.mark.parametrize("method", [KDConfig(), CRLDConfig()])
def test_answers_of_a_cached_teacher_are_looked_up_without_waiting(method, top_k):
    setting = Setting(method, ViewConfig(count=2), cached=CacheConfig(cache_teacher=True, cache_top_k=top_k))
    with training(setting) as (trainer, found):
        batch = next(found)
        with counting() as launches:
            answers = trainer.teacher(batch)
            trainer.step(batch)
    assert answers.logits.device == DEVICE
    assert (answers.strong is not None) == method.two_views
    assert launches["convolution"] <= 19  # the student's alone


MIXED = ViewConfig(mixup=0.2, cutmix=1.0)
FITS = {
    "two parts": Setting(KDConfig(), MIXED, {"accumulate": 2}),
    "two parts of two views": Setting(CRLDConfig(), fit={"accumulate": 2}),
    "average of the weights": Setting(KDConfig(), fit={"ema": 0.9}),
    "clipped": Setting(KDConfig(), fit={"clip_norm": 1.0}),
    "weighted classes": Setting(KDConfig(label_smoothing=0.1), MIXED, {"balance": "weights"}),
    "adjusted logits": Setting(KDConfig(), fit={"balance": "logit-adjust"}),
    "half precision": Setting(KDConfig(), fit={"mixed_precision": "bf16"}),
    "adamw": Setting(KDConfig(), fit={"optimizer": "adamw"}),
    "no decay of norms": Setting(KDConfig(), fit={"decay_norm_and_bias": False, "layer_decay": 0.8}),
    "features in half precision": Setting(named_method("at")(), fit={"mixed_precision": "bf16"}),
}


@pytest.mark.parametrize("name", FITS)
def test_a_step_never_waits_however_it_is_trained(name):
    with training(FITS[name]) as (trainer, found):
        trainer.step(next(found))
        with counting() as launches:
            trainer.step(next(found))
    assert launches["convolution"] >= 2 * 9


def test_the_average_of_the_weights_takes_a_launch_for_all_and_one_for_each_integer():
    with training(FITS["average of the weights"]) as (trainer, _), counting() as launches:
        trainer.average.update(1)
    integers = [tensor for tensor in trainer.average.weights.values() if not tensor.is_floating_point()]
    assert sum(launches.values()) <= 1 + len(integers)


def test_the_meter_takes_few_launches():
    with training(Setting(KDConfig())) as (trainer, found):
        batch = next(found)
        result = trainer.model(batch, trainer.teacher(batch))
        with counting() as launches:
            trainer.record(result, batch)
    assert sum(launches.values()) <= 8


def test_scoring_copies_nothing_batch_by_batch():
    """The split, its mean and its deviation are copied before the first batch, and nothing after it."""
    copies = []
    with training(Setting()) as (trainer, _):
        network, data = trainer.distiller.deployed, trainer.data
        for batch_size, batches_of_it in ((32, 2), (512, 1)):  # a GPU takes 256 at least
            with counting(may_copy=True) as launches:
                logits = predict_logits(network, data.val, data, trainer.accelerator, batch_size)
            assert launches["convolution"] == 9 * batches_of_it
            copies.append(launches[COPY])
    assert logits.device == DEVICE
    assert copies[0] == copies[1]


def test_a_cache_of_answers_is_built_on_the_gpu():
    """Rows are chosen, and answers stored, on the host; in between nothing mixes the devices."""
    with training(Setting(CRLDConfig(), ViewConfig(count=2))) as (trainer, _):
        images = TrainingImages(trainer.data, trainer.job.views, 0, DEVICE, two_views=True)
        (answers,) = _query(trainer.teacher, images, [torch.arange(16)], 1)
    assert answers.logits.device == answers.strong.device == DEVICE


@dataclass(frozen=True)
class ToyFlags(MethodFlags):
    """No flags."""

    fault: ClassVar[str]


class Toy(DistillationLoss):
    """A method without a fault, which those with one derive from."""

    config: ToyFlags
    has_cross_entropy = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"toy": self.term(student.logits, teacher.logits, batch)}

    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student - teacher).square().mean()


class ReadsAValue(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student - teacher).mean() / teacher.std().item()


class Decides(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student if student.sum() > 0 else teacher).mean()


class ChoosesByMask(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return student[teacher.argmax(dim=1) == batch.label].mean()


class SetsByMask(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        weights = torch.ones_like(teacher)
        weights[teacher > 0] = teacher[0, 0].expand(5)
        return (student * weights).mean()


class FindsRows(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return student[(batch.label == 0).nonzero()].sum()


class CountsClasses(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student * torch.bincount(batch.label, minlength=CLASSES)).mean()


class Copies(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student * torch.linspace(0, 1, CLASSES).to(student.device)).mean()


class CopiesAList(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student * torch.tensor([0.5] * CLASSES, device=student.device)).mean()


class TakesHome(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return student.cpu().mean().to(student.device)


class MixesDevices(Toy):
    def term(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return (student * torch.linspace(0, 1, CLASSES)).mean()


def step_of(loss: type[Toy]) -> int:
    return launches_of_a_step(Setting(named_method(f"{__name__}:{loss.__name__}")()))


def test_a_sound_method_of_ones_own_passes():
    assert step_of(Toy) > 40


@pytest.mark.parametrize(
    ("loss", "operation"),
    [
        (ReadsAValue, "_local_scalar_dense"),
        (Decides, "_local_scalar_dense"),
        (ChoosesByMask, "index by a boolean mask"),
        (SetsByMask, "index_put_ by a boolean mask"),
        (FindsRows, "nonzero"),
        (CountsClasses, "bincount"),
        (Copies, "_to_copy"),
        (CopiesAList, "_to_copy"),
        (TakesHome, "_to_copy"),
    ],
)
def test_a_method_that_makes_the_host_wait_is_found_with_its_line(loss, operation):
    lines, first = inspect.getsourcelines(loss)
    with pytest.raises(HostWaits, match=rf"^{operation} in tests/test_fake_cuda.py:(\d+)") as caught:
        step_of(loss)
    assert first < int(str(caught.value).partition("py:")[2].partition(":")[0]) < first + len(lines)


def test_a_method_that_mixes_host_and_gpu_is_found():
    with pytest.raises(RuntimeError, match=r"all tensors to be on the same device|two different devices"):
        step_of(MixesDevices)


def test_views_that_ask_which_rows_drew_an_operation_are_found(monkeypatch):
    with batches(Setting(views=ViewConfig(grey=0.2))) as found, counting():
        monkeypatch.setattr("kd.data.policies._by_rows", lambda images: True)
        with pytest.raises(HostWaits, match=r"^nonzero in kd/data/policies.py"):
            next(found)


def test_without_a_compiler_the_tests_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match=r"need a C\+\+ compiler, and there is no g\+\+"):
        load_guard.__wrapped__()
