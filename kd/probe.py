"""What a method needs to know of its networks, found by trying them on two images."""

from torch import nn

from kd.data import Data
from kd.models import probe
from kd.outputs import Outputs, Pair
from kd.teacher import Frozen


def probe_pair(student: nn.Module, teacher: Frozen | None, data: Data) -> Pair:
    """Both networks' outputs on two grey images of the data's size; neither is changed."""
    theirs = Outputs(probe(teacher.network, data.size, str(teacher.folder))) if teacher else None
    return Pair(Outputs(probe(student, data.size, "student")), theirs)
