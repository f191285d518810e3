"""A teacher whose network runs at every step."""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd.models.features import Tap
from kd.types import Batch, Outputs

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
        if calls[source.target] == calls[node.target] == 1:  # one that runs twice would be folded for both
            traced.set_submodule(source.target, fuse_conv_bn_eval(*pair))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def live_logits(
    network: nn.Module, accelerator: Accelerator, layers: tuple[str, ...] = (), channels_last: bool = True
) -> TeacherLogits:
    """A teacher that runs `network` on each batch, without gradients.

    Its outputs include the features of `layers`, and the logits of the strong view if the batch has one.
    """
    fast = network if layers else fold_batchnorm(network)
    if channels_last:
        fast = fast.to(memory_format=torch.channels_last)
    tap = Tap(fast, layers)

    # no_grad, not inference_mode: the latter's tensors cannot take part in a later backward pass.
    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        with accelerator.autocast():
            logits, features, strong = tap.of_batch(batch)
        return Outputs(logits.float(), features, None if strong is None else strong.float())

    return run
