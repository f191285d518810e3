"""A trained network as it is handed out: it takes pixels, and has no training left in it."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from kd.data import rows
from kd.errors import UserError

WORDS = "preprocessing.json"  # what a .pt2 file says of itself, as one of its extra files


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own workings, and log and print pages on the way to an error that is raised as well."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def in_short(error: Exception) -> str:
    """The kind of an error and the first line of what it says, which may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no more is said'}"


class Deployed(nn.Module):
    """A network with the run's own normalisation, the very arithmetic of training, in front of it."""

    def __init__(self, network: nn.Module, info: dict):
        super().__init__()
        self.network = bake(network)
        self.register_buffer("mean", torch.tensor(info["mean"]))
        self.register_buffer("std", torch.tensor(info["std"]))
        self.image_size = tuple(info["image_size"])
        self.eval().requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        return self.network(rows.normalize(images, self.mean, self.std))


def bake(network: nn.Module) -> nn.Module:
    """Every weight that is computed from others (quantised, pruned, normalised) becomes what it was computed to be."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return network


def trace(deployed: Deployed, model: str) -> ExportedProgram:
    """The network as a graph of torch operations, for batches of any size.

    Raises: UserError where it cannot be one, as for a network whose steps follow from its inputs' values.
    """
    images = torch.zeros(2, 3, *deployed.image_size, dtype=torch.uint8)
    try:
        with quiet():
            program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # it fails in as many ways as there are networks
        raise UserError(
            f"{model} cannot be exported: torch.export cannot turn it into a graph for batches of any size"
            f" ({in_short(error)}); --formats safetensors ships its weights"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source code, with this machine's paths
    return program


def rounds(program: ExportedProgram) -> bool:
    """Whether it rounds its activations, so that a last bit's difference may become a whole step."""
    return any(node.target is torch.ops.aten.round.default for node in program.graph.nodes)


def write_pt2(program: ExportedProgram, path: Path, preprocessing: dict) -> None:
    with quiet():
        torch.export.save(program, path, extra_files={WORDS: json.dumps(preprocessing)})


def open_pt2(path: Path) -> nn.Module:
    """What the file holds, as a module from pixels to logits."""
    with quiet():
        return torch.export.load(path).module()
