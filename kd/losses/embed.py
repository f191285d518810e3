"""Distillation of embeddings, without labels and without classes.

The queue form matches the student's and the teacher's similarities to a queue of the teacher's embeddings: SEED (Fang
et al., arXiv:2101.04731, section 3) with one temperature and one linear head, as in LightlyTrain's first distillation
method. The student may be of any width; the head, which is not deployed, brings it to the teacher's.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kd.config.methods import EmbedConfig
from kd.errors import require
from kd.losses.base import DistillationLoss, global_batch
from kd.losses.features import check_batches, same_size
from kd.types import Batch, Outputs, Pair, Stages

SHORTEST, LONGEST = 128, 8192  # queue lengths by default
INITIAL_STD = 0.02  # of the head's weights


def queue_length(images: int) -> int:
    """The default length of the queue: the largest power of two that is at most half the training images, from 128 to
    8,192. So a quarter to a half of an epoch is in it, within those bounds; at the start of the next epoch some images
    are in it twice."""
    half = max(images // 2, 1)
    return min(max(2 ** int(math.log2(half)), SHORTEST), LONGEST)


def embedding_queue_loss(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    queue: Float[Tensor, "n d"],
    temperature: float,
    filled: Bool[Tensor, "n"] | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of the softmax over cosine similarities / temperature to the queue's embeddings (SEED,
    section 3), averaged over the batch; not scaled by the squared temperature.

    `queue`: normalised embeddings of the teacher. `filled`: which of its places count; all if left out. If none does,
    the loss is 0. Raises ValueError if the batches differ.
    """
    check_batches(student, teacher)
    log_student, log_teacher = (
        _similarities(embedding, queue, temperature, filled).log_softmax(dim=1) for embedding in (student, teacher)
    )
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _similarities(
    embedding: Float[Tensor, "b d"], queue: Float[Tensor, "n d"], temperature: float, filled: Bool[Tensor, "n"] | None
) -> Float[Tensor, "b n"]:
    similar = F.normalize(embedding, dim=1) @ queue.T / temperature
    if filled is None:
        return similar
    lowest = torch.finfo(similar.dtype).min / 2  # not -inf, whose differences are NaN
    return similar.masked_fill(~filled, lowest)


def cosine_embedding_loss(student: Float[Tensor, "b d *s"], teacher: Float[Tensor, "b d *s"]) -> Float[Tensor, ""]:
    """1 - cosine similarity over dimension 1, averaged over the batch, and over the places of maps.

    Raises ValueError if the batches differ.
    """
    check_batches(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def mse_embedding_loss(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean squared difference over samples and dimensions, of embeddings as they are: not normalised.

    Raises ValueError if the batches differ.
    """
    check_batches(student, teacher)
    return F.mse_loss(student, teacher)


class Embed(DistillationLoss):
    """The loss between the student's embedding through a linear head and the teacher's; no cross-entropy.

    `--form queue`: a step first pushes the global batch's teacher embeddings, the oldest fall out, and then compares
    with the whole queue; so each image finds its own teacher embedding there, and a global batch (or part of an
    accumulated one) that is longer than the queue is refused. All processes hold the same queue, and
    checkpoints include it. Places not filled yet do not count. Scoring on validation images pushes nothing.
    `--patches`: beside it weight * (1 - cosine similarity) of the last maps at each place, of the student through a
    1 x 1 convolution, both pooled to the smaller size.
    Memory: length * width numbers, 25 MB for 8,192 of 768.
    Differs from LightlyTrain: its queue has zeros in places that are not filled, and each process a queue of its own.
    """

    config: EmbedConfig
    has_cross_entropy = False

    @classmethod
    def layers(
        cls, config: EmbedConfig, student: Stages, teacher: Stages | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """With --patches the last map of each network. Raises UserError if one has no known maps."""
        if not config.patches:
            return (), ()
        student_layers = config.student_layers or _last_map(student, "student")
        if teacher is None:
            return student_layers, ()
        return student_layers, config.teacher_layers or _last_map(teacher, "teacher")

    def __init__(self, config: EmbedConfig, pair: Pair):
        super().__init__(config, pair)
        width_in, width = pair.student.logits.shape[1], pair.teacher.logits.shape[1]
        self.head = nn.Linear(width_in, width)
        nn.init.trunc_normal_(self.head.weight, std=INITIAL_STD)
        if config.form == "queue":
            self.register_buffer("queue", torch.zeros(config.queue or queue_length(pair.rows), width))
            self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        if config.patches:
            self.project = nn.Conv2d(*_map_channels(pair), kernel_size=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        projected = self.head(student.logits)
        terms = {"embed": self._embedding_loss(projected, teacher.logits)}
        if self.config.patches:
            (student_map,), (teacher_map,) = student.features.values(), teacher.features.values()
            maps = same_size(self.project(student_map), teacher_map)
            terms["patches"] = self.config.patches * cosine_embedding_loss(*maps)
        return terms

    def _embedding_loss(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        if self.config.form == "cosine":
            return cosine_embedding_loss(student, teacher)
        if self.config.form == "mse":
            return mse_embedding_loss(student, teacher)
        if self.training:
            self._push(teacher)
        queue = self.queue.clone()  # backward needs it as it was: an accumulated batch's next part pushes too
        filled = torch.arange(len(queue), device=queue.device) < self.pushed
        return embedding_queue_loss(student, teacher, queue, self.config.temperature, filled)

    @torch.no_grad()
    def _push(self, teacher: Float[Tensor, "b d"]) -> None:
        """Put the global batch before what the queue holds, whose end falls out."""
        fresh = F.normalize(global_batch(teacher), dim=1)
        require(
            len(fresh) <= len(self.queue),
            f"embed: a batch of {len(fresh)} images does not fit the queue of {len(self.queue)}: give a smaller"
            " --batch-size or a longer --queue",
        )
        self.queue.copy_(torch.cat([fresh, self.queue])[: len(self.queue)])
        self.pushed += len(fresh)

    @torch.no_grad()
    def measures(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The mean cosine similarity of the two embeddings."""
        return {"cosine": F.cosine_similarity(self.head(student.logits), teacher.logits, dim=1).mean()}


def _last_map(stages: Stages, role: str) -> tuple[str, ...]:
    require(
        bool(stages.maps),
        f"--patches: the {role}'s model has no known maps; name the module that outputs one with --{role}-layers, or"
        " leave the flag out",
    )
    return stages.maps[-1:]


def _map_channels(pair: Pair) -> tuple[int, int]:
    """Channels of the student's and the teacher's map. Raises UserError unless each is one map b x c x h x w."""
    found = []
    for role, outputs in (("student", pair.student), ("teacher", pair.teacher)):
        shapes = [tuple(feature.shape) for feature in outputs.features.values()]
        require(len(shapes) == 1, f"--patches: compares one map, and {len(shapes)} --{role}-layers are named; name one")
        require(
            len(shapes[0]) == 4,
            f"--patches: the {role}'s layer {next(iter(outputs.features))} outputs {shapes[0]}, no map b x c x h x w;"
            f" name another with --{role}-layers, or leave the flag out",
        )
        found.append(shapes[0][1])
    return found[0], found[1]
