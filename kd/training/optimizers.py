"""The optimizer of a training: torch's or timm's, over groups of parameters that differ in weight decay and rate."""

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.config import FitConfig
from kd.config.flags import WITHOUT_BETAS, WITHOUT_EPS
from kd.errors import UserError, nearest, require
from kd.losses.base import Distiller
from kd.models import STAGES
from kd.models.libraries import timm_library
from kd.runs.checkpoint import is_plain
from kd.utils.console import clip

# Left out of torch.optim: LBFGS, which evaluates the loss several times a step; Rprop, for whole data sets as one
# batch; SparseAdam, for sparse gradients. Muon is below.
TORCH = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
}
FUSED = ("sgd", "adamw", "adam", "muon")  # muon: its AdamW


class Kind(NamedTuple):
    """What the parameters of a group have in common."""

    lr_scale: float
    decays: bool
    muon: bool  # a matrix for Muon; False with other optimizers


class MuonWithAdamW(Optimizer):
    """torch's Muon (Jordan, 2024) for the matrices of hidden linear layers and AdamW for all else, as one optimizer.

    Muon's steps are scaled to the size of AdamW's (arXiv:2502.16982, section 2.2), so one --lr and one --weight-decay,
    those that suit AdamW, serve both. Momentum 0.95 with Nesterov, torch's defaults.
    """

    def __init__(self, matrices: list[dict], others: list[dict], adamw: dict):
        both = {"lr": adamw["lr"], "weight_decay": adamw["weight_decay"]}
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **both)
        self.adamw = torch.optim.AdamW(others, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], both)
        self._share()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Make groups and state those of both: they are new objects once a checkpoint is loaded."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: None = None) -> None:
        self.muon.step()
        self.adamw.step()


def make_optimizer(distiller: Distiller, fit: FitConfig, model: str, accelerator: Accelerator) -> Optimizer:
    """The optimizer over everything trainable: the student, called `model`, and what the method trains beside it.

    Raises: UserError if the optimizer is not installed, or cannot group or train the parameters of this network.
    """
    # One kernel for all parameters; on a CPU no faster. Not under fp16: where the first step overflows, the fused
    # kernel returns early and leaves the momentum as uninitialised memory.
    fused = accelerator.device.type == "cuda" and accelerator.scaler is None and fit.optimizer in FUSED
    groups = group_parameters(distiller, fit, model)
    if fit.optimizer == "muon":
        _require_matrices(any(kind.muon for kind in groups), model)
    return build(fit, groups, {"fused": True} if fused else {})


def check_network(network: nn.Module, fit: FitConfig, model: str, headless: bool) -> None:
    """Raises UserError if the optimizer or --layer-decay cannot work on this network, before its teacher is trained."""
    if fit.optimizer == "muon":
        _require_matrices(bool(muon_names(network, "muon", headless)), model)
    if fit.layer_decay is not None:
        layer_scales(network, fit.layer_decay, model)


def _require_matrices(found: bool, model: str) -> None:
    require(
        found,
        f"--optimizer muon: {model} trains no hidden linear layer, and torch's Muon trains nothing else; take"
        " timm/muon, which trains convolutions too",
    )


def build(fit: FitConfig, groups: dict[Kind, list[nn.Parameter]], options: dict) -> Optimizer:
    """The optimizer by its name, over groups of parameters. Raises UserError."""
    parts = {kind: _as_group(kind, parameters, fit) for kind, parameters in groups.items()}
    name, options = fit.optimizer, options | _settings(fit)
    if name == "muon":
        matrices = [part for kind, part in parts.items() if kind.muon]
        others = [part for kind, part in parts.items() if not kind.muon]
        return MuonWithAdamW(matrices, others, options | {"lr": fit.lr})
    if name in TORCH:
        return TORCH[name](list(parts.values()), fit.lr, **options)
    return _timm_optimizer(fit, list(parts.values()), options)


def _as_group(kind: Kind, parameters: list[nn.Parameter], fit: FitConfig) -> dict:
    group = {"params": parameters}
    if not kind.decays:
        group["weight_decay"] = 0.0
    if kind.lr_scale != 1:
        group["lr_scale"] = kind.lr_scale
    if fit.optimizer.startswith("timm/") and "muon" in fit.optimizer and not kind.muon:
        group["use_fallback"] = True  # timm's variants of Muon train these by AdamW
    return group


def _settings(fit: FitConfig) -> dict:
    """Options of the optimizer that flags give; what is left out stays as its authors have it."""
    given = {"weight_decay": fit.weight_decay}
    if fit.optimizer == "sgd":
        return given | {"momentum": fit.momentum, "nesterov": fit.nesterov}
    given |= {"betas": fit.betas} if fit.betas else {}
    return given | ({} if fit.eps is None else {"eps": fit.eps})


def _timm_optimizer(fit: FitConfig, groups: list[dict], options: dict) -> Optimizer:
    """One of timm's, by timm's own factory; those with a momentum take --momentum."""
    try:
        timm_library()
    except UserError as error:
        raise UserError(f"--optimizer {fit.optimizer}: needs timm: pip install timm") from error
    from timm.optim import create_optimizer_v2

    name = fit.optimizer.removeprefix("timm/")
    return create_optimizer_v2(groups, name, lr=fit.lr, momentum=fit.momentum, **options)


def group_parameters(distiller: Distiller, fit: FitConfig, model: str) -> dict[Kind, list[nn.Parameter]]:
    """The trainable parameters by what they have in common; one group by default."""
    student, prefix = distiller.get_submodule(distiller.bare), f"{distiller.bare}."
    scales = {} if fit.layer_decay is None else layer_scales(student, fit.layer_decay, model)
    spared = set() if fit.decay_norm_and_bias else without_decay(distiller)
    headless = distiller.loss.config.embeds
    matrices = {f"{prefix}{name}" for name in muon_names(student, fit.optimizer, headless)}
    groups: dict[Kind, list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            kind = Kind(scales.get(name.removeprefix(prefix), 1.0), name not in spared, name in matrices)
            groups.setdefault(kind, []).append(parameter)
    return groups


def without_decay(distiller: Distiller) -> set[str]:
    """Names of biases, weights of normalisation, and what timm's networks list themselves (positions, tokens)."""
    listed = getattr(distiller.get_submodule(distiller.bare), "no_weight_decay", set)()  # timm's name for it
    patterns = [f"{distiller.bare}.{pattern}" for pattern in listed]
    return {
        name
        for name, parameter in distiller.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def muon_names(network: nn.Module, optimizer: str, headless: bool) -> set[str]:
    """Names of the weights that are Muon's; its authors leave the classifier and embeddings to AdamW.

    `headless`: whether the network has no classifier.
    """
    if "muon" not in optimizer:
        return set()
    kinds = (nn.Linear,) if optimizer == "muon" else (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = dict(network.named_modules())
    linear = [part for part in modules.values() if isinstance(part, nn.Linear)]
    classes = linear[-1].out_features if linear and not headless else 0
    names = set()
    for name, module in modules.items():
        if isinstance(module, kinds) and getattr(module, "out_features", None) != classes:
            names |= {f"{name}.weight", f"{name}.parametrizations.weight.original"}  # the latter if it is compressed
        if isinstance(module, nn.MultiheadAttention):
            names.add(f"{name}.in_proj_weight")
    return names & {name for name, _ in network.named_parameters()}


def layer_scales(student: nn.Module, decay: float, model: str) -> dict[str, float]:
    """Each parameter's share of the learning rate: decay to the power of the layers above it (arXiv:2106.08254).

    Layers are the blocks as timm counts them, or the stages of kd's own networks; the classifier is the last one.
    Raises: UserError if the order of the network's layers is not known.
    """
    matcher = getattr(student, "group_matcher", None)  # timm's name for it
    if matcher is not None:
        depths = timm_library().models.group_parameters(student, matcher(coarse=False), reverse=True)
    else:
        names = [name for name, _ in student.named_parameters()]
        ends = [_last(names, stage) for stage in STAGES.get(model, ())]
        depths = {name: sum(end < place for end in ends if end >= 0) for place, name in enumerate(names)}
    deepest = max(depths.values(), default=0)
    require(
        deepest > 0,
        f"--layer-decay: the order of {model}'s layers is not known; take a network of timm or of kd, or leave it out",
    )
    return {name: decay ** (deepest - depth) for name, depth in depths.items()}


def _last(names: list[str], stage: str) -> int:
    """The place of a stage's last parameter; -1 if it has none."""
    return max((place for place, name in enumerate(names) if name.startswith(f"{stage}.")), default=-1)


def check_optimizer(fit: FitConfig) -> None:
    """Raises UserError, before any data is read, if the optimizer is not installed or cannot be resumed."""
    if fit.optimizer in TORCH or fit.optimizer == "muon":
        return
    short = fit.optimizer.removeprefix("timm/")
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    try:
        optimizer = build(dataclasses.replace(fit, lr=fit.lr or 0.1), {Kind(1.0, True, True): parameters}, {})
        from timm.optim import get_optimizer_info

        known = get_optimizer_info(short)
        for flag, taken in (("betas", known.has_betas), ("eps", known.has_eps)):
            given = getattr(fit, flag) not in ((), None)
            require(taken or not given, f"--{flag}: {fit.optimizer} has none; leave it out")
        require(
            not known.second_order,
            f"--optimizer {fit.optimizer}: needs second derivatives, which no step here computes; take another one",
        )
        sum((parameter**2).sum() for parameter in parameters).backward()
        optimizer.step()
    except Exception as error:  # each of timm's optimizers fails in its own way
        if isinstance(error, UserError):
            raise
        from timm.optim import list_optimizers

        why = clip(str(error), 200) if short in list_optimizers() else nearest(short, list_optimizers())
        raise UserError(f"--optimizer {fit.optimizer}: timm cannot make it ({why}); take another one") from error
    values = [value for entries in optimizer.state.values() for value in entries.values()]
    require(
        all(is_plain(value) or _comes_back(value) for value in values),
        f"--optimizer {fit.optimizer}: keeps what no checkpoint here can hold; take another one",
    )


def _comes_back(value: object) -> bool:
    """Whether a value of an optimizer's state is the same after load_state_dict, which makes all floats float32."""
    return isinstance(value, Tensor) and (not value.is_floating_point() or value.dtype == torch.float32)


def describe(optimizer: Optimizer, fit: FitConfig) -> str | None:
    """One line on the optimizer and its groups; None if it is SGD with one group."""
    groups = optimizer.param_groups
    if fit.optimizer == "sgd" and len(groups) == 1 and fit.decay_norm_and_bias:
        return None
    settings = {"betas": WITHOUT_BETAS, "eps": WITHOUT_EPS}
    known = {key: groups[-1].get(key) for key, absent in settings.items() if fit.optimizer not in absent}
    parts = [f"{key} {_numbers(value)}" for key, value in known.items() if value is not None]
    decayed, free = (_count(group for group in groups if bool(group["weight_decay"]) == has) for has in (True, False))
    if fit.weight_decay and free:
        parts.append(
            f"weight decay {fit.weight_decay:g} on {decayed} tensors, none on {free} biases and normalisations"
        )
    else:
        parts.append(f"weight decay {fit.weight_decay:g} on all {decayed + free} tensors")
    if isinstance(optimizer, MuonWithAdamW):
        parts.append(f"Muon on {_count(optimizer.muon.param_groups)} matrices, AdamW on the others")
    if fit.layer_decay is not None:
        scales = [group.get("lr_scale", 1.0) for group in groups]
        parts.append(f"lr x {min(scales):.3g} in the first of {len(set(scales))} layers, x 1 in the last")
    return f"optimizer {fit.optimizer}: {'; '.join(parts)}"


def _count(groups: Iterable[dict]) -> int:
    return sum(len(group["params"]) for group in groups)


def _numbers(value: object) -> str:
    return " ".join(f"{part:g}" for part in value) if isinstance(value, tuple | list) else f"{value:g}"
