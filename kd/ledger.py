"""What training has done so far: sums on the device, numbers in the history, checkpoints on the disk."""

import math
import time

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from kd import checkpoint
from kd.config import Job
from kd.diagnostics import gradient_norms
from kd.errors import Preempted, UserError
from kd.files import not_finite
from kd.losses import Distiller
from kd.metrics import Meter
from kd.outputs import Batch, Outputs, Step
from kd.run_folder import RunFolder
from kd.state import State

LOWER = "start another run with a lower --lr, or with --clip-norm"
SETTLING = 10  # steps that images_per_second leaves out: caches fill, kernels are chosen


class Clock:
    """Times training steps alone, from the eleventh of this process on, into `timing` (images, seconds)."""

    def __init__(self, timing: dict[str, float]):
        self.timing = timing
        for key in ("images", "seconds"):
            timing.setdefault(key, 0.0)
        self._steps = 0
        self._since: float | None = None

    def step(self, images: int) -> None:
        self._steps += 1
        if self._steps == SETTLING and torch.cuda.is_available():
            torch.cuda.synchronize()  # once a process: the clock starts when the device has caught up
        if self._since is None and self._steps >= SETTLING:
            self._since = time.monotonic()
        elif self._since is not None:
            self.timing["images"] += images

    def rate(self) -> float | None:
        """Images per second of this run so far; None before there is anything to tell."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        seconds = self.timing["seconds"] + running
        return self.timing["images"] / seconds if self.timing["images"] and seconds else None

    def pause(self) -> None:
        """Before anything else than training, once the device's numbers have been read."""
        if self._since is not None:
            self.timing["seconds"] += time.monotonic() - self._since
            self._since = None


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
        self.meter.restore(self.state.sums, self.accelerator.process_index)
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
        checkpoint.broadcast_buffers(self.distiller)
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
