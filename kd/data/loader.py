"""Batches on this process's device: training batches in an epoch's order, augmented by kd/data/augment.py, and crops
for scoring."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kd.config import FitConfig, Job, ViewConfig
from kd.data import augment, draws, rows
from kd.data.dataset import Data
from kd.data.draws import BatchDraws, Drawn, Draws, Sizes
from kd.data.rows import Rows, gather
from kd.errors import require
from kd.types import Batch, Mix
from kd.utils import rng


def check_batch(fit: FitConfig, rows: int, processes: int) -> None:
    """Raises UserError if a global batch does not fit the processes or the training rows."""
    size, last = fit.batch_size, 0 if fit.drop_last else rows % fit.batch_size
    require(size % processes == 0, f"--batch-size {size}: must be a multiple of the number of processes, {processes}")
    require(size <= rows, f"--batch-size {size}: larger than the training split of {rows} images; give fewer")
    require(
        last % processes == 0,
        f"--no-drop-last: the last batch of {last} images does not divide by the number of processes, {processes}:"
        " leave the flag out, or give another --batch-size",
    )
    require(
        last == 0 or last > processes,
        f"--no-drop-last: the last batch has one image{' per process' * (processes > 1)}, too few for BatchNorm:"
        " leave the flag out, or give another --batch-size",
    )


class Batches:
    """The training split as a sequence of this process's shares of global batches."""

    def __init__(self, data: Data, job: Job, accelerator: Accelerator):
        self.size, self.rows = job.fit.batch_size, len(data.train.labels)
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        check_batch(job.fit, self.rows, self.processes)
        self.used = self.rows - (self.rows % self.size if job.fit.drop_last else 0)  # images of an epoch
        self.steps = job.fit.steps_an_epoch(self.rows)
        self.seed, self.views, self.epochs = job.fit.seed, job.views, job.fit.epochs
        self.balance = job.fit.balance
        views = job.fit.epochs, job.method.two_views, compiles_views(job.fit, accelerator.device)
        self.images = TrainingImages(data, job.views, job.fit.seed, accelerator.device, *views)

    def epoch(self, epoch: int, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch, from its step `first` on and before its step `last`, if that is given."""
        order, device = epoch_order(self.balance, self.seed, epoch, self.images.split), self.images.device
        number = self.views.number(epoch, self.epochs)
        end = self.steps if last is None else min(last, self.steps)
        indices = [self._share(order[: self.used], step) for step in range(first, end)]
        view, counted = (torch.full((), count, device=device) for count in (number, epoch))
        steps = numbers(epoch * self.steps + first, len(indices), device)
        for step, (images, labels, mixed, strong, index) in zip(steps, self.images.augmented(indices, number)):
            yield Batch(images, labels, index, view, counted, step, mixed, strong)

    def _share(self, order: Int[Tensor, "n"], step: int) -> Int[Tensor, "b"]:
        """What this process gets of a step's batch: the same number of samples as every other process."""
        batch = order[step * self.size : (step + 1) * self.size]
        share = len(batch) // self.processes
        return batch[self.process * share : (self.process + 1) * share]


def numbers(first: int, count: int, device: torch.device) -> Sequence[Int[Tensor, ""]]:
    """`count` consecutive numbers as 0-dim tensors, made at once.

    16 bytes apart: a compiled step copies an input whose address is not a multiple of that.
    """
    return torch.arange(first, first + count, device=device).repeat_interleave(2)[::2].unbind()


def compiles_views(fit: FitConfig, device: torch.device) -> bool:
    """Whether views are compiled: on a CPU it would cost seconds and gain nothing."""
    return fit.compile and device.type == "cuda"


class Pixels:
    """Rows of a split as normalised images on the device."""

    def __init__(self, split: Rows, data: Data, device: torch.device):
        self.split, self.device, self.size = split.on(device), device, data.size
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)
        self._scale, self._shift = rows.scale_and_shift(self.mean, self.std)

    def centre_crops(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (b x c x h x w) of each index (b) in `indices`, as networks are scored on them."""
        for images in self.split.batches(indices, self.device):
            yield self.normalize(rows.centre_crop(images, self.size))

    def labels(self, index: Tensor) -> Tensor:
        return gather(self.split.labels, index, self.device)

    def normalize(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return rows.scaled(images, self._scale, self._shift)


class Augmented(NamedTuple):
    """One batch of TrainingImages."""

    image: Float[Tensor, "b 3 h w"]  # normalised
    label: Int[Tensor, "b"]
    mix: Mix | None
    strong: Float[Tensor, "b 3 h w"] | None  # the second view; of two views
    index: Int[Tensor, "b"]


class TrainingImages(Pixels):
    """Rows of the training split, augmented; with `two_views`, once weakly and once strongly.

    `compiled`: weak views of crops and flips alone are compiled, from stored to normalised image. Others are not: a
    compiler's rounding would move a policy's pixels.
    """

    def __init__(
        self,
        data: Data,
        config: ViewConfig,
        seed: int,
        device: torch.device,
        epochs: int = 1,
        two_views: bool = False,
        compiled: bool = False,
    ):
        super().__init__(data.train, data, device)
        self.config, self.seed, self.epochs = config, draws.view_seed(config, seed), epochs
        self.rows, self.two_views = len(data.train.labels), two_views
        weak = TrainingImages._weak  # not self._weak: a cycle would keep the pixels on the device after the training
        moved = compiled and config.moves_only
        self._weakly = torch.compile(weak, fullgraph=True, dynamic=False) if moved else weak
        self.draws = Draws(config, Sizes(data.train.size, data.size), self.seed, two_views)

    def augmented(self, indices: Sequence[Tensor], number: int) -> Iterator[Augmented]:
        """View `number` of the images of each index in `indices`.

        Row numbers and labels of all batches, and the draws of many, are made and copied to the device at once: a batch
        takes its part of them, which launches nothing.
        """
        if not len(indices):
            return
        mixes = self.config.mixes_in(number, self.epochs)
        wanted = self._with_partners(indices, number) if mixes else indices
        read = torch.cat(list(wanted)).to(self.split.labels.device)
        stored = self.split.batches(read.split([len(part) for part in wanted]), self.device)
        sizes = [len(index) * (1 + mixes) for index in indices]
        batches, labels = rows.to_device(read, self.device).split(sizes), self.labels(read).split(sizes)
        for batch, label, drawn in zip(batches, labels, self.draws.of_batches(batches, number, mixes)):
            images = torch.cat([next(stored), next(stored)]) if mixes else next(stored)
            yield self._augment(images, batch, label, drawn)

    def _with_partners(self, indices: Sequence[Tensor], number: int) -> list[Tensor]:
        """Each index, and after it the rows with which its images are mixed."""
        every = torch.cat(list(indices)).to(self.split.labels.device)
        partners = draws.draw_partners(self.rows, every, self.seed, number)
        sizes = [len(index) for index in indices]
        return [part for pair in zip(every.split(sizes), partners.split(sizes)) for part in pair]

    def _augment(
        self, images: UInt8[Tensor, "m c p q"], index: Int[Tensor, "m"], labels: Int[Tensor, "m"], drawn: BatchDraws
    ) -> Augmented:
        """A batch of stored images, and of their partners if they are mixed."""
        kinds, mixed = (self._weakly, TrainingImages._strong), None
        views = [view(self, images, of) for view, of in zip(kinds, drawn.views)]
        if drawn.mixing is not None:  # both views alike, for they have one label
            views = [augment.mix(*view.chunk(2), drawn.mixing) for view in views]
            (index, _), (labels, others) = index.chunk(2), labels.chunk(2)
            mixed = Mix(others, drawn.mixing.weight)
        if drawn.erased is not None:
            views = [augment.erase(*pair) for pair in zip(views, drawn.erased)]
        return Augmented(views[0], labels, mixed, views[1] if self.two_views else None, index)

    def _weak(self, images: UInt8[Tensor, "m c p q"], drawn: Drawn) -> Float[Tensor, "m c h w"]:
        return self.normalize(augment.augment(self.config, images, drawn, self.size))

    def _strong(self, images: UInt8[Tensor, "m c p q"], drawn: Drawn) -> Float[Tensor, "m c h w"]:
        return self.normalize(augment.augment_strongly(self.config, images, drawn, self.size))


def epoch_order(balance: str, seed: int, epoch: int, split: Rows) -> Int[Tensor, "n"]:
    """The order in which an epoch visits the samples: a function of its arguments, the same on every process."""
    return balanced_order(seed, epoch, split.labels.cpu()) if balance == "sampler" else split.order(seed, epoch)


def balanced_order(seed: int, epoch: int, labels: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """An epoch of as many samples as there are, every class equally often to within one (--balance sampler).

    Class-aware sampling (Shen et al., arXiv:1512.05830): all of a class's samples come once before any comes again, in
    a new order each time. Which classes get one more than others changes with the epoch. A sample that repeats within
    an epoch has the same view each time, because a teacher's cached logits have one row for it.
    """
    rows, counts = len(labels), torch.bincount(labels)
    present = counts.nonzero().flatten()
    visits = torch.zeros_like(counts)  # samples of each class in the epoch
    visits[present] = rows // len(present)
    shuffled = present[rng.random_bits(present, seed, "more", epoch).argsort(stable=True)]
    visits[shuffled[: rows % len(present)]] += 1
    rounds = visits.div(counts.clamp(min=1), rounding_mode="floor") + 1  # passes over each class, the last one partial
    copies = rounds[labels]
    row = torch.arange(rows).repeat_interleave(copies)
    copy = torch.arange(len(row)) - (copies.cumsum(0) - copies).repeat_interleave(copies)  # the pass it belongs to
    # Sort by class, then pass, then at random; take the first `visits` of each class.
    group = labels[row] * int(rounds.max()) + copy
    sorted_row = row[torch.argsort((group << 32) | rng.random_bits(torch.arange(len(row)), seed, "balance", epoch))]
    sizes = counts * rounds
    place = torch.arange(len(row)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    taken = sorted_row[place < visits.repeat_interleave(sizes)]
    return taken[rng.order(seed, epoch, rows)]
