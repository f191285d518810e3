"""The deployed form of a trained network: it takes pixels, with normalisation inside and nothing left of training."""

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
from kd.utils.console import one_line

PREPROCESSING_ENTRY = "preprocessing.json"  # the extra file inside a .pt2 file that describes its input


class Deployed(nn.Module):
    """A network behind its run's own normalisation, in the same arithmetic as in training."""

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
    """Replace every parametrized weight (quantised, pruned, normalised) by its computed value, in place."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return network


def trace(deployed: Deployed, model: str) -> ExportedProgram:
    """The network as a graph of torch operations, for batches of any size.

    Raises: UserError if it cannot be traced, for example because its steps depend on its inputs' values.
    """
    images = torch.zeros(2, 3, *deployed.image_size, dtype=torch.uint8)
    try:
        with quiet():
            program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # each network fails with an exception of its own
        raise UserError(
            f"{model} cannot be exported: torch.export does not trace it for batches of any size"
            f" ({one_line(error)}); --formats safetensors exports its weights"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines with local paths
    return program


def rounds_activations(program: ExportedProgram) -> bool:
    """Whether the graph rounds activations, so that a difference in the last bit may become a whole step."""
    return any(node.target is torch.ops.aten.round.default for node in program.graph.nodes)


def write_pt2(program: ExportedProgram, path: Path, preprocessing: dict) -> None:
    with quiet():
        torch.export.save(program, path, extra_files={PREPROCESSING_ENTRY: json.dumps(preprocessing)})


def open_pt2(path: Path) -> nn.Module:
    """Load a .pt2 file as a module from pixels to logits."""
    with quiet():
        return torch.export.load(path).module()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, logs and prints: exporters warn about their own internals, and raise their errors as well."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
