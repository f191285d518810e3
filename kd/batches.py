"""Training batches: which samples, seen how, on this process's device."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor

from kd import augment, mixing, views
from kd.balance import epoch_order
from kd.config import Job, ViewConfig
from kd.data import Data
from kd.errors import require
from kd.images.rows import Rows, gather
from kd.outputs import Batch, Mix


class Pixels:
    """Rows of a split as normalised images on the device."""

    def __init__(self, split: Rows, data: Data, device: torch.device):
        self.split, self.device, self.size = split.on(device), device, data.size
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)

    def centred(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (b x c x h x w) of each of `indices` (b) in turn, as networks are scored on them."""
        for images in self.split.batches(indices, self.device):
            yield self.normalized(views.centre(images, self.size))

    def labels(self, index: Tensor) -> Tensor:
        return gather(self.split.labels, index, self.device)

    def normalized(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return views.normalize(images, self.mean, self.std)


def check_batch(size: int, rows: int, processes: int) -> None:
    """Raises UserError where a global batch of `size` does not fit the processes or the training rows."""
    require(size % processes == 0, f"--batch-size {size}: must divide by the number of processes, {processes}")
    require(size <= rows, f"--batch-size {size}: larger than the training split of {rows} images; give fewer")


class TrainingImages(Pixels):
    """The training split, each image as one of its views."""

    def __init__(self, data: Data, config: ViewConfig, seed: int, device: torch.device):
        super().__init__(data.train, data, device)
        self.config, self.seed, self.rows = config, seed, len(data.train.labels)

    def seen(self, indices: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor, Mix | None]]:
        """Of each of `indices` in turn, as `epoch` sees them: normalised images, labels, and how they were mixed."""
        seed, number = views.which(self.config, self.seed, epoch)
        asked = list(indices)
        if self.config.mixes:  # each batch's partners are fetched right behind it
            asked = [rows for index in indices for rows in (index, mixing.partners(self.rows, index, seed, number))]
        images = self.split.batches(asked, self.device)
        for index in indices:
            label, here, mixed = self.labels(index), index.to(self.device, non_blocking=True), None
            image = self._view(next(images), here, seed, number)
            if self.config.mixes:
                how = mixing.blend(self.config, seed, number, here, self.rows, self.size)
                other = self._view(next(images), how.partner, seed, number)
                image, mixed = mixing.mix(image, other, how), Mix(self.labels(how.partner), how.weight)
            if self.config.erase:
                image = mixing.erase(image, self.config.erase, seed, number, here)
            yield image, label, mixed

    def _view(self, images: UInt8[Tensor, "b c m n"], index: Tensor, seed: int, number: int) -> Tensor:
        config = self.config
        if config.resized_crop:
            box = augment.boxes(config.resized_crop, tuple(images.shape[2:]), index, seed, number)
            images = augment.resized_crop(images, box, self.size)
        view = views.view(config, seed, number, index, spare=images.shape[2] - self.size[0])
        images = views.apply(images, view, config.padding, self.size)
        if config.colour_jitter:
            images = augment.jitter(images, augment.factors(config.colour_jitter, index, seed, number))
        return self.normalized(images)


class Batches:
    """The training split as a sequence of this process's shares of global batches."""

    def __init__(self, data: Data, job: Job, accelerator: Accelerator):
        self.size, self.rows = job.fit.batch_size, len(data.train.labels)
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        check_batch(self.size, self.rows, self.processes)
        self.steps = self.rows // self.size  # an epoch; the incomplete batch at its end is dropped
        self.seed, self.views = job.fit.seed, job.views
        self.balance = job.fit.balance
        self.images = TrainingImages(data, job.views, job.fit.seed, accelerator.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its step `first` on."""
        # The whole order goes where the images are at once: a slice of it costs no copy in the step.
        order = epoch_order(self.balance, self.seed, epoch, self.images.split).to(self.images.split.labels.device)
        device, share = self.images.device, self.size // self.processes
        number = views.which(self.views, self.seed, epoch)[1]
        starts = range(first * self.size + self.process * share, self.steps * self.size, self.size)
        indices = [order[start : start + share] for start in starts]
        for step, (image, label, mixed) in enumerate(self.images.seen(indices, epoch), first):
            whens = (torch.full((), when, device=device) for when in (number, epoch, epoch * self.steps + step))
            yield Batch(image, label, indices[step - first].to(device, non_blocking=True), *whens, mixed)
