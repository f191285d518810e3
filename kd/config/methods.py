"""Every method's flags: one dataclass each, with the authors' CIFAR-100 setting as defaults. No torch here.

First what methods share, then those that compare logits or need no teacher, then those that compare features. A field
must not repeat a common flag's name (tyro refuses; a test checks). If the literature adds a method to cross-entropy,
cross-entropy has weight 1.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Union

from tyro.conf import subcommand

from kd.errors import require


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def positive(config, *names: str) -> None:
    """Raise UserError unless each of these fields is above 0 and finite."""
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{_flag(name)} {value}: give a number above 0")


def not_negative(config, *names: str) -> None:
    """Raise UserError unless each of these fields is 0 or more, and finite."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0 and math.isfinite(value), f"{_flag(name)} {value}: give 0 or more")


def share(config, name: str) -> None:
    """Raise UserError unless this field is from 0 to 1."""
    value = getattr(config, name)
    require(0 <= value <= 1, f"{_flag(name)} {value}: give a share from 0 to 1")


@dataclass(frozen=True)
class MethodFlags:
    """Base of every method's flags: what the scripts need to know before they import torch."""

    loss: ClassVar[str]  # module:Class of the method's DistillationLoss
    name: ClassVar[str] = ""  # of a method that is not in METHODS (kd.config.named)
    needs_teacher: ClassVar[bool] = True
    answers: ClassVar[str] = "logits"  # what of the teacher it follows: the kind of cache that it can take
    two_views: ClassVar[bool] = False  # True: both networks also see a strong view of each image
    embeds: ClassVar[bool] = False  # True: both networks answer with embeddings, and are built without classifiers
    labels_in_ce_only: ClassVar[bool] = (
        False  # True: no term but "ce" needs labels; of several methods the first has it
    )
    without_labels: ClassVar[str | None] = None  # flags without which it needs labels ("": none); None: always
    label_smoothing: float = 0.0
    """Share of cross-entropy's target that is spread over all classes (arXiv:1512.00567)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: give 0 or more, below 1")

    @property
    def uses_labels(self) -> bool:
        """Whether it needs the images' labels; if not, it can train on images that have none."""
        return True

    @property
    def weighs_cross_entropy(self) -> bool:
        """Whether cross-entropy has a weight, so that --balance and --label-smoothing change something."""
        return self.uses_labels

    def settled(self, student: str) -> "MethodFlags":
        """These flags with numbers for what follows from the student's name."""
        return self


@dataclass(frozen=True)
class LogitFlags(MethodFlags):
    """Flags of every method that compares logits."""

    standardize: bool = False
    """First scale all logits to mean 0, deviation 1 per sample (arXiv:2403.01427)."""


@dataclass(frozen=True)
class FeatureFlags(MethodFlags):
    """Flags of every method that compares features."""

    weight: float = 1.0
    """Weight of the method's loss."""
    student_layers: tuple[str, ...] = ()
    """The student's modules (layer2.0, or NAME.input for what enters NAME); the stages of its model if left out."""
    teacher_layers: tuple[str, ...] = ()
    """The teacher's modules, paired with the student's in order."""
    kd_weight: float = 0.0
    """Weight of plain kd, added as in the literature's combinations; 0: none."""
    kd_temperature: float = 4.0
    """Temperature of the kd that --kd-weight adds."""

    def check(self) -> None:
        super().check()
        not_negative(self, "weight", "kd_weight")
        positive(self, "kd_temperature")
        require(
            self.kd_weight > 0 or self.kd_temperature == FeatureFlags.kd_temperature,
            f"--kd-temperature {self.kd_temperature:g}: changes nothing without --kd-weight; give both",
        )


@dataclass(frozen=True)
class NoneConfig(MethodFlags):
    """Cross-entropy alone: no teacher."""

    loss: ClassVar[str] = "kd.losses.base:CrossEntropy"
    needs_teacher: ClassVar[bool] = False


@dataclass(frozen=True)
class KDConfig(LogitFlags):
    """Hinton et al. 2015: match the teacher's softened predictions."""

    loss: ClassVar[str] = "kd.losses.kd:KD"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--alpha 1"
    temperature: float = 5.0
    """Softens both distributions; larger shows more of the wrong classes."""
    alpha: float = 0.7
    """Weight of the distillation loss; cross-entropy has 1 - alpha."""
    boost: float = 1.0
    """Factor on the distillation loss; --standardize was published with 10 (and temperature 2, alpha 0.9)."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student); reverse: the report's formula."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature", "boost")
        share(self, "alpha")

    @property
    def uses_labels(self) -> bool:
        return self.alpha < 1


@dataclass(frozen=True)
class MimicConfig(LogitFlags):
    """Ba & Caruana 2014: match the teacher's logits themselves."""

    loss: ClassVar[str] = "kd.losses.mimic:Mimic"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--label-weight 0"
    weight: float = 0.1
    """Weight of the mean squared difference of the logits."""
    label_weight: float = 1.0
    """Weight of cross-entropy with the labels."""

    def check(self) -> None:
        super().check()
        not_negative(self, "weight", "label_weight")

    @property
    def uses_labels(self) -> bool:
        return self.label_weight > 0


@dataclass(frozen=True)
class DKDConfig(LogitFlags):
    """Zhao et al. 2022: kd split into target class and other classes."""

    loss: ClassVar[str] = "kd.losses.dkd:DKD"
    temperature: float = 4.0
    """Softens both distributions."""
    alpha: float = 1.0
    """Weight of the target-class term (target class against the rest)."""
    beta: float = 8.0
    """Weight of the non-target term (other classes). Published: 2 for resnet56 to 20 and 110 to 32, 6 for WRN to WRN
    and from vgg13, 8 for the rest; with --standardize alpha 9, beta 72, temperature 2."""
    ramp_epochs: float = 20.0
    """Epochs over which the loss rises to its full weight."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        not_negative(self, "alpha", "beta", "ramp_epochs")


@dataclass(frozen=True)
class DISTConfig(LogitFlags):
    """Huang et al. 2022: correlate with the teacher, per sample and per class."""

    loss: ClassVar[str] = "kd.losses.dist:DIST"
    labels_in_ce_only: ClassVar[bool] = True
    temperature: float = 4.0
    """Softens both distributions."""
    weight: float = 2.0
    """Weight of both correlation terms together."""
    beta: float = 1.0
    """Weight of the row term: each sample over its classes."""
    gamma: float = 1.0
    """Weight of the column term: each class over the batch."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        not_negative(self, "weight", "beta", "gamma")


@dataclass(frozen=True)
class NKDConfig(MethodFlags):
    """Yang et al. 2023: the label's and the other classes' terms, each normalised."""

    loss: ClassVar[str] = "kd.losses.nkd:NKD"
    temperature: float = 3.0
    """Softens the other classes' distributions: 3 for resnet34 to resnet18 on CIFAR-100, 1 on ImageNet."""
    gamma: float = 3.5
    """Weight of the other classes' term: 3.5 for resnet34 to resnet18 on CIFAR-100, 1.5 on ImageNet (1 for DeiT)."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        not_negative(self, "gamma")


@dataclass(frozen=True)
class WTTMConfig(MethodFlags):
    """Zheng & Yang 2024: soften the teacher alone, and count unsure images more."""

    loss: ClassVar[str] = "kd.losses.wttm:WTTM"
    exponent: float = 0.1
    """Power of the teacher's probabilities, an inverse temperature: 0.1 for WRN, VGG, resnet32x4 and resnet110 to 32;
    0.3 for resnet56 to 20; 0.8 for resnet34 to resnet18 on ImageNet."""
    weight: float | None = None
    """Weight of the loss. If left out 2.25, or 45 with --unweighted: vgg13 to vgg8. resnet32x4 to 8x4: 3, or 100;
    resnet56 to 20: 1.5, or 7; resnet34 to resnet18 on ImageNet: 1.6."""
    unweighted: bool = False
    """TTM: every image counts the same."""

    @property
    def used_weight(self) -> float:
        """The weight, or the default for vgg13 to vgg8."""
        return self.weight if self.weight is not None else 45.0 if self.unweighted else 2.25

    def check(self) -> None:
        super().check()
        positive(self, "exponent")
        if self.weight is not None:
            not_negative(self, "weight")


@dataclass(frozen=True)
class RLDConfig(LogitFlags):
    """Sun et al. 2024: correct the teacher by the label, keep its order below."""

    loss: ClassVar[str] = "kd.losses.rld:RLD"
    temperature: float = 4.0
    """Softens the classes below the label: 4 for all pairs on CIFAR-100, 1 on ImageNet."""
    binary_temperature: float = 1.0
    """Softens the confidences: the teacher's largest and the student's in the label."""
    alpha: float = 1.0
    """Weight of the confidences' term."""
    beta: float = 8.0
    """Weight of the term of the classes below the label: 8 on CIFAR-100, 0.5 on ImageNet."""
    ramp_epochs: float = 20.0
    """Epochs over which the loss rises to its full weight: 20 on CIFAR-100, 1 on ImageNet."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature", "binary_temperature")
        not_negative(self, "alpha", "beta", "ramp_epochs")


@dataclass(frozen=True)
class PLDConfig(MethodFlags):
    """Bassam et al. 2025: rank the classes as the teacher does; no cross-entropy."""

    loss: ClassVar[str] = "kd.losses.pld:PLD"
    temperature: float = 4.0
    """Softens the teacher's weights of the ranks: 4 for all pairs on CIFAR-100, 1 on ImageNet."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")


@dataclass(frozen=True)
class SKDConfig(LogitFlags):
    """SKD 2026: kd, and which images of a batch have logits of like direction."""

    loss: ClassVar[str] = "kd.losses.skd:SKD"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--ce-weight 0"
    temperature: float = 4.0
    """Softens both distributions of the divergence."""
    ce_weight: float = 1.0
    """Weight of cross-entropy; in the authors' code 0.1 (resnet32x4 to resnet8x4: 0.5)."""
    kd_weight: float = 1.0
    """Weight of the divergence; the authors' code comes to 7.2 (resnet32x4 to resnet8x4: 4), T^2 included."""
    direction_weight: float = 1.0
    """Weight of the directions; the authors' code comes to 0.45 (resnet32x4 to resnet8x4: 0.25)."""
    ridge: float = 0.1
    """Added to the covariance's diagonal: the authors' for all pairs."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature", "ridge")
        not_negative(self, "ce_weight", "kd_weight", "direction_weight")

    @property
    def uses_labels(self) -> bool:
        return self.ce_weight > 0


@dataclass(frozen=True)
class CTKDConfig(LogitFlags):
    """Li et al. 2023: kd at a temperature that learns to make the task harder."""

    loss: ClassVar[str] = "kd.losses.ctkd:CTKD"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--alpha 1"
    alpha: float = 0.9
    """Weight of the distillation loss; cross-entropy has 1 - alpha."""
    lowest_temperature: float = 1.0
    """Lower bound of the learned temperature."""
    highest_temperature: float = 21.0
    """Upper bound of the learned temperature, which starts at 73% of the way."""
    decay_epochs: float = 10.0
    """Epochs over which the temperature's reversed gradient rises to its full strength: 10 for all pairs."""

    @property
    def uses_labels(self) -> bool:
        return self.alpha < 1

    def check(self) -> None:
        super().check()
        share(self, "alpha")
        positive(self, "lowest_temperature", "highest_temperature")
        not_negative(self, "decay_epochs")
        require(
            self.lowest_temperature < self.highest_temperature,
            f"--lowest-temperature {self.lowest_temperature}: give less than --highest-temperature"
            f" {self.highest_temperature}",
        )


@dataclass(frozen=True)
class MLKDConfig(LogitFlags):
    """Jin et al. 2023: two views, five temperatures, relations of images and classes."""

    loss: ClassVar[str] = "kd.losses.mlkd:MLKD"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--ce-weight 0"
    two_views: ClassVar[bool] = True
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    """Each softens both distributions; their losses are added. They need a lower --lr: the authors have 0.025 with 240
    epochs; the literature quotes 480."""
    weight: float = 0.9
    """Weight of each of the three losses: per image, between images, between classes."""
    ce_weight: float = 0.1
    """Weight of cross-entropy on each view."""
    as_in_paper: bool = False
    """Mask and compare as the paper says, not as its code, which made its numbers (docs/methods.md)."""

    @property
    def uses_labels(self) -> bool:
        return self.ce_weight > 0

    def check(self) -> None:
        super().check()
        not_negative(self, "weight", "ce_weight")
        given = self.temperatures
        right = bool(given) and all(value > 0 and math.isfinite(value) for value in given)
        require(right, f"--temperatures {' '.join(map(str, given))}: give one or more numbers above 0")


@dataclass(frozen=True)
class CRLDConfig(MethodFlags):
    """Zhang et al. 2024: two views; match the teacher's of both where it is sure."""

    loss: ClassVar[str] = "kd.losses.crld:CRLD"
    labels_in_ce_only: ClassVar[bool] = True
    without_labels: ClassVar[str] = "--ce-weight 0"
    two_views: ClassVar[bool] = True
    temperature: float = 4.0
    """Softens both distributions: 4 on CIFAR-100, 1 on ImageNet."""
    within_weight: float = 2.0
    """Weight of the loss within each view."""
    across_weight: float = 0.5
    """Weight of the loss across the views."""
    weak_threshold: float = 0.9
    """Within a view, only images count whose weak view gives the teacher this confidence."""
    strong_threshold: float = 0.2
    """Across the views, only images count whose strong view gives the teacher this confidence."""
    ce_weight: float = 1.0
    """Weight of cross-entropy on each view: 1 on CIFAR-100, 2 on ImageNet."""

    @property
    def uses_labels(self) -> bool:
        return self.ce_weight > 0

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        not_negative(self, "within_weight", "across_weight", "ce_weight")
        share(self, "weak_threshold")
        share(self, "strong_threshold")


@dataclass(frozen=True)
class TFKDConfig(MethodFlags):
    """Yuan et al. 2020: a virtual teacher that is right; a control, near label smoothing."""

    loss: ClassVar[str] = "kd.losses.tfkd:TFKD"
    needs_teacher: ClassVar[bool] = False
    temperature: float = 20.0
    """Softens the virtual teacher's distribution."""
    alpha: float = 0.1
    """Weight of the virtual teacher's loss; cross-entropy has 1 - alpha."""
    correct: float = 0.99
    """Probability that the virtual teacher gives the right class."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        share(self, "alpha")
        require(0 < self.correct < 1, f"--correct {self.correct}: give a share between 0 and 1")

    @property
    def weighs_cross_entropy(self) -> bool:
        return self.alpha < 1


@dataclass(frozen=True)
class ApprenticeConfig(MethodFlags):
    """Mishra & Marr 2017, scheme A: teacher and student train together from scratch."""

    loss: ClassVar[str] = "kd.losses.apprentice:Apprentice"
    needs_teacher: ClassVar[bool] = False
    partner: str | None = None
    """The teacher, in full precision (names as for --student); the student's own network if left out."""
    alpha: float = 1.0
    """Weight of the teacher's cross-entropy with the labels."""
    beta: float = 0.5
    """Weight of the student's cross-entropy with the labels."""
    gamma: float = 0.5
    """Weight of the student's cross-entropy with the teacher's probabilities."""

    def check(self) -> None:
        super().check()
        not_negative(self, "alpha", "beta", "gamma")

    @property
    def weighs_cross_entropy(self) -> bool:
        return self.alpha > 0 or self.beta > 0


@dataclass(frozen=True)
class FitNetConfig(FeatureFlags):
    """Romero et al. 2015: match one middle feature map, through a regressor."""

    loss: ClassVar[str] = "kd.losses.fitnet:FitNet"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 100.0
    """Weight of the mean squared difference of the maps."""
    hint_stage: int = 2
    """Number of the stage to match, counted from 1."""

    def check(self) -> None:
        super().check()
        require(self.hint_stage >= 1, f"--hint-stage {self.hint_stage}: give 1 or more")
        ours, theirs = bool(self.student_layers), bool(self.teacher_layers)
        require(ours == theirs, "--student-layers and --teacher-layers: name a map of each network, or of none")
        require(
            not ours or self.hint_stage == FitNetConfig.hint_stage,
            f"--hint-stage {self.hint_stage}: layers are named in its place; leave one of them out",
        )


@dataclass(frozen=True)
class ATConfig(FeatureFlags):
    """Zagoruyko & Komodakis 2017: match each stage's attention map, summed over channels."""

    loss: ClassVar[str] = "kd.losses.at:AttentionTransfer"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 1000.0
    """Weight of the attention loss, summed over stages."""


@dataclass(frozen=True)
class SPConfig(FeatureFlags):
    """Tung & Mori 2019: match which samples of a batch are similar."""

    loss: ClassVar[str] = "kd.losses.sp:SimilarityPreserving"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 3000.0
    """Weight of the mean squared difference of the similarity matrices."""


@dataclass(frozen=True)
class NSTConfig(FeatureFlags):
    """Huang & Wang 2017: match the distribution of each stage's channels."""

    loss: ClassVar[str] = "kd.losses.nst:NeuronSelectivity"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 50.0
    """Weight of the discrepancy, summed over stages."""


@dataclass(frozen=True)
class PKTConfig(FeatureFlags):
    """Passalis & Tefas 2018: match the probability that samples are neighbours."""

    loss: ClassVar[str] = "kd.losses.pkt:PKT"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 30000.0
    """Weight of the divergence."""


@dataclass(frozen=True)
class RKDConfig(FeatureFlags):
    """Park et al. 2019: match distances and angles between a batch's embeddings."""

    loss: ClassVar[str] = "kd.losses.rkd:RKD"
    labels_in_ce_only: ClassVar[bool] = True
    distance_weight: float = 25.0
    """Weight of the distances between pairs."""
    angle_weight: float = 50.0
    """Weight of the angles in triples."""

    def check(self) -> None:
        super().check()
        not_negative(self, "distance_weight", "angle_weight")


VID_EPS = 1e-5  # smallest variance, added to those that are learned, as in the authors' code


@dataclass(frozen=True)
class VIDConfig(FeatureFlags):
    """Ahn et al. 2019: predict the teacher's maps with a learned variance."""

    loss: ClassVar[str] = "kd.losses.vid:VID"
    labels_in_ce_only: ClassVar[bool] = True
    initial_variance: float = 5.0
    """Variance of every channel before training."""

    def check(self) -> None:
        super().check()
        value, most = self.initial_variance, math.floor(math.log(sys.float_info.max))
        require(VID_EPS < value <= most, f"--initial-variance {value}: give a number above {VID_EPS:g}, up to {most}")


@dataclass(frozen=True)
class CCConfig(FeatureFlags):
    """Peng et al. 2019: match the correlation between a batch's samples."""

    loss: ClassVar[str] = "kd.losses.cc:CC"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float = 0.02
    """Weight of the correlation loss."""
    definition: Literal["neighbours", "paper"] = "neighbours"
    """paper: kernel matrices, as published; neighbours: what the code behind the literature's tables computes."""
    width: int = 128
    """Size of both networks' learned embeddings (for neighbours)."""

    def check(self) -> None:
        super().check()
        positive(self, "width")
        require(
            self.definition == "neighbours" or self.width == CCConfig.width,
            f"--width {self.width}: --definition paper learns no embeddings; leave one of them out",
        )
        require(
            self.definition == "neighbours" or self.weight != CCConfig.weight,
            f"--definition paper: {CCConfig.weight} is the weight of neighbours, by which this is at most 0.01; give a"
            " --weight",
        )


@dataclass(frozen=True)
class CRDConfig(FeatureFlags):
    """Tian et al. 2020: tell the same sample from others, across the two networks."""

    loss: ClassVar[str] = "kd.losses.crd:CRD"
    weight: float = 0.8
    """Weight of both contrastive terms together."""
    width: int = 128
    """Size of both networks' learned embeddings."""
    negatives: int = 16384
    """Samples of other classes to contrast each sample with."""
    contrast_temperature: float = 0.07
    """Temperature of the contrast: divides the products of embeddings."""
    bank_momentum: float = 0.5
    """Share of a sample's stored embedding kept at each update."""

    def check(self) -> None:
        super().check()
        positive(self, "width", "negatives", "contrast_temperature")
        require(0 <= self.bank_momentum < 1, f"--bank-momentum {self.bank_momentum}: give 0 or more, below 1")


@dataclass(frozen=True)
class ReviewKDConfig(FeatureFlags):
    """Chen et al. 2021: each stage learns from the teacher's earlier ones too."""

    loss: ClassVar[str] = "kd.losses.reviewkd:ReviewKD"
    labels_in_ce_only: ClassVar[bool] = True
    weight: float | None = None
    """Weight of the maps' loss. If left out, the published one for the student: 0.6 for resnet20, 1 for resnet32, 5 for
    WRN, resnet8x4 and shufflenetv1, 8 for shufflenetv2 (with batch 128, lr 0.1, Nesterov); 1 for all others."""
    ramp_epochs: float = 20.0
    """Epochs over which the loss rises to its full weight."""

    def check(self) -> None:
        settled = self.settled("")
        super(ReviewKDConfig, settled).check()
        not_negative(settled, "ramp_epochs")

    def settled(self, student: str) -> "ReviewKDConfig":
        if self.weight is not None:
            return self
        return dataclasses.replace(
            self, weight=REVIEWKD_WEIGHTS.get(student, 5.0 if student.startswith("wrn-") else 1.0)
        )


# The authors' command lines (dvlab-research/ReviewKD, CIFAR-100/script/reviewKD.sh); their code's default is 1.
REVIEWKD_WEIGHTS = {
    "resnet20": 0.6,
    "resnet32": 1.0,
    "resnet8x4": 5.0,
    "shufflenetv1": 5.0,
    "shufflenetv2": 8.0,
}


@dataclass(frozen=True)
class SimKDConfig(FeatureFlags):
    """Chen et al. 2022: reuse the teacher's classifier; no cross-entropy."""

    loss: ClassVar[str] = "kd.losses.simkd:SimKD"
    without_labels: ClassVar[str] = ""

    @property
    def uses_labels(self) -> bool:
        return False


@dataclass(frozen=True)
class DeiTConfig(MethodFlags):
    """Touvron et al. 2021: a second head follows the teacher; both heads' mean predicts."""

    loss: ClassVar[str] = "kd.losses.deit:DeiT"
    kind: Literal["hard", "soft"] = "hard"
    """hard: the class that the teacher thinks likeliest; soft: its softened predictions."""
    alpha: float | None = None
    """Weight of the distillation head's loss; cross-entropy has 1 - alpha. 0.5 for hard and 0.1 for soft if left
    out."""
    temperature: float = 3.0
    """Softens both distributions (for soft)."""

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        require(
            self.kind == "soft" or self.temperature == DeiTConfig.temperature,
            f"--temperature {self.temperature:g}: changes nothing with hard labels; add --kind soft, or leave it out",
        )
        if self.alpha is not None:
            share(self, "alpha")

    @property
    def weighs_cross_entropy(self) -> bool:
        return self.alpha != 1


@dataclass(frozen=True)
class OFAConfig(MethodFlags):
    """Hao et al. 2023: for unlike networks; exits on the student's stages."""

    loss: ClassVar[str] = "kd.losses.ofa:OFA"
    weight: float = 1.0
    """Weight of the loss of the student's own logits."""
    exit_weight: float = 1.0
    """Weight of the exits' loss, summed over exits."""
    exponent: float = 1.0
    """Power that raises the label's share of the target; the authors' command for ImageNet has 1.5."""
    temperature: float = 1.0
    """Softens both distributions."""
    student_layers: tuple[str, ...] = ()
    """The student's modules with exits (layer2.0); the stages of its model if left out."""

    def check(self) -> None:
        super().check()
        not_negative(self, "weight", "exit_weight")
        positive(self, "exponent", "temperature")


@dataclass(frozen=True)
class EmbedConfig(MethodFlags):
    """Fang et al. 2021 (SEED): match the teacher's embedding; no labels, no classifier."""

    loss: ClassVar[str] = "kd.losses.embed:Embed"
    embeds: ClassVar[bool] = True
    answers: ClassVar[str] = "embedding"
    without_labels: ClassVar[str] = ""
    form: Literal["queue", "cosine", "mse"] = "queue"
    """queue: similarities to a queue of teacher embeddings; cosine, mse: the two embeddings themselves."""
    temperature: float = 0.07
    """Divides the similarities (for queue)."""
    queue: int | None = None
    """Its length; if left out 128 to 8,192, by the number of images."""
    patches: float = 0.0
    """Weight of the cosine loss of the last maps, place by place; 0: none."""
    student_layers: tuple[str, ...] = ()
    """The student's module that outputs the map for --patches; the last stage of its model if left out."""
    teacher_layers: tuple[str, ...] = ()
    """The teacher's."""

    @property
    def uses_labels(self) -> bool:
        return False

    def check(self) -> None:
        super().check()
        positive(self, "temperature")
        not_negative(self, "patches")
        require(self.queue is None or self.queue >= 1, f"--queue {self.queue}: give 1 or more")
        usual = EmbedConfig.temperature, None
        require(
            self.form == "queue" or (self.temperature, self.queue) == usual,
            f"--form {self.form}: has no queue; leave --queue and --temperature out",
        )
        for name in ("student_layers", "teacher_layers"):
            layers = getattr(self, name)
            require(
                self.patches > 0 or not layers,
                f"{_flag(name)} {' '.join(layers)}: names the map of --patches; give that a weight too",
            )


METHODS = {
    "none": NoneConfig,
    "kd": KDConfig,
    "mimic": MimicConfig,
    "dkd": DKDConfig,
    "dist": DISTConfig,
    "nkd": NKDConfig,
    "wttm": WTTMConfig,
    "rld": RLDConfig,
    "pld": PLDConfig,
    "skd": SKDConfig,
    "ctkd": CTKDConfig,
    "mlkd": MLKDConfig,
    "crld": CRLDConfig,
    "fitnet": FitNetConfig,
    "at": ATConfig,
    "sp": SPConfig,
    "nst": NSTConfig,
    "pkt": PKTConfig,
    "rkd": RKDConfig,
    "vid": VIDConfig,
    "cc": CCConfig,
    "crd": CRDConfig,
    "reviewkd": ReviewKDConfig,
    "simkd": SimKDConfig,
    "deit": DeiTConfig,
    "ofa": OFAConfig,
    "embed": EmbedConfig,
    "tfkd": TFKDConfig,
    "apprentice": ApprenticeConfig,
}

# tyro makes a subcommand of each member of a union, with its class's docstring.
Method = Union[tuple(Annotated[kind, subcommand(name)] for name, kind in METHODS.items())]  # noqa: UP007


def methods_without_labels() -> str:
    """The methods that train on images without labels, with the flags that this takes."""
    named = ((name, kind.without_labels) for name, kind in METHODS.items() if kind.without_labels is not None)
    return ", ".join(f"{name} {flags}".strip() for name, flags in named)


def method_name(method: object) -> str:
    """The name of the method that these flags belong to, as on the command line."""
    return next((name for name, kind in METHODS.items() if type(method) is kind), "") or type(method).name
