"""Every method's flags: one dataclass each, with its authors' CIFAR-100 setting. No torch here.

A field must not repeat a common flag's name (tyro refuses; a test checks). Where the literature adds a method to
cross-entropy, cross-entropy has weight 1.
"""

from typing import Annotated, Union

from tyro.conf import subcommand

from kd.methods.features import (
    ATConfig,
    CCConfig,
    CRDConfig,
    FitNetConfig,
    NSTConfig,
    PKTConfig,
    ReviewKDConfig,
    RKDConfig,
    SimKDConfig,
    SPConfig,
    VIDConfig,
)
from kd.methods.logits import (
    ApprenticeConfig,
    DISTConfig,
    DKDConfig,
    KDConfig,
    MimicConfig,
    NoneConfig,
    TFKDConfig,
)

METHODS = {
    "none": NoneConfig,
    "kd": KDConfig,
    "mimic": MimicConfig,
    "dkd": DKDConfig,
    "dist": DISTConfig,
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
    "tfkd": TFKDConfig,
    "apprentice": ApprenticeConfig,
}
# tyro makes a subcommand of each member of a union.
Method = Union[tuple(Annotated[kind, subcommand(name)] for name, kind in METHODS.items())]  # noqa: UP007


def method_name(method: object) -> str:
    return next(name for name, kind in METHODS.items() if type(method) is kind)
