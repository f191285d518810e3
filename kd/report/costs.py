"""What a network costs to run: multiplications, bytes on the disk, time for one image on this machine's CPU."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from kd.config import CompressConfig
from kd.errors import UserError
from kd.models.cost import THREADS, count_macs, describe_machine, time_interleaved
from kd.runs.load import load_network
from kd.runs.results import Run
from kd.utils.files import read_json, write_json
from kd.utils.processes import same_threads

PATIENCE = 3.0  # seconds, roughly, of timing a network


SHAPING = tuple(entry.name for entry in dataclasses.fields(CompressConfig))  # what else tells networks apart


SHAPING += ("image_size", "origin")


class Cost(NamedTuple):
    macs: int  # multiply-accumulates of convolutions and matrix products, one image
    bytes: int
    milliseconds: float


def measure_cost(folder: Path, trust_code: bool) -> Cost:
    """Load the run's network and time it. Raises UserError where it cannot be loaded."""
    trained = load_network(folder, trust_code)
    size = tuple(trained.info["image_size"])
    image = torch.zeros(1, 3, *size)
    with same_threads(), torch.no_grad():
        torch.set_num_threads(THREADS)
        macs = count_macs(trained.network, size)
        (seconds,) = time_interleaved({"network": lambda: trained.network(image)}, PATIENCE).values()
    return Cost(macs, (folder / "model.safetensors").stat().st_size, 1000 * seconds)


class Costs:
    """Measured once a network and kept beside the report, so that the same report twice has the same numbers."""

    def __init__(self, path: Path, trust_code: bool, afresh: bool, trained: Collection[Path] = ()):
        self.path, self.trust_code = path, trust_code
        self.trained = {folder.resolve() for folder in trained}  # runs whose code this command has run already
        self.where, self.notes = describe_machine(), {}
        self._kept: dict[str, Cost] = {}
        if not afresh and path.exists():
            try:
                kept = read_json(path)
                networks = {key: Cost(*values) for key, values in kept["networks"].items()}
                self._kept = networks if kept["machine"] == self.where else {}
            except (UserError, KeyError, TypeError, AttributeError):
                self._kept = {}  # measured again

    def of(self, run: Run) -> Cost | None:
        """None where the network cannot be built; `notes` says why, by folder."""
        key = f"{run.summary['model']} {run.summary['params']} {run.identity['data']} {run.identity.get('classes')}"
        asked = {flag: run.identity[flag] for flag in SHAPING if run.identity.get(flag) is not None}
        key += f" {json.dumps(asked, sort_keys=True)}" if asked else ""
        if key not in self._kept:
            try:
                self._kept[key] = measure_cost(run.path, self.trust_code or run.path.resolve() in self.trained)
            except Exception as error:  # the network may be anybody's code: whatever it raises, the report goes on
                self.notes[str(run.path)] = str(error)
                return None
            write_json(self.path, {"machine": self.where, "networks": self._kept})
        return self._kept[key]
