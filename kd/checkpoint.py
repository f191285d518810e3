"""Saving and restoring the state of training, so that a run killed anywhere ends in the same bytes.

A checkpoint is a folder step-N of safetensors and JSON. It is written under another name; its manifest of sha256s comes
last; then it is renamed, and only then are older ones removed. A bit that flips later is noticed before it is used.
"""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.errors import UserError
from kd.files import (
    read_json,
    read_weights,
    remove_tree,
    sha256_file,
    sync_folder,
    write_json,
    write_weights,
)
from kd.state import State, sound

KEEP = 2  # the newest and, should it turn out bad, the one before


def save(folder: Path, state: State, module: nn.Module, optimizer: Optimizer, best: dict[str, Tensor]) -> None:
    """Write checkpoint `folder`/step-N; raises UserError where the disk does not take it, older ones intact."""
    partial = folder / f".partial-{state.step}"
    target = folder / f"step-{state.step}"
    try:
        folder.mkdir(exist_ok=True)
        for killed in folder.glob(".partial-*"):  # in the middle of its save
            remove_tree(killed)
        partial.mkdir()
        write_weights(partial / "model.safetensors", module.state_dict())
        tensors, rest = _split_optimizer(optimizer.state_dict())
        write_weights(partial / "optimizer.safetensors", tensors)
        write_weights(partial / "best.safetensors", best)
        write_json(partial / "state.json", {"state": asdict(state), "optimizer": rest})
        write_json(partial / "manifest.json", {path.name: sha256_file(path) for path in sorted(partial.iterdir())})
        sync_folder(partial)
        remove_tree(target)  # of an earlier life, at the same step
        os.rename(partial, target)
        sync_folder(folder)
    except OSError as error:
        remove_tree(partial)
        raise UserError(
            f"could not save to {folder} ({error}); free some space, then continue with --resume"
        ) from error
    # Newer ones were passed over as damaged when this life began: they must not count as kept.
    newer = [step for step in steps(folder) if step > state.step]
    for old in [*newer, *steps(folder)[len(newer) :][KEEP:]]:
        remove_tree(folder / f"step-{old}")


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, newest first (as numbers: 10 after 9)."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there never was one.

    Warns of each that is damaged. Raises UserError where all are: starting again is the user's to decide.
    """
    for step in steps(folder):
        checkpoint = folder / f"step-{step}"
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged ({fault}): passed over", stacklevel=2)
    if steps(folder):
        raise UserError(f"every checkpoint in {folder} is damaged; to start again, remove the run folder")
    return None


def _fault(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        wanted = {"model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"}
        if missing := wanted - set(manifest):
            return f"its manifest lacks {', '.join(sorted(missing))}"
        wrong = [name for name in sorted(wanted) if sha256_file(checkpoint / name) != manifest[name]]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    return f"{', '.join(wrong)} changed since it was saved" if wrong else None


def restore(checkpoint: Path, module: nn.Module, optimizer: Optimizer) -> tuple[State, dict[str, Tensor]]:
    """Load weights and optimizer in place; returns the position and the best weights so far."""
    content = read_json(checkpoint / "state.json")
    try:
        state = sound(State(**content["state"]))
        module.load_state_dict(read_weights(checkpoint / "model.safetensors"))
        tensors = read_weights(checkpoint / "optimizer.safetensors")
        optimizer.load_state_dict(_join_optimizer(tensors, content["optimizer"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{checkpoint} is none that this version can continue ({error!r:.200}); to start again, remove the run"
        ) from error
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Saved in plain order; fused optimizers want it to lie in memory as its parameter does.
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return state, read_weights(checkpoint / "best.safetensors")


def _split_optimizer(state: dict) -> tuple[dict[str, Tensor], dict]:
    """Tensors by "parameter/name", and what JSON can hold."""
    tensors, rest = {}, {"param_groups": state["param_groups"], "state": {}}
    for index, entries in state["state"].items():
        rest["state"][str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                rest["state"][str(index)][name] = value
    return tensors, rest


def _join_optimizer(tensors: dict[str, Tensor], rest: dict) -> dict:
    state = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split("/")
        state[int(index)][name] = tensor
    return {"param_groups": rest["param_groups"], "state": state}


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's BatchNorm statistics, which under data parallelism differ between processes."""
    if torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
