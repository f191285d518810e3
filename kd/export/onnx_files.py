"""Write a traced network as a float32 ONNX file; and what all ONNX files have in common."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.errors import UserError
from kd.export.deployed import quiet
from kd.export.onnx_runtime import METADATA_KEY
from kd.utils.console import one_line

NORMALISATION = ("Cast", "Mul", "Sub")  # the first nodes of a Deployed network, in this order


def write_onnx(program, path: Path, preprocessing: dict) -> None:
    """Write a torch.export program as one file: pixels in, logits or embeddings out, any batch.

    `preprocessing` goes into its metadata.
    Raises: UserError if an operation has no counterpart in ONNX.
    """
    import torch

    with errors_as_messages(path.name):
        options = {"dynamo": True, "external_data": False, "verbose": False}
        names = {"input_names": ["images"], "output_names": [preprocessing["output"]]}
        exported = torch.onnx.export(program, **names, **options)
        save_onnx(exported.model_proto, path, preprocessing)


def save_onnx(model, path: Path, preprocessing: dict) -> None:
    """Write a model with `preprocessing` and no local paths in its metadata."""
    import onnx

    _strip_metadata(model.graph, preprocessing["shape"][0])
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(preprocessing)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


@contextmanager
def errors_as_messages(file: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a UserError that names `file`; but a full disk is another matter."""
    try:
        with quiet():
            yield
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{file}: cannot be made ({one_line(error)}); leave it out of --formats") from error


def _strip_metadata(graph, batch: str) -> None:
    """Remove source lines and local paths, which each node carries, and name the batch dimension."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = batch


def normalisation_nodes(graph) -> list[str]:
    """Names of the nodes that normalise pixels; they stay in float32, where 8 bits would gain nothing."""
    value, names = "images", []
    for kind in NORMALISATION:
        node = next((node for node in graph.node if node.op_type == kind and value in node.input), None)
        if node is None:
            break
        names.append(node.name)
        value = node.output[0]
    return names
