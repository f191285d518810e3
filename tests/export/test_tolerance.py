"""How far an exported float32 file's answers may be from torch's."""

import numpy as np
import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.export import build
from kd.export.deployed import Deployed
from kd.export.source import ExportedRun
from tests import networks

SCALE = 40.0  # the largest logit, about


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ExportedRun:
    """A network with one logit that is 40 for every image, and small others."""
    torch.manual_seed(0)
    network = networks.plain(4).eval()
    with torch.no_grad():
        network[4].weight[0], network[4].bias[0] = 0.0, SCALE
    info = {"classes": list("abcd"), "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    return ExportedRun(tmp_path_factory.mktemp("run"), Deployed(network, info), info, {}, {})


def answers(source: ExportedRun, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return source.network(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize(
    ("rounding", "everywhere", "tolerance"),
    [(False, True, 1e-4), (False, False, 1e-4), (True, True, 0.02)],
    ids=["all logits", "one logit", "all logits, of a network that rounds its activations"],
)
def test_a_files_logits_may_differ_by_a_share_of_the_largest_one(source, rounding, everywhere, tolerance):
    """Of every single logit; of a network that rounds its activations, on the mean."""

    def compare(shift: float) -> float:
        shifts = np.full(4, shift, dtype=np.float32) * (1 if everywhere else np.eye(4, dtype=np.float32)[1])
        return build.compare_with_torch(source, rounding, "model.onnx", lambda x: answers(source, x) + shifts)

    assert compare(0.5 * tolerance * SCALE) == pytest.approx(0.5 * tolerance * SCALE, rel=0.01)
    with pytest.raises(UserError, match=r"model.onnx: its logits differ from torch's by up to .*nothing was written"):
        compare(2 * tolerance * SCALE)


def test_a_last_bit_that_decides_on_a_whole_step_is_no_error_of_a_network_that_rounds(source):
    def one_in_eight(images: np.ndarray) -> np.ndarray:
        found = answers(source, images)
        found[0, 1] += 0.05 * SCALE
        return found

    assert build.compare_with_torch(source, True, "model.onnx", one_in_eight) == pytest.approx(0.05 * SCALE, rel=0.01)
    with pytest.raises(UserError, match=r"model.onnx: its logits differ"):
        build.compare_with_torch(source, False, "model.onnx", one_in_eight)


def test_small_logits_are_compared_with_1(source):
    """Else the last bits of a network whose answers are all near 0 would count."""
    network = nn.Sequential(source.network.network, nn.Linear(4, 4))
    nn.init.zeros_(network[1].weight), nn.init.zeros_(network[1].bias)
    small = source._replace(network=Deployed(network, source.info))
    shifted = lambda shift: lambda images: answers(small, images) + np.float32(shift)  # noqa: E731
    assert build.compare_with_torch(small, False, "model.onnx", shifted(0.5e-4)) == pytest.approx(0.5e-4)
    with pytest.raises(UserError, match=r"model.onnx: its logits differ"):
        build.compare_with_torch(small, False, "model.onnx", shifted(2e-4))
