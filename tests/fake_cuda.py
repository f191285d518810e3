"""Training steps on fake CUDA tensors: what a step would ask of a GPU, without one and without arithmetic.

Fake tensors have a shape, a type and a device, and no memory. Torch runs every operation on them as far as choosing its
result's shape and device, and refuses two devices in one operation. `counting` counts the operations that a GPU would
be asked to launch, and raises at once where the host would wait for it. Backward passes cannot run so: the autograd
engine asks for a real accelerator; `train_step` leaves them out and gives the optimizer gradients without values.

Torch asks for a device guard wherever it meets a CUDA tensor; a build without CUDA has none, so a guard that does
nothing is compiled from five lines of C++ (two seconds, once a process).
"""

import ctypes
import dataclasses
import os
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd.config import CacheConfig, DataConfig, FitConfig, Job, NoneConfig, RunConfig, ViewConfig
from kd.config.methods import MethodFlags, method_name
from kd.data import Data, policies
from kd.data.loader import Batches
from kd.data.rows import Split
from kd.losses.base import Distiller
from kd.models import build_model
from kd.runs.folder import RunFolder
from kd.teachers.cache import LogitStore
from kd.teachers.live import TeacherLogits, fold_batchnorm, live_logits
from kd.teachers.load import TeacherNetwork
from kd.training.setup import build_distiller
from kd.training.trainer import Trainer
from kd.types import Batch

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent


class _Mode(FakeTensorMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.startswith("aten::_fused_"):  # an optimizer's one kernel, which has no fake form
            return None
        return super().__torch_dispatch__(function, types, args, kwargs)


MODE = _Mode()  # one for all: tables that kd keeps on the device belong to it

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
}
"""

# The host reads a value, or a size that depends on values.
WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("unique_dim", "unique_consecutive", "_unique", "_unique2", "_linalg_check_errors", "histc"),
}
# No kernel: memory is taken, or looked at otherwise.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"),
    *("lift_fresh", "detach", "alias", "set_", "resize_", "is_same_size"),
}
COPY = "copy"  # how a copy between host and GPU is counted


class HostWaits(AssertionError):
    """An operation for which the host would wait for the GPU, or copy between them."""


@cache
def load_guard() -> None:
    """Register the device guard. Skips the test if nothing can compile it."""
    if torch.cuda.is_available():
        return  # torch has its own
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("fake CUDA tensors need a C++ compiler, and there is no g++; install one, or set CXX")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        options = [
            "-std=c++20",
            "-w",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        command = [compiler, *options, f"-I{torch_folder / 'include'}", str(source), "-o", str(library)]
        subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-lc10"], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake and CUDA is there."""
    load_guard()
    with ExitStack() as stack:
        patch = lambda *args, **kwargs: stack.enter_context(mock.patch(*args, **kwargs))  # noqa: E731
        patch("torch.cuda.mem_get_info", lambda device: (2**36, 2**36))
        patch("torch.cuda.is_bf16_supported", lambda: True)
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch("torch.nn.Module._apply", _apply)
        patch("torch.from_numpy", _fake_from_numpy)
        patch("kd.data.policies.operations", _really(policies.operations))
        stack.enter_context(MODE)
        yield


def _fake_from_numpy(array: np.ndarray, really: Callable = torch.from_numpy) -> Tensor:
    return MODE.from_tensor(really(array))


def _really(function: Callable) -> Callable:
    """A function of numbers, which computes with tensors that have values."""

    def call(*args):
        with unset_fake_temporarily():
            return function(*args)

    return call


def _apply(module: nn.Module, change: Callable, recurse: bool = True) -> nn.Module:
    """Module._apply for fake parameters, which torch can only swap while nothing refers to them."""
    done: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        fake = tensor if isinstance(tensor, FakeTensor) else MODE.from_tensor(tensor)
        new = change(fake.detach())
        return tensor if tensor is fake and new.device == fake.device else new

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    new = changed(tensor)
                    is_new_parameter = isinstance(tensor, nn.Parameter) and new is not tensor
                    done[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_new_parameter else new
                tensors[name] = done[id(tensor)]
    return module


class _Counting(TorchDispatchMode):
    def __init__(self, may_copy: bool):
        super().__init__()
        self.may_copy = may_copy
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in given if tensor.is_cuda]
        if on_gpu and name in WAITING:
            raise HostWaits(f"{name}{_where()}: the host would wait for the GPU to learn a value")
        if on_gpu and _chooses_by_mask(name, args):
            raise HostWaits(f"{name} by a boolean mask{_where()}: the host would wait to learn how many rows it has")
        out = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_") and len({tensor.device.type for tensor in (*given, *made)}) > 1:
            if not self.may_copy:
                raise HostWaits(f"{name}{_where()}: a copy between host and GPU")
            self.launches[COPY] += 1
        elif any(tensor.is_cuda for tensor in (*made, *on_gpu)) and _launches(function, name, made):
            self.launches[name] += 1
        return out


def _launches(function, name: str, made: list[Tensor]) -> bool:
    """Whether an operation runs a kernel: it is no view, and no mere question."""
    if name in FREE or name.startswith("prim"):
        return False
    aliases = [result.alias_info for result in function._schema.returns]
    if aliases and all(alias is not None and not alias.is_write for alias in aliases):
        return False
    return bool(made) or function._schema.is_mutable


def _chooses_by_mask(name: str, args: tuple) -> bool:
    """Whether rows are chosen by a boolean index. To set them all to one value a kernel needs no list of them."""
    if name not in ("index", "index_put", "index_put_") or (name != "index" and args[2].numel() == 1):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _where() -> str:
    """The line of kd or of a test that asked."""
    lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
    lines = [frame for frame in lines if frame.filename != __file__]
    return f" in {Path(lines[-1].filename).relative_to(ROOT)}:{lines[-1].lineno}" if lines else ""


@contextmanager
def counting(may_copy: bool = False) -> Iterator[Counter[str]]:
    """The kernels launched inside, by name. Raises HostWaits where the host would wait, or copy unless it may."""
    with _Counting(may_copy) as mode:
        yield mode.launches


CLASSES, SIZE = 100, (32, 32)
ROWS = 512  # of each split


@dataclass(frozen=True)
class Setting:
    """One training, of which a few steps are taken."""

    method: MethodFlags = field(default_factory=NoneConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    fit: dict = field(default_factory=dict)  # further flags of FitConfig
    cached: CacheConfig | None = None  # the teacher's logits are looked up, stored as these flags say
    student: str = "resnet8"
    teacher: str = "resnet14"

    @property
    def job(self) -> Job:
        fit = FitConfig(**{"batch_size": 64, "lr": 0.1} | self.fit)
        parts = self.views, fit, RunConfig(wandb="disabled", diagnose_every=0), self.cached or CacheConfig()
        for part in (self.method, *parts[:2]):
            part.check()
        return Job(method_name(self.method), "report", self.student, self.method, DataConfig(), *parts)


@contextmanager
def training(setting: Setting) -> Iterator[tuple[Trainer, Iterator[Batch]]]:
    """A trainer on fake CUDA and its batches, built as the scripts do. One batch is past: kept tables are there."""
    job, data = setting.job, _data()
    with accelerator_on_gpu(job.fit.mixed_precision) as accelerator:
        distiller, network = _networks(setting, job, data)
        with fake_cuda():
            logits = _teacher(setting, network, distiller, accelerator) if job.method.needs_teacher else None
            trainer = Trainer(job, _faked(data), accelerator, RunFolder(Path("run"), {}), distiller, logits)
            trainer.backward = lambda loss: _fill_gradients(distiller)
            found = trainer.batches(0)
            next(found)
            yield trainer, found


@contextmanager
def batches(setting: Setting) -> Iterator[Iterator[Batch]]:
    """The batches of an epoch on fake CUDA, the first of which is past."""
    with accelerator_on_gpu() as accelerator, fake_cuda():
        found = Batches(_faked(_data()), setting.job, accelerator).epoch(0)
        next(found)
        yield found


@contextmanager
def accelerator_on_gpu(precision: str | None = None) -> Iterator[Accelerator]:
    """An accelerator that takes fake CUDA for its device."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision or "no")
    accelerator.state.device = PartialState().device = DEVICE  # the former is copied from the latter now and then
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _data() -> Data:
    split = Split(torch.zeros(ROWS, 3, *SIZE, dtype=torch.uint8), torch.arange(ROWS) % CLASSES)
    return Data(split, split, split, tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3, "", SIZE)


def _faked(data: Data) -> Data:
    split = Split(MODE.from_tensor(data.train.images), MODE.from_tensor(data.train.labels))
    return replace(data, train=split, val=split, test=split)


def _networks(setting: Setting, job: Job, data: Data) -> tuple[Distiller, nn.Module]:
    """The student behind its loss, and its teacher ready to run: tensors with values, on the CPU."""
    network = build_model(setting.teacher, CLASSES, SIZE).eval().requires_grad_(False)
    teacher = TeacherNetwork(network, Path("teacher"), "", {"model": setting.teacher}, CLASSES)
    distiller = build_distiller(job, data, teacher if job.method.needs_teacher else None)
    return distiller, network if distiller.loss.teacher_layers else fold_batchnorm(network)


def _teacher(setting: Setting, network: nn.Module, distiller: Distiller, accelerator: Accelerator) -> TeacherLogits:
    """Live, or looked up in a cache of zeros."""
    if setting.cached is None:
        with mock.patch("kd.teachers.live.fold_batchnorm", lambda network: network):  # is folded already
            return live_logits(network.to(DEVICE), accelerator, distiller.loss.teacher_layers)
    identity = {"rows": ROWS, "classes": CLASSES, "views": dataclasses.asdict(setting.views)}
    identity |= {"dtype": setting.cached.cache_dtype, "top_k": setting.cached.cache_top_k}
    identity |= {"strong": setting.views.strong} if setting.method.two_views else {}
    store = LogitStore(Path("cache"), identity)
    store.folder.mkdir()
    for name, shape in store.shapes.items():
        np.save(store.path(name), np.zeros(shape, store.dtype(name)))
    return store.teacher(DEVICE)


def _fill_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
