"""What a step costs the host beside its arithmetic: no seeding of every device, no wrapper, no launch for a number."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from kd.config import KDConfig
from kd.training.schedule import lr_at
from kd.utils import rng
from tests.fake_cuda import Setting, accelerator_on_gpu, counting, training
from tests.run_scripts import teach


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_a_cpu_draws_after_a_steps_seed_what_it_always_drew(step, monkeypatch):
    torch.manual_seed(rng.derive(3, "step", step, 1))
    wanted = torch.rand(9), torch.randn(9), torch.nn.functional.dropout(torch.ones(99))
    monkeypatch.setattr(torch, "manual_seed", None)  # it asks for every kind of device
    rng.seed_step(3, step, 1, torch.device("cpu"))
    found = torch.rand(9), torch.randn(9), torch.nn.functional.dropout(torch.ones(99))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_on_a_gpu_its_own_generator_and_the_cpus_are_seeded():
    """By the CPU's, a network may draw which layers to skip."""
    with mock.patch("torch.cuda.manual_seed") as seeded, mock.patch("torch.cuda.manual_seed_all") as every:
        rng.seed_step(3, 5, 1, torch.device("cuda", 0))
    seeded.assert_called_once_with(rng.derive(3, "step", 5, 1))
    every.assert_not_called()
    assert torch.initial_seed() == rng.derive(3, "step", 5, 1)


def test_a_seed_is_hashed_once():
    with mock.patch("hashlib.sha256", side_effect=rng.hashlib.sha256) as hashed:
        assert rng.derive("a purpose of its own", 1) == rng.derive("a purpose of its own", 1)
        assert rng.derive("a purpose of its own", 2) != rng.derive("a purpose of its own", 1)
    assert hashed.call_count == 2


def test_an_update_is_one_kernel_whatever_the_learning_rate_and_copies_nothing():
    """The rate is an argument of the kernel; as a tensor it would be a copy to the GPU at every step."""
    with training(Setting(KDConfig())) as (trainer, found):
        steps, fit = trainer._batches.steps, trainer.job.fit
        for _ in found:
            trainer.backward(None)
            with counting() as launches:
                trainer.update()
            assert launches == {"_fused_sgd_": 1}
            (group,) = trainer.optimizer.param_groups
            assert group["lr"] == lr_at(trainer.state.step, steps, fit)
            trainer.state.step += 1
    assert lr_at(0, steps, fit) != lr_at(1, steps, fit)


@contextmanager
def scaling(precision: str | None = None):
    """An accelerator of fp16, which has a scaler on a GPU alone."""
    with accelerator_on_gpu(precision) as accelerator:
        accelerator.scaler = torch.amp.GradScaler("cpu")
        yield accelerator


def test_a_wrapper_goes_around_an_update_only_where_gradients_are_scaled(monkeypatch):
    with training(Setting()) as (trainer, _):
        assert not isinstance(trainer.optimizer, AcceleratedOptimizer)
    with training(Setting(fit={"mixed_precision": "bf16"})) as (trainer, _):
        assert not isinstance(trainer.optimizer, AcceleratedOptimizer)
    monkeypatch.setattr("tests.fake_cuda.accelerator_on_gpu", scaling)
    with training(Setting()) as (trainer, _):
        assert isinstance(trainer.optimizer, AcceleratedOptimizer)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_loss_is_neither_divided_by_one_nor_added_to_zero(monkeypatch):
    """With one term, cross-entropy's, no operation stands between it and its backward pass."""
    from kd.training.trainer import Trainer

    seen, real = [], Trainer.backward

    def backward(self, loss):
        with Operations() as operations:
            real(self, loss)
        seen.append((loss.grad_fn.name(), operations.names[:2]))

    monkeypatch.setattr(Trainer, "backward", backward)
    teach("--out", "run", "--epochs", "1", "--batch-size", "450")
    assert seen == [("NllLossBackward0", ["aten::ones_like", "aten::nll_loss_backward"])] * 2
