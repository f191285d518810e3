"""Where a training is, beside its weights, and what of it may be believed when it is read back."""

from dataclasses import dataclass, field

from kd.errors import UserError
from kd.files import is_number
from kd.metrics import UNNAMED

MOST_THREADS = 4096


@dataclass
class State:
    """Where training is. Weights and optimizer aside, this is all that a resumed run needs to know."""

    step: int = 0
    seconds: float = 0.0  # spent so far, over all the run's lives
    history: list[dict] = field(default_factory=list)  # one entry an epoch: the lines of metrics.jsonl
    sums: dict = field(default_factory=dict)  # of the unfinished epoch: Meter.save
    threads: int = 0
    processes: int = 1
    processes_before: list[int] = field(default_factory=list)  # of --resume-inexact: each number it was trained by
    scaler: dict = field(default_factory=dict)  # of fp16 gradients
    timing: dict = field(default_factory=dict)  # images and seconds that images_per_second is made of


def sound(state: State) -> State:
    """The state, seen to be one that a training saves. Raises ValueError naming the first entry that is not."""
    rows, names = state.sums["rows"], [*state.sums["terms"], *state.sums["measures"]]
    before = state.processes_before
    fine = {
        "step": type(state.step) is int and state.step >= 0,
        "seconds": is_number(state.seconds) and state.seconds >= 0,
        "threads": type(state.threads) is int and 1 <= state.threads <= MOST_THREADS,
        "processes": type(state.processes) is int and state.processes >= 1,
        "processes_before": isinstance(before, list) and all(type(number) is int for number in before),
        "history": isinstance(state.history, list)
        and all(_is_line(line, epoch, state.step) for epoch, line in enumerate(state.history, 1)),
        "sums": all(isinstance(name, str) for name in names)
        and len(rows) == state.processes
        and all(len(row) == len(names) + UNNAMED and all(map(is_number, row)) for row in rows),
        "scaler": isinstance(state.scaler, dict),
        "timing": set(state.timing) <= {"images", "seconds"} and all(map(is_number, state.timing.values())),
    }
    for name, well in fine.items():
        if not well:
            raise ValueError(f"state.json has {name} {getattr(state, name)!r:.80}")
    return state


def _is_line(line: object, epoch: int, step: int) -> bool:
    """Whether it is what an epoch up to this step left in metrics.jsonl."""
    if not isinstance(line, dict) or not {"epoch", "step", "lr", "train/loss", "train/top1"} <= line.keys():
        return False
    numbers = all(value is None or is_number(value) for value in line.values())
    return numbers and line["epoch"] == epoch and line["step"] <= step


def check_position(state: State, steps_an_epoch: int, epochs: int) -> None:
    """Raises UserError where step and history do not fit each other, or the recipe: nobody's training stopped there."""
    done = len(state.history)
    # Between an epoch's last step and its line in the history lies its validation.
    if not done * steps_an_epoch <= state.step <= min(done + 1, epochs) * steps_an_epoch:
        raise UserError(
            f"the checkpoint is of step {state.step} after {done} epochs of {steps_an_epoch} steps, where no training"
            " of this recipe can be; to start again, remove the run folder"
        )
