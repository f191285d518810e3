"""One-for-all distillation (Hao et al., arXiv:2310.19444), for a student and a teacher of unlike architectures.

Features of unlike networks do not compare, so each stage of the student gets an exit that answers in logits.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.config.methods import OFAConfig
from kd.errors import UserError, require
from kd.losses.base import DistillationLoss
from kd.losses.features import check_once
from kd.losses.kd import check_shapes
from kd.models.features import list_layers
from kd.types import Batch, Outputs, Pair, Stages

GRID = 7  # tokens are merged while their grid stays at least as large; an ImageNet network's last map
ATTENTION_HEADS = 4


def ofa_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    eps: float,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """-((p_t + y)^eps - y) . log p_s, averaged over the batch; y is 1 for the label, else 0.

    As the authors' code computes it, without a factor T^2. With eps = 1 it is the cross-entropy with the teacher's
    probabilities. A larger eps gives the label more weight where the teacher is sure of it.
    Computed in logarithms: the authors' log(softmax) gives inf for distant logits. Raises ValueError if the shapes
    differ.
    """
    check_shapes(student_logits, teacher_logits)
    target = F.one_hot(labels, student_logits.shape[1])
    weights = ((teacher_logits / temperature).softmax(dim=1) + target) ** eps - target
    return -(weights * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1).mean()


class OFA(DistillationLoss):
    """Cross-entropy + weight * ofa_loss of the student's logits + exit_weight * ofa_loss, summed over the exits.

    Exits are trained with the student and dropped from what is deployed. Of the teacher only logits are needed.
    The label of a mixed image is the one with the larger share, as in the authors' code.
    """

    config: OFAConfig

    @classmethod
    def layers(cls, config: OFAConfig, student: Stages, teacher: Stages | None) -> tuple[tuple[str, ...], tuple]:
        check_once(config.student_layers, "--student-layers")
        layers = config.student_layers or student.maps
        if not layers:
            raise UserError(
                "the student's model has no known stages to put exits on; name layers with --student-layers:"
                f" {list_layers(student.modules)}"
            )
        return layers, ()

    def __init__(self, config: OFAConfig, pair: Pair):
        super().__init__(config, pair)
        for name, feature in pair.student.features.items():
            shape = tuple(feature.shape)
            require(
                feature.ndim == 4,
                f"layer {name!r}: outputs {shape}, and ofa puts its exits on maps, b x c x h x w; name another layer",
            )
        maps, classes = list(pair.student.features.values()), pair.student.logits.shape[1]
        last = maps[-1].shape[1]
        width = pair.width if pair.head is None else pair.head.in_features
        wide = max(last, width or 0)
        after = range(len(maps) - 1, -1, -1)  # stages after each
        self.exits = nn.ModuleList(
            token_exit(feature.shape, last, later, classes)
            if pair.student_stages.tokens
            else map_exit(feature.shape[1], wide, later, classes)
            for feature, later in zip(maps, after)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config, label = self.config, main_label(batch)

        def loss(logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
            return ofa_loss(logits, teacher.logits, label, config.exponent, config.temperature)

        answers = [part(feature) for part, feature in zip(self.exits, student.features.values())]
        return {
            "ce": self.cross_entropy(student.logits, batch),
            "ofa": config.weight * loss(student.logits),
            "exits": config.exit_weight * sum(map(loss, answers)),
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return teacher.logits / self.config.temperature


def main_label(batch: Batch) -> Int[Tensor, "b"]:
    """The label, and of a mixed image the one with the larger share."""
    return batch.label if batch.mix is None else torch.where(batch.mix.weight < 0.5, batch.mix.label, batch.label)


def map_exit(channels: int, width: int, later: int, classes: int) -> nn.Sequential:
    """The authors' exit for maps: half the size once for each later stage, then pooling and a linear layer.

    Channels double on the way, and end at `width`.
    """
    layers: list[nn.Module] = []
    for left in range(later, 0, -1):
        channels_out = width if left == 1 else 2 * channels
        layers += _halve(channels, channels_out)
        channels = channels_out
    if not layers:
        layers = [nn.Conv2d(channels, width, 1)]
    return _initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))


def _halve(channels_in: int, channels_out: int) -> Iterator[nn.Module]:
    """Two separable convolutions, the first of stride 2; each depthwise 3 x 3, then 1 x 1, BatchNorm and ReLU."""
    for stride, channels in ((2, channels_in), (1, channels_out)):
        yield nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False)
        yield nn.Conv2d(channels_in, channels, 1, bias=False)
        yield nn.BatchNorm2d(channels)
        yield nn.ReLU()


def token_exit(shape: torch.Size, width: int, later: int, classes: int) -> nn.Sequential:
    """The authors' exit for tokens: merges of 2 x 2, a transformer block for each later stage, pooling, a linear layer.

    Differs from the authors' code: pools the patches of a network with a class token, too, because a tap drops that
    token. `shape` is that of the tokens' map; there is one block at least.
    """
    _, channels, height, row = shape
    layers: list[nn.Module] = []
    while min(height, row) >= 2 * GRID and height % 2 == row % 2 == 0:
        layers += [Merge(channels, width), nn.GELU()]
        channels, height, row = width, height // 2, row // 2
    if len(layers) > 2:
        layers.pop()  # the last of several merges is linear, as the authors'
    if channels != width:
        layers.append(nn.Conv2d(channels, width, 1))
    require(
        width % ATTENTION_HEADS == 0,
        f"ofa: the student's {width} channels do not divide among the exits' {ATTENTION_HEADS} attention heads; choose"
        " another method",
    )
    blocks = [Block(width) for _ in range(max(later, 1))]
    return _initialised(nn.Sequential(*layers, ToTokens(), *blocks, MeanToken(), nn.Linear(width, classes)))


class Merge(nn.Module):
    """Merges each 2 x 2 patches of a map into one: LayerNorm and a linear layer on their channels."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        self.norm, self.reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, width, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        merged = self.unshuffle(x).permute(0, 2, 3, 1)
        return self.reduction(self.norm(merged)).permute(0, 3, 1, 2)


class ToTokens(nn.Module):
    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        return x.flatten(2).transpose(1, 2)


class MeanToken(nn.Module):
    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return x.mean(dim=1)


class Block(nn.Module):
    """A transformer block, normalised before attention and before its two layers (as in ViT), without dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        parts = self.query_key_value(self.norm1(x)).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (ATTENTION_HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _initialised(exit_head: nn.Sequential) -> nn.Sequential:
    """As the authors start them: He's normal weights for convolutions, a normal of 0.02 for linear layers."""
    for module in exit_head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return exit_head
