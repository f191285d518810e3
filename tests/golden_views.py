"""The views that every flag draws, as recorded: python -m tests.golden_views records them anew.

Pixels of a few views, not a hash: two machines may round one level differently, and then draw the same views all the
same. Recording is refused where views changed and kd.data.augment.VERSION did not.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kd.config import ViewConfig
from kd.data import augment
from kd.data.dataset import Data
from kd.data.loader import TrainingImages
from kd.data.rows import Split

FILE = Path(__file__).parent / "data" / "golden_views.json"

LEVELS = 2  # of 255, by which a pixel may differ
SHARE = 0.02  # of the pixels, that may differ by more

ROWS, STORED, SIZE = 6, (20, 20), (16, 16)

# By case: the flags beside --views 3. Together the cases set every flag of ViewConfig.
CASES: dict[str, dict] = {
    "crop and flip": {},
    "no flip": {"flip": False},
    "wider crop": {"crop_padding": 7},
    "view seed": {"view_seed": 5},
    "resized crop": {"resized_crop": 0.3},
    "resized crop within": {"resized_crop": 0.1, "resized_crop_max": 0.5, "crop_ratio": (0.5, 2.0)},
    "colour jitter": {"colour_jitter": 0.4},
    "hue": {"hue": 0.4},
    "grey": {"grey": 0.5},
    "blur": {"blur": 0.7},
    "upside down": {"vertical_flip": True},
    "alternating flip": {"alternating_flip": True},
    "mixup": {"mixup": 0.7},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix": {"mixup": 0.3, "cutmix": 0.5},
    "mixing off at the end": {"mixup": 0.7, "mix_off_epochs": 2},
    "erase": {"erase": 0.7},
    "trivial": {"policy": "trivial"},
    "rand": {"policy": "rand"},
    "rand, strong": {"policy": "rand", "policy_ops": 3, "policy_magnitude": 20},
    "augmix": {"policy": "augmix"},
    "augmix, severe": {"policy": "augmix", "policy_magnitude": 8},
    "strong view": {"two_views": True},
    "strong view, gentle": {"two_views": True, "strong_ops": 1, "strong_magnitude": 5, "strong_cutout": 0.0},
    "strong view, mixed and erased": {"two_views": True, "mixup": 0.5, "erase": 0.5, "strong_cutout": 0.8},
}


def pictures() -> Split:
    """Images in which every place and channel differs, so that no draw goes unseen."""
    row, column = torch.meshgrid(*(torch.arange(side) for side in STORED), indexing="ij")
    number, channel = torch.arange(ROWS)[:, None, None, None], torch.arange(3)[:, None, None]
    images = (40 * number + 11 * row * (channel + 1) + 7 * column + 3 * row * column) % 256
    return Split(images.to(torch.uint8), torch.arange(ROWS) % 2)


def draw(flags: dict) -> list[torch.Tensor]:
    """Every eleventh pixel of the images in each stored view, in levels of 255: rows x pixels."""
    config, two_views = ViewConfig(count=3), flags.get("two_views", False)
    config = replace(config, **{name: value for name, value in flags.items() if name != "two_views"})
    config.check()
    half, data = (0.5,) * 3, pictures()
    data = Data(data, None, data, ("a", "b"), half, half, "", SIZE)
    images, index = TrainingImages(data, config, 0, torch.device("cpu"), two_views=two_views), torch.arange(ROWS)
    found = []
    for number in range(config.stored):
        (batch,) = images.augmented([index], number)
        for view in (batch.image, *([batch.strong] if two_views else [])):
            found.append(((view * 0.5 + 0.5) * 255).round().to(torch.uint8).flatten(1)[:, ::11])
    return found


def numbers() -> list[list[int]]:
    """Which views a run of 9 epochs uses, for some flags."""
    configs = (
        {"count": 3},
        {"count": 3, "mixup": 1.0, "mix_off_epochs": 4},
        {"count": 4, "mixup": 1.0, "mix_off_epochs": 2},
    )
    return [[ViewConfig(**flags).number(epoch, 9) for epoch in range(9)] for flags in configs]


def recorded() -> dict:
    return json.loads(FILE.read_text())


def changed(golden: dict) -> list[str]:
    """The cases whose views are not those recorded."""
    found = [] if golden["numbers"] == numbers() else ["numbers"]
    for name, flags in CASES.items():
        views = draw(flags)
        known = [bytes.fromhex(view) for view in golden["views"].get(name, [])]
        if len(known) != len(views) or any(not _alike(view, before) for view, before in zip(views, known, strict=True)):
            found.append(name)
    return found


def _alike(view: torch.Tensor, before: bytes) -> bool:
    then = torch.frombuffer(bytearray(before), dtype=torch.uint8)
    differ = (view.flatten().int() - then.int()).abs() > LEVELS
    return len(then) == view.numel() and differ.float().mean().item() <= SHARE


def main() -> None:
    if FILE.exists():
        golden = recorded()
        wrong = [name for name in changed(golden) if name in (*golden["views"], "numbers")]
        if wrong and golden["version"] == augment.VERSION:
            sys.exit(f"{', '.join(wrong)}: drawn otherwise than recorded; raise kd.data.augment.VERSION first")
    views = {name: [view.numpy().tobytes().hex() for view in draw(flags)] for name, flags in CASES.items()}
    FILE.write_text(json.dumps({"version": augment.VERSION, "numbers": numbers(), "views": views}, indent=1) + "\n")


if __name__ == "__main__":
    main()
