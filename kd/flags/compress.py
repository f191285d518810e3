"""What makes the trained network smaller."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from kd.errors import require


@dataclass(frozen=True)
class CompressConfig:
    init: str | None = None
    """Start from the weights of this finished run of the same network (Apprentice's scheme C; pruning needs it)."""
    weight_bits: Literal[32, 8, 4, 2] = 32
    """Of each weight in all convolutions and linear layers but the first and the last; 2 is -s, 0 and s."""
    activation_bits: Literal[32, 8, 4] = 32
    """Of each number that enters these layers."""
    prune: float = 0.0
    """Share of --init's multiply-accumulates to remove, in whole channels: those with the smallest filters."""
    sparsity: float = 0.0
    """Share of the weights in all layers but the first and the last that stay zero: the smallest of --init's."""

    def check(self) -> None:
        for name in ("prune", "sparsity"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value}: give a share from 0 up to 1")
            require(
                value == 0 or self.init is not None,
                f"--{name}: needs --init RUN, a trained run of the same network; what is small means nothing before",
            )

    @property
    def asked(self) -> dict:
        """What differs from no compression at all."""
        usual = CompressConfig()
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(usual, name)}
