"""The one training loop, and how a network is scored."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from kd import metrics, views
from kd.batches import Batches, Pixels
from kd.checkpoint import broadcast_buffers
from kd.config import FitConfig, Job, RunConfig
from kd.data import Data
from kd.diagnostics import warnings
from kd.display import Display
from kd.images.rows import Rows
from kd.ledger import Ledger
from kd.losses import Distiller
from kd.outputs import Batch, Outputs, Step
from kd.run_folder import RunFolder
from kd.signals import StopRequests
from kd.state import check_position
from kd.teacher import Teacher
from kd.tracking import Tracker


def lr_at(step: int, steps_per_epoch: int, config: FitConfig) -> float:
    """The learning rate of step `step` (from 0) of the run: a function of the step, so there is nothing to save."""
    steps = steps_per_epoch * config.epochs
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(step >= round(milestone * steps) for milestone in config.milestones)
    return config.lr


def fit(
    distiller: Distiller,
    data: Data,
    job: Job,
    accelerator: Accelerator,
    run: RunFolder,
    tracker: Tracker,
    teacher: Teacher | None,
) -> Ledger:
    """Train `distiller` in place, from the run's newest checkpoint if it has one.

    Returns the ledger: final state, history, best weights. The run's metrics.jsonl and W&B run get a line an epoch.
    Raises: UserError where something is no longer finite; Preempted once a requested stop is saved.
    """
    config = job.fit
    batches = Batches(data, job, accelerator)
    sgd = set_up(distiller, config, accelerator)
    ledger = Ledger(distiller, sgd, job, run, accelerator)
    check_position(ledger.state, batches.steps, config.epochs)
    model, optimizer = accelerator.prepare(distiller, sgd)
    state = ledger.state
    tracker.rewrite(state.history)
    display = Display(f"{job.role} {job.model}", config.epochs, batches.steps, state.step, accelerator.is_main_process)
    with StopRequests() as requests, display:
        if not run.resuming:
            ledger.save()
        for epoch in range(len(state.history), config.epochs):
            distiller.train()
            for _ in train_epoch(epoch, model, optimizer, batches, teacher, ledger, accelerator, config):
                between_steps(ledger, display, requests, job.run)
            numbers, _ = ledger.look()
            ledger.clock.pause()
            display.step(state.step, numbers)
            scores = validate(distiller.deployed, data, accelerator, config.batch_size)
            line = ledger.end_epoch(numbers, lr_at(state.step - 1, batches.steps, config), scores)
            tracker.log(line)
            display.epoch(line)
            for words in warnings(state.history, len(data.classes)):
                display.warn(words)
            ledger.save()
            _, stop = ledger.look(requests.number)  # asked to stop while the epoch was scored and saved
            if stop:
                ledger.stopped(stop)
    return ledger


def between_steps(ledger: Ledger, display: Display, requests: StopRequests, config: RunConfig) -> None:
    """Read, show, save and stop, where it is time to."""
    step = ledger.state.step
    alone = requests.number and ledger.accelerator.num_processes == 1  # several agree where they meet
    if step % config.log_every == 0 or alone:
        numbers, stop = ledger.look(requests.number)
        display.step(step, numbers | {"images_per_second": ledger.clock.rate()})
        if stop:
            ledger.preempt(stop)
    if config.save_every and step % config.save_every == 0:
        ledger.save()


def train_epoch(
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    teacher: Teacher | None,
    ledger: Ledger,
    accelerator: Accelerator,
    config: FitConfig,
) -> Iterator[None]:
    """Train through what is left of an epoch, a step each time it is asked; the host never waits for the device."""
    state = ledger.state
    for batch in batches.epoch(epoch, state.step - epoch * batches.steps):
        lr = lr_at(state.step, batches.steps, config)
        views.seed_step(config.seed, state.step, accelerator.process_index)
        answer = teacher and teacher(batch)
        result = train_step(model, optimizer, lr, batch, answer, accelerator, config.clip_norm)
        ledger.step(result, batch)
        ledger.weigh(result, batch, answer)
        yield


def layout(config: FitConfig) -> torch.memory_format:
    """How convolutions' weights lie in memory; the images that meet them follow."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def make_optimizer(module: nn.Module, config: FitConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """SGD over everything trainable: the student, and what the method trains beside it."""
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
    # One kernel for all parameters; on a CPU no faster. Not under fp16: where the first step overflows, the fused
    # kernel returns early and leaves the momentum as uninitialised memory.
    if accelerator.device.type == "cuda" and accelerator.scaler is None:
        options["fused"] = True
    return torch.optim.SGD((p for p in module.parameters() if p.requires_grad), config.lr, **options)


def set_up(distiller: Distiller, config: FitConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """Make `distiller`, in place, what is trained on the device; returns its optimizer."""
    if config.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    distiller.to(accelerator.device, memory_format=layout(config))
    if accelerator.scaler is not None:  # of fp16: a teacher trained before in this process must leave no trace
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    return make_optimizer(distiller, config, accelerator)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    batch: Batch,
    answer: Outputs | None,
    accelerator: Accelerator,
    clip_norm: float | None,
) -> Step:
    """One update of the weights; what the forward pass before it gave."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    result = model(batch, answer)
    accelerator.backward(sum(result.terms.values()))
    if clip_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return result


@torch.no_grad()
def predict(
    network: nn.Module, split: Rows, data: Data, accelerator: Accelerator, batch_size: int
) -> Float[Tensor, "n k"]:
    """The network's logits for every row of the split, in eval mode; all processes share the work and get all rows.

    Each row is written by one process and zero on the others, so that their sum holds each exactly once, whatever
    the remainder.
    """
    training = network.training
    network.eval()
    broadcast_buffers(network)
    pixels = Pixels(split, data, accelerator.device)
    rows = len(split.labels)
    logits = torch.zeros(rows, len(data.classes), device=accelerator.device)
    share = max(batch_size // accelerator.num_processes, 1)
    starts = range(accelerator.process_index * share, rows, accelerator.num_processes * share)
    indices = [torch.arange(start, min(start + share, rows)) for start in starts]
    for start, images in zip(starts, pixels.centred(indices)):
        with accelerator.autocast():
            logits[start : start + share] = network(images).float()
    network.train(training)
    total = accelerator.reduce(logits, "sum")
    return total.cpu() if total.device.type == "mps" else total  # which has no float64 to score them in


def validate(network: nn.Module, data: Data, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
    """Loss and top-1 on the validation split; nothing where there is none."""
    if data.val is None:
        return {}
    logits = predict(network, data.val, data, accelerator, batch_size)
    labels = data.val.labels.to(logits.device)
    return {"val/loss": metrics.nll(logits, labels), "val/top1": metrics.top_k(logits, labels, 1)}
