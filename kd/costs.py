"""What a network costs to run: multiplications, bytes on the disk, time for one image on this machine's CPU."""

import dataclasses
import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kd.config import CompressConfig
from kd.errors import UserError
from kd.files import read_json, write_json
from kd.launch import same_threads
from kd.reporting.results import Run
from kd.shipping.timing import interleaved
from kd.trained import load_network

PATIENCE = 3.0  # seconds, roughly, of timing a network
SHAPING = tuple(entry.name for entry in dataclasses.fields(CompressConfig))  # what else tells networks apart
SHAPING += ("image_size", "origin")
THREADS = 1  # of one image there is little to share out, and one thread's time is the steadier


class Cost(NamedTuple):
    macs: int  # multiply-accumulates of convolutions and matrix products, one image
    bytes: int
    milliseconds: float


def measure(folder: Path, trust_code: bool) -> Cost:
    """Load the run's network and time it. Raises UserError where it cannot be loaded."""
    trained = load_network(folder, trust_code)
    size = tuple(trained.info["image_size"])
    image = torch.zeros(1, 3, *size)
    with same_threads(), torch.no_grad():
        torch.set_num_threads(THREADS)
        macs = count_macs(trained.network, size)
        (seconds,) = interleaved({"network": lambda: trained.network(image)}, PATIENCE).values()
    return Cost(macs, (folder / "model.safetensors").stat().st_size, 1000 * seconds)


@torch.no_grad()
def count_macs(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of the network's convolutions and matrix products for one image; it is left as it was."""
    from torch.utils.flop_counter import FlopCounterMode

    training, device = network.training, next(network.parameters()).device
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *image_size, device=device))
    network.train(training)
    return counter.get_total_flops() // 2  # the library counts a multiply-accumulate as two


def machine(threads: int = THREADS) -> str:
    """The CPU's name as far as the system tells it, and the threads used: what a latency belongs to."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


class Costs:
    """Measured once a network and kept beside the report, so that the same report twice has the same numbers."""

    def __init__(self, path: Path, trust_code: bool, afresh: bool, trained: Collection[Path] = ()):
        self.path, self.trust_code = path, trust_code
        self.trained = {folder.resolve() for folder in trained}  # runs whose code this command has run already
        self.where, self.notes = machine(), {}
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
                self._kept[key] = measure(run.path, self.trust_code or run.path.resolve() in self.trained)
            except Exception as error:  # the network may be anybody's code: whatever it raises, the report goes on
                self.notes[str(run.path)] = str(error)
                return None
            write_json(self.path, {"machine": self.where, "networks": self._kept})
        return self._kept[key]
