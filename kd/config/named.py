"""Methods by name: those of METHODS, from outside (module:Class), and several at once (kd+at). No torch here.

An outside method is a DistillationLoss whose annotation `config: MyFlags` names the dataclass of its flags, which
derives from MethodFlags (docs/extend.md). Its module imports torch.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, get_args, get_origin, get_type_hints

from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.methods import METHODS, MethodFlags
from kd.errors import UserError, nearest, require, reworded
from kd.utils.users_own import import_class, is_module_function

LOSS = "kd.losses.base.DistillationLoss"

CALLED_WITH = {"__init__": ("config", "pair"), "forward": ("student", "teacher", "batch")}

# What the flags' class, and a run's identity beside the flags, have already: no field may be called so.
RESERVED = {name for name in (*vars(MethodFlags), *MethodFlags.__annotations__) if name != "label_smoothing"}
RESERVED |= {"role", "origin", "shared_cache", "extended_from"}


def is_named(word: str) -> bool:
    """Whether a word of the command line may mean a method that is not in METHODS."""
    parts = word.split("+")
    joined = len(parts) > 1 and any(part in METHODS or is_module_function(part) for part in parts) and "/" not in word
    return (joined or is_module_function(word)) and not Path(word).is_file()


@cache  # the same class at every call: flags are compared by type
def named_method(name: str) -> type[MethodFlags]:
    """The class of a method's flags. `name` is of METHODS, or module:Class, which is imported, or several with +.

    Raises: UserError that names what is missing, UsersOwnError if the module fails.
    """
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        return _combination(name)
    require(
        is_module_function(name),
        f"{name}: no such method; {nearest(name, METHODS)}; a method of your own is named as module:Class",
    )
    loss = import_class(name, f"method {name}")
    _check_loss(name, loss)
    flags = _flags_of(name, loss)
    _check_flags(name, flags)
    # A class of its own: two losses may share one class of flags.
    own = {key: getattr(flags, key) for key in ("__doc__", "__module__", "__qualname__")}
    return type(flags.__name__, (flags,), own | {"loss": name, "name": name})


def _check_loss(name: str, loss: type) -> None:
    """Raise UserError unless the class is a DistillationLoss with all that it needs."""
    bases = {f"{base.__module__}.{base.__qualname__}" for base in loss.__mro__}
    require(LOSS in bases, f"{name}: is no method; derive the class from kd.losses.DistillationLoss")
    missing = sorted(getattr(loss, "__abstractmethods__", ()))
    require(not missing, f"{name}: has no {' and no '.join(missing)}; define it as kd/losses/base.py says")
    for method, given in CALLED_WITH.items():
        signature = inspect.signature(getattr(loss, method))
        try:
            signature.bind("self", *given)
            fits = True
        except TypeError:
            fits = False
        require(fits, f"{name}: defines {method}{signature}; write {method}(self, {', '.join(given)})")


def _flags_of(name: str, loss: type) -> type[MethodFlags]:
    """The class that the annotation `config` names. Raises UserError unless it is a dataclass of flags."""
    owner = next((base for base in loss.__mro__ if "config" in inspect.get_annotations(base)), None)
    remedy = "write `config: MyFlags` in it, with a dataclass that derives from kd.config.methods.MethodFlags"
    require(owner is not None, f"{name}: does not say which flags it has; {remedy}")
    flags = inspect.get_annotations(owner)["config"]
    if isinstance(flags, str):  # of `from __future__ import annotations`
        flags = getattr(sys.modules[owner.__module__], flags, flags)
    said = getattr(flags, "__name__", repr(flags))
    right = isinstance(flags, type) and issubclass(flags, MethodFlags)
    require(right, f"{name}: its flags, config: {said}, do not derive from kd.config.methods.MethodFlags")
    require("__dataclass_fields__" in vars(flags), f"{name}: {said} is no dataclass; put @dataclass(frozen=True) on it")
    return flags


def _check_flags(name: str, flags: type[MethodFlags]) -> None:
    """Raise UserError for a flag without a default, with another one's name, or of a type that no file can hold."""
    common = common_flags()
    try:
        get_type_hints(flags)
    except NameError as error:
        raise UserError(f"{name}: the types of its flags: {error}; import it where {flags.__name__} is") from error
    for field in dataclasses.fields(flags):
        flag = f"{name}: --{dashed(field.name)}"
        require(field.name not in RESERVED, f"{flag}: the flags' class has that name already; call the field otherwise")
        require(field.name not in common, f"{flag}: is a common flag already; call the field otherwise")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        require(default is not MISSING, f"{flag}: has no default; give it one")
        try:
            json.dumps(default)
            fits = True
        except TypeError:
            fits = False
        kind = type(default).__name__
        require(fits, f"{flag}: config.json cannot hold its {kind}; take int, float, bool, str, or a tuple of them")


@cache
def common_flags() -> frozenset[str]:
    """The fields of both scripts' configurations, and the names of their flags."""
    names = set()
    for part in {*_parts(TrainConfig()), *_parts(DistillConfig())}:
        hints = get_type_hints(part, include_extras=True)
        for field in dataclasses.fields(part):
            hint = hints[field.name]
            settings = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            names |= {field.name, *(setting.name.replace("-", "_") for setting in settings if setting.name)}
    return frozenset(names)


def _parts(config) -> Iterator[type]:
    """The classes of a configuration and of all that it is made of, but for the method."""
    yield type(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, MethodFlags):
            yield from _parts(value)


@dataclass(frozen=True)
class CombinedFlags(MethodFlags):
    """Base of the flags of several methods at once: those of each, with its name before them, and --label-smoothing."""

    loss: ClassVar[str] = "kd.losses.combined:Combined"
    kinds: ClassVar[dict[str, type[MethodFlags]]]  # by the name before their flags

    def parts(self) -> dict[str, MethodFlags]:
        """The flags of each method, by the name that stands before them."""
        shared = {"label_smoothing": self.label_smoothing}
        return {
            prefix: kind(**shared, **{name: getattr(self, f"{prefix}_{name}") for name in _own_fields(kind)})
            for prefix, kind in self.kinds.items()
        }

    @property
    def uses_labels(self) -> bool:
        """Of the terms that need labels in cross-entropy only, just the first method's is used (kd.losses.combined)."""
        parts = list(self.parts().values())
        first = next((part for part in parts if part.labels_in_ce_only), None)
        return any(part.uses_labels and (part is first or not part.labels_in_ce_only) for part in parts)

    def settled(self, student: str) -> "CombinedFlags":
        values = {
            f"{prefix}_{name}": getattr(flags.settled(student), name)
            for prefix, flags in self.parts().items()
            for name in _own_fields(type(flags))
        }
        return dataclasses.replace(self, **values)

    def check(self) -> None:
        super().check()
        for prefix, flags in self.parts().items():
            with flags_of(prefix, type(flags)):
                flags.check()


def flags_of(prefix: str, kind: type[MethodFlags]) -> AbstractContextManager:
    """An error of one of several methods at once names its flags as the command line does: --at-weight."""
    return reworded(lambda text: name_flags(text, prefix, kind))


def name_flags(text: str, prefix: str, kind: type[MethodFlags]) -> str:
    """`text` with a method's flags named as where several methods are given at once."""
    own = "|".join(map(dashed, _own_fields(kind)))
    return re.sub(rf"--(?=({own})(?![\w-]))", f"--{dashed(prefix)}-", text)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def with_usual(kind: type[MethodFlags], usual: MethodFlags) -> MethodFlags:
    """A method's flags at their defaults, or as `usual` has them: a preset's flags of its own method."""
    if type(usual) is kind:
        return usual
    kinds = kind.kinds if issubclass(kind, CombinedFlags) else {}
    prefix = next((prefix for prefix, part in kinds.items() if type(usual) is part), None)
    if prefix is None:
        return kind()
    own = {f"{prefix}_{name}": getattr(usual, name) for name in _own_fields(type(usual))}
    return kind(**own, label_smoothing=usual.label_smoothing)


def _combination(name: str) -> type[CombinedFlags]:
    """The flags of several methods at once. Raises UserError if they cannot be combined."""
    names = name.split("+")
    require("" not in names, f"{name}: a method is missing before or after a +; name it, or leave the + out")
    require("none" not in names, f"{name}: none is the student alone, with nothing to add; leave it out")
    twice = next((part for part in names if names.count(part) > 1), None)
    require(twice is None, f"{name}: has {twice} twice; name it once")
    kinds: dict[str, type[MethodFlags]] = {}
    for part in names:
        kind, prefix = named_method(part), _prefix(part)
        require(prefix not in kinds, f"{name}: two methods would have the flags --{dashed(prefix)}-...; rename a class")
        kinds[prefix] = kind
    alone = next((part for part in names if named_method(part).embeds), None)
    require(alone is None, f"{name}: {alone} trains on embeddings, the others on classes; give it alone")
    fields = []
    for prefix, kind in kinds.items():
        hints, defaults = get_type_hints(kind, include_extras=True), kind()
        fields += [(f"{prefix}_{field}", hints[field], getattr(defaults, field)) for field in _own_fields(kind)]
    flags = [field for field, _, _ in fields]
    clash = next((flag for flag in flags if flags.count(flag) > 1 or flag in common_flags()), "")
    require(not clash, f"{name}: two flags would be --{dashed(clash)}; rename a class or its flag")
    attributes = {
        "name": name,
        "kinds": kinds,
        "needs_teacher": any(kind.needs_teacher for kind in kinds.values()),
        "two_views": any(kind.two_views for kind in kinds.values()),
        "__doc__": f"{' and '.join(names)} at once: the sum of their terms, with the first one's cross-entropy only.",
        "__module__": __name__,
    }
    return dataclasses.make_dataclass("Combination", fields, bases=(CombinedFlags,), namespace=attributes, frozen=True)


def _own_fields(kind: type[MethodFlags]) -> list[str]:
    """A method's flags without --label-smoothing, which several at once share."""
    return [field.name for field in dataclasses.fields(kind) if field.name != "label_smoothing"]


def _prefix(name: str) -> str:
    """What stands before a method's flags: its name, or its class's: mine:MyLoss has --my-loss-weight."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.partition(":")[2] or name).lower()
