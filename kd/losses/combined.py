"""Several methods at once: `kd+at` minimises the sum of both methods' terms, with one cross-entropy.

The literature adds methods so (kd to at, fitnet or crd: Tian et al., arXiv:1910.10699). Each method keeps its own
weights. Cross-entropy is that of the first method that has any: kd+at is (1 - alpha) CE + alpha KD + 1000 AT, and
at+kd is CE + 1000 AT + alpha KD.
"""

from functools import cache

from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import method_name
from kd.config.named import CombinedFlags, flags_of
from kd.errors import require
from kd.losses.base import DistillationLoss, loss_class
from kd.types import Batch, Outputs, Pair, Stages

CROSS_ENTROPY = "ce"  # the name of that term in every method


class Combined(DistillationLoss):
    """The terms of several methods, each of which sees its own layers only.

    A term whose name an earlier method has is named after its own: `at_kd` is the kd that --at-kd-weight adds. At most
    one of them may deploy another network than the student, and at most one train a network beside it.
    """

    config: CombinedFlags

    @classmethod
    def for_flags(cls, kind: type[CombinedFlags]) -> type["Combined"]:
        return _class_for(cls, kind)

    @classmethod
    def layers(
        cls, config: CombinedFlags, student: Stages, teacher: Stages | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All layers that any of the methods needs. Raises UserError if two deploy different networks."""
        deploying = [name for name, kind in config.kinds.items() if _deploys(kind)]
        require(
            len(deploying) < 2,
            f"{config.name}: {' and '.join(deploying)} each deploy another network than the student; leave one out",
        )
        found = _layers_of(config, student, teacher).values()
        return tuple(tuple(dict.fromkeys(layer for names in found for layer in names[role])) for role in (0, 1))

    @classmethod
    def partner(cls, config: CombinedFlags, model: str) -> str | None:
        names = {name: loss_class(flags).partner(flags, model) for name, flags in config.parts().items()}
        training = [name for name, partner in names.items() if partner]
        require(
            len(training) < 2,
            f"{config.name}: {' and '.join(training)} each train a network beside the student; leave one out",
        )
        return names[training[0]] if training else None

    def __init__(self, config: CombinedFlags, pair: Pair):
        super().__init__(config, pair)
        self.parts = nn.ModuleDict()
        names = _layers_of(config, pair.student_stages, pair.teacher_stages if pair.teacher else None)
        for name, flags in config.parts().items():
            with flags_of(name, type(flags)):
                self.parts[name] = loss_class(flags)(flags, _pair_of(pair, *names[name]))
        # For each method: its names of the student's layers, and those in the deployed network.
        self._names = {name: {layer: layer for layer in part.student_layers} for name, part in self.parts.items()}

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            features = {layer: student.features[tapped] for layer, tapped in self._names[name].items()}
            theirs = teacher and _only(teacher, part.teacher_layers)
            for term, value in part(student._replace(features=features), theirs, batch).items():
                if term != CROSS_ENTROPY or term not in terms:
                    terms[f"{name}_{term}" if term in terms else term] = value
        return terms

    def identity(self) -> dict:
        return {f"{name}_{key}": value for name, part in self.parts.items() for key, value in part.identity().items()}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        """Those of the first method that has any."""
        found = (part.soft_labels(_only(teacher, part.teacher_layers)) for part in self.parts.values())
        return next((logits for logits in found if logits is not None), None)

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network of the method that deploys another one than the student; the others' layers are inside it."""
        network = student
        for name, part in self.parts.items():
            own = part.deployed(student)
            if own is not student:
                network = own
                self.recipe = part.recipe and {"method": method_name(part.config), **part.recipe}
                self._move_layers(name, network, student)
        self.student_layers = tuple(dict.fromkeys(layer for names in self._names.values() for layer in names.values()))
        return network

    def _move_layers(self, deploying: str, network: nn.Module, student: nn.Module) -> None:
        """Name the other methods' layers as in the deployed network. Raises UserError if the student is not in it."""
        inside = next((name for name, module in network.named_modules() if module is student), None)
        for name, layers in self._names.items():
            if name != deploying:
                require(
                    inside is not None or not layers,
                    f"{self.config.name}: {deploying} deploys a network without the student inside, where {name} finds"
                    f" no {', '.join(layers)}; leave one of them out",
                )
                self._names[name] = {layer: f"{inside}.{layer}" for layer in layers}

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        """Never called: the recipe names the one method that deploys, which rebuilds it alone."""
        raise NotImplementedError


@cache
def _class_for(cls: type[Combined], kind: type[CombinedFlags]) -> type[Combined]:
    """`Combined` with the attributes that depend on which methods it combines."""
    losses = [loss_class(part) for part in kind.kinds.values()]
    attributes = {
        "needs_hard_labels": any(loss.needs_hard_labels for loss in losses),
        "compares_images": any(loss.compares_images for loss in losses),
        "has_cross_entropy": any(loss.has_cross_entropy for loss in losses),
    }
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **attributes})


def _layers_of(
    config: CombinedFlags, student: Stages, teacher: Stages | None
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Each method's layers, as (student's, teacher's)."""
    found = {}
    for name, flags in config.parts().items():
        with flags_of(name, type(flags)):
            found[name] = loss_class(flags).layers(flags, student, teacher)
    return found


def _deploys(kind: type) -> bool:
    return loss_class(kind).deployed is not DistillationLoss.deployed


def _pair_of(pair: Pair, student_layers: tuple[str, ...], teacher_layers: tuple[str, ...]) -> Pair:
    """What one method may know: the features of its own layers."""
    return pair._replace(
        student=_only(pair.student, student_layers), teacher=pair.teacher and _only(pair.teacher, teacher_layers)
    )


def _only(outputs: Outputs, layers: tuple[str, ...]) -> Outputs:
    return outputs._replace(features={layer: outputs.features[layer] for layer in layers})
