"""What the launcher's environment may not do behind the flags, and what stands beside its tracebacks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kd.config import FitConfig, RunConfig
from kd.errors import UserError
from kd.models import build_model
from kd.study.runner import LAUNCHER, _last_words
from kd.training.launch import make_accelerator, warn_of_slow_threads
from kd.training.setup import few_for_batchnorm
from kd.utils.files import read_json
from kd.utils.system import StopRequests
from tests.run_scripts import script, teach

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradients are not accumulated"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "only data parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "--compile compiles with inductor"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "--compile-mode chooses"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "True", "one batch size"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "give --mixed-precision no, bf16 or fp16"),
        ("ACCELERATE_DOWNCAST_BF16", "yes", "--mixed-precision bf16"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "--mixed-precision bf16"),
        ("DNNL_DEFAULT_FPMATH_MODE", "BF16", ""),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0", ""),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", ""),
        ("ACCELERATE_USE_SAGEMAKER", "true", ""),
        ("ACCELERATE_IN_TPU_POD", "true", ""),
        ("XLA_USE_BF16", "1", ""),
        ("XLA_DOWNCAST_BF16", "1", ""),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True", ""),
        ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True", ""),
        ("NVIDIA_TF32_OVERRIDE", "0", "--deterministic"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_with_its_remedy(monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}.*{remedy}"):
        make_accelerator(FitConfig(), RunConfig())


def test_row_41_fp16_by_the_launcher_is_refused_on_a_cpu_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="a CPU would silently compute in fp32"):
        make_accelerator(FitConfig(), RunConfig())


def test_a_launchers_precision_is_part_of_the_runs_identity(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    teach("--out", "run", "--epochs", "1")
    assert read_json(Path("run/config.json"))["identity"]["mixed_precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match=r"has another run \(mixed-precision bf16 there, no here"):
        teach("--out", "run", "--epochs", "1", "--resume")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "XLA", "TP"])
def test_ways_to_distribute_that_are_not_ours_are_refused(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", SimpleNamespace(name=kind))
    with pytest.raises(UserError, match=f"distributed_type {kind} is not supported: take MULTI_GPU"):
        make_accelerator(FitConfig(), RunConfig(threads=1))


@pytest.mark.parametrize(
    ("flags", "processes", "named"),
    [
        ({"batch_size": 64}, 8, "batch 64 over 8 processes is 8 images each"),
        ({"batch_size": 64, "accumulate": 2}, 2, "over 2 processes and --accumulate 2 is 16 images each"),
        ({"batch_size": 64}, 2, None),
        ({"batch_size": 16}, 1, None),
        ({"batch_size": 64, "accumulate": 16}, 1, "batch 64 over --accumulate 16 is 4 images each"),
        ({"batch_size": 64, "sync_batchnorm": True}, 8, None),
    ],
)
def test_few_images_a_process_are_named_where_batchnorm_sees_no_others(flags, processes, named):
    line = few_for_batchnorm(build_model("resnet8", 10, (16, 16)), FitConfig(**flags), processes)
    assert (line is None) if named is None else (named in line)
    assert few_for_batchnorm(build_model("tests.networks:plain", 10, (16, 16)), FitConfig(**flags), processes) is None


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


def test_an_error_under_the_real_launcher_is_framed_above_its_traceback():
    done = script("train_teacher.py", "--data", "digits", "--model", "resnet9", launcher=ACCELERATE, timeout=120)
    assert done.returncode == 1, "the launcher's own"
    rule = "-" * 80
    (framed,) = re.findall(f"\n{rule}\n(.*)\n{rule}\n", done.stderr)
    assert framed.startswith("error: unknown model 'resnet9': did you mean resnet8")
    assert "CalledProcessError" in done.stderr.split(framed)[1]
    assert _last_words(f"command\n{done.stdout}{done.stderr}", done.returncode) == framed, "what a study reports"


STOPS = """
import os, signal, sys
from kd.errors import exit_code
from kd.training.trainer import Trainer
from tests.run_scripts import teach
real = Trainer.record
def record(self, *args):
    real(self, *args)
    if self.state.step == 20:
        os.killpg(0, signal.SIGINT)  # as a terminal does: launcher and script
Trainer.record = record
sys.exit(exit_code(lambda: teach("--out", "run"), ""))
"""


def test_ctrl_c_under_the_real_launcher_says_stopped_and_saved(tmp_path):
    program = tmp_path / "stops.py"
    program.write_text(STOPS)
    command = [*ACCELERATE, str(program)]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    printed = started.communicate(timeout=120)[1]  # until the script has closed its end too
    rule = "-" * 80
    assert re.search(f"\n\n{rule}\nstopped and saved: step 20 in run; continue with --resume\n{rule}\n", printed)
    assert "KeyboardInterrupt" in printed, "the launcher's, above or below"


def test_torchruns_sigterm_after_ctrl_c_is_still_a_ctrl_c():
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert requests.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGTERM)
        assert requests.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert requests.number == signal.SIGINT


@pytest.fixture
def broken_timm(tmp_path, monkeypatch):
    """What timm does beside a CPU-only torch with the registry's torchvision."""
    (tmp_path / "fake/timm").mkdir(parents=True)
    (tmp_path / "fake/timm/__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (tmp_path / "fake/timm-1.0.0.dist-info").mkdir()
    (tmp_path / "fake/timm-1.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 1.0.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"), prepend=os.pathsep)
    program = tmp_path / "program.py"
    program.write_text("print('it runs')\n")
    return str(program)


@pytest.mark.parametrize(
    "launcher", [LAUNCHER, [str(Path(sys.executable).with_name("accelerate-launch"))]], ids=["kd.study", "README"]
)
def test_a_broken_timm_does_not_stop_the_launchers_that_we_use_and_name(launcher, broken_timm):
    done = script(broken_timm, launcher=list(launcher), timeout=120)
    assert "it runs" in done.stdout, done.stderr


def test_a_broken_timm_stops_accelerate_launch(broken_timm):
    """If this fails, accelerate has mended it: README's sentence can go."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    done = script(broken_timm, launcher=launcher, timeout=120)
    assert "operator torchvision::nms does not exist" in done.stderr
