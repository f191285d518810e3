"""--help of the scripts, and what each flag is: read from the dataclasses and the docstrings under their fields.

tyro's own --help has hundreds of lines in the order of the dataclasses; ours has groups with the commonest flags first.
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from kd.config.flags import SETTLED_BY_DATA
from kd.config.jobs import LR_BY_NETWORK, DistillConfig
from kd.config.methods import METHODS, method_name
from kd.config.named import CombinedFlags, dashed, is_named, name_flags, named_method, with_usual
from kd.utils.users_own import is_module_function


class Flag(NamedTuple):
    """A flag as --help shows it."""

    usage: str
    text: str
    default: str
    value: object = None

    @property
    def takes_value(self) -> bool:
        return " " in self.usage


class Group(NamedTuple):
    """Flags of one subject: names, the commonest first."""

    common: str
    rare: str = ""  # only `--help GROUP` explains them


# The groups of --help. The dataclasses' own order is that of every config.json.
GROUPS = {
    "data": Group(
        "data classes image-size val-fraction stream",
        "label image test-fraction skip-broken stored-size decode workers shuffle-rows split-seed imbalance "
        "no-labels label-share probe probe-every probe-label",
    ),
    "model": Group("student model init", "model-args freeze freeze-epochs"),
    "teacher": Group(
        "teacher teacher-model control fine-tune-teacher cache-teacher",
        "teacher-seed teacher-init teacher-model-args trust-code cache-dtype cache-top-k cache-from",
    ),
    "training": Group(
        "preset epochs batch-size lr seed optimizer weight-decay schedule warmup-epochs ema label-smoothing "
        "mixed-precision",
        "momentum nesterov milestones balance drop-last clip-norm compile channels-last deterministic sync-batchnorm "
        "betas eps decay-norm-and-bias layer-decay accumulate gradient-checkpointing min-lr warmup-start lr-per-256 "
        "steps compile-mode",
    ),
    "augmentation": Group(
        "crop-padding resized-crop flip policy mixup cutmix views",
        "policy-ops policy-magnitude erase colour-jitter hue grey blur vertical-flip alternating-flip "
        "crop-ratio resized-crop-max mix-off-epochs view-seed strong-ops strong-magnitude strong-cutout",
    ),
    "run": Group(
        "out resume auto-resume config threads",
        "save-every push-to push-every print-config resume-inexact extend test",
    ),
    "logging": Group("wandb", "track log-every diagnose-every wandb-project wandb-group"),
    "compression": Group("weight-bits", "activation-bits prune sparsity"),
    "picture": Group("images"),  # of kd.data.show
}


POSITIONAL = get_args(Positional[str])[1]  # what marks an argument without a flag's name


# Read before tyro is asked.
FILE_FLAGS = {
    "config": Flag("--config FILE", "Take flags from a YAML or a run's config.json; those typed here win.", ""),
    "print-config": Flag("--print-config", "Print all flags as such a YAML, and stop.", ""),
}


INDENT = 24  # columns before a flag's text


MAX_WIDTH = 120  # columns: longer lines are hard to read


def format_help(default, description: str, args: list[str], width: int) -> str:
    """The help of a script, or of one method if `args` name it.

    `default` is the preset's configuration. `description` opens the help: what the script does and the usual commands.
    """
    width = min(max(width, 60), MAX_WIDTH)
    script_name = Path(sys.argv[0]).name
    flags = list_flags(default) | FILE_FLAGS
    meaning = f"[...] at the end of a line: the default of --preset {default.preset}. Without one: off, or not given."
    usage, methods = " ".join([f"usage: {script_name} [FLAG ...]", *_positionals(type(default))]), ()
    if default.preset in LR_BY_NETWORK:
        flags["lr"] = flags["lr"]._replace(default=_rates(LR_BY_NETWORK[default.preset]))
    if isinstance(default, DistillConfig):
        if method := typed_method(args, flags):
            return _paragraphs(*_method_help(script_name, method, default.method, width))
        usage, methods = f"usage: {script_name} [FLAG ...] [METHOD] [FLAG ...]", _list_methods(default.method, width)
        flags = without_method(flags, default)
    if group := first_word(args, flags, GROUPS.__contains__):
        names = f"{GROUPS[group].common} {GROUPS[group].rare}".split()
        whole = _group(group, (flags[name] for name in names if name in flags), width)
        return _paragraphs([usage, meaning], whole, [f"{script_name} --help shows the commonest flags of all groups."])
    groups = filter(None, (_common_flags(title, flags, width) for title in GROUPS))
    return _paragraphs([description.strip()], [usage, meaning], *groups, *methods)


def _common_flags(title: str, flags: dict[str, Flag], width: int) -> list[str]:
    """One group's commonest flags, and the names of its others; empty if the script has none of them."""
    common, rare = ([name for name in names.split() if name in flags] for names in GROUPS[title])
    more = f"more with --help {title}: {', '.join(rare)}"
    lines = textwrap.wrap(more, width - 2, break_on_hyphens=False) if rare else []
    found = _group(title, (flags[name] for name in common), width) if common else []
    return [*found, *(f"  {line}" for line in lines)]


def _rates(rates: dict[str, float]) -> str:
    """Learning rates by network, in a few words; docs/methods.md lists the networks."""
    return f"{rates['']:g}; mobile networks {min(rates.values()):g}"


def typed_method(args: list[str], flags: dict[str, Flag]) -> str | None:
    """The method among the arguments. A module:function may be one of several teachers: then a name of METHODS wins."""
    method = first_word(args, flags, lambda word: word in METHODS or is_named(word))
    if method and is_module_function(method):
        before = [word for word in args[: args.index(method)] if word.startswith("--")]
        if before and before[-1] == "--teacher":
            return first_word(args, flags, METHODS.__contains__) or method
    return method


def first_word(args: list[str], flags: dict[str, Flag], wanted: Callable[[str], bool]) -> str | None:
    """The first wanted word that is not the value right after a flag, as crd is in `--preset crd`."""
    alone = {f"--{name}" for name, flag in flags.items() if not flag.takes_value}
    alone |= {f"--no-{name}" for name in flags} | {"--help"}
    dashed = [word.replace("_", "-") for word in ["", *args]]  # tyro takes --no_labels for --no-labels
    takes = [word.startswith("--") and "=" not in word and word not in alone for word in dashed]
    return next((word for word, value in zip(args, takes) if not value and wanted(word)), None)


def _method_help(script_name: str, method: str, usual: object, width: int) -> list[list[str]]:
    """Paragraphs on one method; `usual` has the preset's flags of its own method."""
    kind = named_method(method)
    flags = list_flags(with_usual(kind, usual))
    return [
        [" ".join(_text_of(kind).split())],
        [f"usage: {script_name} [FLAG ...] {method} [FLAG ...]"],
        _group(f"flags of {method}", flags.values(), width),
        [f"{script_name} --help lists all other flags."],
    ]


def _list_methods(usual: object, width: int) -> list[list[str]]:
    """Paragraphs on the usual method's flags and on all methods."""
    indent = 4 + max(map(len, (*METHODS, "module:Class")))
    methods = (_entry(name, kind.__doc__, indent, width) for name, kind in METHODS.items())
    more = {
        "kd+at": "Several at once, with the first one's cross-entropy; flags: --kd-alpha, --at-weight.",
        "module:Class": "A method of your own (docs/extend.md).",
    }
    methods = itertools.chain(*methods, *(_entry(name, text, indent, width) for name, text in more.items()))
    return [
        _group(f"flags of {method_name(usual)}, the method if none is given", list_flags(usual).values(), width),
        ["methods (METHOD --help lists a method's own flags):", *methods],
    ]


def _text_of(kind: type) -> str:
    """A class's docstring, without what dataclass puts in place of a missing one."""
    generated = (kind.__doc__ or "").startswith(f"{kind.__name__}(")
    return kind.name if generated or not kind.__doc__ else kind.__doc__


def _paragraphs(*parts: list[str]) -> str:
    return "\n\n".join("\n".join(lines) for lines in parts)


def _group(title: str, flags: Iterable[Flag], width: int) -> list[str]:
    lines = [f"{title}:"]
    for flag in flags:
        text = f"{flag.text} [{flag.default}]" if flag.default else flag.text
        lines += _entry(flag.usage, text, INDENT, width)
    return lines


def _entry(head: str, text: str, indent: int, width: int) -> list[str]:
    """`head` and the wrapped `text` in two columns; after a long head, `text` starts on the next line if it must."""
    head = f"  {head}".ljust(indent - 2) + "  "
    if len(head + text) <= width:
        return [head + text]
    lines = [" " * indent + line for line in textwrap.wrap(text, width - indent, break_on_hyphens=False)]
    return [head.rstrip(), *lines] if len(head) > indent else [head + lines[0].strip(), *lines[1:]]


def list_flags(config) -> dict[str, Flag]:
    """Every flag of a configuration and its parts by name, those of a class before those that it inherits."""
    kind, flags = type(config), {}
    if isinstance(config, CombinedFlags):
        return _combined_flags(config)
    hints, texts = get_type_hints(kind, include_extras=True), _docstrings(kind)
    hints = {name: hint for name, hint in hints.items() if name.upper() not in _positionals(kind)}
    for field in sorted(dataclasses.fields(kind), key=lambda field: [*texts, field.name].index(field.name)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flags |= list_flags(value)
        elif field.name in hints:
            name, usage = _usage(field.name, hints[field.name], value)
            flags[name] = Flag(usage, texts.get(field.name, ""), _default(field.name, value), value)
    return flags


def without_method(flags: dict[str, Flag], config: DistillConfig) -> dict[str, Flag]:
    """The flags that are not the method's own."""
    own = list_flags(config.method)
    return {name: flag for name, flag in flags.items() if name not in own}


def _positionals(kind: type) -> list[str]:
    """The arguments that have no flag's name."""
    hints = get_type_hints(kind, include_extras=True)
    return [name.upper() for name, hint in hints.items() if POSITIONAL in get_args(hint)]


def flag_values(config) -> dict[str, object]:
    """Every flag's value by its name on the command line, in the order of --help, the method and its flags last."""
    flags, method = list_flags(config), {}
    if isinstance(config, DistillConfig):
        own, flags = list_flags(config.method), without_method(flags, config)
        method = {"method": method_name(config.method)} | {name: flag.value for name, flag in own.items()}
    names = " ".join(f"{group.common} {group.rare}" for group in GROUPS.values()).split()
    return {name: flags[name].value for name in names if name in flags} | method


def _combined_flags(config: CombinedFlags) -> dict[str, Flag]:
    """The flags of several methods, each with its method's name before it, and the one that they share."""
    flags, shared = {}, {}
    for prefix, part in config.parts().items():
        own = list_flags(part)
        shared = {"label-smoothing": own.pop("label-smoothing")}
        for name, flag in own.items():
            longer, text = f"{dashed(prefix)}-{name}", name_flags(flag.text, prefix, type(part))
            flags[longer] = Flag(flag.usage.replace(name, longer, 1), text, flag.default, flag.value)
    return flags | shared


@cache  # reading a class's source takes milliseconds
def _docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field, as tyro reads them too: Python itself drops them."""
    texts = {}
    for base in kind.__mro__[:-1]:  # without object
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # made at run time: its fields have their texts in its bases
            continue
        body = ast.parse(textwrap.dedent(source)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts.setdefault(field.target.id, " ".join(ast.literal_eval(text.value).split()))
    return texts


def _usage(field: str, hint: Any, value: object) -> tuple[str, str]:
    """The flag's name, and the flag with what it takes: lr, --lr X."""
    name, metavar = field.replace("_", "-"), None
    if get_origin(hint) is Annotated:
        hint, setting = get_args(hint)
        name, metavar = setting.name or name, setting.metavar
    if hint is bool:  # a flag that is on by default is given to switch it off
        return name, f"--[no-]{name}" if value else f"--{name}"
    return name, f"--{name} {metavar or _metavar(hint)}"


def _metavar(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), ...)]
    if get_origin(hint) is Literal:
        return "|".join(map(str, kinds))
    if get_origin(hint) in (Union, types.UnionType):
        return _metavar(kinds[0])
    if get_origin(hint) is tuple:
        return f"{_metavar(kinds[0])} ..."
    return {int: "N", float: "X", str: "NAME"}.get(hint, "VALUE")


def _default(field: str, value: object) -> str:
    if value is None or value is False:
        return "by the number of images" if field in SETTLED_BY_DATA else ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return " ".join(_default(field, part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
