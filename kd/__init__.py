"""Knowledge distillation for image classifiers: `kd.train` and `kd.distill` run the scripts, `kd.load` opens a run.

Imports no torch, so that the scripts answer `--help` at once.
"""

from pathlib import Path


def load(folder: str | Path, trust_code: bool = False, weights: str = "last"):
    """Load the trained network of a run, in eval mode on the CPU; it takes normalised images, b x 3 x h x w.

    It is the plain torch module, and has besides: `.predict(images, top=1)`, the likeliest classes of image files, PIL
    images or pixels; `.embedding(images)`, what enters its last layer (an embedder's output); `.transform`, from a PIL
    image to its input; `.classes`, their names; `.folder`, the run.

    `folder` is a run folder, also one copied from another machine, or a Hub id (user/name, user/name@revision) that
    `kd.export --push` or `--push-to` wrote. Only safetensors and JSON are read. A network of the user's own
    (`module:function`) is imported and built only with `trust_code=True`. `weights`: of the "last" step, the "best"
    epoch on validation, or the average that a run with --ema keeps ("ema").

    Raises: kd.errors.UserError (a ValueError) if there is no finished run or no such weights, or its code is not
    trusted.
    """
    from kd.predict import with_classes
    from kd.runs.load import load_network
    from kd.utils.hub import local_folder

    path = local_folder(folder)
    trained = load_network(path, trust_code, weights)
    return with_classes(trained.network, trained.info, path)


def train(config=None, **flags):
    """Train a network as train_teacher.py does, or find it trained already; returns it as `kd.load` does.

    `config` is a kd.config.TrainConfig, or flags as on the command line: `kd.train(preset="digits", epochs=3)`.

    Raises: kd.errors.UserError for what ends the script with a message; kd.errors.Preempted once Ctrl-C or SIGTERM
    has saved the run, which the same call with `resume=True` continues.
    """
    from kd.training.python import run_script

    return load(run_script("train_teacher", config, flags), trust_code=True)


def distill(config=None, **flags):
    """Distil a student as distill_student.py does: `kd.distill(preset="digits", method="dkd", beta=2.0)`.

    `config` is a kd.config.DistillConfig, or flags, with the method's name as `method`. Otherwise as `kd.train`.
    """
    from kd.training.python import run_script

    return load(run_script("distill_student", config, flags), trust_code=True)
