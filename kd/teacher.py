"""Teachers: anything that answers a Batch with Outputs. The training loop cannot tell one from another."""

import copy
import dataclasses
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

from kd.adapt import adapt, resized
from kd.config import DistillConfig, Job
from kd.data import Data
from kd.errors import require
from kd.foreign import NEW_HEAD, build, check, is_foreign, origin_of, read, with_fresh_head
from kd.foreign_file import expanded
from kd.hub import local_folder
from kd.models import build_model
from kd.outputs import Batch, Outputs, Tap
from kd.trained import load_network, read_model

Teacher = Callable[[Batch], Outputs]


class Frozen(NamedTuple):
    """A teacher's network, ready to be asked: on the device, in eval mode, without gradients."""

    network: nn.Module
    folder: Path  # or the name of a network from elsewhere
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


def check_teachers(config: DistillConfig) -> None:
    """Raises UserError for a teacher that is not there, or cannot be what its flags say: before any data is read."""
    require(
        not config.fine_tune_teacher or any(map(is_foreign, config.teachers)),
        f"--fine-tune-teacher: {', '.join(config.teachers)} is a run, which has learned its last layer; leave the flag"
        " out, or name a teacher from elsewhere",
    )
    for name in config.teachers:
        if is_foreign(name):
            check(name, config.teacher_model)
        else:
            read_model(local_folder(expanded(name)))


def load_teachers(
    names: Sequence[str | Path], data: Data, device: torch.device, trust_code: bool, model: str = ""
) -> Frozen:
    """The one teacher named, or the average of several; `model` is the network of those that are files of weights.

    Raises UserError as load_teacher and kd.foreign do.
    """
    load = lambda name: (  # noqa: E731
        _load_foreign(str(name), model, data, device)
        if is_foreign(str(name))
        else load_teacher(local_folder(name), data, device, trust_code)
    )
    members = tuple(load(name) for name in names)
    if len(members) == 1:
        return members[0]
    network = Average([member.network for member in members]).eval()
    sha256 = hashlib.sha256("".join(member.sha256 for member in members).encode()).hexdigest()
    name = Path(" + ".join(str(member.folder) for member in members))
    model = " + ".join(member.summary["model"] for member in members)
    return Frozen(network, name, sha256, {"model": model}, len(data.classes), members)


def load_teacher(folder: Path, data: Data, device: torch.device, trust_code: bool) -> Frozen:
    """A finished run as teacher for students on `data`.

    Its normalisation and image size are kept, its classes are matched by name. Raises: UserError where it lacks a class
    of `data`, or its network is a `module:function` and not trusted.
    """
    network, info, sha256, summary = load_network(folder, trust_code)
    adapt(network, info, data, device, f"teacher {folder}", "train one on this data")
    # What it says follows from its normalisation and classes as well.
    identity = hashlib.sha256(f"{sha256} {json.dumps(info, sort_keys=True)}".encode()).hexdigest()
    return Frozen(network, folder, identity, summary, len(info["classes"]))


def _load_foreign(name: str, model: str, data: Data, device: torch.device) -> Frozen:
    found = read(name, model)
    network = build(found, name)
    adapt(network, found._asdict(), data, device, f"--teacher {name}", NEW_HEAD)
    return Frozen(network, Path(name), found.sha256, {"model": found.model}, len(found.classes))


def head_task(config: DistillConfig, name: str | Path, data: Data) -> tuple[Job, Data] | None:
    """What trains a new last layer upon a teacher from elsewhere: the job, and the data normalised as that one expects.

    None where that is not asked, or for a run, which has learned its last layer.
    """
    if not (config.fine_tune_teacher and is_foreign(str(name))):
        return None
    found = read(str(name), config.teacher_model)
    job = config.head_job(found.model, origin_of(found, str(name)))
    return job, dataclasses.replace(data, mean=found.mean, std=found.std)


def start_network(job: Job, data: Data) -> nn.Module:
    """The job's network as its training begins: fresh, or from elsewhere and fresh in its last layer alone."""
    if job.origin is None:
        return build_model(job.model, len(data.classes), data.size)
    network = with_fresh_head(job, len(data.classes))
    resized(network, job.origin.image_size, data)
    return network


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
