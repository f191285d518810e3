"""Which data, how it is held and how it is split."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from kd.errors import require


@dataclass(frozen=True)
class DataConfig:
    source: Annotated[str, arg(name="data")] = "cifar100"
    """cifar10, cifar100, tiny-imagenet, imagenette, food101, oxford-pets, imagenet-1k (all from the Hub), digits,
    synthetic, a Hub id (user/name or user/name@revision), or a folder (imagefolder or parquet)."""
    label: str | None = None
    """Label column, where the data has several; the first one if left out."""
    classes: int | None = None
    """Keep the first N classes only."""
    image_size: int | None = None
    """Bring each image's central square to this many pixels a side; needed where images differ in size."""
    stored_size: int | None = None
    """Keep images larger than they are seen: training sees a random --image-size part of them, scoring the centre."""
    decode: Literal["auto", "memory", "workers"] = "auto"
    """memory: every image once, kept on the disk decoded; workers: again in every epoch, by worker processes; auto:
    memory where the decoded images fit. The results are the same."""
    stream: bool = False
    """Read the data in the order it is stored in, shard by shard, and keep nothing: for what the disk cannot hold."""
    shuffle_rows: int = 4096
    """With --stream: rows that are held and shuffled at a time."""
    workers: int | None = None
    """Processes (with --stream, threads) that decode; all the cores this process may use if left out."""
    val_fraction: float = 0.1
    """Share of every class held out of the training split for validation; 0 for none."""
    split_seed: int = 0
    """Which rows validate. Apart from --seed, so that students of several seeds share one teacher."""
    imbalance: float = 1.0
    """Keep fewer training images of each further class, down to this share of the first one's (arXiv:1906.07413); 1
    keeps all. --split-seed says which. Validation and test stay as they are."""

    def check_sizes(self) -> None:
        """Once a named set's own size is filled in."""
        shown, kept = self.image_size, self.stored_size
        require(
            kept is None or (shown is not None and kept >= shown),
            f"--stored-size {kept}: give --image-size too, and no less than that",
        )

    def check(self) -> None:
        require(0 < self.imbalance <= 1, f"--imbalance {self.imbalance}: give a share above 0, up to 1")
        require(self.classes is None or self.classes >= 2, f"--classes {self.classes}: give 2 or more")
        require(self.image_size is None or self.image_size >= 4, f"--image-size {self.image_size}: give 4 or more")
        require(self.shuffle_rows >= 1, f"--shuffle-rows {self.shuffle_rows}: give 1 or more")
        require(self.workers is None or self.workers >= 0, f"--workers {self.workers}: give 0 or more")
        require(not self.stream or self.decode == "auto", f"--stream: leave --decode {self.decode} out")
        require(self.split_seed >= 0, f"--split-seed {self.split_seed}: give 0 or more")
        require(0 <= self.val_fraction < 1, f"--val-fraction {self.val_fraction}: give a share from 0 up to 1")
