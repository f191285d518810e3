"""Distillation methods by name, one paper a file: kd/losses/dkd.py has DKD's citation, its loss and its module.

In each file a pure function of tensors (`dkd_loss`) comes first, then the `DistillationLoss` that wires it (`DKD`).
base.py explains what a method is and how to add one.
"""

from kd.losses.apprentice import Apprentice, soft_cross_entropy
from kd.losses.at import AttentionTransfer, attention_transfer_loss
from kd.losses.base import CrossEntropy, DistillationLoss, Distiller
from kd.losses.cc import CC, correlation_congruence_loss, neighbour_product_loss
from kd.losses.crd import CRD, contrastive_loss
from kd.losses.cross_entropy import class_weights, cross_entropy, log_prior
from kd.losses.deit import DeiT, deit_loss
from kd.losses.dist import DIST, dist_loss
from kd.losses.dkd import DKD, dkd_loss
from kd.losses.fitnet import FitNet, hint_loss
from kd.losses.kd import KD, kd_loss, standardize
from kd.losses.mimic import Mimic, mimic_loss
from kd.losses.nst import NeuronSelectivity, nst_loss
from kd.losses.ofa import OFA, ofa_loss
from kd.losses.pkt import PKT, pkt_loss
from kd.losses.reviewkd import ReviewKD, hierarchical_context_loss
from kd.losses.rkd import RKD, rkd_loss
from kd.losses.simkd import SimKD
from kd.losses.sp import SimilarityPreserving, similarity_preserving_loss
from kd.losses.tfkd import TFKD, tfkd_loss
from kd.losses.vid import VID, vid_loss

LOSSES = {
    "none": CrossEntropy,
    "kd": KD,
    "mimic": Mimic,
    "dkd": DKD,
    "dist": DIST,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "sp": SimilarityPreserving,
    "nst": NeuronSelectivity,
    "pkt": PKT,
    "rkd": RKD,
    "vid": VID,
    "cc": CC,
    "crd": CRD,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "deit": DeiT,
    "ofa": OFA,
    "tfkd": TFKD,
    "apprentice": Apprentice,
}

__all__ = [
    "KD",
    "LOSSES",
    "Apprentice",
    "CrossEntropy",
    "DistillationLoss",
    "Distiller",
    "attention_transfer_loss",
    "class_weights",
    "contrastive_loss",
    "correlation_congruence_loss",
    "cross_entropy",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kd_loss",
    "log_prior",
    "mimic_loss",
    "neighbour_product_loss",
    "nst_loss",
    "ofa_loss",
    "pkt_loss",
    "rkd_loss",
    "similarity_preserving_loss",
    "soft_cross_entropy",
    "standardize",
    "tfkd_loss",
    "vid_loss",
]
