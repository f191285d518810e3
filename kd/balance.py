"""Which samples an epoch visits, where classes that differ in size are to count alike (--balance sampler)."""

import torch
from jaxtyping import Int
from torch import Tensor

from kd import views
from kd.images.rows import Rows


def balanced_order(seed: int, epoch: int, labels: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """As many samples as there are, every class equally often to within one.

    Class-aware sampling (Shen et al., arXiv:1512.05830): a class's samples all come once before any comes again, in a
    new order each time. Which classes get one more than others changes with the epoch. A sample that repeats within an
    epoch is seen in the same view each time, as the teacher's kept answers need.
    """
    rows, counts = len(labels), torch.bincount(labels)
    present = counts.nonzero().flatten()
    turns = torch.zeros_like(counts)  # how many samples of each class the epoch visits
    turns[present] = rows // len(present)
    luck = present[views.random_bits(present, seed, "more", epoch).argsort(stable=True)]
    turns[luck[: rows % len(present)]] += 1
    rounds = turns.div(counts.clamp(min=1), rounding_mode="floor") + 1  # passes over each class, the last one partial
    copies = rounds[labels]
    row = torch.arange(rows).repeat_interleave(copies)
    number = torch.arange(len(row)) - (copies.cumsum(0) - copies).repeat_interleave(copies)  # whose pass a copy is in
    # Sorted by class, then pass, then chance; the first `turns` of each class are taken.
    stretch = labels[row] * int(rounds.max()) + number
    sorted_row = row[torch.argsort((stretch << 32) | views.random_bits(torch.arange(len(row)), seed, "balance", epoch))]
    sizes = counts * rounds
    place = torch.arange(len(row)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    taken = sorted_row[place < turns.repeat_interleave(sizes)]
    return taken[views.order(seed, epoch, rows)]


def epoch_order(balance: str, seed: int, epoch: int, split: Rows) -> Int[Tensor, "n"]:
    """The order in which an epoch visits the samples: a function of its arguments, the same on every process."""
    return balanced_order(seed, epoch, split.labels.cpu()) if balance == "sampler" else split.order(seed, epoch)
