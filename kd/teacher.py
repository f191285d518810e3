"""Teachers: anything that answers a Batch with Outputs. The training loop cannot tell one from another."""

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd.data import Data
from kd.errors import require
from kd.outputs import Batch, Outputs, Tap
from kd.run_folder import load_network

Teacher = Callable[[Batch], Outputs]


class Renormalize(nn.Module):
    """From the student's normalisation to the teacher's own."""

    def __init__(self, ours: tuple, theirs: tuple):
        super().__init__()
        mean, std, their_mean, their_std = (torch.tensor(part)[:, None, None] for part in (*ours, *theirs))
        self.register_buffer("scale", std / their_std, persistent=False)
        self.register_buffer("shift", (mean - their_mean) / their_std, persistent=False)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return image * self.scale + self.shift


class Frozen(NamedTuple):
    """A teacher's network, ready to be asked: on the device, in eval mode, without gradients."""

    network: nn.Module
    folder: Path
    sha256: str  # of its weights and of what it expects
    summary: dict
    classes: int  # of its own classifier, before they are matched with the data's
    members: tuple["Frozen", ...] = ()  # of several teachers


class Average(nn.Module):
    """Several networks as one: the logarithm of their mean probabilities, which are logits again.

    The mean is that of the probabilities as they are; a method's temperature softens it afterwards.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        each = torch.stack([network(image).float().log_softmax(dim=1) for network in self.networks])
        return each.logsumexp(dim=0) - math.log(len(self.networks))


def load_teachers(folders: Sequence[Path], data: Data, device: torch.device, trust_code: bool) -> Frozen:
    """The teacher in the one folder, or the average of those in several. Raises UserError as load_teacher does."""
    members = tuple(load_teacher(folder, data, device, trust_code) for folder in folders)
    if len(members) == 1:
        return members[0]
    network = Average([member.network for member in members]).eval()
    sha256 = hashlib.sha256("".join(member.sha256 for member in members).encode()).hexdigest()
    name = Path(" + ".join(str(member.folder) for member in members))
    model = " + ".join(member.summary["model"] for member in members)
    return Frozen(network, name, sha256, {"model": model}, len(data.classes), members)


def load_teacher(folder: Path, data: Data, device: torch.device, trust_code: bool) -> Frozen:
    """A finished run as teacher for students on `data`; its normalisation is kept, its classes are matched by name.

    Raises: UserError where it lacks a class of `data`, takes another image size, or its network is a `module:function`
    and not trusted.
    """
    network, info, sha256, summary = load_network(folder, trust_code)
    theirs, ours = info["classes"], list(data.classes)
    missing = [name for name in ours if name not in theirs]
    require(
        not missing and len(set(theirs)) == len(theirs),
        f"teacher {folder} knows {len(theirs)} classes and not {', '.join(map(repr, missing[:3]))} of the data's"
        f" {len(ours)}: train one on this data",
    )
    require(
        tuple(info["image_size"]) == data.size,
        f"teacher {folder} takes images of {info['image_size']} (height, width), the data has {list(data.size)}",
    )
    # As hooks, so that its layers keep their names.
    if (tuple(info["mean"]), tuple(info["std"])) != (data.mean, data.std):
        renormalize = Renormalize((data.mean, data.std), (info["mean"], info["std"])).to(device)
        network.register_forward_pre_hook(lambda _, images: renormalize(*images))
    if theirs != ours:  # by name: ours may come in another order, or be some of theirs
        columns = torch.tensor([theirs.index(name) for name in ours], device=device)
        network.register_forward_hook(lambda _, images, logits: logits[:, columns])
    # What it says follows from its normalisation and classes as well.
    identity = hashlib.sha256(f"{sha256} {json.dumps(info, sort_keys=True)}".encode()).hexdigest()
    return Frozen(network.eval().requires_grad_(False).to(device), folder, identity, summary, len(theirs))


def folded(network: nn.Module) -> nn.Module:
    """A copy with each BatchNorm folded into the convolution before it; the network itself where it cannot be traced.

    Logits differ in their last bits.
    """
    inside = nn.Sequential(copy.deepcopy(network))  # so that hooks of the network itself are traced, or refuse to be
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


def live(
    network: nn.Module, accelerator: Accelerator, layers: tuple[str, ...] = (), channels_last: bool = True
) -> Teacher:
    """Ask the network at every step, for these layers' features too."""
    quick = network if layers else folded(network)
    if channels_last:
        quick = quick.to(memory_format=torch.channels_last)
    tap = Tap(quick, layers)

    # no_grad, not inference_mode: the latter's tensors cannot take part in a later backward pass.
    @torch.no_grad()
    def answer(batch: Batch) -> Outputs:
        with accelerator.autocast():
            logits, features = tap(batch.image)
        return Outputs(logits.float(), features)

    return answer
