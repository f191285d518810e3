"""The progress display of a training."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd.utils.console import console, shorten

NUMBERS_WIDTH = 60  # columns of the run's bar, beside its name
MIN_NAME_WIDTH = 12
TRAINING = (("train/loss", "loss", ".3f"), ("train/top1", "top1", ".1f"))  # beside the epoch's bar
NOTEBOOK_SECONDS = 0.5  # between two updates in a notebook, which keeps every one of them in its messages


class ProgressDisplay:
    """A line an epoch; on a terminal also a bar for the run and one for the epoch, below the lines.

    In a notebook the two bars alone, in one place: rich's own way there needs a widget package, and a line an epoch
    would fill the page.
    """

    def __init__(self, title: str, steps: int, total: int, position: int, shown: bool):
        """`steps`: of an epoch; `total`: of the run, whose last epoch may be shorter; `position`: where it starts."""
        self.title, self.epochs, self.steps, self.total = title, math.ceil(total / steps), steps, total
        self._first, self._started = position, time.monotonic()
        self.shown = shown
        self.bars = shown and console.is_terminal
        self._handle, self._updated = None, 0.0  # of the place in a notebook
        self._notebook = shown and console.is_jupyter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not self.bars,
        )
        name = shorten(title, max(console.width - NUMBERS_WIDTH, MIN_NAME_WIDTH))
        self._run = self._progress.add_task(name, total=total, completed=position, numbers="")
        self._work = None  # the third bar
        self._epoch = self._progress.add_task("epoch", total=steps, completed=position % steps, numbers="")

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        if self._notebook:
            with suppress(ImportError):  # lines are printed then
                from IPython.display import display

                self._handle = display(self._progress, display_id=True)
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()
        self._update_notebook(last=True)

    def _update_notebook(self, last: bool = False) -> None:
        now = time.monotonic()
        if self._handle is not None and (last or now - self._updated >= NOTEBOOK_SECONDS):
            self._updated = now
            self._handle.update(self._progress)

    def step(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers after `step` steps of the run; called only when they are read anyway."""
        done = (step - 1) % self.steps + 1
        length = min(self.steps, self.total - (step - done))
        self._progress.update(self._run, completed=step)
        name = f"epoch {(step - 1) // self.steps + 1}/{self.epochs}"
        short = "  ".join(f"{name} {numbers[key]:{style}}" for key, name, style in TRAINING if key in numbers)
        if (speed := numbers.get("images_per_second")) is not None:
            short += f"  {speed:.0f} images/s"
        self._progress.update(self._epoch, description=name, total=length, completed=done, numbers=short)
        self._update_notebook()

    def epoch(self, line: dict) -> None:
        """Show an epoch's numbers, validation included."""
        if "val/loss" in line:
            top1 = f"  top1 {line['val/top1']:.1f}" if "val/top1" in line else ""
            self._progress.update(self._run, numbers=f"val loss {line['val/loss']:.3f}{top1}")
        if self.bars:
            numbers = f"epoch {line['epoch']}/{self.epochs}  {_format_short(line)}"
            name = shorten(self.title, max(console.width - len(numbers) - 2, MIN_NAME_WIDTH))
            row = f"{name}  {numbers}"
            console.print(row, markup=False, highlight=False, no_wrap=True, overflow="ellipsis", crop=True)
        elif self._handle is not None:
            self._update_notebook()
        elif self.shown:
            done, total = line["step"] - self._first, self.total - self._first
            left = (time.monotonic() - self._started) * (total - done) / max(done, 1)
            print(
                f"{self.title}  epoch {line['epoch']}/{self.epochs}  {_format(line)}  {_clock(left)} left", flush=True
            )

    def work(self, what: str, done: int, total: int) -> None:
        """Show how much of something between two epochs is done, in a third bar that goes when all is."""
        if not self.bars:
            return
        if self._work is None:
            self._work = self._progress.add_task(what, total=total, numbers="")
        self._progress.update(self._work, description=what, completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._work)
            self._work = None

    def warn(self, warning: str) -> None:
        """Print a line above the bars."""
        if self.shown:
            console.print(f"warning: {self.title}: {warning}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def work_bar(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal for work outside of a training; gives what is to be told (what, done, total)."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bar = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)


def _format_short(line: dict) -> str:
    """An epoch's numbers for one line of a terminal."""
    names = {"train/loss": "loss", "train/top1": "top1", "val/loss": "val loss", "val/top1": "val top1"}
    names |= {"probe/knn": "kNN", "probe/linear": "linear"}
    parts = [f"{name} {line[key]:.{3 if 'loss' in key else 1}f}" for key, name in names.items() if key in line]
    speed = line.get("images_per_second")
    return "  ".join(parts + ([f"{speed:.0f} images/s"] if speed is not None else []))


def _format(numbers: dict) -> str:
    keys = ("train/loss", "train/top1", "val/loss", "val/top1", "probe/knn", "probe/linear", "images_per_second")
    units = {"top1": ".2f", "loss": ".4f", "knn": ".2f", "linear": ".2f", "images_per_second": ".0f"}
    shown = [key for key in keys if numbers.get(key) is not None]
    return "  ".join(f"{key} {numbers[key]:{units[key.rsplit('/', 1)[-1]]}}" for key in shown)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
