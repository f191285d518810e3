"""Distillation methods, one paper a file: kd/losses/dkd.py has DKD's citation, its loss and its module.

In each file a pure function of tensors (`dkd_loss`) comes first, then the `DistillationLoss` that wires it (`DKD`).
The functions are exported here, for loops of your own. `loss_class` finds the class that a method's flags name
(kd.config.METHODS); base.py explains what a method is and how to add one.
"""

from kd.losses.apprentice import Apprentice, soft_cross_entropy
from kd.losses.at import attention_transfer_loss
from kd.losses.base import CrossEntropy, DistillationLoss, Distiller, loss_class
from kd.losses.cc import correlation_congruence_loss, neighbour_product_loss
from kd.losses.crd import contrastive_loss
from kd.losses.crld import crld_loss
from kd.losses.cross_entropy import class_weights, cross_entropy, log_prior
from kd.losses.ctkd import LearnedTemperature, reverse_gradient
from kd.losses.deit import deit_loss
from kd.losses.dist import dist_loss
from kd.losses.dkd import dkd_loss
from kd.losses.embed import cosine_embedding_loss, embedding_queue_loss, mse_embedding_loss
from kd.losses.features import FeatureLoss
from kd.losses.fitnet import hint_loss
from kd.losses.kd import KD, kd_loss, standardize
from kd.losses.mimic import mimic_loss
from kd.losses.mlkd import batch_relation_loss, class_relation_loss, mlkd_loss
from kd.losses.nkd import nkd_loss
from kd.losses.nst import nst_loss
from kd.losses.ofa import ofa_loss
from kd.losses.pkt import pkt_loss
from kd.losses.pld import pld_loss
from kd.losses.reviewkd import hierarchical_context_loss
from kd.losses.rkd import rkd_loss
from kd.losses.rld import rld_loss
from kd.losses.skd import skd_loss
from kd.losses.sp import similarity_preserving_loss
from kd.losses.tfkd import tfkd_loss
from kd.losses.vid import vid_loss
from kd.losses.wttm import wttm_loss

__all__ = [
    "KD",
    "Apprentice",
    "CrossEntropy",
    "DistillationLoss",
    "Distiller",
    "FeatureLoss",
    "LearnedTemperature",
    "attention_transfer_loss",
    "batch_relation_loss",
    "class_relation_loss",
    "class_weights",
    "contrastive_loss",
    "correlation_congruence_loss",
    "cosine_embedding_loss",
    "crld_loss",
    "cross_entropy",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "embedding_queue_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kd_loss",
    "log_prior",
    "loss_class",
    "mimic_loss",
    "mlkd_loss",
    "mse_embedding_loss",
    "neighbour_product_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "pkt_loss",
    "pld_loss",
    "reverse_gradient",
    "rkd_loss",
    "rld_loss",
    "similarity_preserving_loss",
    "skd_loss",
    "soft_cross_entropy",
    "standardize",
    "tfkd_loss",
    "vid_loss",
    "wttm_loss",
]
