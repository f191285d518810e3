"""Every flag and every preset. No torch here: the scripts parse before they import anything slow."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from kd.errors import require
from kd.methods import METHODS, KDConfig, Method, NoneConfig, method_name

__all__ = ["METHODS", "KDConfig", "Method", "NoneConfig"]


@dataclass(frozen=True)
class DataConfig:
    source: Annotated[str, arg(name="data")] = "cifar100"
    """cifar100, digits, synthetic, a Hub id (user/name or user/name@revision), or a folder (imagefolder or parquet)."""
    label: str | None = None
    """Label column, where the data has several; the first one if left out."""
    classes: int | None = None
    """Keep the first N classes only."""
    image_size: int | None = None
    """Resize the shorter side to this and crop the centre; needed where images differ in size."""
    val_fraction: float = 0.1
    """Share of every class held out of the training split for validation; 0 for none."""
    split_seed: int = 0
    """Which rows validate. Apart from --seed, so that students of several seeds share one teacher."""

    def check(self) -> None:
        require(self.classes is None or self.classes >= 2, f"--classes {self.classes}: give 2 or more")
        require(self.image_size is None or self.image_size >= 4, f"--image-size {self.image_size}: give 4 or more")
        require(self.split_seed >= 0, f"--split-seed {self.split_seed}: give 0 or more")
        require(0 <= self.val_fraction < 1, f"--val-fraction {self.val_fraction}: give a share from 0 up to 1")


@dataclass(frozen=True)
class ViewConfig:
    crop_padding: int = 4
    """Pad by this many black pixels, then crop back at random; 0 for no crop."""
    flip: bool = True
    """Mirror half of the images; off for digits."""
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
        require(self.crop_padding >= 0, f"--crop-padding {self.crop_padding}: give 0 or more")
        require(self.count >= 0, f"--views {self.count}: give 0 or more")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value == 0 or 0.01 <= value <= 100, f"--{name} {value}: give 0, or a number from 0.01 to 100")
        require(0 <= self.erase <= 1, f"--erase {self.erase}: give a share from 0 to 1")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


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
        require(self.lr > 0 and math.isfinite(self.lr), f"--lr {self.lr}: give a number above 0")
        require(0 <= self.momentum < 1, f"--momentum {self.momentum}: give 0 or more, below 1")
        require(not self.nesterov or self.momentum > 0, "--nesterov: needs --momentum above 0")
        require(self.weight_decay >= 0, f"--weight-decay {self.weight_decay}: give 0 or more")
        require(self.warmup_epochs >= 0, f"--warmup-epochs {self.warmup_epochs}: give 0 or more")
        require(self.clip_norm is None or self.clip_norm > 0, f"--clip-norm {self.clip_norm}: give more than 0")
        require(all(0 < m < 1 for m in self.milestones), f"--milestones {self.milestones}: give shares between 0 and 1")


@dataclass(frozen=True)
class RunConfig:
    out: str | None = None
    """Run folder; runs/<preset>/<what>-<model>-seed<seed>-<hash> if left out."""
    resume: bool = False
    """Continue the run in the folder; an error if there is none."""
    auto_resume: bool = False
    """Continue if there is something to continue, else start."""
    save_every: int = 0
    """Save every so many steps as well as after every epoch; 0 for epochs only."""
    log_every: int = 50
    """Read losses from the device, and agree to stop, every so many steps."""
    threads: int | None = None
    """CPU threads of each process; left out: all the cores it may use."""
    test: bool = True
    """Read the test split at the end. --no-test leaves it unread and the summary's test keys null, for settings that
    are compared on validation; the same command without it then only reads the test split."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a key is found, else offline."""
    wandb_project: str = "kd"
    """Project in Weights & Biases."""
    wandb_group: str | None = None
    """Group in Weights & Biases; the preset's name if left out."""

    def check(self) -> None:
        require(self.save_every >= 0, f"--save-every {self.save_every}: give 0 or more")
        require(self.log_every >= 1, f"--log-every {self.log_every}: give 1 or more")
        require(self.threads is None or self.threads >= 1, f"--threads {self.threads}: give 1 or more")
        require(not (self.resume and self.auto_resume), "--resume and --auto-resume: give one of them")


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


PresetName = Literal["report", "strong", "crd", "patient", "digits"]


@dataclass(frozen=True)
class _Common:
    preset: PresetName = "report"
    """The recipe that gives every flag its default. report: the report's own; strong: 200 epochs, the best we know;
    crd: the literature's 240 epochs; patient: the teacher alone, mixup, 1,200 epochs; digits: a demonstration."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class TrainConfig(_Common):
    model: str = "resnet34"
    """A name such as resnet34, torchvision/NAME, timm/NAME, or your own module:function, called as f(num_classes=K)."""
    method: NoneConfig = field(default_factory=NoneConfig)

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.method):
            part.check()

    def job(self) -> "Job":
        return Job("teacher", self.preset, self.model, self.method, self.data, self.views, self.fit, self.run)


@dataclass(frozen=True)
class DistillConfig(_Common):
    student: str = "resnet18"
    """The network to train; names as for train_teacher.py's --model."""
    teacher: tuple[str, ...] = ()
    """Run folder of the teacher, or of several, whose probabilities are averaged; left out: the recipe's own is trained
    first, and reused afterwards."""
    teacher_model: str = "resnet34"
    """The recipe's teacher, where --teacher is left out."""
    teacher_seed: int = 0
    """Its seed; apart from --seed, so that students of several seeds share one teacher."""
    trust_code: bool = False
    """Build a --teacher whose network is a module:function, which runs its author's code."""
    control: bool = False
    """Also train the student alone, by the same recipe, to compare with."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    method: Method = field(default_factory=KDConfig)

    def check(self) -> None:
        for part in (self.data, self.views, self.fit, self.run, self.method):
            part.check()
        self.cache.check(self.views)

    def job(self) -> "Job":
        name = method_name(self.method)
        return Job(name, self.preset, self.student, self.method, self.data, self.views, self.fit, self.run, self.cache)

    def teacher_job(self) -> "Job":
        """The recipe's teacher: resumed unasked, in its own default folder.

        It sees a new view every epoch: --views limits what it is asked by its students, not what it learns from.
        """
        fit = dataclasses.replace(self.fit, seed=self.teacher_seed)
        job = self._side_job("teacher", self.teacher_model, fit)
        return dataclasses.replace(job, views=dataclasses.replace(self.views, count=0, view_seed=0))

    def control_job(self) -> "Job":
        """The student alone: the very run that `distill_student.py none` makes."""
        return self._side_job("none", self.student, self.fit)

    def _side_job(self, role: str, model: str, fit: FitConfig) -> "Job":
        run = dataclasses.replace(self.run, out=None, resume=False, auto_resume=True)
        return Job(role, self.preset, model, NoneConfig(), self.data, self.views, fit, run)


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
    cache: CacheConfig = CacheConfig()  # how the teacher's answers are kept, if there is one

    @property
    def method_name(self) -> str:
        return method_name(self.method)
