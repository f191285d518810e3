"""How a teacher's answers are kept."""

from dataclasses import dataclass
from typing import Literal

from kd.errors import require
from kd.flags.views import ViewConfig


@dataclass(frozen=True)
class CacheConfig:
    cache_teacher: bool = False
    """Compute the teacher's logits for all --views once, keep them in runs/cache, and look them up from then on."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """How they are kept; float32 gives a live teacher's very bits on a CPU."""
    cache_top_k: int | None = None
    """For many classes: keep the largest k logits of each image and the rest's mass (FKD, arXiv:2112.01528)."""

    def check(self, views: ViewConfig) -> None:
        require(
            not self.cache_teacher or views.count > 0,
            "--cache-teacher: needs --views K above 0; with a new view every epoch no answer is ever used twice",
        )
        require(self.cache_top_k is None or self.cache_top_k >= 1, f"--cache-top-k {self.cache_top_k}: give 1 or more")
