"""Starting a process: Accelerate, threads and precision; refuses a launch that would train something else."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from kd.config import FitConfig, RunConfig
from kd.errors import require
from kd.utils.system import share_of_cores


def start(fit: FitConfig, run: RunConfig) -> Accelerator:
    """The Accelerator of this process, with its CPU threads set.

    Raises UserError for fp16 on a CPU, or fewer processes than the launcher was asked for.
    """
    torch.set_num_threads(run.threads or default_threads())
    if fit.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # every batch has one shape: searching for the fastest kernels pays
        torch.set_float32_matmul_precision("high")  # TF32, if the precision is not half already
    precision = fit.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = asked_for_cpu() or not torch.accelerator.is_available()
    require(
        not (on_cpu and precision == "fp16"),
        "--mixed-precision fp16: a CPU would silently compute in fp32; use bf16, or no",
    )
    backend = "inductor" if compiles(fit, on_cpu) else "no"
    accelerator = Accelerator(mixed_precision=fit.mixed_precision, dynamo_backend=backend)
    _check_processes(accelerator)
    require(
        not fit.sync_batchnorm or accelerator.device.type == "cuda",
        "--sync-batchnorm: works on GPUs only; leave it out",
    )
    return accelerator


def compiles(fit: FitConfig, on_cpu: bool) -> bool:
    return fit.compile and not on_cpu and torch.cuda.is_available()


def asked_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def default_threads() -> int:
    """CPU threads: under a launcher this process's share of the cores, else what torch chose, by OMP_NUM_THREADS.

    Launchers set OMP_NUM_THREADS=1 on a CPU, which is half of a 2-core machine.
    """
    if not any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ):
        return torch.get_num_threads()
    return share_of_cores()


def _check_processes(accelerator: Accelerator) -> None:
    """Raises UserError for two launches that silently run one process, or several independent ones."""
    promised = int(os.environ.get("WORLD_SIZE", "0"))
    remedy = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N SCRIPT ... runs N processes on a CPU"
    require(
        promised in (0, accelerator.num_processes),
        f"the launcher started {promised} processes and each trains alone, because there is no GPU: {remedy}",
    )
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address and starts one process.
    alone = accelerator.distributed_type == DistributedType.NO
    require(
        not (alone and promised == 0 and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ),
        f"accelerate launch was asked for several processes on a CPU and started one: {remedy}",
    )
