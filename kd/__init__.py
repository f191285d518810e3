"""Knowledge distillation for image classifiers.

Imports no torch, so that the scripts answer `--help` at once.
"""

from pathlib import Path


def load(folder: str | Path, trust_code: bool = False, weights: str = "last"):
    """Load the trained network of a run, in eval mode on the CPU; it takes normalised images, b x 3 x h x w.

    `folder` is a run folder, also one copied from another machine, or a Hub id (user/name, user/name@revision) that
    `kd.export --push` wrote. Only safetensors and JSON are read. A network of the user's own (`module:function`) is
    imported and built only with `trust_code=True`. `weights`: of the "last" step, the "best" epoch on validation, or
    the average that a run with --ema keeps ("ema").

    Raises: kd.errors.UserError (a ValueError) if there is no finished run or no such weights, or its code is not
    trusted.
    """
    from kd.runs.load import load_network
    from kd.utils.hub import local_folder

    return load_network(local_folder(folder), trust_code, weights).network
