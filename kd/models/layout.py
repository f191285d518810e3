"""Where the networks of timm have their stages, and how a layer's output becomes a map b x c x h x w.

timm's networks list their stages in `feature_info`, each with its layer's name and its reduction of the image. Such a
layer outputs a map, a map with the channels last (Swin), or tokens b x n x d (ViT, DeiT, LeViT, MLP-Mixer): one vector
for each patch, and before them perhaps a class token, a distillation token and registers. `Tap` gives the losses a map
b x c x h x w of each. Tested against timm's own `forward_intermediates`.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

STAGES = 4  # taken of a network that lists more

UNORDERED = ("Hiera",)  # classes whose layers output tokens in another order than their places in the image


class Layout(NamedTuple):
    """How a layer outputs its map."""

    prefix: int = 0  # tokens before those of the patches, dropped
    grid: tuple[int, int] | None = None  # rows and columns of patches; None: as many as columns
    channels: int = 0  # of the map; 0: unknown
    channels_last: bool = False  # a 4-dimensional output is b x h x w x c, even if it is as high as it has channels

    def to_map(self, feature: Tensor) -> Float[Tensor, "b c h w"]:
        """The output as a map; a view. Raises ValueError for tokens that fill no grid."""
        if feature.ndim == 4:
            turned = feature.shape[3] == self.channels != feature.shape[1]
            return feature.permute(0, 3, 1, 2) if self.channels_last or turned else feature
        if feature.ndim != 3:
            return feature  # for the loss to judge
        grid = self._grid(feature.shape[1] - self.prefix)
        if grid is not None:
            feature = feature[:, self.prefix :]
        else:
            grid = self._grid(feature.shape[1])  # a class token that joins later (CaiT, XCiT)
        if grid is None:
            raise ValueError(f"its {feature.shape[1]} tokens fill no grid")
        return feature.transpose(1, 2).unflatten(2, grid)

    def _grid(self, patches: int) -> tuple[int, int] | None:
        if self.grid is not None and self.grid[0] * self.grid[1] == patches:
            return self.grid
        side = math.isqrt(max(patches, 0))
        return (side, side) if side and side * side == patches else None


class Found(NamedTuple):
    """What is known of a network's stages without running it."""

    maps: tuple[str, ...] = ()
    tokens: bool = False  # a transformer's: its layers output tokens, or maps with the channels last


def find_stages(network: nn.Module) -> Found:
    """The stages that a network of timm lists, or one inside `network`: at most four.

    Of stages with the same reduction the last. If all have the same one (ViT), four layers at even distances.
    """
    inside = _backbones(network)
    if len(inside) != 1:
        return Found()
    ((prefix, backbone),) = inside.items()
    stages = _listed(backbone)
    names = list(stages)
    columnar = len({stage.get("reduction") for stage in stages.values()}) == 1
    if columnar:
        count = min(STAGES, len(names))
        names = [names[len(names) * (place + 1) // count - 1] for place in range(count)]
    else:
        names = list({stage.get("reduction"): name for name, stage in stages.items()}.values())[-STAGES:]
    return Found(tuple(prefix + name for name in names), columnar or _channels_last(backbone))


def find_layouts(network: nn.Module) -> dict[str, Layout]:
    """The layout of every layer that a network of timm lists, also of networks inside `network`."""
    layouts = {}
    for prefix, backbone in _backbones(network).items():
        grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
        prefix_tokens, channels_last = getattr(backbone, "num_prefix_tokens", 0), _channels_last(backbone)
        for name, stage in _listed(backbone).items():
            layouts[prefix + name] = Layout(prefix_tokens, grid and tuple(grid), stage.get("num_chs", 0), channels_last)
    return layouts


def _backbones(network: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that list their stages, under what comes before the names of their layers."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if _listed(module) and not any(prefix.startswith(outer) for outer in found):
            found[prefix] = module
    return found


def _listed(module: nn.Module) -> dict[str, dict]:
    """Layer -> what is listed of it, from early to late: reduction of the image, channels. Empty without a list."""
    listed = getattr(module, "feature_info", None)
    listed = getattr(listed, "info", listed)  # timm wraps the list in some networks
    if not isinstance(listed, list | tuple) or type(module).__name__ in UNORDERED:
        return {}
    modules = dict(module.named_modules())
    return {stage["module"]: stage for stage in listed if isinstance(stage, dict) and stage.get("module") in modules}


def _channels_last(backbone: nn.Module) -> bool:
    return getattr(backbone, "output_fmt", None) == "NHWC"
