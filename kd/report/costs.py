"""The cost of running a network: multiplications, bytes on disk, time for one image on this machine's CPU."""

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

COUNTED = 2  # version of count_macs: costs of another one are measured again (1 left out fused attention)

TIMING_SECONDS = 3.0  # roughly, for each network

# Flags that change a network's cost, beside its model and data.
COST_FLAGS = (*(entry.name for entry in dataclasses.fields(CompressConfig)), "image_size", "origin", "model_args")


class Cost(NamedTuple):
    macs: int  # multiply-accumulates of convolutions and matrix products, one image
    bytes: int
    milliseconds: float


def measure_cost(folder: Path, trust_code: bool) -> Cost:
    """Load the run's network and time it. Raises UserError if it cannot be loaded."""
    trained = load_network(folder, trust_code)
    size = tuple(trained.info["image_size"])
    image = torch.zeros(1, 3, *size)
    with same_threads(), torch.no_grad():
        torch.set_num_threads(THREADS)
        macs = count_macs(trained.network, size)
        (seconds,) = time_interleaved({"network": lambda: trained.network(image)}, TIMING_SECONDS).values()
    return Cost(macs, (folder / "model.safetensors").stat().st_size, 1000 * seconds)


class Costs:
    """Costs by network, measured once and stored beside the report, so that it repeats with the same numbers."""

    def __init__(self, path: Path, trust_code: bool, measure_again: bool, trained: Collection[Path] = ()):
        self.path, self.trust_code = path, trust_code
        self.trained = {folder.resolve() for folder in trained}  # runs whose code this command has run already
        self.machine = describe_machine()
        self.notes: dict[str, str] = {}  # why a run's network could not be measured, by folder
        self._measured: dict[str, Cost] = {}
        if not measure_again and path.exists():
            try:
                stored = read_json(path)
                networks = {key: Cost(*values) for key, values in stored["networks"].items()}
                alike = (stored["machine"], stored.get("counted", 1)) == (self.machine, COUNTED)
                self._measured = networks if alike else {}
            except (UserError, KeyError, TypeError, AttributeError):
                self._measured = {}  # malformed: measured again

    def of(self, run: Run) -> Cost | None:
        """The cost of a run's network; None if it cannot be built, for the reason in `notes`."""
        key = f"{run.summary['model']} {run.summary['params']} {run.identity['data']} {run.identity.get('classes')}"
        flags = {flag: run.identity[flag] for flag in COST_FLAGS if run.identity.get(flag) is not None}
        key += f" {json.dumps(flags, sort_keys=True)}" if flags else ""
        if key not in self._measured:
            try:
                self._measured[key] = measure_cost(run.path, self.trust_code or run.path.resolve() in self.trained)
            except Exception as error:  # anybody's code may raise anything; the report goes on
                self.notes[str(run.path)] = str(error)
                return None
            write_json(self.path, {"machine": self.machine, "counted": COUNTED, "networks": self._measured})
        return self._measured[key]
