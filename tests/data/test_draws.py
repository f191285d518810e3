"""Draws of many samples at once: each sample's own bits, in blocks of bounded size, the same as ever."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kd.config import ViewConfig
from kd.data import draws
from kd.data.draws import Draws, Sizes, strong_seed
from kd.data.policies import KERNELS

COLOURS = {"colour_jitter": 0.4, "hue": 0.1, "grey": 0.3, "blur": 0.5, "vertical_flip": True, "erase": 0.4}
MIXED = {"mixup": 0.4, "cutmix": 1.0}
VIEWS = {
    "crop": ViewConfig(policy="rand", strong_magnitude=10, **COLOURS, **MIXED),
    "resized crop": ViewConfig(resized_crop=0.08, policy="augmix", alternating_flip=True, **COLOURS, mixup=0.2),
    "little": ViewConfig(strong_ops=0, strong_cutout=0.0, cutmix=0.5),
}
SIZES = [Sizes((36, 36), (32, 32)), Sizes((250, 240), (224, 214))]

PINNED = {
    "boxes": [[6, 7, 1], [11, 3, 5], [14, 25, 30], [15, 27, 27]],
    "erased": [[15, 6, 11], [26, 23, 11], [1, 19, 4], [31, 30, 18]],
    "cut out": [[13, 8, -4], [27, 12, 7], [3, 22, 9], [17, 26, 20]],
    "mixing": [[10, 16, 22], [18, 45, 39], [16, 13, -4], [24, 42, 13], [False, True, False], [751, 703, 689]],
    "crop and colours": [
        *([11, 2, 5], [3, 8, 12], [True, True, False], [True, False, False]),
        *([816, 1297, 707], [830, 798, 702], [1348, 748, 1227], [-92, -97, 53], [False] * 3, [False, False, True]),
    ],
    "partners": [31637, 14403, 36191],
    "kernels": [["Blend", "Posterize", "Identity"], ["Posterize", "Move", "Solarize"]],
}


def tensors(drawn: Tensor | tuple | None) -> Iterator[Tensor]:
    """Those in tuples in tuples."""
    if isinstance(drawn, Tensor):
        yield drawn
    else:
        for part in drawn or ():
            yield from tensors(part)


def drawn_for(config: ViewConfig, sizes: Sizes, index: Tensor) -> list[Tensor]:
    """Everything that can be drawn for samples."""
    drawn = [kind(config, sizes, index, 3, 5) for kind in (draws.draw, draws.draw_strongly)]
    drawn.append(draws.draw_mixing(config, sizes.seen, index, 3, 5))
    drawn.append(draws.draw_erased(0.3, sizes.seen, index, 3, 5))
    return list(tensors(tuple(drawn)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_a_samples_draws_are_the_same_bits_alone_in_a_batch_and_among_all(name, sizes):
    """exp, sqrt and the like may round otherwise in a vector's lanes than in the rest of a tensor."""
    every = drawn_for(VIEWS[name], sizes, torch.arange(5003))
    for size in (1, 3, 33, 64):
        index = torch.randperm(5003)[:size]
        for whole, part in zip(every, drawn_for(VIEWS[name], sizes, index), strict=True):
            assert torch.equal(whole[index], part)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_batches_get_their_own_draws_across_blocks(name, mixes, monkeypatch):
    monkeypatch.setattr(draws, "BLOCK", 50)
    config, (sizes, _) = VIEWS[name], SIZES
    batches = [torch.randperm(9999)[:size] for size in (12, 12, 30, 12, 60, 4)]
    found = list(Draws(config, sizes, 7, two_views=True).of_batches(batches, 2, mixes))
    assert len(found) == len(batches)
    for batch, drawn in zip(batches, found):
        own = batch[: len(batch) // 2] if mixes else batch
        expected = [kind(config, sizes, batch, 7, 2) for kind in (draws.draw, draws.draw_strongly)]
        expected += [draws.draw_mixing(config, sizes.seen, own, 7, 2)] if mixes else []
        if config.erase:
            expected += [draws.draw_erased(config.erase, sizes.seen, own, seed, 2) for seed in (7, strong_seed(7))]
        for one, other in zip(tensors(tuple(expected)), tensors(drawn), strict=True):
            assert torch.equal(one, other)


def test_methods_with_one_view_draw_one_and_what_no_flag_asks_for_is_not_drawn():
    (found,) = Draws(ViewConfig(), SIZES[0], 0, two_views=False).of_batches([torch.arange(4)], 0, False)
    assert len(found.views) == 1
    assert (found.mixing, found.erased, *found.views[0][1:]) == (None,) * 9
    (still,) = Draws(ViewConfig(crop_padding=0, flip=False), Sizes((8, 8), (8, 8)), 0, False).of_batches(
        [torch.arange(4)], 0, False
    )
    assert still.views[0].crop is None


def test_a_blocks_draws_take_little_memory_whatever_the_flags():
    """All of ImageNet's at once would be 2.7 GB."""
    flags = COLOURS | MIXED | {"resized_crop": 0.1, "policy": "augmix"}
    batches = [torch.arange(100)] * 1000
    (drawn,) = Draws(ViewConfig(**flags), SIZES[1], 0, two_views=True).of_batches(batches[:1], 0, True)
    of_a_batch = sum(tensor.nbytes for tensor in tensors(drawn))
    assert len(next(draws._blocks(batches))) * of_a_batch < 18e6


def test_draws_never_change():
    """A run that is resumed, and a cache that is used, with a later version must see the same images."""
    index, config = torch.tensor([0, 1, 44_999]), ViewConfig(mixup=1.0, cutmix=1.0, resized_crop=0.2, colour_jitter=0.4)
    assert lists(draws.draw_boxes(config, (32, 32), index, 1, 2)) == PINNED["boxes"]
    assert lists(draws.draw_erased(0.7, (32, 32), index, 1, 2)) == PINNED["erased"]
    assert lists(draws.draw_cut_out(0.5, (32, 32), index, 1, 2)) == PINNED["cut out"]
    mixing = draws.draw_mixing(config, (32, 32), index, 1, 2)
    assert lists((*mixing.box, mixing.paste, (mixing.weight * 1000).round())) == PINNED["mixing"]
    assert draws.draw_partners(50_000, index, 1, 2).tolist() == PINNED["partners"]
    policy = draws.draw_strongly(config, Sizes((32, 32), (32, 32)), index, 1, 2).strong.policy
    kernels = [change.drawn.int().argmax(1).tolist() for change in policy.changes]
    view = draws.draw(VIEWS["crop"], SIZES[0], index, 1, 2)
    colours = (part.mul(1000).round() for part in (*view.factors, view.hue))
    assert lists((*view.crop, *colours, view.grey, view.blur.chosen)) == PINNED["crop and colours"]
    assert [[list(KERNELS)[place] for place in step] for step in kernels] == PINNED["kernels"]


def lists(parts: tuple) -> list[list]:
    return [part.tolist() for part in parts]
