"""The learning rate of each step: a function of the step, so there is nothing to save."""

import math

from kd.config import FitConfig

ONE_CYCLE_RISE = 0.3  # share of the run, as in torch's OneCycleLR


def lr_at(step: int, steps_per_epoch: int, config: FitConfig) -> float:
    """The learning rate of step `step` (from 0) of the run.

    one-cycle: up and down in straight lines (Smith and Topin, arXiv:1708.07120, figure 1), up over --warmup-epochs, or
    ONE_CYCLE_RISE of the run if there are none. Differs from the paper: momentum stays, and the fall has one slope.
    """
    steps = config.total_steps(steps_per_epoch)
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "one-cycle" and warmup == 0:
        warmup = ONE_CYCLE_RISE * steps
    top, bottom, start = config.lr, config.min_lr, config.warmup_start
    if step < warmup:
        if start is not None:
            return start + (top - start) * step / warmup
        return top * (step + 1) / warmup if step + 1 <= warmup else top  # in the last part of a step it has arrived
    if config.schedule == "cosine":
        return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
    if config.schedule == "one-cycle":
        return bottom + (top - bottom) * (1 - (step - warmup) / max(steps - warmup, 1))
    if config.schedule == "step":
        return max(top * 0.1 ** sum(step >= round(milestone * steps) for milestone in config.milestones), bottom)
    return top
