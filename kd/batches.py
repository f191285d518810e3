"""Training batches: which samples, seen how, on this process's device."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from kd import mixing, views
from kd.config import Job, ViewConfig
from kd.data import Data, Split
from kd.errors import require
from kd.outputs import Batch, Mix

ROOM = 0.5  # share of a GPU's free memory that the data may take; the rest is for the networks


def place(split: Split, device: torch.device) -> Split:
    """The split on the device if it fits there, else in host memory."""
    if device.type == "cuda" and split.images.nbytes > ROOM * torch.cuda.mem_get_info(device)[0]:
        return split
    return split.to(device)


class Pixels:
    """Rows of a split as normalised images on the device."""

    def __init__(self, split: Split, data: Data, device: torch.device):
        self.split, self.device = place(split, device), device
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)

    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images and labels of the rows `index` (anywhere), on the device."""
        index = index.to(self.split.labels.device)
        images, labels = self.split.images[index], self.split.labels[index]
        if images.device.type != self.device.type:  # from pinned memory the copy runs beside the arithmetic
            images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def normalized(self, images: Tensor) -> Tensor:
        return views.normalize(images, self.mean, self.std)


def check_batch(size: int, rows: int, processes: int) -> None:
    """Raises UserError where a global batch of `size` does not fit the processes or the training rows."""
    require(size % processes == 0, f"--batch-size {size}: must divide by the number of processes, {processes}")
    require(size <= rows, f"--batch-size {size}: larger than the training split of {rows} images; give fewer")


class TrainingImages(Pixels):
    """The training split, each image as one of its views."""

    def __init__(self, data: Data, config: ViewConfig, seed: int, device: torch.device):
        super().__init__(data.train, data, device)
        self.config, self.seed, self.rows, self.size = config, seed, len(data.train.labels), data.size

    def seen(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor, Mix | None]:
        """Normalised images of the rows `index` as `epoch` sees them, their labels, and how they were mixed."""
        seed, number = views.which(self.config, self.seed, epoch)
        image, label = self._cropped(index, seed, number)
        index, mixed = index.to(self.device, non_blocking=True), None
        if self.config.mixes:
            how = mixing.blend(self.config, seed, number, index, self.rows, self.size)
            other, other_label = self._cropped(how.partner, seed, number)
            image, mixed = mixing.mix(image, other, how), Mix(other_label, how.weight)
        if self.config.erase:
            image = mixing.erase(image, self.config.erase, seed, number, index)
        return image, label, mixed

    def _cropped(self, index: Tensor, seed: int, number: int) -> tuple[Tensor, Tensor]:
        images, labels = self.raw(index)
        view = views.view(self.config, seed, number, index.to(self.device, non_blocking=True))
        return self.normalized(views.apply(images, view, self.config.crop_padding)), labels


class Batches:
    """The training split as a sequence of this process's shares of global batches."""

    def __init__(self, data: Data, job: Job, accelerator: Accelerator):
        self.size, self.rows = job.fit.batch_size, len(data.train.labels)
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        check_batch(self.size, self.rows, self.processes)
        self.steps = self.rows // self.size  # an epoch; the incomplete batch at its end is dropped
        self.seed, self.views = job.fit.seed, job.views
        self.images = TrainingImages(data, job.views, job.fit.seed, accelerator.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its step `first` on."""
        # The whole order goes where the images are at once: a slice of it costs no copy in the step.
        order = views.order(self.seed, epoch, self.rows).to(self.images.split.labels.device)
        device, share = self.images.device, self.size // self.processes
        number = views.which(self.views, self.seed, epoch)[1]
        for step in range(first, self.steps):
            start = step * self.size + self.process * share
            index = order[start : start + share]
            image, label, mixed = self.images.seen(index, epoch)
            whens = (torch.full((), when, device=device) for when in (number, epoch, epoch * self.steps + step))
            yield Batch(image, label, index.to(device, non_blocking=True), *whens, mixed)
