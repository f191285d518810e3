"""Flags of the views beside crop and random flip: colours, blur, flips, crops, mixing switched off at the end."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from kd.config import DataConfig, ViewConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.data import augment, draws, load_data, policies
from kd.data.loader import Batches, TrainingImages
from kd.errors import UserError
from kd.runs.folder import without_newer_defaults
from kd.teachers.cache import LogitStore
from kd.utils.operators import define_operators
from tests.conftest import ROOT
from tests.data.test_policies import pictures

define_operators()  # before torchvision is imported
from torchvision.transforms.v2 import functional  # noqa: E402

INDEX = torch.arange(64)
STILL = {"crop_padding": 0, "flip": False}


def drawn_view(config: ViewConfig, images: torch.Tensor, index: torch.Tensor, number: int = 0) -> torch.Tensor:
    size = tuple(images.shape[2:])
    return augment.augment(config, images, draws.draw(config, draws.Sizes(size, size), index, 0, number), size)


def view(images: torch.Tensor, number: int = 0, **flags) -> torch.Tensor:
    config = ViewConfig(**(STILL | flags))
    config.check()
    return drawn_view(config, images, INDEX[: len(images)], number)


@pytest.mark.parametrize("share", [-0.5, -0.31, 0.0, 0.07, 0.25, 0.5])
def test_a_turned_hue_is_torchvisions(share):
    images = pictures(8)
    turned = augment.turn_hue(images, torch.full((8,), share))
    assert (turned.int() - functional.adjust_hue(images, share).int()).abs().max() <= 1
    if share == 0:
        assert torch.equal(turned, images)


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (64, 7), (100, 11)])
def test_a_blur_is_torchvisions_over_a_tenth_of_the_side(side, kernel):
    images, sigmas = pictures(5, (side, side)), torch.tensor([0.1, 0.4, 1.0, 1.5, 2.0])
    blurred = augment.blur(images, *[draws.blur_weights(sigmas, side)] * 2)
    for image, sigma, result in zip(images, sigmas.tolist(), blurred):
        wanted = functional.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
        assert (result.int() - wanted.int()).abs().max() <= 1
    wide = pictures(5, (20, 60))
    wanted = functional.gaussian_blur(wide[3], [7, 3], [1.5, 1.5])  # width first
    blurred = augment.blur(wide, *(draws.blur_weights(sigmas, length) for length in (60, 20)))
    assert (blurred[3].int() - wanted.int()).abs().max() <= 1


def test_grey_takes_its_share_and_torchvisions_levels():
    images = pictures(64)
    seen = view(images, grey=0.3)
    wanted = functional.rgb_to_grayscale(images, num_output_channels=3)
    changed = (seen != images).flatten(1).any(1)
    assert 8 <= changed.sum() <= 32
    assert (seen[changed].int() - wanted[changed].int()).abs().max() <= 1
    assert (seen[changed] == seen[changed][:, :1]).all()


def test_a_vertical_flip_turns_half_of_the_images():
    images = pictures(64)
    seen = view(images, vertical_flip=True)
    turned = (seen == images.flip(2)).flatten(1).all(1)
    assert ((seen == images).flatten(1).all(1) | turned).all()
    assert 20 <= turned.sum() <= 44


def test_consecutive_epochs_of_an_alternating_flip_show_each_image_both_ways():
    config = ViewConfig(alternating_flip=True)
    first, second, third = (draws.draw_crop_flip(config, 0, number, torch.arange(1000)).flip for number in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 400 < first.sum() < 600
    assert not torch.equal(first, draws.draw_crop_flip(config, 1, 0, torch.arange(1000)).flip)


def test_boxes_keep_to_the_ratios_and_shares_asked_for():
    config = ViewConfig(resized_crop=0.2, resized_crop_max=0.4, crop_ratio=(0.5, 0.8))
    box = draws.draw_boxes(config, (200, 200), torch.arange(2000), 0, 0)
    share, ratio = box.height * box.width / 200**2, box.width / box.height
    assert 0.195 < share.min() < 0.21
    assert 0.39 < share.max() < 0.41
    assert 0.49 < ratio.min() < 0.51
    assert 0.79 < ratio.max() < 0.81


ALL = {"policy": "rand", "hue": 0.1, "grey": 0.3, "blur": 0.5, "vertical_flip": True, "colour_jitter": 0.4}


def test_a_sample_alone_is_what_it_is_in_a_batch():
    images = pictures(40)
    config = ViewConfig(resized_crop=0.3, **ALL)
    together = drawn_view(config, images, INDEX[:40], 3)
    assert not torch.equal(together, drawn_view(config, images, INDEX[:40], 4))
    for row in range(40):
        part = slice(row, row + 1)
        alone = drawn_view(config, images[part], INDEX[part], 3)
        assert torch.equal(alone[0], together[row])


class Calls(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["trivial", "rand", "augmix"])
def test_on_a_gpu_the_host_waits_for_nothing(policy, monkeypatch):
    """The operators of a GPU's way through the views, none of which needs a value on the host."""
    config, images = ViewConfig(resized_crop=0.3, **(ALL | {"policy": policy})), pictures(8)
    monkeypatch.setattr(policies, "_by_rows", lambda images: False)
    drawn_view(config, images, INDEX[:8])  # tables are copied to the device once
    with Calls() as calls:
        drawn_view(config, images, INDEX[:8], 1)
    assert not calls.names & {"nonzero", "_local_scalar_dense", "index_put_", "lift_fresh", "masked_select"}
    assert "grid_sampler_2d" in calls.names


COMPILED = """
import functools, sys, warnings
import torch, torch._dynamo.testing
from kd.config import DataConfig, ViewConfig
from kd.data import load_data
from kd.data.loader import TrainingImages
warnings.simplefilter("error")
data, cpu = load_data(DataConfig(source="synthetic")), torch.device("cpu")
real, index = torch.compile, [torch.arange(start, start + 10) for start in range(0, 100, 10)]
for flags, graphs in (({}, 1), ({"vertical_flip": True, "mixup": 0.2, "erase": 0.3}, 1), ({"colour_jitter": 0.3}, 0)):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compile = functools.partial(real, backend=counter)
    compiled, eager = (TrainingImages(data, ViewConfig(**flags), 0, cpu, 3, compiled=how) for how in (True, False))
    for number in range(3):
        for one, other in zip(compiled.augmented(index, number), eager.augmented(index, number), strict=True):
            assert torch.equal(one.image, other.image)
    assert counter.frame_count == graphs, (flags, counter.frame_count)
    torch._dynamo.reset()
"""


@pytest.mark.slow
def test_compiled_views_are_one_graph_for_all_epochs_with_the_same_bits():
    """In a process of its own: torch.compile cannot trace the shape checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_policies_come_after_crop_and_flip_and_before_colours(monkeypatch):
    order = []
    for name in ("crop_and_flip", "apply_policy", "jitter", "turn_hue", "blur"):
        real = getattr(augment, name)

        def noted(*args, name=name, real=real):
            order.append(name)
            return real(*args)

        monkeypatch.setattr(augment, name, noted)
    view(pictures(40), **ALL)
    assert order == ["crop_and_flip", "apply_policy", "jitter", "turn_hue", "blur"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policy-ops", "3"], "--policy-ops 3: only --policy rand takes it"),
        (["--policy", "trivial", "--policy-magnitude", "3"], "only --policy rand and augmix take it"),
        (["--policy", "augmix", "--policy-magnitude", "0"], "give 1 to 10"),
        (["--policy", "rand", "--policy-magnitude", "31"], "give 0 to 30"),
        (["--policy", "rand", "--policy-ops", "0"], "give 1 to 20"),
        (["--hue", "0.6"], "--hue 0.6: give a share of the colour circle"),
        (["--grey", "2"], "--grey 2.0: give a share from 0 to 1"),
        (["--blur", "nan"], "--blur nan"),
        (["--alternating-flip", "--no-flip"], "--alternating-flip: leave --no-flip out"),
        (["--crop-ratio", "0.5", "2"], "--crop-ratio: needs --resized-crop"),
        (["--resized-crop", "0.1", "--crop-ratio", "2", "0.5"], "the smaller first"),
        (["--resized-crop-max", "0.5"], "--resized-crop-max: needs --resized-crop"),
        (["--resized-crop", "0.5", "--resized-crop-max", "0.2"], "--resized-crop-max 0.2: give a share from"),
        (["--mix-off-epochs", "3"], "--mix-off-epochs 3: needs --mixup or --cutmix"),
        (["--mixup", "1", "--mix-off-epochs", "10"], "--mix-off-epochs 10: give fewer than the 10 of --epochs"),
    ],
)
def test_flags_out_of_range_or_without_effect_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse(train_defaults, "", flags)


def test_flags_parse():
    flags = ["--policy", "rand", "--policy-ops", "3", "--policy-magnitude", "12", "--resized-crop", "0.1"]
    views = parse(train_defaults, "", [*flags, "--crop-ratio", "0.5", "2", "--resized-crop-max", "0.9"]).views
    assert draws.policy_of(views) == ("rand", 3, 12)
    assert (views.crop_ratio, views.resized_crop_max) == ((0.5, 2.0), 0.9)


def test_defaults_of_new_flags_are_not_in_an_identity():
    old = {"crop_padding", "flip", "mixup", "cutmix", "erase", "count", "view_seed"}
    assert set(without_newer_defaults(vars(ViewConfig()))) == old


# Mixing switched off in the last epochs


def mixed_in(batches: Batches, epochs: int) -> list[tuple[int, bool]]:
    """The view number of each epoch, and whether it is mixed."""
    first = [next(batches.epoch(epoch)) for epoch in range(epochs)]
    return [(int(batch.view), batch.mix is not None) for batch in first]


def batches_of(*args: str) -> Batches:
    job = parse(train_defaults, "", ["--data", "synthetic", "--batch-size", "100", *args]).job()
    return Batches(load_data(DataConfig(source="synthetic")), job, Accelerator(cpu=True))


OFF = ["--mixup", "1", "--mix-off-epochs", "3", "--epochs", "6"]


def test_the_last_epochs_are_not_mixed():
    assert mixed_in(batches_of(*OFF), 6) == [(epoch, epoch < 3) for epoch in range(6)]


def test_with_views_the_unmixed_ones_have_numbers_of_their_own():
    """Else a cached teacher would give its logits of the mixed image."""
    assert mixed_in(batches_of(*OFF, "--views", "2"), 6) == [
        *[(0, True), (1, True), (0, True)],
        *[(2, False), (3, False), (2, False)],
    ]
    assert mixed_in(batches_of(*OFF, "--views", "5"), 6)[3:] == [(5, False), (6, False), (7, False)]


@pytest.mark.parametrize(("views", "off", "stored"), [(2, 0, 2), (2, 3, 4), (5, 3, 8)])
def test_a_cache_has_the_unmixed_views_too(views, off, stored, tmp_path):
    config = ViewConfig(mixup=1.0, count=views, mix_off_epochs=off)
    identity = {"views": without_newer_defaults(vars(config)), "rows": 10, "classes": 3, "top_k": None}
    assert LogitStore(tmp_path, identity).shapes["logits"] == (stored, 10, 3)
    numbers = {config.number(epoch, 20) for epoch in range(20)}
    assert numbers == set(range(stored))


def test_the_recipes_teacher_leaves_mixing_out_in_its_last_epochs_too():
    config = parse(distill_defaults, "", [*OFF, "--views", "2"])
    assert config.teacher_job().views == ViewConfig(mixup=1.0, mix_off_epochs=3)


def test_the_pixels_of_a_compiled_training_are_gone_with_it():
    """A compiled method of its own would keep them on the GPU until Python collects cycles."""
    images = TrainingImages(load_data(DataConfig("synthetic")), ViewConfig(), 0, torch.device("cpu"), compiled=True)
    alive = weakref.ref(images)
    gc.disable()
    try:
        del images
        assert alive() is None
    finally:
        gc.enable()
