"""What the launcher's environment may not do behind the flags."""

import sys

import pytest
import torch

from kd.config import FitConfig, RunConfig
from kd.errors import UserError
from kd.training.launch import start, warn_of_slow_threads
from tests.run_scripts import script


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradients are not accumulated"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "only data parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "--compile compiles with inductor"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "default mode"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "True", "one batch size"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "give --mixed-precision no, bf16 or fp16"),
        ("ACCELERATE_DOWNCAST_BF16", "yes", "--mixed-precision bf16"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "--mixed-precision bf16"),
        ("NVIDIA_TF32_OVERRIDE", "0", "--deterministic"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_with_its_remedy(monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}.*{remedy}"):
        start(FitConfig(), RunConfig())


def test_what_the_real_launcher_always_sets_is_harmless(tmp_path):
    """accelerate launch sets a dozen variables even if nothing special is asked of it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom kd.training.launch import HARMLESS, check_environment\ncheck_environment()\n"
        "print('harmless:', len([name for name in HARMLESS if name in os.environ]))\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = script(str(program), launcher=launcher, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("harmless:")[1]) >= 4


def test_accumulation_under_the_real_launcher_is_refused():
    """It divided every gradient by 4 and accumulated nothing: 50.00 instead of 83.33 under the same identity."""
    flags = ["--data", "synthetic", "--model", "tests.networks:plain", "--epochs", "1", "--wandb", "disabled"]
    done = script("train_teacher.py", *flags, env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("two", "warned"), [(0.5, False), (1.1, False), (6.0, True)])
def test_threads_that_are_slower_than_one_are_named(monkeypatch, capsys, two, warned):
    before = torch.get_num_threads()
    monkeypatch.setattr("kd.training.launch._convolution_seconds", lambda: two if torch.get_num_threads() == 2 else 1.0)
    torch.set_num_threads(2)
    try:
        warn_of_slow_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert ("--threads 1 is faster" in capsys.readouterr().out) == warned
