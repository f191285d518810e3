"""Every flag and every preset. No torch here: the scripts parse before they import anything slow."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from kd.config.flags import CacheConfig, CompressConfig, DataConfig, FitConfig, RunConfig, ViewConfig
from kd.config.methods import KDConfig, Method, NoneConfig, method_name
from kd.errors import require

PresetName = Literal["report", "strong", "crd", "patient", "digits"]


def check_together(data: DataConfig, views: ViewConfig, fit: FitConfig) -> None:
    require(
        not (data.stream and views.mixes),
        "--stream: leave --mixup and --cutmix out; each image's partner would have to be fetched from anywhere",
    )
    require(
        not (data.stream and fit.balance == "sampler"),
        "--stream: leave --balance sampler out, which visits rows in any order; take weights or logit-adjust",
    )


@dataclass(frozen=True)
class _Common:
    preset: PresetName = "report"
    """The recipe that gives every flag its default. report: the report's own; strong: 200 epochs, the best we know;
    crd: the literature's 240 epochs; patient: the teacher alone, mixup, 1,200 epochs; digits: a demonstration."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    run: RunConfig = field(default_factory=RunConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)


@dataclass(frozen=True)
class TrainConfig(_Common):
    model: str = "resnet34"
    """A name such as resnet34, torchvision/NAME, timm/NAME, or your own module:function, called as f(num_classes=K)."""
    method: NoneConfig = field(default_factory=NoneConfig)

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.compress, self.method):
            part.check()
        check_together(self.data, self.views, self.fit)

    def job(self) -> "Job":
        parts = (self.data, self.views, self.fit, self.run)
        return Job("teacher", self.preset, self.model, self.method, *parts, compress=self.compress)


@dataclass(frozen=True)
class DistillConfig(_Common):
    student: str = "resnet18"
    """The network to train; names as for train_teacher.py's --model."""
    teacher: tuple[str, ...] = ()
    """Run folder (or Hub id) of the teacher, a pretrained torchvision/NAME or timm/NAME, or a file of weights; of
    several the probabilities are averaged. Left out: with --prune or --sparsity the network of --init, else the
    recipe's own, which is trained first and reused afterwards."""
    fine_tune_teacher: bool = False
    """First train a new last layer for these classes on a --teacher from elsewhere; the rest of it stays as it is."""
    teacher_model: str = "resnet34"
    """The recipe's teacher, where --teacher is left out; the network, where --teacher is a file of weights."""
    teacher_seed: int = 0
    """Its seed; apart from --seed, so that students of several seeds share one teacher."""
    trust_code: bool = False
    """Build a --teacher whose network is a module:function, which runs its author's code."""
    control: bool = False
    """Also train the student alone, by the same recipe, to compare with."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    method: Method = field(default_factory=KDConfig)

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.compress, self.method):
            part.check()
        self.cache.check(self.views)
        require(
            bool(self.teacher) or not self.fine_tune_teacher,
            "--fine-tune-teacher: needs a --teacher from elsewhere (torchvision/NAME, timm/NAME or a file of weights)",
        )
        check_together(self.data, self.views, self.fit)

    def job(self) -> "Job":
        parts = (self.data, self.views, self.fit, self.run, self.cache, self.compress)
        return Job(method_name(self.method), self.preset, self.student, self.method, *parts)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The runs that teach: --teacher, else the network as it was before it was pruned, else none yet."""
        pruned = self.compress.prune > 0 or self.compress.sparsity > 0
        return self.teacher or ((self.compress.init,) if pruned else ())

    def teacher_job(self) -> "Job":
        """The recipe's teacher: resumed unasked, in its own default folder.

        It sees a new view every epoch: --views limits what it is asked by its students, not what it learns from.
        """
        fit = dataclasses.replace(self.fit, seed=self.teacher_seed)
        job = self._side_job("teacher", self.teacher_model, fit)
        return dataclasses.replace(job, views=dataclasses.replace(self.views, count=0, view_seed=0))

    def head_job(self, model: str, origin: "Origin") -> "Job":
        """A new last layer upon a network from elsewhere, by the teacher's recipe."""
        return dataclasses.replace(self.teacher_job(), model=model, origin=origin)

    def control_job(self) -> "Job":
        """The student alone, compressed alike: the very run that `distill_student.py none` makes."""
        return dataclasses.replace(self._side_job("none", self.student, self.fit), compress=self.compress)

    def _side_job(self, role: str, model: str, fit: FitConfig) -> "Job":
        run = dataclasses.replace(self.run, out=None, resume=False, auto_resume=True)
        return Job(role, self.preset, model, NoneConfig(), self.data, self.views, fit, run)


@dataclass(frozen=True)
class Origin:
    """A network from elsewhere, of which a job trains a new last layer (kd/foreign.py)."""

    source: str  # as --teacher names it
    sha256: str
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One network to train: what both scripts boil down to."""

    role: str  # "teacher", or the method's name
    preset: str
    model: str
    method: object  # one of METHODS
    data: DataConfig
    views: ViewConfig
    fit: FitConfig
    run: RunConfig
    cache: CacheConfig = field(default_factory=CacheConfig)  # how the teacher's answers are kept, if there is one
    compress: CompressConfig = field(default_factory=CompressConfig)
    origin: Origin | None = None  # left out: all of a fresh network is trained

    @property
    def method_name(self) -> str:
        return method_name(self.method)
