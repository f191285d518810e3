"""Knowledge distillation for image classifiers.

Nothing heavy is imported here, so that the scripts answer `--help` at once.
"""

from pathlib import Path


def load(folder: str | Path, trust_code: bool = False):
    """The trained network of a run folder, in eval mode on the CPU; it takes normalised images, b x 3 x h x w.

    Reads safetensors and JSON only, and works on a folder copied from elsewhere. A network of the user's own
    (`module:function`) is imported and built only with `trust_code=True`.

    Raises: kd.errors.UserError (a ValueError) when the folder holds no finished run or code is not trusted.
    """
    from kd.run_folder import load_network

    return load_network(Path(folder), trust_code).network
