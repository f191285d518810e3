"""A teacher whose network runs at every step."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd.models.features import Tap
from kd.types import Batch, Outputs
from kd.utils.compiling import compiled, uses_graphs

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Layers all of whose parameters autocast casts at every call. Not their subclasses, which may compute with the weights
# first (standardised or quantised ones).
CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

TeacherLogits = Callable[[Batch], Outputs]
"""A teacher as the training loop sees it: live or cached, the loop cannot tell."""


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """A copy with each BatchNorm folded into the convolution before it; the network itself if it cannot be traced.

    Logits differ in their last bits.
    """
    inside = nn.Sequential(copy.deepcopy(network))  # so that the network's own hooks are traced too, or tracing fails
    try:
        traced = torch.fx.symbolic_trace(inside)
    except Exception:  # tracing fails in as many ways as there are networks
        return network
    modules, calls = dict(traced.named_modules()), Counter(node.target for node in traced.graph.nodes)
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        pair = [modules.get(n.target) for n in (source, node) if isinstance(n, torch.fx.Node) and n.op == "call_module"]
        if [type(module) for module in pair] != [nn.Conv2d, nn.BatchNorm2d] or len(source.users) > 1:
            continue
        if pair[1].running_mean is None:  # it normalises by each batch
            continue
        if calls[source.target] == calls[node.target] == 1:  # one that runs twice would be folded for both
            traced.set_submodule(source.target, fuse_conv_bn_eval(*pair))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


class HalfWeights:
    """The weights of a frozen network that autocast would cast at every step, cast once: the same bits, half the
    launches of a ResNet.

    `used` puts them into the network inside the block; `put` for good.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self._weights = [
            (module._parameters, name, nn.Parameter(weight.to(dtype), requires_grad=False))
            for module in network.modules()
            if type(module) in CAST
            for name, weight in module.named_parameters(recurse=False)
            if weight.dtype == torch.float32
        ]

    def put(self) -> None:
        for parameters, name, weight in self._weights:
            parameters[name] = weight

    @contextmanager
    def used(self) -> Iterator[None]:
        before = [parameters[name] for parameters, name, _ in self._weights]
        self.put()
        try:
            yield
        finally:
            for (parameters, name, _), weight in zip(self._weights, before, strict=True):
                parameters[name] = weight


def live_logits(
    network: nn.Module, accelerator: Accelerator, layers: tuple[str, ...] = (), channels_last: bool = True
) -> TeacherLogits:
    """A teacher that runs `network` on each batch, without gradients; compiled where the launch compiles.

    Its outputs (float32) include the features of `layers`, and the logits of the strong view if the batch has one.
    In half precision they are those of autocast, a few units of 2^-8 of the largest logit (fp16: 2^-11) from float32's.
    """
    fast = network if layers else fold_batchnorm(network)
    if channels_last:
        fast = fast.to(memory_format=torch.channels_last)
    tap, in_precision, graphs = Tap(fast, layers), _in_precision(fast, network, accelerator), uses_graphs(accelerator)

    def answer(batch: Batch) -> Outputs:
        logits, features, strong = tap.of_batch(batch)
        return Outputs(logits.float(), features, None if strong is None else strong.float())

    answer = compiled(answer, accelerator)

    # no_grad, not inference_mode: the latter's tensors cannot take part in a later backward pass.
    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        nonlocal in_precision
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with in_precision(), accelerator.autocast():
                return answer(batch)
        except RuntimeError:
            if in_precision is nullcontext:
                raise
            in_precision = nullcontext  # the network leaves autocast for a layer of its own
            return run(batch)

    return run


def _in_precision(fast: nn.Module, network: nn.Module, accelerator: Accelerator) -> Callable:
    """Makes a block's context in which `fast` has its weights in the run's precision: always, if it is a copy."""
    dtype = HALF.get(accelerator.mixed_precision)
    if dtype is None:
        return nullcontext
    weights = HalfWeights(fast, dtype)
    if fast is network:  # it is scored too, and others may hold it
        return weights.used
    weights.put()
    return nullcontext
