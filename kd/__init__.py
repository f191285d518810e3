"""Knowledge distillation for image classifiers.

Nothing heavy is imported here, so that the scripts answer `--help` at once.
"""

from pathlib import Path


def load(folder: str | Path, trust_code: bool = False):
    """The trained network of a run, in eval mode on the CPU; it takes normalised images, b x 3 x h x w.

    `folder` is a run folder, or a Hub id (user/name, user/name@revision) that `kd.export --push` wrote.

    Reads safetensors and JSON only, and works on a folder copied from elsewhere. A network of the user's own
    (`module:function`) is imported and built only with `trust_code=True`.

    Raises: kd.errors.UserError (a ValueError) when there is no finished run there or code is not trusted.
    """
    from kd.runs.load import load_network
    from kd.utils.hub import local_folder

    return load_network(local_folder(folder), trust_code).network
