"""Training batches: which samples, seen how, on this process's device."""

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kd.config import FitConfig, Job, ViewConfig
from kd.data import augment, rows
from kd.data.dataset import Data
from kd.data.rows import Rows, gather
from kd.errors import require
from kd.types import Batch, Mix
from kd.utils import rng


class Pixels:
    """Rows of a split as normalised images on the device."""

    def __init__(self, split: Rows, data: Data, device: torch.device):
        self.split, self.device, self.size = split.on(device), device, data.size
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)

    def centred(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (b x c x h x w) of each of `indices` (b) in turn, as networks are scored on them."""
        for images in self.split.batches(indices, self.device):
            yield self.normalized(rows.centre(images, self.size))

    def labels(self, index: Tensor) -> Tensor:
        return gather(self.split.labels, index, self.device)

    def normalized(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return rows.normalize(images, self.mean, self.std)


def check_batch(fit: FitConfig, rows: int, processes: int) -> None:
    """Raises UserError where a global batch does not fit the processes or the training rows."""
    size, last = fit.batch_size, 0 if fit.drop_last else rows % fit.batch_size
    require(size % processes == 0, f"--batch-size {size}: must divide by the number of processes, {processes}")
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


class TrainingImages(Pixels):
    """The training split, each image as one of its views."""

    def __init__(self, data: Data, config: ViewConfig, seed: int, device: torch.device):
        super().__init__(data.train, data, device)
        self.config, self.seed, self.rows = config, seed, len(data.train.labels)

    def seen(self, indices: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor, Mix | None]]:
        """Of each of `indices` in turn, as `epoch` sees them: normalised images, labels, and how they were mixed."""
        seed, number = augment.view_seed(self.config, self.seed, epoch)
        asked = list(indices)
        if self.config.mixes:  # each batch's partners are fetched right behind it
            asked = [rows for index in indices for rows in (index, augment.partners(self.rows, index, seed, number))]
        images = self.split.batches(asked, self.device)
        for index in indices:
            label, here, mixed = self.labels(index), index.to(self.device, non_blocking=True), None
            image = self._view(next(images), here, seed, number)
            if self.config.mixes:
                how = augment.blend(self.config, seed, number, here, self.rows, self.size)
                other = self._view(next(images), how.partner, seed, number)
                image, mixed = augment.mix(image, other, how), Mix(self.labels(how.partner), how.weight)
            if self.config.erase:
                image = augment.erase(image, self.config.erase, seed, number, here)
            yield image, label, mixed

    def _view(self, images: UInt8[Tensor, "b c m n"], index: Tensor, seed: int, number: int) -> Tensor:
        config = self.config
        if config.resized_crop:
            box = augment.draw_boxes(config.resized_crop, tuple(images.shape[2:]), index, seed, number)
            images = augment.resized_crop(images, box, self.size)
        view = augment.draw_view(config, seed, number, index, spare=images.shape[2] - self.size[0])
        images = augment.apply_view(images, view, config.padding, self.size)
        if config.colour_jitter:
            images = augment.jitter(images, augment.draw_factors(config.colour_jitter, index, seed, number))
        return self.normalized(images)


class Batches:
    """The training split as a sequence of this process's shares of global batches."""

    def __init__(self, data: Data, job: Job, accelerator: Accelerator):
        self.size, self.rows = job.fit.batch_size, len(data.train.labels)
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        check_batch(job.fit, self.rows, self.processes)
        self.used = self.rows - (self.rows % self.size if job.fit.drop_last else 0)  # images of an epoch
        self.steps = math.ceil(self.used / self.size)
        self.seed, self.views = job.fit.seed, job.views
        self.balance = job.fit.balance
        self.images = TrainingImages(data, job.views, job.fit.seed, accelerator.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its step `first` on."""
        # The whole order goes where the images are at once: a slice of it costs no copy in the step.
        order = epoch_order(self.balance, self.seed, epoch, self.images.split).to(self.images.split.labels.device)
        device = self.images.device
        number = augment.view_seed(self.views, self.seed, epoch)[1]
        indices = [self._share(order[: self.used], step) for step in range(first, self.steps)]
        for step, (image, label, mixed) in enumerate(self.images.seen(indices, epoch), first):
            whens = (torch.full((), when, device=device) for when in (number, epoch, epoch * self.steps + step))
            yield Batch(image, label, indices[step - first].to(device, non_blocking=True), *whens, mixed)

    def _share(self, order: Int[Tensor, "n"], step: int) -> Int[Tensor, "b"]:
        """What this process gets of a step's batch: the same number of samples as every other process."""
        batch = order[step * self.size : (step + 1) * self.size]
        share = len(batch) // self.processes
        return batch[self.process * share : (self.process + 1) * share]


#: (kd.balance) Which samples an epoch visits, where classes that differ in size are to count alike (--balance sampler).


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
    luck = present[rng.random_bits(present, seed, "more", epoch).argsort(stable=True)]
    turns[luck[: rows % len(present)]] += 1
    rounds = turns.div(counts.clamp(min=1), rounding_mode="floor") + 1  # passes over each class, the last one partial
    copies = rounds[labels]
    row = torch.arange(rows).repeat_interleave(copies)
    number = torch.arange(len(row)) - (copies.cumsum(0) - copies).repeat_interleave(copies)  # whose pass a copy is in
    # Sorted by class, then pass, then chance; the first `turns` of each class are taken.
    stretch = labels[row] * int(rounds.max()) + number
    sorted_row = row[torch.argsort((stretch << 32) | rng.random_bits(torch.arange(len(row)), seed, "balance", epoch))]
    sizes = counts * rounds
    place = torch.arange(len(row)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    taken = sorted_row[place < turns.repeat_interleave(sizes)]
    return taken[rng.order(seed, epoch, rows)]


def epoch_order(balance: str, seed: int, epoch: int, split: Rows) -> Int[Tensor, "n"]:
    """The order in which an epoch visits the samples: a function of its arguments, the same on every process."""
    return balanced_order(seed, epoch, split.labels.cpu()) if balance == "sampler" else split.order(seed, epoch)
