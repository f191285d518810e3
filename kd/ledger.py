"""What training has done so far: sums on the device, numbers in the history, checkpoints on the disk."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from kd import checkpoint
from kd.checkpoint import State
from kd.config import Job
from kd.errors import Preempted, UserError
from kd.losses import Distiller
from kd.metrics import Meter
from kd.run_folder import RunFolder

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
        self.batch_size = job.fit.batch_size
        self.state = State(threads=torch.get_num_threads(), processes=accelerator.num_processes)
        self.best: dict[str, Tensor] = {}
        self.meter = Meter(accelerator.device)
        if run.resuming:
            self._restore(job)
        self._marked = time.monotonic()
        self.clock = Clock(self.state.timing)
        self._epoch_timing = dict(self.state.timing)

    def _restore(self, job: Job) -> None:
        folder = checkpoint.newest(self.run.path / "checkpoint")
        self.state, self.best = checkpoint.restore(folder, self.distiller, self.optimizer)
        processes = self.accelerator.num_processes
        if self.state.processes != processes:
            raise UserError(
                f"{self.run.path} was trained by {self.state.processes} processes, here are {processes}:"
                f" resume it with {self.state.processes}"
            )
        if job.run.threads is not None:
            self.state.threads = job.run.threads
        torch.set_num_threads(self.state.threads)
        self.meter.restore(self.state.sums, self.accelerator.process_index)
        if self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def step(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, step: Tensor) -> None:
        """Count one training step; the host does not wait."""
        self.meter.update(terms, logits, labels, step)
        self.state.step += 1
        self.clock.step(self.batch_size)

    def look(self, stop: int = 0) -> tuple[dict[str, float], int]:
        """Read the means of this epoch so far, and whether any process was asked to stop (a signal's number).

        Raises UserError naming the first step whose loss was not finite; nothing from it on has been saved.
        """
        numbers, bad, stop = self.meter.read(self.accelerator, stop)  # waits for the device
        if bad is not None:
            kept = max(checkpoint.steps(self.run.path / "checkpoint"), default=0)
            raise UserError(
                f"the loss was not finite at step {bad}; the checkpoint of step {kept} in {self.run.path} stands:"
                " lower --lr or set --clip-norm"
            )
        return numbers, stop

    def save(self) -> None:
        """Write a checkpoint, after making sure that what it holds is finite."""
        self.look()
        self.clock.pause()
        checkpoint.broadcast_buffers(self.distiller)
        self.state.sums = self.meter.save(self.accelerator)
        now = time.monotonic()
        self.state.seconds, self._marked = self.state.seconds + now - self._marked, now
        scaler = self.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else {}
        if self.accelerator.is_main_process:
            folder = self.run.path / "checkpoint"
            checkpoint.save(folder, self.state, self.distiller, self.optimizer, self.best)
        self.accelerator.wait_for_everyone()

    def preempt(self, signal_number: int) -> None:
        self.save()
        self.stopped(signal_number)

    def stopped(self, signal_number: int) -> None:
        """Raises Preempted, where all is saved."""
        raise Preempted(signal_number, f"saved step {self.state.step} in {self.run.path}; continue with --resume")

    def end_epoch(self, numbers: dict[str, float], lr: float, scores: dict[str, float]) -> dict:
        """The epoch's line for metrics.jsonl; keeps the deployed weights if validation never was better."""
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
