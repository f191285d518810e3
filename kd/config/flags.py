"""The flags of both scripts, by what they are about; each part checks its own values. No torch here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from kd.errors import require

#: (kd.flags.data) Which data, how it is held and how it is split.


@dataclass(frozen=True)
class DataConfig:
    source: Annotated[str, arg(name="data")] = "cifar100"
    """cifar10, cifar100, tiny-imagenet, imagenette, food101, oxford-pets, imagenet-1k (all from the Hub), digits,
    synthetic, a Hub id (user/name or user/name@revision), or a folder (imagefolder or parquet)."""
    label: str | None = None
    """Label column, where the data has several; the first one if left out."""
    classes: int | None = None
    """Keep the first N classes only."""
    image_size: int | None = None
    """Bring each image's central square to this many pixels a side; needed where images differ in size."""
    stored_size: int | None = None
    """Keep images larger than they are seen: training sees a random --image-size part of them, scoring the centre."""
    decode: Literal["auto", "memory", "workers"] = "auto"
    """memory: every image once, kept on the disk decoded; workers: again in every epoch, by worker processes; auto:
    memory where the decoded images fit. The results are the same."""
    stream: bool = False
    """Read the data in the order it is stored in, shard by shard, and keep nothing: for what the disk cannot hold."""
    shuffle_rows: int = 4096
    """With --stream: rows that are held and shuffled at a time."""
    workers: int | None = None
    """Processes (with --stream, threads) that decode; all the cores this process may use if left out."""
    val_fraction: float = 0.1
    """Share of every class held out of the training split for validation; 0 for none."""
    split_seed: int = 0
    """Which rows validate. Apart from --seed, so that students of several seeds share one teacher."""
    imbalance: float = 1.0
    """Keep fewer training images of each further class, down to this share of the first one's (arXiv:1906.07413); 1
    keeps all. --split-seed says which. Validation and test stay as they are."""

    def check_sizes(self) -> None:
        """Once a named set's own size is filled in."""
        shown, kept = self.image_size, self.stored_size
        require(
            kept is None or (shown is not None and kept >= shown),
            f"--stored-size {kept}: give --image-size too, and no less than that",
        )

    def check(self) -> None:
        require(0 < self.imbalance <= 1, f"--imbalance {self.imbalance}: give a share above 0, up to 1")
        require(self.classes is None or self.classes >= 2, f"--classes {self.classes}: give 2 or more")
        require(self.image_size is None or self.image_size >= 4, f"--image-size {self.image_size}: give 4 or more")
        require(self.shuffle_rows >= 1, f"--shuffle-rows {self.shuffle_rows}: give 1 or more")
        require(self.workers is None or self.workers >= 0, f"--workers {self.workers}: give 0 or more")
        require(not self.stream or self.decode == "auto", f"--stream: leave --decode {self.decode} out")
        require(self.split_seed >= 0, f"--split-seed {self.split_seed}: give 0 or more")
        require(0 <= self.val_fraction < 1, f"--val-fraction {self.val_fraction}: give a share from 0 up to 1")


#: (kd.flags.views) How training images are seen.


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


#: (kd.flags.fit) How a network is trained.


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


#: (kd.flags.run) Where a run lies, how it is saved and followed. None of it changes the weights.


@dataclass(frozen=True)
class RunConfig:
    out: str | None = None
    """Run folder; runs/<preset>/<what>-<model>-seed<seed>-<hash> if left out."""
    resume: bool = False
    """Continue the run in the folder; an error if there is none."""
    auto_resume: bool = False
    """Continue if there is something to continue, else start."""
    resume_inexact: bool = False
    """With either of them: continue with another number of processes. The global batch stays as it is, and the learning
    rate; the bits do not."""
    save_every: int = 0
    """Save every so many steps as well as after every epoch; 0 for epochs only."""
    log_every: int = 50
    """Read losses from the device, and agree to stop, every so many steps."""
    diagnose_every: int = 200
    """Compare the gradients of distillation and cross-entropy every so many steps, at some cost; 0 for never."""
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
        require(self.diagnose_every >= 0, f"--diagnose-every {self.diagnose_every}: give 0 or more")
        require(self.log_every >= 1, f"--log-every {self.log_every}: give 1 or more")
        require(self.threads is None or 1 <= self.threads <= 1024, f"--threads {self.threads}: give 1 to 1024")
        require(not (self.resume and self.auto_resume), "--resume and --auto-resume: give one of them")
        require(
            not self.resume_inexact or self.resume or self.auto_resume,
            "--resume-inexact: says how to continue; give --resume or --auto-resume with it",
        )


#: (kd.flags.cache) How a teacher's answers are kept.


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


#: (kd.flags.compress) What makes the trained network smaller.


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
