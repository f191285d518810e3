"""What a distillation method is, and the module that joins it to the student.

A method is a `DistillationLoss`: a module that turns both networks' outputs into weighted loss terms. One of your own
needs no change here (docs/extend.md). To add one to kd:

1. kd/losses/NAME.py: the citation, the loss as a pure function of tensors, and the class that wires it. Subclass
   `DistillationLoss`, or `FeatureLoss` (features.py) if the method compares feature maps or embeddings.
2. kd/config/methods.py: a dataclass with the method's flags and `loss`, the address of that class, in METHODS under its
   name on the command line.
3. tests/losses/test_loss_functions.py: a case that compares the function with a naive loop in tests/naive.py.
"""

import copy
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.config import NoneConfig
from kd.config.methods import MethodFlags, method_name
from kd.config.named import named_method
from kd.errors import UserError, require
from kd.losses.cross_entropy import BalancedCrossEntropy
from kd.metrics import closeness
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages, Step


class DistillationLoss(nn.Module, ABC):
    """A method: weighted loss terms by name, whose sum is minimised.

    Modules and parameters that it registers (projectors, say) are trained with the student.
    """

    needs_hard_labels = False  # True: refuses mixup and cutmix, whose images have two labels
    compares_images = False  # True: compares the images of a batch with each other, and needs two or more
    has_cross_entropy = True  # in a term called "ce"; False: none for --balance and --label-smoothing to change

    def __init__(self, config, pair: Pair):
        super().__init__()
        self.config = config
        self.labelled = pair.labelled
        self.student_layers = tuple(pair.student.features)  # keys of student.features in forward
        self.teacher_layers = tuple(pair.teacher.features) if pair.teacher else ()
        self.cross_entropy = BalancedCrossEntropy(
            pair.balance, pair.labels, pair.student.logits.shape[1], config.label_smoothing
        )
        # JSON from which `rebuild` makes the deployed network; empty if the student is deployed unchanged.
        self.recipe: dict = {}

    @classmethod
    def layers(cls, config, student: Stages, teacher: Stages | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers whose features the loss needs, as (student's, teacher's); none by default.

        `teacher` is None before the teacher is loaded; only the student's layers count then."""
        return (), ()

    @classmethod
    def for_flags(cls, kind: type[MethodFlags]) -> type["DistillationLoss"]:
        """The class for these flags; another one than this only if attributes of the class depend on them."""
        return cls

    @classmethod
    def partner(cls, config, model: str) -> str | None:
        """Name of a network to train from scratch beside a student called `model`; none by default."""
        return None

    def identity(self) -> dict:
        """What changes the method's result beside its flags, for the run's identity.

        Empty for all that the first runs did, so that they keep their folders."""
        return {}

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms, each averaged over this process's share of the batch; float32, with autocast off."""

    def hard_labels_term(self, batch: Batch, *logits: Float[Tensor, "b k"], weight: float = 1) -> dict[str, Tensor]:
        """{"ce": weight * cross-entropy}, summed over views if there are several `logits`; empty on data without
        labels."""
        if not self.labelled:
            return {}
        first, *others = (self.cross_entropy(view, batch) for view in logits)
        term = sum(others, first)
        return {"ce": term if weight == 1 else weight * term}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        """Logits whose softmax the student should match; None if the method matches no distribution."""
        return None

    def measures(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """How close the two networks are on a batch, for the log: means over the batch, left on the device."""
        labels = batch.label if self.labelled else None
        return closeness(student.logits, teacher.logits, labels, self.soft_labels(teacher))

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network to train, score, save and export; called once."""
        return student

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        """The deployed network without its weights, from a fresh student and a saved `recipe`."""
        return student


def loss_class(flags: MethodFlags | type[MethodFlags]) -> type[DistillationLoss]:
    """The class of the method that these flags belong to."""
    module, _, name = flags.loss.partition(":")
    kind = flags if isinstance(flags, type) else type(flags)
    return getattr(importlib.import_module(module), name).for_flags(kind)


class Distiller(nn.Module):
    """The student and its method behind one forward, so that DDP sees every trainable parameter.

    `compression`: the recipe of a compressed student, for model.json; empty otherwise.
    """

    def __init__(self, student: nn.Module, loss: DistillationLoss, compression: dict | None = None):
        super().__init__()
        _check_built(loss)
        self.student = loss.deployed(student)
        if self.student is not student:
            _check_deployed(loss, student, self.student)
        inside = (name for name, part in self.named_modules() if part is student)
        self.bare = next(inside, "student")  # the name of the student itself, which a method may have wrapped
        self.loss, self.compression = loss, compression or {}
        self.tap = Tap(self.student, loss.student_layers)
        self.held: tuple[nn.Parameter, ...] = ()  # of the student's, which --freeze-epochs keeps at first
        self._holding = False

    @property
    def deployed(self) -> nn.Module:
        return self.student

    @property
    def recipe(self) -> dict:
        """JSON from which the deployed network is rebuilt, with the method that does it; empty for a plain student."""
        return self.loss.recipe and {"method": method_name(self.loss.config), **self.loss.recipe}

    def train(self, mode: bool = True) -> "Distiller":
        """Keep frozen modules in eval mode: BatchNorm statistics stay fixed, and dropout stays off."""
        super().train(mode)
        held = set(self.held) if self._holding else ()
        for part in self.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad and parameter not in held for parameter in parameters):
                part.eval()
        return self

    def hold(self, holding: bool, with_gradients: bool) -> None:
        """Keep the `held` parameters as they are from now on, or train them. To be followed by `train`.

        The optimizer has them from the start, and leaves alone what has no gradient: no decay, no momentum, no state.
        So their first trained step is the same in a run that is resumed. `with_gradients`: compute and drop them, for
        DDP, which waits for the gradient of every parameter that it was built with.
        """
        self._holding = holding
        for parameter in self.held:
            parameter.requires_grad_(not holding or with_gradients)

    def drop_held_gradients(self) -> None:
        """After backward, before anything reads the gradients."""
        if self._holding:
            for parameter in self.held:
                parameter.grad = None

    def trained_parameters(self) -> list[nn.Parameter]:
        """The student's parameters that are trained now."""
        held = set(self.held) if self._holding else ()
        return [part for part in self.student.parameters() if part.requires_grad and part not in held]

    def forward(self, batch: Batch, teacher: Outputs | None) -> Step:
        """The student's logits (float32), the loss terms, and how close student and teacher are."""
        student = self.tap.of_batch(batch)
        # Losses lose digits in half precision: a Gram matrix in bfloat16 is off by 2e-3.
        with torch.autocast(batch.image.device.type, enabled=False):
            student, teacher = _float(student), teacher and _float(teacher)
            terms = self.loss(student, teacher, batch)
            if teacher is None:
                return Step(student.logits, terms)
            return Step(student.logits, terms, self.loss.measures(student, teacher, batch))


def _check_built(loss: DistillationLoss) -> None:
    """Raise UserError unless the method's class ran what it derives from."""
    called = "student_layers" in vars(loss)
    require(called, f"{method_name(loss.config)}: its __init__ must call super().__init__(config, pair)")


def _check_deployed(loss: DistillationLoss, student: nn.Module, deployed: nn.Module) -> None:
    """Raise UserError unless a method that deploys another network than the student can build it again."""
    name = method_name(loss.config)
    require(
        type(loss).rebuild.__func__ is not DistillationLoss.rebuild.__func__ and bool(loss.recipe),
        f"{name}: deploys another network than the student, which could not be loaded again; define rebuild, and"
        " self.recipe, the JSON that it needs",
    )
    recipe = {"method": name, **loss.recipe}
    try:
        recipe = json.loads(json.dumps(recipe))
    except TypeError as error:
        raise UserError(f"{name}: self.recipe is no JSON ({error}); take numbers, strings, lists and dicts") from error
    with torch.random.fork_rng(devices=[]):  # new layers draw their weights
        rebuilt = loss_class(named_method(recipe["method"])).rebuild(copy.deepcopy(student), recipe)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (rebuilt, deployed)]
    wrong = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    require(
        not wrong,
        f"{name}: rebuild makes another network than deployed: {len(wrong)} tensors differ"
        f" ({', '.join(wrong[:3])}); make both alike",
    )


def _float(outputs: Outputs) -> Outputs:
    features = {name: feature.float() for name, feature in outputs.features.items()}
    return Outputs(outputs.logits.float(), features, None if outputs.strong is None else outputs.strong.float())


def global_batch(share: Tensor) -> Tensor:
    """The whole batch, in order, from the processes' equal shares; gradients reach every share.

    For losses that compare samples with one another. With one process, `share` itself, and nothing that would break a
    compiled step's graph.
    """
    if _alone or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return share
    return _gathered(share)


@torch.compiler.disable  # the compiler would rewrite the collectives; left alone they cost one graph break
def _gathered(share: Tensor) -> Tensor:
    return _Gather.apply(share.contiguous())


_alone = False  # whether each process computes a loss of images of its own


@contextmanager
def each_alone() -> Iterator[None]:
    """Inside the block `global_batch` is what a process has: each scores batches of its own."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does the same, but is deprecated and warns.
    @staticmethod
    def forward(ctx, share: Tensor) -> Tensor:
        parts = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, share)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Each process computes the whole batch's loss. These gradients are summed, and DDP averages those of the
        # parameters, which gives that one loss's gradient once.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def ramp(epoch: Int[Tensor, ""], epochs: float) -> Float[Tensor, ""]:
    """min(epoch / epochs, 1), with epochs counted from 1 as in the authors' code; stays on the device."""
    return ((epoch + 1) / max(epochs, 1e-9)).clamp(max=1)


class CrossEntropy(DistillationLoss):
    """Cross-entropy alone: the loss of teachers, and of the control that distillation is compared with.

    With --label-smoothing as in Szegedy et al., arXiv:1512.00567, section 7.
    """

    config: NoneConfig

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(student.logits, batch)}
