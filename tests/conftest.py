"""What all tests share: shape checks on every call into kd, a data cache of their own, no W&B."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

# Tests compare bits on the CPU, and torch.compile, the default on a GPU, cannot trace the shape checks. KD_TEST_GPU=1
# trains on the GPU, without these checks (docs/gpu.md).
ON_GPU = os.environ.get("KD_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    install_import_hook("kd", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CIFAR100 = ROOT.parent / "shared" / "cifar100"

needs_cifar100 = pytest.mark.skipif(not CIFAR100.is_dir(), reason="the real CIFAR-100 is not beside the project")


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """One cache of decoded data for all tests, subprocesses included; nothing of the machine's launcher or W&B."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "TORCHELASTIC_", "WANDB_")) or name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
            del os.environ[name]
    base = tmp_path_factory.getbasetemp()
    os.environ["KD_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"  # two tests run at once
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, where runs/ lands, and starts torch's draws and Accelerate afresh."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the order of the tests must not decide on a failure
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def resnet8_run(tmp_path_factory):
    """A finished run of a network that needs no trust: resnet8 on the synthetic pictures, read by several tests."""
    from tests.run_scripts import teach

    folder = tmp_path_factory.mktemp("shared") / "resnet8"
    teach("--model", "resnet8", "--out", str(folder))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A finished run of a network with a layer that is neither the first nor the last."""
    from tests.losses.test_methods import FEW
    from tests.run_scripts import teach

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "tests.networks:deep", *FEW, "--out", "run")
    return str(folder / "run")
