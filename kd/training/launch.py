"""Starting a process: Accelerate, threads and precision; refuses a launch that would train something else."""

import inspect
import os
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, TorchDynamoPlugin
from torch.nn.parallel import DistributedDataParallel

from kd.config import FitConfig, Job, RunConfig
from kd.config.defaults import default_preset
from kd.errors import require
from kd.training.optimizers import check_optimizer
from kd.training.precision import advise_precision
from kd.utils.console import print_once
from kd.utils.system import share_of_cores

SLOWER = 1.3  # ratio of times from which several threads are called slower than one
PRECISIONS = ("no", "fp16", "bf16")

# Networks and methods that a process compiles: they all have one forward (Distiller's). torch's own limit is 8, and
# would leave the ninth uncompiled, with a line in the log alone.
COMPILED_AT_MOST = 64

# Variables that an Accelerate configuration, its launcher or torch's libraries set, and that would change or silently
# not change the training: the values that are harmless (those that `accelerate launch` always sets among them), and
# what to do about any other.
HARMLESS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "gradients are not accumulated: remove it, or set it to 1"),
    "ACCELERATE_GRADIENT_CLIPPING": ((), "remove it; --clip-norm clips gradients"),
    "ACCELERATE_USE_FSDP": (("false",), "FSDP is not supported: take distributed_type MULTI_GPU"),
    "ACCELERATE_USE_DEEPSPEED": (("false",), "DeepSpeed is not supported: take distributed_type MULTI_GPU"),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "Megatron-LM is not supported: take distributed_type MULTI_GPU"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "only data parallelism is supported: remove parallelism_config"),
    "ACCELERATE_USE_SAGEMAKER": (("false",), "SageMaker is not supported: remove it"),
    "ACCELERATE_IN_TPU_POD": (("0", "false"), "TPUs are not supported: remove it"),
    "ACCELERATE_DOWNCAST_BF16": (("no", "false", "0"), "remove it; --mixed-precision bf16 computes in bf16"),
    "XLA_USE_BF16": (("0", "false"), "remove it; --mixed-precision bf16 computes in bf16"),
    "XLA_DOWNCAST_BF16": (("0", "false"), "remove it; --mixed-precision bf16 computes in bf16"),
    "ACCELERATE_DYNAMO_BACKEND": (("no", "inductor"), "remove it; --compile compiles with inductor on a GPU"),
    "ACCELERATE_DYNAMO_MODE": (("default",), "remove it; --compile-mode chooses the mode"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": (("false", "0"), "remove it; --compile allows graph breaks"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": (("false", "0"), "remove it; --compile compiles for one batch size"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (("false", "0"), "remove it; --compile compiles the whole step"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("strict",), "remove it; --mixed-precision bf16 computes in bf16"),
    "DNNL_DEFAULT_FPMATH_MODE": (("strict",), "remove it; --mixed-precision bf16 computes in bf16"),
    "NVIDIA_TF32_OVERRIDE": ((), "remove it; TF32 is used unless --deterministic is given"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (("1",), "remove it; TF32 is used unless --deterministic is given"),
}


def make_accelerator(fit: FitConfig, run: RunConfig) -> Accelerator:
    """The Accelerator of this process, with its CPU threads set.

    Raises UserError for fp16 on a CPU, fewer processes than the launcher was asked for, or settings of the launcher
    that would change the training behind the flags.
    """
    check_environment()
    check_optimizer(fit)
    on_cpu = asked_for_cpu() or not torch.accelerator.is_available()
    torch.set_num_threads(run.threads or default_threads())
    if fit.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")  # whatever the environment says
    elif not on_cpu and torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # every batch has one shape: searching for the fastest kernels pays
        torch.set_float32_matmul_precision("high")  # TF32, if the precision is not half already
    precision = fit.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    require(precision in PRECISIONS, f"ACCELERATE_MIXED_PRECISION={precision}: give --mixed-precision no, bf16 or fp16")
    require(
        not (on_cpu and precision == "fp16"),
        "--mixed-precision fp16: a CPU would silently compute in fp32; use bf16, or no",
    )
    require(
        fit.compile_mode == "default" or compiles(fit, on_cpu),
        f"--compile-mode {fit.compile_mode}: kd compiles on CUDA only; leave it out",
    )
    accelerator = Accelerator(mixed_precision=fit.mixed_precision, dynamo_plugin=_dynamo_plugin(fit, on_cpu))
    accelerator.ddp_handler = DataParallel()
    _check_processes(accelerator)
    if run.threads is None and accelerator.device.type == "cpu":
        warn_of_slow_threads()
    if accelerator.device.type == "cpu" and accelerator.is_main_process:
        advise_precision(accelerator.mixed_precision)
    require(
        not fit.sync_batchnorm or accelerator.device.type == "cuda",
        "--sync-batchnorm: works on GPUs only; leave it out",
    )
    return accelerator


class DataParallel(DistributedDataParallelKwargs):
    """DDP without a broadcast of rank 0's buffers in every forward pass; they are sent once, when it is made.

    In training nothing reads them: BatchNorm's running statistics are broadcast before scoring and saving, and crd
    keeps its banks (51 MB for CIFAR-100) equal itself.
    """

    def to_kwargs(self) -> dict:
        name = "forward_sync_buffers"  # since torch 2.13, which warns of the older name
        known = name in inspect.signature(DistributedDataParallel).parameters
        return super().to_kwargs() | {name if known else "broadcast_buffers": False}


def check_environment() -> None:
    """Raises UserError for an environment variable that would change the training, or be ignored, without a word."""
    for name, (harmless, remedy) in HARMLESS.items():
        value = os.environ.get(name)
        require(
            not value or value.lower() in harmless, f"{name}={value} (set by the launcher's configuration?): {remedy}"
        )


def _dynamo_plugin(fit: FitConfig, on_cpu: bool) -> TorchDynamoPlugin:
    """Every field is given: those left out would be read from the environment."""
    backend = "inductor" if compiles(fit, on_cpu) else "no"
    if backend != "no":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_AT_MOST)
    return TorchDynamoPlugin(
        backend=backend, mode=fit.compile_mode, fullgraph=False, dynamic=False, use_regional_compilation=False
    )


def print_plan(job: Job, teachers: Sequence[str] = (), control: bool = False) -> None:
    """Print, before anything slow, what is trained on what with which recipe, and where the results go."""
    fit = job.fit
    method = f"{job.model} with {'cross-entropy' if job.method_name == 'none' else job.method_name}"
    taught = f", teacher {' + '.join(teachers)}" if teachers else ""
    beside = ", and alone for comparison" if control else ""
    out = job.run.folder or f"runs/{job.preset}/"
    own = job.preset == default_preset(job.data.source) == "own"
    chosen = "; --preset own, the default for this data" if own else ""
    begun = f" from {job.compress.init}" if job.compress.init else ""
    print_once(f"train {method}{begun}{taught}{beside}, on {job.data.source}{chosen}")
    print_once(f"recipe {job.preset}: {_numbers(fit)} ({fit.schedule}), seed {fit.seed}; results in {out}")


def _numbers(fit: FitConfig) -> str:
    """Epochs, batch size and learning rate; those that follow from the number of images come last, without values."""
    numbers = {
        "epochs": f"{fit.steps} steps" if fit.steps else fit.epochs and f"{fit.epochs} epoch{'s' * (fit.epochs > 1)}",
        "batch": fit.batch_size and f"batch {fit.batch_size}",
        "lr": fit.peak_lr and f"lr {fit.peak_lr:g}",
    }
    later = ", ".join(name for name, text in numbers.items() if text is None)
    known = [text for text in numbers.values() if text is not None]
    return ", ".join([*known, f"{later} by the number of images"] if later else known)


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


def warn_of_slow_threads() -> None:
    """Print a warning if several CPU threads are slower than one, as they are beside another busy job."""
    threads = torch.get_num_threads()
    if threads == 1:
        return
    seconds = {1: [], threads: []}
    for _ in range(3):
        for number, times in seconds.items():
            torch.set_num_threads(number)
            times.append(_convolution_seconds())
    torch.set_num_threads(threads)
    ratio = min(seconds[threads]) / min(seconds[1])
    if ratio > SLOWER:
        print_once(
            f"warning: {threads} threads take {ratio:.1f} times as long as one here (is another job running?);"
            " --threads 1 is faster"
        )


def _convolution_seconds() -> float:
    """The time of a training step in miniature."""
    image, weight = torch.ones(64, 16, 16, 16, requires_grad=True), torch.ones(16, 16, 3, 3)
    start = time.perf_counter()
    F.conv2d(image, weight, padding=1).relu().sum().backward()
    return time.perf_counter() - start


def _check_processes(accelerator: Accelerator) -> None:
    """Raises UserError for two launches that silently run one process, or several independent ones."""
    promised = int(os.environ.get("WORLD_SIZE", "0"))
    remedy = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N SCRIPT ... runs N processes on a CPU"
    require(
        promised in (0, accelerator.num_processes),
        f"the launcher started {promised} processes and each trains alone, because there is no GPU: {remedy}",
    )
    kind = accelerator.distributed_type.name
    require(
        kind == "NO" or kind.startswith("MULTI_"),
        f"distributed_type {kind} is not supported: take MULTI_GPU, MULTI_CPU or NO in the launcher's configuration",
    )
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address and starts one process.
    alone = accelerator.distributed_type == DistributedType.NO
    require(
        not (alone and promised == 0 and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ),
        f"accelerate launch was asked for several processes on a CPU and started one: {remedy}",
    )
