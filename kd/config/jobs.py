"""The whole configuration of each script, and the jobs, one network each, that follow from it. No torch here.

Names, order and nesting of the fields of Job are in every config.json and in run identities, and must stay.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from kd.config.flags import CacheConfig, CompressConfig, DataConfig, FitConfig, RunConfig, StartConfig, ViewConfig
from kd.config.methods import KDConfig, Method, NoneConfig, method_name
from kd.config.model_args import asked_size, parse_model_args
from kd.config.presets import PRESETS, for_teacher, usual_teacher
from kd.errors import require

PresetName = Literal[
    "report", "quick", "strong", "modern", "crd", "patient", "own", "vit", "imagenet", "digits", "embed"
]


# Peak learning rates that a preset has for some networks, and for all others (""); a preset not named has one for all.
LR_BY_NETWORK = {
    "crd": {"": 0.05, **dict.fromkeys(("mobilenetv2", "shufflenetv1", "shufflenetv2"), 0.01)},
}


def fit_for(preset: str, fit: FitConfig, model: str) -> FitConfig:
    """`fit` with the learning rate that the preset has for this network; one that is given stays."""
    rates = LR_BY_NETWORK.get(preset)
    if rates is None or fit.lr is not None:
        return fit
    return dataclasses.replace(fit, lr=rates.get(model, rates[""]))


def check_together(data: DataConfig, views: ViewConfig, fit: FitConfig) -> None:
    """Raise UserError for flags of different parts that exclude each other."""
    require(
        not (data.stream and views.mixes),
        "--stream: mixes no images, whose partners may be in any shard; give --mixup 0 and --cutmix 0",
    )
    require(
        not (data.stream and fit.balance == "sampler"),
        "--stream: leave --balance sampler out, which needs rows in any order; give weights or logit-adjust",
    )
    require(
        not data.no_labels or fit.balance == "none",
        f"--balance {fit.balance}: is about classes, and the images have no labels; leave it out",
    )
    off = views.mix_off_epochs
    require(
        off == 0 or fit.epochs is None or off < fit.epochs,
        f"--mix-off-epochs {off}: give fewer than the {fit.epochs} of --epochs",
    )


@dataclass(frozen=True)
class _Common:
    """Flags of both scripts."""

    preset: PresetName = "report"
    """Sets all defaults. report: the report's; quick: its ten epochs, used well; own: by the data's
    number of images; strong: 200 plain epochs; modern: 300, all we know; crd, imagenet: the literature's; vit:
    transformers; patient: 1,200 epochs; digits: a demo; embed: for that method."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    run: RunConfig = field(default_factory=RunConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    start: StartConfig = field(default_factory=StartConfig)


@dataclass(frozen=True)
class TrainConfig(_Common):
    """Flags of train_teacher.py."""

    model: str = "resnet34"
    """NAME, torchvision/NAME, timm/NAME or your own module:function."""
    method: NoneConfig = field(default_factory=NoneConfig)

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.compress, self.start, self.method):
            part.check()
        check_together(self.data, self.views, self.fit)

    def job(self) -> "Job":
        parts = (self.data, self.views, fit_for(self.preset, self.fit, self.model), self.run)
        return Job("teacher", self.preset, self.model, self.method, *parts, compress=self.compress, start=self.start)


@dataclass(frozen=True)
class DistillConfig(_Common):
    """Flags of distill_student.py."""

    student: str = "resnet18"
    """NAME, torchvision/NAME, timm/NAME or your own module:function."""
    teacher: Annotated[tuple[str, ...], arg(metavar="RUN ...")] = ()
    """Run folder, Hub id, torchvision/NAME, timm/NAME or file of weights (several: mean of their probabilities). If
    left out: --init's network with --prune or --sparsity, else the recipe's own, trained first and reused."""
    fine_tune_teacher: bool = False
    """First train a new last layer on a pretrained --teacher, for these classes."""
    teacher_model: str = "resnet34"
    """The recipe's own teacher, or the network of a file of weights."""
    teacher_seed: int = 0
    """Seed of the recipe's own teacher, shared by students of every --seed."""
    trust_code: bool = False
    """Build a --teacher that is a module:function; runs its author's code."""
    control: bool = False
    """Also train the student alone, by the same recipe, to compare."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    method: Method = field(default_factory=KDConfig)
    teacher_init: Annotated[str | None, arg(metavar="RUN")] = None
    """As --init, for the recipe's own teacher."""
    teacher_model_args: Annotated[str | None, arg(metavar="KEY=VALUE,...")] = None
    """As --model-args, for --teacher-model; with embed also for a library's --teacher (img_size=224)."""

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.compress, self.start, self.method):
            part.check()
        self.cache.check(self.views)
        require(
            bool(self.teacher and self.teachers) or not self.fine_tune_teacher,
            "--fine-tune-teacher: needs a pretrained --teacher (torchvision/NAME, timm/NAME or a file of weights)",
        )
        require(
            self.teacher_init is None or not self.teachers,
            f"--teacher-init {self.teacher_init}: is for the recipe's own teacher, and {' '.join(self.teachers)}"
            " teaches; leave one of them out",
        )
        parse_model_args(self.teacher_model_args, "--teacher-model-args")
        require(
            self.cache.cache_from is None or self.teacher in ((), PRESETS[self.preset].get("pretrained")),
            f"--teacher {' '.join(self.teacher)}: --cache-teacher {self.cache.cache_from} has the teacher's answers"
            " already; leave one of them out",
        )
        check_together(self.data, self.views, self.fit)
        top_k = self.cache.cache_top_k
        require(
            top_k is None or not self.method.embeds,
            f"--cache-top-k {top_k}: keeps the largest of a teacher's logits, and embeddings are needed whole; leave it"
            " out",
        )

    def job(self) -> "Job":
        fit, method = fit_for(self.preset, self.fit, self.student), self.method.settled(self.student)
        parts = (self.data, self.views, fit, self.run, self.cache, self.compress)
        return Job(method_name(method), self.preset, self.student, method, *parts, start=self.start)

    def for_method(self) -> "DistillConfig":
        """The configuration with --no-labels if the method trains on embeddings: it reads no labels that are there.

        Raises UserError for flags about labels then, or if no teacher is named.
        """
        if not self.method.embeds:
            return self
        name = method_name(self.method)
        require(
            bool(self.teachers or self.cache.cache_from),
            f"{name}: needs --teacher, a network whose embedding to learn: a run, timm/NAME, torchvision/NAME, a file",
        )
        data = dataclasses.replace(self.data, no_labels=True)
        data.check()
        return dataclasses.replace(self, data=data)

    @property
    def teachers(self) -> tuple[str, ...]:
        """--teacher; if left out, with pruning, the unpruned network of --init; else empty: none is trained yet.

        A --teacher-model or --teacher-init that is given takes the place of the teacher that a preset names.
        """
        pruned = self.compress.prune > 0 or self.compress.sparsity > 0
        own = (self.teacher_model, self.teacher_init) != (usual_teacher(self.preset), None)
        named = () if own and self.teacher == PRESETS[self.preset].get("pretrained") else self.teacher
        return named or ((self.compress.init,) if pruned else ())

    @property
    def is_taught_by_named(self) -> bool:
        """Whether --teacher's networks teach, and neither --init's nor the recipe's own, whose code is the user's."""
        return bool(self.teachers) and self.teachers == self.teacher

    def teacher_job(self, model: str | None = None) -> "Job":
        """The recipe's teacher (or another network like it): in its own default folder, and resumed without --resume.

        It sees a new view every epoch: --views limits the views that students take its logits of.
        """
        fit = dataclasses.replace(for_teacher(self.preset, "fit", self.fit), seed=self.teacher_seed)
        job = self._side_job("teacher", model or self.teacher_model, fit)
        views = dataclasses.replace(for_teacher(self.preset, "views", self.views), count=0, view_seed=0)
        start, compress = StartConfig(self.teacher_model_args), CompressConfig(self.teacher_init)
        return dataclasses.replace(job, views=views, start=start, compress=compress)

    def head_job(self, model: str, origin: "Origin") -> "Job":
        """Training of a new last layer on a pretrained network, by the teacher's recipe."""
        return dataclasses.replace(self.teacher_job(model), origin=origin)

    def control_job(self) -> "Job":
        """The student alone, compressed and smoothed alike: what `distill_student.py none` makes of these flags."""
        job = self._side_job("none", self.student, self.fit)
        alone = NoneConfig(label_smoothing=self.method.label_smoothing)
        return dataclasses.replace(job, method=alone, compress=self.compress, start=self.start)

    def _side_job(self, role: str, model: str, fit: FitConfig) -> "Job":
        run = dataclasses.replace(self.run, out=None, resume=False, auto_resume=True, push_to=None, push_every=0)
        fit = fit_for(self.preset, fit, model)
        return Job(role, self.preset, model, NoneConfig(), self.data, self.views, fit, run)


@dataclass(frozen=True)
class Origin:
    """Weights from elsewhere: of a pretrained teacher that gets a new last layer, or those that --init starts from."""

    source: str  # the value of --teacher or --init
    sha256: str
    image_size: tuple[int, int]  # at which the network takes the images, resized inside
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One network to train: what both scripts reduce to."""

    role: str  # "teacher", or the method's name
    preset: str
    model: str
    method: object  # one of METHODS
    data: DataConfig
    views: ViewConfig
    fit: FitConfig
    run: RunConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    origin: Origin | None = None  # None: a new network, or a run's that sees images as the data has them
    start: StartConfig = field(default_factory=StartConfig)

    @property
    def model_args(self) -> dict[str, object]:
        return parse_model_args(self.start.model_args)

    @property
    def resized(self) -> tuple[int, int] | None:
        """The size at which the network takes the images, resized inside; None: that of the data."""
        return self.origin.image_size if self.origin else asked_size(self.model, self.model_args)

    @property
    def method_name(self) -> str:
        return method_name(self.method)
