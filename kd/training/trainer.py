"""The one training loop, and how a network is scored."""

import math
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.config import FitConfig, Job, RunConfig
from kd.data import Data
from kd.data.loader import Batches
from kd.errors import Preempted, UserError
from kd.losses.base import Distiller
from kd.runs import checkpoint
from kd.runs.checkpoint import State, check_position
from kd.runs.folder import RunFolder
from kd.teachers.live import Teacher
from kd.training.diagnostics import gradient_norms, warnings
from kd.training.evaluate import validate
from kd.training.meter import Clock, Meter
from kd.training.progress import Display
from kd.training.tracking import Tracker
from kd.types import Batch, Outputs, Step
from kd.utils import processes, rng
from kd.utils.files import not_finite
from kd.utils.system import StopRequests

#: (kd.ledger) What training has done so far: sums on the device, numbers in the history, checkpoints on the disk.


LOWER = "start another run with a lower --lr, or with --clip-norm"


class Ledger:
    """Owns the state of one training and its checkpoints; all processes call its methods together."""

    def __init__(self, distiller: Distiller, optimizer: Optimizer, job: Job, run: RunFolder, accelerator: Accelerator):
        self.distiller, self.optimizer, self.run, self.accelerator = distiller, optimizer, run, accelerator
        self.batch_size, self.diagnose_every = job.fit.batch_size, job.run.diagnose_every
        self.state = State(threads=torch.get_num_threads(), processes=accelerator.num_processes)
        self.best: dict[str, Tensor] = {}
        self.kept: int | None = None  # the step that this life last saved or began from
        self.meter = Meter(accelerator.device)
        if run.resuming:
            self._restore(job)
        self._marked = time.monotonic()
        self.clock = Clock(self.state.timing)
        self._epoch_timing = dict(self.state.timing)

    def _restore(self, job: Job) -> None:
        folder = checkpoint.newest(self.run.path / "checkpoint")
        self.state, self.best = checkpoint.restore(folder, self.distiller, self.optimizer)
        self.kept = self.state.step
        if self.state.processes != self.accelerator.num_processes:
            self._change_processes(job.run.resume_inexact)
        if job.run.threads is not None:
            self.state.threads = job.run.threads
        torch.set_num_threads(self.state.threads)
        try:
            self.meter.restore(self.state.sums, self.accelerator.process_index)
        except ValueError as error:
            raise UserError(f"{folder}: {error}; to start again, remove the run") from error
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def _change_processes(self, allowed: bool) -> None:
        """Go on with another number of processes than the run had, if that is `allowed`, and say what it costs."""
        theirs, ours = self.state.processes, self.accelerator.num_processes
        if not allowed:
            raise UserError(
                f"{self.run.path} was trained by {theirs} processes, here are {ours}: resume it with {theirs}; or add"
                " --resume-inexact, which keeps the global batch and gives up the same bytes"
            )
        if self.accelerator.is_main_process:
            said = f"{self.run.path}: from step {self.state.step} on {ours} processes, {theirs} before: not bit-exact"
            print(f"{said}; the global batch stays {self.batch_size}", flush=True)
        self.state.processes_before.append(theirs)
        self.state.processes = ours
        sums = [sum(column) for column in zip(*self.state.sums["rows"], strict=True)]
        self.state.sums["rows"] = [sums] + [[0.0] * len(sums)] * (ours - 1)  # of the epoch so far; only totals are read

    def step(self, result: Step, batch: Batch) -> None:
        """Count one training step; the host does not wait."""
        self.meter.update(result, batch.label, batch.step)
        self.state.step += 1
        self.clock.step(self.batch_size)

    def weigh(self, result: Step, batch: Batch, answer: Outputs | None) -> None:
        """Every so many steps: which pulls harder, distillation or cross-entropy? At the weights after the step."""
        due = self.diagnose_every and (self.state.step - 1) % self.diagnose_every == 0
        if due and answer is not None and "ce" in result.terms and len(result.terms) > 1:
            self.meter.add_gradients(gradient_norms(self.distiller, batch, answer, self.accelerator))

    def look(self, stop: int = 0) -> tuple[dict[str, float], int]:
        """Read the means of this epoch so far, and whether any process was asked to stop (a signal's number).

        Raises UserError naming the first step whose loss was not finite; nothing from it on has been saved.
        """
        numbers, bad, stop = self.meter.read(self.accelerator, stop)  # waits for the device
        if self.meter.spike is not None and self.accelerator.is_main_process:
            step, loss, usual = self.meter.spike
            print(f"step {step:.0f}: the loss rose to {loss:.4g}, lately {usual:.4g}; nothing was skipped", flush=True)
        if bad is not None:
            self._refuse(f"the loss was not finite at step {bad}")
        return numbers, stop

    def _refuse(self, words: str) -> None:
        """Raises UserError: nothing that is not finite is saved, and going on from before would end there again."""
        kept = "nothing was saved" if self.kept is None else f"the checkpoint of step {self.kept} stands"
        raise UserError(f"{words}; {kept} in {self.run.path}: {LOWER}")

    def save(self) -> None:
        """Write a checkpoint, after making sure that what it holds is finite. Raises UserError where it is not."""
        self.look()
        self.clock.pause()
        processes.broadcast_buffers(self.distiller)
        if bad := not_finite(self.distiller.state_dict()):
            self._refuse(f"{bad} was not finite after step {self.state.step - 1}")
        self.state.sums = self.meter.save(self.accelerator)
        now = time.monotonic()
        self.state.seconds, self._marked = self.state.seconds + now - self._marked, now
        scaler = self.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else {}
        if self.accelerator.is_main_process:
            folder = self.run.path / "checkpoint"
            checkpoint.save(folder, self.state, self.distiller, self.optimizer, self.best)
        self.kept = self.state.step
        self.accelerator.wait_for_everyone()

    def preempt(self, signal_number: int) -> None:
        self.save()
        self.stopped(signal_number)

    def stopped(self, signal_number: int) -> None:
        """Raises Preempted, where all is saved."""
        raise Preempted(signal_number, f"saved step {self.state.step} in {self.run.path}; continue with --resume")

    def end_epoch(self, numbers: dict[str, float], lr: float, scores: dict[str, float]) -> dict:
        """The epoch's line for metrics.jsonl; keeps the deployed weights if validation never was better.

        Raises UserError where a score is not finite.
        """
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            self._refuse(f"{', '.join(bad)} was not finite after step {self.state.step - 1}")
        spent = {key: value - self._epoch_timing[key] for key, value in self.state.timing.items()}
        speed = spent["images"] / spent["seconds"] if spent["seconds"] else None
        line = {"epoch": len(self.state.history) + 1, "step": self.state.step, "lr": lr, **numbers, **scores}
        line |= {"images_per_second": speed}
        before = [entry["val/top1"] for entry in self.state.history if "val/top1" in entry]
        if scores and scores["val/top1"] > max(before, default=-1):
            self.best = {name: value.clone() for name, value in self.distiller.deployed.state_dict().items()}
        self.state.history.append(line)
        self.meter.reset()
        self._epoch_timing = dict(self.state.timing)
        return line


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
        rng.seed_step(config.seed, state.step, accelerator.process_index)
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
