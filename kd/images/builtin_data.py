"""Data that needs no download."""

from pathlib import Path

import numpy as np

from kd.errors import UserError
from kd.images.decode import Arrays, write_arrays
from kd.images.splits import hold_out


def _digits(folder: Path) -> tuple[str, ...]:
    """scikit-learn's digits: 1,797 images of 8 x 8 in 17 greys; every fifth of a class, in a fixed shuffle, tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data digits needs scikit-learn: pip install -e '.[demo]'") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = Arrays(np.repeat(grey[:, None], 3, axis=1), digits.target.astype(np.int64))
    train, test = hold_out(rows, 0.2, seed=0)
    write_arrays(folder, {"train": train, "test": test})
    return tuple(str(name) for name in digits.target_names)


def _synthetic(folder: Path, classes: int = 10) -> tuple[str, ...]:
    """Noisy copies of ten smooth random pictures, 16 x 16: learnt in a few epochs, for trying things out."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (classes, 3, 4, 4))
    pictures = np.kron(coarse, np.ones((1, 1, 4, 4)))
    splits = {}
    for name, count in (("train", 1000), ("test", 250)):
        labels = np.arange(count) % classes
        noisy = pictures[labels] + rng.normal(0, 60, (count, 3, 16, 16))
        splits[name] = Arrays(noisy.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
    write_arrays(folder, splits)
    return tuple(f"picture {number}" for number in range(classes))


BUILT_IN = {"digits": _digits, "synthetic": _synthetic}
"""Name -> f(folder), which writes the splits there and returns the class names."""
