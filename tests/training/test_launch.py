"""What the launcher's environment may not do behind the flags."""

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from kd.config import FitConfig, RunConfig
from kd.errors import UserError
from kd.training.launch import HARMLESS, check_environment, start
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


@pytest.mark.parametrize("flags", [[], ["--cpu"], ["--mixed_precision", "bf16"]])
def test_what_the_launcher_always_sets_is_harmless(monkeypatch, flags):
    """The environment that the real launcher prepares when nothing special is asked of it."""
    args = launch_command_parser().parse_args([*flags, "train_teacher.py"])
    args.mixed_precision = args.mixed_precision or "no"
    args.use_cpu = args.cpu
    args.num_processes, args.num_cpu_threads_per_process, args.dynamo_backend = 1, 1, "no"
    _, environment = prepare_simple_launcher_cmd_env(args)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert any(name in HARMLESS for name in environment)
    check_environment()


def test_accumulation_under_the_real_launcher_is_refused():
    """It divided every gradient by 4 and accumulated nothing: 50.00 instead of 83.33 under the same identity."""
    flags = ["--data", "synthetic", "--model", "tests.networks:plain", "--epochs", "1", "--wandb", "disabled"]
    done = script("train_teacher.py", *flags, env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4")
    assert done.stderr.count("\n") == 1
