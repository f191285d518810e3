"""The training loop's state: model, optimizer, teacher, position and checkpoints, in one object.

The loop itself stands in train_teacher.py.
"""

import math
import operator
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from kd.config import FitConfig, Job
from kd.data import Data
from kd.data.loader import Batches
from kd.errors import Preempted, UserError, is_out_of_memory
from kd.losses.base import Distiller
from kd.models.adapt import synchronise_batchnorm
from kd.runs import checkpoint
from kd.runs.checkpoint import State, Weights, check_position
from kd.runs.folder import RunFolder
from kd.teachers.live import TeacherLogits
from kd.training.average import Average, too_long, weights_in
from kd.training.diagnostics import gradient_norms, warnings
from kd.training.evaluate import best_epoch, distillation_loss, validate, validation
from kd.training.meter import Clock, Meter, check_terms
from kd.training.optimizers import describe, make_optimizer
from kd.training.probe import due, open_probe
from kd.training.progress import ProgressDisplay
from kd.training.schedule import lr_at
from kd.training.tracking import Tracker
from kd.types import Batch, Mix, Outputs, Step
from kd.utils import processes, rng
from kd.utils.compiling import compiles, uses_graphs
from kd.utils.console import print_once
from kd.utils.files import not_finite
from kd.utils.system import StopRequests

COMPILING = "the first step takes longer, as it is compiled; the next start finds what was compiled on disk"
GRAPHS_PAY = "; --compile-mode reduce-overhead trained ResNet18 twice as fast on an H200"
LOWER_LR_ADVICE = "start another run with a lower --lr, or with --clip-norm"


class Trainer:
    """One training: it trains `distiller` in place, from the run's newest checkpoint if there is one.

        with Trainer(job, data, accelerator, run, distiller, teacher) as trainer:
            for epoch in trainer.epochs():
                for batch in trainer.batches(epoch):
                    trainer.step(batch)
                trainer.end_epoch(epoch)

    All processes call its methods together. The run's metrics.jsonl and W&B run get a line an epoch.
    Raises: UserError if something is no longer finite; Preempted once a requested stop is saved.
    """

    def __init__(
        self,
        job: Job,
        data: Data,
        accelerator: Accelerator,
        run: RunFolder,
        distiller: Distiller,
        teacher: TeacherLogits | None = None,
        live: TeacherLogits | None = None,
    ):
        """`live`: the teacher, not cached, for the validation images of data without labels."""
        self.job, self.data, self.accelerator, self.run = job, data, accelerator, run
        self.distiller, self.teacher, self.live = distiller, teacher, live
        self._batches = Batches(data, job, accelerator)
        self._total = job.fit.total_steps(self._batches.steps)
        optimizer = prepare_distiller(distiller, job, accelerator)
        self.average = None if job.fit.ema is None else Average(distiller.deployed, job.fit.ema)
        if line := too_long(job.fit.ema, self._total):
            print_once(line)
        self.probe = open_probe(job.run.probe, distiller.deployed, job.model, data, accelerator, job.fit.batch_size)
        self.state = State(threads=torch.get_num_threads(), processes=accelerator.num_processes)
        self.best: dict[str, Tensor] = {}  # the deployed weights of the best epoch on validation
        self.saved_step: int | None = None  # the step that this process last saved or resumed from
        self.meter = Meter(accelerator.device, data.labelled)
        self._writer = checkpoint.Writer(run.path / "checkpoint")
        if run.resuming:
            self._restore(optimizer)
        check_position(self.state, self._batches.steps, self._total)
        self.clock = Clock(self.state.timing, accelerator.device)
        self._saved_at = time.monotonic()
        self._epoch_timing = dict(self.state.timing)
        self.model = accelerator.prepare(distiller)
        # Accelerate's wrapper is for gradients that are scaled; around the others it takes as long as a small update.
        self.optimizer = optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)
        self._processes, self._process = accelerator.num_processes, accelerator.process_index  # slow to look up
        self._graphs, self._scorer = uses_graphs(accelerator), validation(data, job, accelerator)
        self._requests, self._contexts = StopRequests(), ExitStack()
        self._display = ProgressDisplay(
            f"{job.role} {job.model}", self._batches.steps, self._total, self.state.step, accelerator.is_main_process
        )

    def __enter__(self) -> "Trainer":
        with ExitStack() as contexts:
            self.tracker = Tracker(self.job, self.run, self.accelerator)
            self.tracker.rewrite(self.state.history)
            if compiles(self.accelerator):
                print_once(f"{self.job.role} {self.job.model}: {COMPILING}{'' if self._graphs else GRAPHS_PAY}")
            contexts.enter_context(self._requests)
            contexts.enter_context(self._display)
            contexts.enter_context(self._writer)
            if not self.run.resuming:
                self.save()
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if is_out_of_memory(error):
            error.add_note(str(self.job.fit.batch_size))
        self.data.close()
        self._contexts.__exit__(kind, error, trace)

    def epochs(self) -> range:
        """The epochs that are left to train, from 0."""
        return range(len(self.state.history), self.job.fit.epochs)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that are left of an epoch, of which --steps may cut the last; the model is in training mode."""
        held_epochs = self.job.start.freeze_epochs or 0
        self.distiller.hold(epoch < held_epochs, with_gradients=self.accelerator.num_processes > 1)
        self.distiller.train()
        start = epoch * self._batches.steps
        return self._batches.epoch(epoch, self.state.step - start, self._total - start)

    def step(self, batch: Batch) -> None:
        """Train on one batch. The CPU waits for the GPU only when numbers are read, every --log-every steps."""
        rng.seed_step(self.job.fit.seed, self.state.step, self._process, self.accelerator.device)
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        parts = split(batch, self.job.fit.accumulate)
        shares = [len(part.label) / len(batch.label) for part in parts]
        results = []
        for part, share in zip(parts[:-1], shares):  # processes exchange gradients once, with the last part
            with self.accelerator.no_sync(self.model):
                results.append(self.add_gradient(part, self.teacher and self.teacher(part), share))
        teacher_outputs = self.teacher and self.teacher(parts[-1])
        results.append(self.add_gradient(parts[-1], teacher_outputs, shares[-1]))
        self.update()
        result = joined(results, shares)
        self.record(result, batch)
        self.compare_gradients(result, parts[-1], teacher_outputs)
        self._log_and_save()

    def add_gradient(self, batch: Batch, teacher_outputs: Outputs | None, share: float) -> Step:
        """Forward and backward of a batch, or of a `share` of one; returns the forward pass's results."""
        result = self.model(batch, teacher_outputs)
        if not self.meter.terms:  # the first step
            loss = self.distiller.loss
            check_terms(result, self.job.role, loss.has_cross_entropy and loss.labelled)
        loss = reduce(operator.add, result.terms.values())
        self.backward(loss if share == 1 else loss * share)
        return result

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients, scaled in fp16, and not divided by a number of accumulated steps, which is 1."""
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def update(self) -> None:
        """One optimizer step by the gradient that was added up."""
        self.distiller.drop_held_gradients()
        lr = lr_at(self.state.step, self._batches.steps, self.job.fit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.job.fit.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.job.fit.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.state.step)

    def record(self, result: Step, batch: Batch) -> None:
        """Add a step to the sums on the device, and count it."""
        self.meter.update(result, batch.label, batch.step)
        self.state.step += 1
        self.clock.step(len(batch.label) * self._processes)

    def compare_gradients(self, result: Step, batch: Batch, teacher_outputs: Outputs | None) -> None:
        """Every --diagnose-every steps, measure the gradients of distillation and cross-entropy at the new weights."""
        every = self.job.run.diagnose_every
        due = every and (self.state.step - 1) % every == 0
        if due and teacher_outputs is not None and "ce" in result.terms and len(result.terms) > 1:
            recomputes = self.job.fit.gradient_checkpointing
            self.meter.add_gradients(
                gradient_norms(self.distiller, batch, teacher_outputs, self.accelerator, recomputes)
            )

    def _log_and_save(self) -> None:
        """Read, show, save and stop where it is due."""
        step, config = self.state.step, self.job.run
        stop_alone = self._requests.number and self._processes == 1  # several processes agree first
        if step % config.log_every == 0 or stop_alone:
            numbers, stop = self.read_means(self._requests.number)
            self._display.step(step, numbers | {"images_per_second": self.clock.rate()})
            if stop:
                self.save()
                self.raise_preempted(stop)
        if config.save_every and step % config.save_every == 0:
            self.save()

    def read_means(self, stop: int = 0) -> tuple[dict[str, float], int]:
        """The means of this epoch so far, and the signal by which any process was asked to stop (0: none).

        Waits for the device. Raises UserError naming the first step whose loss was not finite; nothing from that step
        on has been saved.
        """
        numbers, bad, stop = self.meter.read(self.accelerator, stop)
        if self.meter.spike is not None and self.accelerator.is_main_process:
            step, loss, usual = self.meter.spike
            print(
                f"step {step:.0f}: the loss jumped to {loss:.4g} (recently {usual:.4g}); training continues", flush=True
            )
        if bad is not None:
            self.fail_not_finite(f"the loss was not finite at step {bad}")
        return numbers, stop

    def end_epoch(self, epoch: int) -> None:
        """Score the validation split, log the epoch, keep the weights if they are the best so far, and save."""
        numbers, _ = self.read_means()
        self.clock.pause()
        self._display.step(self.state.step, numbers)
        scores = self._validate() | self._probe(epoch)
        line = self._add_to_history(epoch, numbers, scores)
        self.tracker.log(line)
        self._display.epoch(line)
        for warning in warnings(self.state.history, len(self.data.classes)):
            self._display.warn(warning)
        self.save()
        _, stop = self.read_means(self._requests.number)  # a stop requested during validation or saving
        if stop:
            self.raise_preempted(stop)

    def _validate(self) -> dict[str, float]:
        """The scores on the validation split, of the weights and of their average."""
        scores = self._score()
        if self.average is None:
            return scores
        with weights_in(self.distiller.deployed, self.average.weights):
            averaged = self._score()
        return scores | {f"{name}_ema": value for name, value in averaged.items()}

    def _score(self) -> dict[str, float]:
        """Loss and accuracy on the validation split, without labels the loss of distillation."""
        if self.data.labelled:
            return validate(self.distiller.deployed, self._scorer)
        if self.live is None:
            return {}
        return distillation_loss(self.distiller, self.live, self._scorer, self.job.fit)

    def _probe(self, epoch: int) -> dict[str, float]:
        """The scores of the embedding on the validation split of --probe, in epochs that are due."""
        every, epochs = self.job.run.probe_every, self.job.fit.epochs
        if self.probe is None or self.probe.data.val is None or not due(every, epoch, epochs):
            return {}
        scores = self.probe.score(self.probe.data.val, self._display.work)
        return {f"probe/{name}": score for name, score in scores.items()}

    def _add_to_history(self, epoch: int, numbers: dict[str, float], scores: dict[str, float]) -> dict:
        """The epoch's line for metrics.jsonl. Raises UserError if a score is not finite."""
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            self.fail_not_finite(f"{', '.join(bad)} was not finite after step {self.state.step - 1}")
        spent = {key: value - self._epoch_timing[key] for key, value in self.state.timing.items()}
        speed = spent["images"] / spent["seconds"] if spent["seconds"] else None
        lr = lr_at(self.state.step - 1, self._batches.steps, self.job.fit)
        line = {"epoch": epoch + 1, "step": self.state.step, "lr": lr, **numbers, **scores}
        line |= {"images_per_second": speed}
        self.state.history.append(line)
        if best_epoch(self.state.history) is line:
            self.best = {name: value.clone() for name, value in self.distiller.deployed.state_dict().items()}
        self.meter.reset()
        self._epoch_timing = dict(self.state.timing)
        return line

    def save(self) -> None:
        """Copy the state; the main process writes it in a thread, while the training goes on.

        Raises UserError if the weights are not finite, which are not saved, or if the last checkpoint was not written.
        """
        processes.all_do(self._writer.wait)
        self.read_means()
        self.clock.pause()
        processes.broadcast_buffers(self.distiller)
        if bad := not_finite(self.distiller.state_dict()):
            self.fail_not_finite(f"{bad} was not finite after step {self.state.step - 1}")
        self.state.sums = self.meter.save(self.accelerator)
        now = time.monotonic()
        self.state.seconds, self._saved_at = self.state.seconds + now - self._saved_at, now
        scaler = self.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else {}
        if self.accelerator.is_main_process:
            others = {"best": self.best} | ({} if self.average is None else {"ema": self.average.weights})
            self._writer.start(checkpoint.snapshot(self.state, self.distiller, self.optimizer, others))
        self.saved_step = self.state.step
        if self.state.step in (0, self._total):  # there is always something to resume, and the last is whole
            processes.all_do(self._writer.wait)

    def _restore(self, optimizer: Optimizer) -> None:
        folder = processes.from_main(lambda: checkpoint.newest(self.run.path / "checkpoint"))
        self.state, others = checkpoint.restore(folder, self.distiller, optimizer)
        self.best = others["best"]
        if self.average is not None:
            self._restore_average(folder, others)
        self.saved_step = self.state.step
        if self.state.processes != self.accelerator.num_processes:
            self._change_processes()
        if self.job.run.threads is not None:
            self.state.threads = self.job.run.threads
        torch.set_num_threads(self.state.threads)
        try:
            self.meter.restore(self.state.sums, self.accelerator.process_index)
        except ValueError as error:
            raise UserError(f"{folder}: {error}; to start again, remove the run folder") from error
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def _restore_average(self, folder: Path, others: Weights) -> None:
        try:
            self.average.load(others["ema"])
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{folder}: has no average of this network; to start again, remove the run folder"
            ) from error

    def _change_processes(self) -> None:
        """Continue with another number of processes, if --resume-inexact allows it, and print what that costs."""
        before, now = self.state.processes, self.accelerator.num_processes
        if not self.job.run.resume_inexact:
            raise UserError(
                f"{self.run.path} was trained with {before} processes, and this launch has {now}: resume it with"
                f" {before}, or add --resume-inexact, which keeps the global batch; the bits then differ"
            )
        if self.accelerator.is_main_process:
            print(
                f"{self.run.path}: continues from step {self.state.step} with {now} processes instead of {before};"
                f" not bit-exact; the global batch stays {self.job.fit.batch_size}",
                flush=True,
            )
        self.state.processes_before.append(before)
        self.state.processes = now
        sums = [sum(column) for column in zip(*self.state.sums["rows"], strict=True)]
        self.state.sums["rows"] = [sums] + [[0.0] * len(sums)] * (now - 1)  # only totals are read

    def fail_not_finite(self, what: str) -> None:
        """Raises UserError. Non-finite weights are never saved; resuming would fail at the same step."""
        self._writer.wait()
        kept = "nothing was saved" if self.saved_step is None else f"the last good checkpoint is step {self.saved_step}"
        raise UserError(f"{what}; {kept} in {self.run.path}: {LOWER_LR_ADVICE}")

    def raise_preempted(self, signal_number: int) -> None:
        """Raises Preempted once everything is saved."""
        processes.all_do(self._writer.wait)
        raise Preempted(signal_number, f"step {self.state.step} in {self.run.path}; continue with --resume")


def memory_format(config: FitConfig) -> torch.memory_format:
    """The memory layout of convolution weights; the images that meet them follow it."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def prepare_distiller(distiller: Distiller, job: Job, accelerator: Accelerator) -> Optimizer:
    """Move `distiller` to the device in place, as it will be trained; returns its optimizer."""
    config = job.fit
    if config.sync_batchnorm:
        synchronise_batchnorm(distiller)
    distiller.to(accelerator.device, memory_format=memory_format(config))
    if accelerator.scaler is not None:  # of fp16: a teacher trained before in this process must leave no trace
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    optimizer = make_optimizer(distiller, config, job.model, accelerator)
    if line := describe(optimizer, config):
        print_once(f"{job.role} {job.model}: {line}")
    return optimizer


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in `parts` of nearly equal size, in order; fewer if it has fewer images."""
    parts = min(parts, len(batch.label))
    if parts == 1:
        return [batch]
    cut = lambda tensor: tensor.tensor_split(parts)  # noqa: E731
    mixes = [None] * parts if batch.mix is None else map(Mix, *map(cut, batch.mix))
    strongs = [None] * parts if batch.strong is None else cut(batch.strong)
    pieces = zip(cut(batch.image), cut(batch.label), cut(batch.index), mixes, strongs, strict=True)
    names = ("image", "label", "index", "mix", "strong")
    return [batch._replace(**dict(zip(names, piece, strict=True))) for piece in pieces]


def joined(results: list[Step], shares: list[float]) -> Step:
    """The results of a batch's parts as those of the whole batch, without gradients; `shares` sum to 1."""
    if len(results) == 1:
        return results[0]
    mean = lambda parts: {  # noqa: E731
        name: sum(share * part[name].detach() for share, part in zip(shares, parts, strict=True)) for name in parts[0]
    }
    logits = torch.cat([result.logits.detach() for result in results])
    return Step(logits, mean([result.terms for result in results]), mean([result.measures for result in results]))
