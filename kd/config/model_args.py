"""--model-args: what a network's constructor is given beside its classes. Read without running anything; no torch."""

import ast
import math
import re

from kd.errors import UserError, require

LONGEST = 1000  # letters: a model.json may come from a stranger

# By prefix of the model's name, the constructor's arguments that fix the size of its images.
SIZES = {"timm": ("img_size",), "torchvision": ("image_size", "input_size")}

FORM = "KEY=VALUE,KEY=VALUE with numbers, True, False, None, words or (tuples): drop_path_rate=0.1,img_size=64"


def parse_model_args(text: str | None, what: str = "--model-args") -> dict[str, object]:
    """The arguments in `text` by name; empty for None. `what` names them in messages.

    Values are int, float, bool, str, None, or tuples of these. Raises UserError for anything else.
    """
    require(text is None or len(text) <= LONGEST, f"{what}: has more than {LONGEST} letters; write {FORM}")
    arguments: dict[str, object] = {}
    for part in _split(text or ""):
        key, equals, value = (word.strip() for word in part.partition("="))
        require(bool(equals) and key.isidentifier(), f"{what} {part.strip()}: write {FORM}")
        require(key not in arguments, f"{what} {text}: {key} is given twice; give it once")
        arguments[key] = _value(value, f"{what} {part.strip()}")
    return arguments


def format_model_args(arguments: dict[str, object]) -> str:
    """The text that parse_model_args reads, one for each set of arguments whatever their order."""
    return ",".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))


def asked_size(model: str, arguments: dict[str, object]) -> tuple[int, int] | None:
    """Height and width that the arguments fix for the images of `model`; None if they fix none.

    Raises UserError if they are no size. A constructor of the user's own keeps its sizes to itself.
    """
    names = SIZES.get(model.partition("/")[0], ()) if "/" in model else ()
    given = [(name, arguments[name]) for name in names if arguments.get(name) is not None]
    if not given:
        return None
    name, value = given[0]
    size = value if isinstance(value, tuple) else (value, value)
    valid = len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    require(valid, f"--model-args {name}={value!r}: give pixels, as {name}=64 or {name}=(64,96)")
    return size


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text else []


def _value(text: str, what: str) -> object:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text.lower() not in ("true", "false", "none"):
            return text
        raise UserError(f"{what}: the value cannot be read; write {FORM}") from error
    require(_is_plain(value), f"{what}: is a {type(value).__name__}; write {FORM}")
    return value


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int | str | None)
