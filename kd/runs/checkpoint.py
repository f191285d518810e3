"""Checkpoints: saving and restoring a training, so that a run killed at any point and resumed ends in the same bytes.

A checkpoint is a folder step-N of safetensors and JSON. It is written under another name, its manifest of sha256s last;
then it is renamed, and only then are older ones removed. A bit that flips later is noticed before it is used.
The main process alone writes and reads them: a Writer, in a thread, from a copy in memory.
"""

import json
import math
import os
import threading
import warnings
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.errors import UserError
from kd.utils.files import (
    HostCopies,
    host_copies,
    is_number,
    read_json,
    read_tensors,
    remove_tree,
    sha256_file,
    sync_folder,
    write_json,
    write_weights,
)
from kd.utils.processes import from_main

Weights = dict[str, dict[str, Tensor]]

AVERAGE = "ema.safetensors"  # with --ema

KEEP = 2  # the newest and, in case it is damaged, the one before
MOST_THREADS = 4096


@dataclass
class State:
    """The position of a training: all that a resumed run needs beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0  # spent so far, over all processes that worked on the run in turn
    history: list[dict] = field(default_factory=list)  # one entry an epoch: the lines of metrics.jsonl
    sums: dict = field(default_factory=dict)  # of the unfinished epoch: Meter.save
    threads: int = 0
    processes: int = 1
    processes_before: list[int] = field(default_factory=list)  # with --resume-inexact: the earlier numbers
    scaler: dict = field(default_factory=dict)  # of fp16 gradients
    timing: dict = field(default_factory=dict)  # images and seconds, for images_per_second


def _checked(state: State) -> State:
    """The state. Raises ValueError naming the first entry that no training saves."""
    rows, names = state.sums["rows"], [*state.sums["terms"], *state.sums["measures"]]
    before = state.processes_before
    valid = {
        "step": type(state.step) is int and state.step >= 0,
        "seconds": is_number(state.seconds) and state.seconds >= 0,
        "threads": type(state.threads) is int and 1 <= state.threads <= MOST_THREADS,
        "processes": type(state.processes) is int and state.processes >= 1,
        "processes_before": isinstance(before, list) and all(type(number) is int for number in before),
        "history": isinstance(state.history, list)
        and all(_is_line(line, epoch, state.step) for epoch, line in enumerate(state.history, 1)),
        "sums": all(isinstance(name, str) for name in names)
        and len(rows) == state.processes
        and all(all(map(is_number, row)) for row in rows),
        "scaler": isinstance(state.scaler, dict),
        "timing": set(state.timing) <= {"images", "seconds"} and all(map(is_number, state.timing.values())),
    }
    for name, fine in valid.items():
        if not fine:
            raise ValueError(f"state.json has {name} {getattr(state, name)!r:.80}")
    return state


def _is_line(line: object, epoch: int, step: int) -> bool:
    """Whether it is an epoch's line of metrics.jsonl, of this epoch and at most this step."""
    if not isinstance(line, dict) or not {"epoch", "step", "lr", "train/loss"} <= line.keys():
        return False
    numbers = all(value is None or is_number(value) for value in line.values())
    return numbers and line["epoch"] == epoch and line["step"] <= step


def check_position(state: State, steps_an_epoch: int, total: int) -> None:
    """Raises UserError if no training of `total` steps can be at that step after that many epochs."""
    done, epochs = len(state.history), math.ceil(total / steps_an_epoch)
    # An epoch is added to the history after its validation, so `step` may be up to one epoch ahead.
    first, last = (min(number * steps_an_epoch, total) for number in (done, done + 1))
    if done > epochs or not first <= state.step <= last:
        raise UserError(
            f"the checkpoint says step {state.step} after {done} epochs, impossible with {steps_an_epoch} steps an"
            f" epoch and {epochs} epochs; to start again, remove the run folder"
        )


class Snapshot(NamedTuple):
    """A checkpoint in memory: copies that a training which goes on does not change."""

    step: int
    content: dict  # of state.json
    weights: dict[str, HostCopies]  # by the name of their file


def snapshot(state: State, module: nn.Module, optimizer: Optimizer, others: Weights) -> Snapshot:
    """`others`: the deployed network's weights other than the present ones, each by the name of its file."""
    tensors, rest = _split_optimizer(optimizer.state_dict())
    weights = {"model": module.state_dict(), "optimizer": tensors, "best": {}} | others
    copies = {name: host_copies(part) for name, part in weights.items()}
    return Snapshot(state.step, {"state": asdict(state), "optimizer": rest}, copies)


class Writer:
    """Writes one run's checkpoints in a thread, one after another, while the training goes on.

    A failure is raised by the next call, or at the end of the `with` block unless another error ends that.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _writers.add(self)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        self.join()
        if kind is None:
            self.wait()

    def start(self, taken: Snapshot) -> None:
        """Write a snapshot, once the one before is written."""
        self.wait()
        thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint")
        thread.start()
        self._thread = thread

    def _write(self, taken: Snapshot) -> None:
        try:
            save(self.folder, taken)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return once the last snapshot is written. Raises what its writing raised, UserError for a full disk."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        if self._thread is not None:  # any thread that forks calls this: it stays the newest one
            self._thread.join()


_writers: "weakref.WeakSet[Writer]" = weakref.WeakSet()


def _join_writers() -> None:
    """A process that is forked in mid-write would inherit whatever locks the thread holds."""
    for writer in list(_writers):
        writer.join()


os.register_at_fork(before=_join_writers)


def save(folder: Path, taken: Snapshot) -> None:
    """Write checkpoint `folder`/step-N. Raises UserError if the disk is full; older checkpoints stay intact."""
    partial = folder / f".partial-{taken.step}"
    target = folder / f"step-{taken.step}"
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".partial-*"):  # of a process killed while it saved
            remove_tree(leftover)
        partial.mkdir()
        for name, weights in taken.weights.items():
            write_weights(partial / f"{name}.safetensors", weights)
        write_json(partial / "state.json", taken.content)
        write_json(partial / "manifest.json", {path.name: sha256_file(path) for path in sorted(partial.iterdir())})
        sync_folder(partial)
        remove_tree(target)  # an earlier process's, at the same step
        os.rename(partial, target)
        sync_folder(folder)
    except OSError as error:
        remove_tree(partial)
        raise UserError(
            f"could not save to {folder} ({error}); free some space, then continue with --resume"
        ) from error
    # Newer ones were skipped as damaged when this process resumed: they must not count as kept.
    newer = [step for step in steps(folder) if step > taken.step]
    for old in [*newer, *steps(folder)[len(newer) :][KEEP:]]:
        remove_tree(folder / f"step-{old}")


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, newest first (as numbers: 10 after 9)."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint; None if there is no checkpoint.

    Warns of each damaged one. Raises UserError if all are damaged: starting again is the user's decision.
    """
    for step in steps(folder):
        checkpoint = folder / f"step-{step}"
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged ({fault}): skipped", stacklevel=2)
    if steps(folder):
        raise UserError(f"every checkpoint in {folder} is damaged; to start again, remove the run folder")
    return None


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were saved."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        wanted = {"model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"}
        if missing := wanted - set(manifest):
            return f"its manifest lacks {', '.join(sorted(missing))}"
        wanted |= {AVERAGE} & set(manifest)
        wrong = [name for name in sorted(wanted) if sha256_file(checkpoint / name) != manifest[name]]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    return f"{', '.join(wrong)} changed since it was saved" if wrong else None


def read(checkpoint: Path) -> tuple[dict, Weights]:
    """What state.json holds, and the tensors by the name of their file. Raises UserError naming what cannot be read."""
    optional = [path for path in (checkpoint / "best.safetensors", checkpoint / AVERAGE) if path.exists()]
    files = [checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors", *optional]
    return read_json(checkpoint / "state.json"), {path.stem: read_tensors(path) for path in files}


def restore(checkpoint: Path, module: nn.Module, optimizer: Optimizer) -> tuple[State, Weights]:
    """Load weights and optimizer in place; returns the position, and the other weights that were saved.

    All processes call it together; the main one reads.
    """
    content, weights = from_main(lambda: read(checkpoint))
    try:
        state = _checked(State(**content["state"]))
        module.load_state_dict(weights.pop("model"))
        optimizer.load_state_dict(_join_optimizer(weights.pop("optimizer"), content["optimizer"], optimizer))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint} cannot be resumed by this version ({error!r:.200}); to start again, remove the run folder"
        ) from error
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Saved contiguously; fused optimizers need the memory layout of the parameter.
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return state, weights


def _split_optimizer(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Tensors by "parameter/name" and "group N/name", and the rest for JSON.

    Left out of the groups: what JSON does not hold, such as a dtype. The optimizer that goes on has it anyway.
    """
    tensors, rest = {}, {"param_groups": [], "state": {}}
    for index, entries in state["state"].items():
        rest["state"][str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                rest["state"][str(index)][name] = value
    for number, group in enumerate(state["param_groups"]):  # some optimizers count their steps here
        tensors |= {f"group {number}/{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        rest["param_groups"].append({name: value for name, value in group.items() if is_plain(value)})
    return tensors, rest


def is_plain(value: object) -> bool:
    """Whether JSON holds the value, but for the difference of tuples and lists."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


KERNELS = {"fused", "foreach"}  # how an optimizer computes, which the device decides


def _join_optimizer(tensors: dict[str, Tensor], rest: dict, optimizer: Optimizer) -> dict:
    state = {int(index): dict(entries) for index, entries in rest["state"].items()}
    groups = [
        {name: tuple(value) if isinstance(fresh.get(name), tuple) else value for name, value in (fresh | group).items()}
        | {name: fresh[name] for name in KERNELS & fresh.keys()}
        for group, fresh in zip(rest["param_groups"], optimizer.param_groups, strict=True)
    ]
    for key, tensor in tensors.items():
        owner, name = key.split("/")
        entries = groups[int(owner[6:])] if owner.startswith("group ") else state[int(owner)]
        entries[name] = tensor
    return {"param_groups": groups, "state": state}
