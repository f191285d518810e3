"""How a network is trained."""

import math
from dataclasses import dataclass
from typing import Literal

from kd.errors import require

LARGEST = 1e6  # of a learning rate or decay: beyond it floats overflow in the first step


@dataclass(frozen=True)
class FitConfig:
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 64
    """Images per step over all processes together."""
    lr: float = 0.001
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD. The report names neither momentum nor weight decay; these are the field's usual ones."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls, step by step."""
    warmup_epochs: float = 0.0
    """Epochs of linear rise before the schedule."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """For --schedule step: shares of the run after which the learning rate is divided by 10."""
    balance: Literal["none", "sampler", "weights", "logit-adjust"] = "none"
    """For classes that differ in size. sampler: draw all classes equally often; weights: weigh cross-entropy by class
    (arXiv:1901.05555); logit-adjust: add the classes' frequencies to cross-entropy's logits (arXiv:2007.07314)."""
    clip_norm: float | None = None
    """Largest gradient norm; longer gradients are scaled down."""
    seed: int = 0
    """Weights, order and views follow from it."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Left out: as `accelerate launch` is configured."""
    sync_batchnorm: bool = False
    """BatchNorm over all processes' samples (GPUs only)."""
    deterministic: bool = False
    """Bitwise repeatable on a GPU too, at some cost in speed; the CPU always is."""
    compile: bool = True
    """Compile the training step on CUDA; on a CPU it would gain little and cost half a minute."""
    channels_last: bool = True
    """Keep images channels-last in memory: faster on tensor cores and most CPUs; kd.bench tells on yours."""

    def check(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} {value}: give 1 or more")
        require(0 < self.lr <= LARGEST, f"--lr {self.lr}: give a number above 0, up to {LARGEST:g}")
        require(0 <= self.momentum < 1, f"--momentum {self.momentum}: give 0 or more, below 1")
        require(not self.nesterov or self.momentum > 0, "--nesterov: needs --momentum above 0")
        decay = self.weight_decay
        require(0 <= decay <= LARGEST, f"--weight-decay {decay}: give 0 or more, up to {LARGEST:g}")
        require(0 <= self.warmup_epochs < math.inf, f"--warmup-epochs {self.warmup_epochs}: give 0 or more")
        require(
            self.clip_norm is None or 0 < self.clip_norm < math.inf, f"--clip-norm {self.clip_norm}: give more than 0"
        )
        require(all(0 < m < 1 for m in self.milestones), f"--milestones {self.milestones}: give shares between 0 and 1")
