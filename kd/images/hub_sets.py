"""Sets that people ask for by name: where they are on the Hub, and what is peculiar to each. No torch here."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kd.config import DataConfig


@dataclass(frozen=True)
class HubSet:
    """A set whose columns are known; its one image column needs no name."""

    address: str
    label: str = "label"
    image_size: int | None = None  # --image-size where it is left out; for images that differ in size
    revision: str | None = None  # a commit whose content we know, or a branch; else the newest
    folder: str | None = None  # of the repository, where it holds several forms of the set
    unlabelled: str | None = None  # a split without labels, which is left alone
    gated: bool = False  # its owners want their terms accepted first


# Splits are called train, validation (or valid) and test; without a test split the validation split is reported.
HUB_SETS = {
    "cifar10": HubSet("uoft-cs/cifar10"),
    "cifar100": HubSet("uoft-cs/cifar100", "fine_label", revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5"),
    "tiny-imagenet": HubSet("zh-plus/tiny-imagenet", image_size=64),
    # Its own files are a script, which `datasets` no longer runs; this branch is the Hub's conversion of them.
    "imagenette": HubSet("frgfm/imagenette", image_size=160, revision="refs/convert/parquet", folder="160px"),
    "food101": HubSet("ethz/food101", image_size=224),
    "oxford-pets": HubSet("timm/oxford-iiit-pet", image_size=224),
    "imagenet-1k": HubSet("ILSVRC/imagenet-1k", image_size=224, unlabelled="test", gated=True),
}


def find(source: str) -> HubSet:
    """What is known of `--data source`: an entry of the table, or a Hub id, of which only address and revision are."""
    if source in HUB_SETS:
        return HUB_SETS[source]
    address, _, revision = source.partition("@")
    return HubSet(address, label="", revision=revision or None)


def filled(config: DataConfig) -> DataConfig:
    """The same with the named set's own label column and image size, where the flags are left out.

    A folder of that name comes before the set, and is none of it.
    """
    known = HUB_SETS.get(config.source)
    if known is None or Path(config.source).is_dir():
        return config
    return dataclasses.replace(
        config, label=config.label or known.label, image_size=config.image_size or known.image_size
    )


def advice(known: HubSet) -> str:
    """What else to try where a set could not be loaded."""
    page = f"https://huggingface.co/datasets/{known.address}"
    return f"accept its terms at {page} and log in with `hf auth login`; " if known.gated else ""
