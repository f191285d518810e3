"""How training images are seen."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from kd.errors import require

WIDEST = 4096  # pixels


@dataclass(frozen=True)
class ViewConfig:
    crop_padding: int = 4
    """Pad by this many black pixels, then crop back at random; 0 for no crop."""
    resized_crop: float = 0.0
    """Crop at random at least this share of the area, 3:4 to 4:3 in shape, and bring it to the image's size (0.08 is
    usual for ImageNet, arXiv:1409.4842); in place of --crop-padding. 0 for none."""
    flip: bool = True
    """Mirror half of the images; off for digits."""
    colour_jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this share each; 0 for none."""
    mixup: float = 0.0
    """Blend each image with another one, by a share from Beta(a, a) (arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.0
    """Paste a box of another image, its area from Beta(a, a) (arXiv:1905.04899); with --mixup each takes half."""
    erase: float = 0.0
    """Share of images of which a random box is erased (arXiv:1708.04896)."""
    count: Annotated[int, arg(name="views")] = 0
    """Views of each image: epoch e sees view e mod K. 0: a new view every epoch."""
    view_seed: int = 0
    """What the views of --views K follow from, instead of --seed: one teacher cache serves students of every seed."""

    def check(self) -> None:
        require(0 <= self.crop_padding <= WIDEST, f"--crop-padding {self.crop_padding}: give 0 to {WIDEST}")
        for name in ("resized_crop", "colour_jitter"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} {value}: give a share from 0 to 1")
        require(self.count >= 0, f"--views {self.count}: give 0 or more")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value == 0 or 0.01 <= value <= 100, f"--{name} {value}: give 0, or a number from 0.01 to 100")
        require(0 <= self.erase <= 1, f"--erase {self.erase}: give a share from 0 to 1")

    @property
    def padding(self) -> int:
        return 0 if self.resized_crop else self.crop_padding

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0
