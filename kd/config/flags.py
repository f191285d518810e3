"""The flags of both scripts: data, augmentation, training, run folder and logging, teacher cache, compression.

One frozen dataclass a subject; each checks its own values. A docstring under a field is its help text (kd.config.help);
names, order and nesting of the fields are in every config.json and must stay. No torch here.
"""

import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from kd.config.model_args import format_model_args, parse_model_args
from kd.errors import nearest, require
from kd.utils.hub import check_id
from kd.utils.system import expand_user

MAX_PADDING = 4096  # pixels

# Fields of FitConfig that --preset own leaves to the number of training images: None until kd.config.defaults.settle.
SETTLED_BY_DATA = ("epochs", "batch_size", "lr", "warmup_epochs")

MAGNITUDES = {"rand": (0, 30), "augmix": (1, 10)}
"""Smallest and largest --policy-magnitude, of the policies that take one."""

MAX_RATE = 1e6  # learning rate or decay: beyond it floats overflow in the first step

# Names for --optimizer, beside timm/NAME: torch's own, and two of timm's that are known by their names.
# kd/training/optimizers.py has the classes.
TORCH_OPTIMIZERS = (
    *("sgd", "adamw", "adam", "muon", "nadam", "radam", "adamax"),
    *("adagrad", "adadelta", "rmsprop", "asgd", "adafactor"),
)
TIMM_OPTIMIZERS = ("lion", "lamb")
OPTIMIZERS = (*TORCH_OPTIMIZERS, *TIMM_OPTIMIZERS)
# A cache on the Hub, as --cache-teacher names it.
HUB = "hub:"
HUB_CACHE = rf"{HUB}[\w.-]+/[\w.-]+(@[\w./-]+)?"


def is_cache(word: str) -> bool:
    """Whether a word after --cache-teacher names a cache: no method has a slash in its name."""
    return word.startswith(HUB) or ("/" in word and not word.startswith("--"))


WITHOUT_BETAS = ("sgd", "adagrad", "adadelta", "rmsprop", "asgd", "adafactor")
WITHOUT_EPS = ("sgd", "asgd", "adafactor", "lion")


@dataclass(frozen=True)
class DataConfig:
    """Which data, how it is stored and how it is split."""

    source: Annotated[str, arg(name="data")] = "cifar100"
    """Hub: cifar10, cifar100, tiny-imagenet, imagenette, food101, oxford-pets, imagenet-1k, or user/name[@revision];
    local: digits, synthetic, a folder of images (SPLIT/CLASS/ or CLASS/) or parquet, or module:function."""
    label: str | None = None
    """Label column, if there are several."""
    classes: int | None = None
    """Use the first N classes only."""
    image_size: int | None = None
    """Resize each image's central square to N x N pixels; needed if sizes differ."""
    stored_size: int | None = None
    """Store N x N pixels: train on random --image-size crops, score the centre."""
    decode: Literal["auto", "memory", "workers"] = "auto"
    """memory: decode once; workers: in every epoch; auto: by what fits."""
    stream: bool = False
    """Read shards in order and store nothing, for data larger than the disk."""
    shuffle_rows: int = 4096
    """Rows in the shuffle buffer of --stream."""
    workers: int | None = None
    """Processes (threads with --stream) that decode; all cores if left out."""
    val_fraction: float = 0.1
    """Share of each class held out of training for validation; 0: none."""
    split_seed: int = 0
    """Seed of the validation split, so that every --seed shares one teacher."""
    imbalance: float = 1.0
    """Long tail: the last class keeps this share of its images (arXiv:1906.07413)."""
    image: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Image column, if there are several."""
    test_fraction: float = 0.2
    """Share of each class held out as test split, if there is none."""
    skip_broken: bool = False
    """Leave out images that cannot be read, and say how many."""
    no_labels: bool = False
    """Read the images alone, in any nesting of folders, for methods that need no labels (kd --alpha 1)."""
    label_share: float = 1.0
    """Train on this share of each class's labelled images; validation and test stay whole."""

    def check_sizes(self) -> None:
        """Check the two sizes, after a named set's own --image-size is filled in."""
        size, stored = self.image_size, self.stored_size
        require(
            stored is None or (size is not None and stored >= size),
            f"--stored-size {stored}: give --image-size too, at most {stored}",
        )

    def check(self) -> None:
        require(0 < self.label_share <= 1, f"--label-share {self.label_share}: give a share above 0, up to 1")
        require(0 < self.imbalance <= 1, f"--imbalance {self.imbalance}: give a share above 0, up to 1")
        require(self.classes is None or self.classes >= 2, f"--classes {self.classes}: give 2 or more")
        require(self.image_size is None or self.image_size >= 4, f"--image-size {self.image_size}: give 4 or more")
        require(self.shuffle_rows >= 1, f"--shuffle-rows {self.shuffle_rows}: give 1 or more")
        require(
            self.stream or self.shuffle_rows == DataConfig.shuffle_rows,
            f"--shuffle-rows {self.shuffle_rows}: needs --stream; other data is shuffled whole",
        )
        require(self.workers is None or self.workers >= 0, f"--workers {self.workers}: give 0 or more")
        require(
            not self.stream or self.decode == "auto",
            f"--stream: leave --decode {self.decode} out; a stream is decoded as it is read",
        )
        require(self.split_seed >= 0, f"--split-seed {self.split_seed}: give 0 or more")
        if self.no_labels:
            self._check_without_labels()
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name.replace('_', '-')} {value}: give a share from 0 up to 1")

    def _check_without_labels(self) -> None:
        """Raise UserError for a flag about labels, or about the test split that needs them."""
        default = type(self)()
        for name in ("label", "classes", "imbalance", "test_fraction", "label_share"):
            value = getattr(self, name)
            require(
                value == getattr(default, name),
                f"--{name.replace('_', '-')} {value}: is about labels, and the images have none; leave it out",
            )


@dataclass(frozen=True)
class ViewConfig:
    """Augmentation of the training images."""

    crop_padding: int = 4
    """Pad by N black pixels, then crop back at random; 0: no crop."""
    resized_crop: float = 0.0
    """Random crop of at least this share of the area, 3:4 to 4:3, in place of --crop-padding; 0: none (ImageNet: 0.08,
    arXiv:1409.4842)."""
    flip: bool = True
    """Mirror half of the images."""
    colour_jitter: float = 0.0
    """Change brightness, contrast, saturation by up to this share; 0: none."""
    mixup: float = 0.0
    """Blend image pairs, weight from Beta(X, X); 0: none (arXiv:1710.09412)."""
    cutmix: float = 0.0
    """Paste a box of another image, its area from Beta(X, X); 0: none (arXiv:1905.04899). With --mixup, each mixes half
    of the images."""
    erase: float = 0.0
    """Share of images with a random box erased (arXiv:1708.04896)."""
    count: Annotated[int, arg(name="views")] = 0
    """Views of each image: epoch e uses view e mod N; 0: always new ones."""
    view_seed: int = 0
    """Seed of --views, so that students of every --seed share one cache."""
    policy: Literal["none", "trivial", "rand", "augmix"] = "none"
    """TrivialAugment (arXiv:2103.10158), RandAugment (1909.13719) or AugMix (1912.02781)."""
    policy_ops: int | None = None
    """With --policy rand: operations on each image; 2 if left out."""
    policy_magnitude: int | None = None
    """With --policy rand: 0 to 30, 9 if left out; with augmix: its severity, 1 to 10, 3 if left out."""
    hue: float = 0.0
    """Turn all hues by up to this share of the colour circle, at most 0.5."""
    grey: float = 0.0
    """Share of images made grey."""
    blur: float = 0.0
    """Share of images blurred by a Gaussian of 0.1 to 2 pixels (arXiv:2002.05709)."""
    vertical_flip: bool = False
    """Turn half of the images upside down."""
    crop_ratio: Annotated[tuple[float, float], arg(metavar="LOW HIGH")] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of --resized-crop."""
    resized_crop_max: float = 1.0
    """Largest share of the area that --resized-crop takes."""
    alternating_flip: bool = False
    """Mirror each image in every second epoch, in place of at random."""
    mix_off_epochs: int = 0
    """No --mixup and --cutmix in the last N epochs."""
    strong_ops: int = 2
    """Operations of RandAugment in the strong view, of methods with two views (arXiv:2001.07685)."""
    strong_magnitude: int | None = None
    """Their magnitude, 0 to 30; drawn for each one if left out, as in the code of these methods."""
    strong_cutout: float = 0.5
    """Largest side of a grey square in the strong view, as a share of the image's; 0: none."""

    def check(self) -> None:
        require(0 <= self.crop_padding <= MAX_PADDING, f"--crop-padding {self.crop_padding}: give 0 to {MAX_PADDING}")
        for name in ("resized_crop", "colour_jitter", "erase", "grey", "blur"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} {value}: give a share from 0 to 1")
        require(0 <= self.hue <= 0.5, f"--hue {self.hue}: give a share of the colour circle from 0 to 0.5")
        require(self.flip or not self.alternating_flip, "--alternating-flip: leave --no-flip out")
        require(self.count >= 0, f"--views {self.count}: give 0 or more")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value == 0 or 0.01 <= value <= 100, f"--{name} {value}: give 0, or a number from 0.01 to 100")
        off = self.mix_off_epochs
        require(off >= 0, f"--mix-off-epochs {off}: give 0 or more")
        require(off == 0 or self.mixes, f"--mix-off-epochs {off}: needs --mixup or --cutmix")
        self._check_crop()
        self._check_policy()
        self._check_strong()

    def _check_crop(self) -> None:
        low, high = self.crop_ratio
        require(
            0.01 <= low <= high <= 100,
            f"--crop-ratio {low:g} {high:g}: give two numbers from 0.01 to 100, the smaller first",
        )
        default = type(self)()
        for name in ("crop_ratio", "resized_crop_max"):
            changed = getattr(self, name) != getattr(default, name)
            require(not changed or self.resized_crop > 0, f"--{name.replace('_', '-')}: needs --resized-crop")
        largest = self.resized_crop_max
        require(
            self.resized_crop <= largest <= 1,
            f"--resized-crop-max {largest:g}: give a share from --resized-crop's {self.resized_crop:g} to 1",
        )

    def _check_policy(self) -> None:
        ops, magnitude = self.policy_ops, self.policy_magnitude
        require(ops is None or self.policy == "rand", f"--policy-ops {ops}: only --policy rand takes it")
        require(ops is None or 1 <= ops <= 20, f"--policy-ops {ops}: give 1 to 20")
        if magnitude is not None:
            require(
                self.policy in MAGNITUDES,
                f"--policy-magnitude {magnitude}: only --policy {' and '.join(MAGNITUDES)} take it",
            )
            low, high = MAGNITUDES[self.policy]
            require(low <= magnitude <= high, f"--policy-magnitude {magnitude}: give {low} to {high}")

    def _check_strong(self) -> None:
        ops, magnitude = self.strong_ops, self.strong_magnitude
        require(0 <= ops <= 14, f"--strong-ops {ops}: give 0 to 14")
        require(magnitude is None or 0 <= magnitude <= 30, f"--strong-magnitude {magnitude}: give 0 to 30")
        cutout = self.strong_cutout
        require(0 <= cutout <= 1, f"--strong-cutout {cutout}: give a share from 0 to 1")

    @property
    def strong(self) -> dict:
        """The flags of the strong view, which change nothing for methods with one view."""
        return {name: getattr(self, name) for name in ("strong_ops", "strong_magnitude", "strong_cutout")}

    @property
    def padding(self) -> int:
        return 0 if self.resized_crop else self.crop_padding

    @property
    def moves_only(self) -> bool:
        """Whether an image's pixels are moved alone: by whole pixels, and no level changes."""
        changes = self.resized_crop, self.colour_jitter, self.hue, self.grey, self.blur
        return self.policy == "none" and not any(changes)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def stored(self) -> int:
        """The number of different views of each image with --views, for a teacher's cache."""
        return self.count + min(self.count, self.mix_off_epochs)

    def number(self, epoch: int, epochs: int) -> int:
        """The number of an epoch's views, in a run of so many epochs.

        --views K repeat 0 to K - 1, and in the last --mix-off-epochs those from K on, which are not mixed.
        """
        if not self.count:
            return epoch
        off = epoch - (epochs - self.mix_off_epochs)
        unmixed = self.stored - self.count
        return epoch % self.count if off < 0 or not unmixed else self.count + off % unmixed

    def mixes_in(self, number: int, epochs: int) -> bool:
        """Whether the views of this number are mixed, in a run of so many epochs."""
        return self.mixes and (self.mix_off_epochs == 0 or number < (self.count or epochs - self.mix_off_epochs))


@dataclass(frozen=True)
class FitConfig:
    """How a network is trained."""

    epochs: int | None = 10
    """Passes over the training data."""
    batch_size: int | None = 64
    """Images per step, over all processes together."""
    lr: float | None = 0.001
    """Peak learning rate."""
    # The report gives neither momentum nor weight decay; these are the field's usual values.
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum (SGD)."""
    weight_decay: float = 5e-4
    """Weight decay: for sgd, adam and most others an L2 penalty, for adamw a share of lr (there 0.05 is usual)."""
    schedule: Literal["cosine", "step", "constant", "one-cycle"] = "cosine"
    """How the learning rate falls, step by step; one-cycle: in a straight line, after the warm-up, or a rise over
    30% of the run if there is none."""
    warmup_epochs: float | None = 0.0
    """Epochs of linear rise before the schedule."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """With --schedule step: divide lr by 10 at these shares of the run."""
    balance: Literal["none", "sampler", "weights", "logit-adjust"] = "none"
    """sampler: draw all classes equally often; weights: weight cross-entropy (arXiv:1901.05555); logit-adjust:
    add log class frequencies (arXiv:2007.07314)."""
    drop_last: bool = True
    """Leave the last batch of an epoch out if it is incomplete."""
    clip_norm: float | None = None
    """Largest gradient norm; longer gradients are scaled down to it."""
    seed: int = 0
    """Seed of the weights, the order of the images and their views."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the step; as `accelerate launch` is configured if left out."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all processes (GPU only)."""
    deterministic: bool = False
    """Repeat bit for bit on a GPU too, at some cost in speed (a CPU always does)."""
    compile: bool = True
    """Compile the step on CUDA (on a CPU: little gain, half a minute lost)."""
    channels_last: bool = True
    """Store images channels-last; python -m kd.bench measures the gain."""
    optimizer: str = "sgd"
    """sgd, adamw, muon or another of torch; with timm also lion, lamb, timm/NAME."""
    betas: tuple[float, ...] = ()
    """Decay rates of the optimizer's running means; its own if left out."""
    eps: float | None = None
    """Keeps the optimizer's divisor from zero; its own if left out."""
    decay_norm_and_bias: bool = True
    """Also decay biases and the weights of normalisation."""
    layer_decay: float | None = None
    """Multiply the learning rate by this for each layer below the last one (fine-tuning transformers: 0.65 to 0.8)."""
    ema: float | None = None
    """Also score and save a mean of the weights over about 1/(1 - X) steps."""
    accumulate: int = 1
    """Compute each step's gradient in N parts of the batch, which takes less memory; methods that compare the images of
    a batch see one part."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory (timm's networks)."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_start: float | None = None
    """Learning rate of the first step of the rise; one step's share of it if left out."""
    lr_per_256: float | None = None
    """In place of --lr: the learning rate for a batch of 256; it grows with the batch (arXiv:1706.02677)."""
    steps: int | None = None
    """In place of --epochs: end after N steps."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """reduce-overhead: replay the compiled step as CUDA graphs; max-autotune: and search for the fastest kernels."""

    @property
    def peak_lr(self) -> float | None:
        """The learning rate that --lr, or --lr-per-256 for this batch size, asks for; None if the data decides."""
        if self.lr_per_256 is None:
            return self.lr
        return None if self.batch_size is None else self.lr_per_256 * self.batch_size / 256

    def steps_an_epoch(self, images: int) -> int:
        """How many batches an epoch of this many training images has."""
        whole, left = divmod(images, self.batch_size)
        return whole + (left > 0 and not self.drop_last)

    def total_steps(self, steps_an_epoch: int) -> int:
        """How many steps the whole run has."""
        return steps_an_epoch * self.epochs if self.steps is None else self.steps

    def check(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: give 1 or more")
        lr, warmup = self.lr, self.warmup_epochs
        require(lr is None or 0 < lr <= MAX_RATE, f"--lr {lr}: give a number above 0, up to {MAX_RATE:g}")
        require(0 <= self.momentum < 1, f"--momentum {self.momentum}: give 0 or more, below 1")
        require(not self.nesterov or self.momentum > 0, "--nesterov: needs --momentum above 0")
        decay = self.weight_decay
        require(0 <= decay <= MAX_RATE, f"--weight-decay {decay}: give 0 or more, up to {MAX_RATE:g}")
        require(warmup is None or 0 <= warmup < math.inf, f"--warmup-epochs {warmup}: give 0 or more")
        require(
            self.clip_norm is None or 0 < self.clip_norm < math.inf, f"--clip-norm {self.clip_norm}: give more than 0"
        )
        require(all(0 < m < 1 for m in self.milestones), f"--milestones {self.milestones}: give shares between 0 and 1")
        require(
            self.compile_mode == "default" or self.compile,
            f"--compile-mode {self.compile_mode}: --no-compile compiles nothing; leave one of them out",
        )
        require(
            self.compile_mode == "default" or self.accumulate == 1,
            f"--compile-mode {self.compile_mode}: with --accumulate a CUDA graph would overwrite one part's results"
            " by the next's; leave one of them out",
        )
        self._check_rates()
        self._check_optimizer()

    def _check_rates(self) -> None:
        per_256, peak, start = self.lr_per_256, self.peak_lr, self.warmup_start
        top, most = (math.inf, "") if peak is None else (peak, f", at most the peak, {peak:g}")
        require(
            per_256 is None or 0 < per_256 <= MAX_RATE,
            f"--lr-per-256 {per_256}: give a number above 0, up to {MAX_RATE:g}",
        )
        require(0 <= self.min_lr <= top, f"--min-lr {self.min_lr}: give 0 or more{most}")
        require(
            self.min_lr == 0 or self.schedule != "constant",
            "--min-lr: --schedule constant never falls; leave it out, or take another schedule",
        )
        require(start is None or 0 <= start <= top, f"--warmup-start {start}: give 0 or more{most}")
        require(
            start is None or self.warmup_epochs != 0 or self.schedule == "one-cycle",
            "--warmup-start: needs --warmup-epochs, or --schedule one-cycle",
        )

    def _check_optimizer(self) -> None:
        name, eps, decay = self.optimizer, self.eps, self.layer_decay
        require(
            name in OPTIMIZERS or re.fullmatch(r"timm/\w+", name) is not None,
            f"--optimizer {name}: no such optimizer: {nearest(name, OPTIMIZERS)}; or timm/NAME",
        )
        for flag, absent in (("betas", WITHOUT_BETAS), ("eps", WITHOUT_EPS)):
            given = getattr(self, flag) not in ((), None)
            require(not given or name not in absent, f"--{flag}: {name} has none; leave it out")
        betas = " ".join(f"{beta:g}" for beta in self.betas)
        require(all(0 <= beta < 1 for beta in self.betas), f"--betas {betas}: give numbers from 0, below 1")
        require(
            len(self.betas) in (0, 2) or name.startswith("timm/"),
            f"--betas {betas}: give two numbers, of the mean and of the mean square",
        )
        require(eps is None or 0 < eps < 1, f"--eps {eps}: give a number above 0, below 1")
        require(decay is None or 0 < decay <= 1, f"--layer-decay {decay}: give a number above 0, up to 1")
        require(self.ema is None or 0 < self.ema < 1, f"--ema {self.ema}: give a number between 0 and 1, such as 0.999")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is saved, resumed and logged. None of it changes what is computed, but --threads the last bits."""

    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Run folder; runs/<preset>/<method>-<model>-seed<seed>-<hash> if left out."""
    resume: bool = False
    """Continue the run in the folder; an error if there is none."""
    auto_resume: bool = False
    """Continue the run in the folder, or start if there is none."""
    resume_inexact: bool = False
    """With --resume: allow another number of processes (same recipe, other bits)."""
    extend: bool = False
    """With --out, --resume and more --epochs: extend a finished run (the lr jumps)."""
    save_every: int = 0
    """Save a checkpoint every N steps too; 0: only after every epoch."""
    log_every: int = 50
    """Read losses from the device, and act on signals, every N steps."""
    diagnose_every: int = 200
    """Compare distillation and label gradients every N steps; 0: never."""
    threads: int | None = None
    """CPU threads of each process; all the cores it may use if left out."""
    test: bool = True
    """Score the test split at the end; with --no-test, later, by the same command without it."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online if a key is found, else offline."""
    wandb_project: str = "kd"
    """Project in Weights & Biases."""
    wandb_group: str | None = None
    """Group in Weights & Biases; the preset's name if left out."""

    track: tuple[Literal["wandb", "tensorboard", "mlflow", "trackio"], ...] = ("wandb",)
    """Where the numbers go beside metrics.jsonl; --wandb-project names the project in each."""
    push_to: Annotated[str | None, arg(metavar="USER/NAME")] = None
    """Upload the finished run to this model repository on the Hub, for kd.load; a failure is printed, no more."""
    push_every: int = 0
    """With --push-to: upload the weights every N epochs too; 0: at the end."""
    probe: Annotated[str | None, arg(metavar="DATA")] = None
    """Score the embedding by kNN and a linear probe on this labelled set (as --data) at the end."""
    probe_every: int = 0
    """With --probe: also every N epochs, on its validation split; 0: after the last one."""
    probe_label: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Label column of --probe, if there are several."""

    @property
    def folder(self) -> Path | None:
        """--out, with ~ expanded. Raises UserError if that user does not exist."""
        return expand_user(self.out, "--out") if self.out else None

    def check(self) -> None:
        require(self.save_every >= 0, f"--save-every {self.save_every}: give 0 or more")
        require(self.diagnose_every >= 0, f"--diagnose-every {self.diagnose_every}: give 0 or more")
        require(self.log_every >= 1, f"--log-every {self.log_every}: give 1 or more")
        require(self.threads is None or 1 <= self.threads <= 1024, f"--threads {self.threads}: give 1 to 1024")
        for name in {*self.track} - {"wandb"}:  # W&B is a dependency, and a run goes on without it
            require(
                importlib.util.find_spec(name) is not None,
                f"--track {name}: is not installed: pip install {name}",
            )
        require(self.probe_every >= 0, f"--probe-every {self.probe_every}: give 0 or more")
        for name in ("probe_every", "probe_label"):
            given = getattr(self, name)
            require(not given or self.probe is not None, f"--{name.replace('_', '-')} {given}: needs --probe DATA")
        require(self.push_every >= 0, f"--push-every {self.push_every}: give 0 or more")
        require(not self.push_every or self.push_to is not None, "--push-every: needs --push-to USER/NAME")
        if self.push_to is not None:
            check_id(self.push_to, "--push-to")
        require(not (self.resume and self.auto_resume), "--resume and --auto-resume: give one of them")
        require(
            not self.resume_inexact or self.resume or self.auto_resume,
            "--resume-inexact: give --resume or --auto-resume with it",
        )
        require(not self.extend or self.out is not None, "--extend: name the finished run by --out")
        if self.out:
            expand_user(self.out, "--out")
        require(
            "wandb" in self.track or self.wandb != "online",
            f"--wandb online: --track {' '.join(self.track)} leaves W&B out; add wandb to it",
        )


@dataclass(frozen=True)
class CacheConfig:
    """How a teacher's logits are stored."""

    cache_teacher: bool = False
    """Compute the teacher's logits for all --views once, or take SOURCE's."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """float32: the same bits as a live teacher on a CPU."""
    cache_top_k: int | None = None
    """Store the N largest logits and the rest's mass (FKD, arXiv:2112.01528)."""
    cache_from: Annotated[str | None, arg(metavar="SOURCE")] = None
    """What --cache-teacher SOURCE sets: hub:USER/NAME[@REVISION] or a folder's path, of a cache that is taken as it is,
    without its teacher. Else caches are built in runs/cache."""

    def check(self, views: ViewConfig) -> None:
        source = self.cache_from
        require(source is None or self.cache_teacher, f"--cache-from {source}: write it as --cache-teacher {source}")
        require(
            source is None or not source.startswith(HUB) or re.fullmatch(HUB_CACHE, source) is not None,
            f"--cache-teacher {source}: is no Hub id; give {HUB}USER/NAME or {HUB}USER/NAME@REVISION",
        )
        require(
            not self.cache_teacher or source is not None or views.count > 0,
            "--cache-teacher: needs --views K above 0; with a new view every epoch no logits are used twice",
        )
        require(self.cache_top_k is None or self.cache_top_k >= 1, f"--cache-top-k {self.cache_top_k}: give 1 or more")


@dataclass(frozen=True)
class CompressConfig:
    """Low precision and pruning of the trained network."""

    init: Annotated[str | None, arg(metavar="RUN")] = None
    """Start from weights: `pretrained` (published ones), or what --teacher takes (run, Hub id, file, torchvision/NAME,
    timm/NAME). Pruning needs a run."""
    weight_bits: Literal[32, 8, 4, 2] = 32
    """Bits per weight, in every conv and linear layer except the first and last (2 = ternary: -s, 0, s)."""
    activation_bits: Literal[32, 8, 4] = 32
    """Bits per input value of those layers."""
    prune: float = 0.0
    """Remove channels with the smallest filters: this share of --init's MACs."""
    sparsity: float = 0.0
    """Share of --init's weights fixed at zero, the smallest, except in the first and last layers."""

    def check(self) -> None:
        for name in ("prune", "sparsity"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value}: give a share from 0 up to 1")
            require(
                value == 0 or self.init is not None,
                f"--{name}: needs --init RUN, a trained run of the same network; untrained weights cannot be ranked",
            )

    @property
    def asked(self) -> dict:
        """The flags that differ from no compression."""
        default = CompressConfig()
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(default, name)}


@dataclass(frozen=True)
class StartConfig:
    """How the network is built, and which of its weights stay as they are."""

    model_args: Annotated[str | None, arg(metavar="KEY=VALUE,...")] = None
    """Arguments for the network's constructor: drop_path_rate=0.1,img_size=64."""
    freeze: Annotated[tuple[str, ...], arg(metavar="LAYER ...")] = ()
    """Layers, by the dotted names of modules, that are not trained."""
    freeze_epochs: int | None = None
    """With --freeze: for the first N epochs only."""

    def check(self) -> None:
        parse_model_args(self.model_args)
        epochs = self.freeze_epochs
        require(epochs is None or epochs >= 1, f"--freeze-epochs {epochs}: give 1 or more")
        require(epochs is None or bool(self.freeze), f"--freeze-epochs {epochs}: name the layers with --freeze")

    @property
    def asked(self) -> dict:
        """What differs from a network as its name says, all of it trained; equal for equal results."""
        arguments = format_model_args(parse_model_args(self.model_args))
        given = {"model_args": arguments, "freeze": sorted(set(self.freeze)), "freeze_epochs": self.freeze_epochs}
        return {name: value for name, value in given.items() if value}
