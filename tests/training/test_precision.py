"""bf16: where it pays is said, all of a run computes in it, and it trains as fp32 does."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from kd.bench.__main__ import BenchConfig, start_in
from kd.config import DataConfig, FitConfig, RunConfig
from kd.data import load_data
from kd.data.loader import Batches
from kd.teachers.cache import cached_logits
from kd.teachers.live import live_logits
from kd.teachers.load import load_teachers
from kd.training import launch, precision
from kd.training.diagnostics import gradient_norms
from kd.training.evaluate import score_test_split, validate, validation
from kd.training.setup import build_distiller
from kd.types import Outputs
from tests.run_scripts import distil, teach

INTEL = "processor : 0\nflags\t\t: fpu sse2 avx512f {}\npower management:\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        (INTEL.format("avx512_bf16 amx_bf16 amx_tile"), "amx_bf16"),
        (INTEL.format("avx512_bf16"), "avx512_bf16"),
        (INTEL.format("avx512_vnni avx512_bf16x"), None),
        (INTEL.format("") + "bugs : avx512_bf16\n", None),
        (ARM.format("i8mm bf16"), "bf16"),
        ("", None),
        (None, None),
    ],
)
def test_what_the_cpu_says_of_itself(text, flag, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert precision.bf16_instructions(path) == flag


@pytest.mark.parametrize(
    ("run", "flag", "speed", "said"),
    [
        ("no", "amx_bf16", 2.7, "this CPU multiplies bf16 in hardware (amx_bf16): --mixed-precision bf16 is about 2.7"),
        ("no", "avx512_bf16", 1.1, ""),
        ("no", None, 2.7, ""),
        ("bf16", "amx_bf16", 2.7, ""),
        ("bf16", None, 0.9, ""),
        (
            "bf16",
            None,
            0.25,
            "warning: this CPU multiplies no bf16 in hardware: --mixed-precision bf16 takes about 4.0",
        ),
        ("bf16", "avx512_bf16", 0.5, "warning: this CPU has avx512_bf16, and is slower in bf16 all the same"),
    ],
)
def test_the_faster_precision_is_named_if_the_run_has_the_other(monkeypatch, capsys, run, flag, speed, said):
    monkeypatch.setattr(precision, "bf16_instructions", lambda: flag)
    monkeypatch.setattr(precision, "bf16_speed", lambda: speed)
    launch.make_accelerator(FitConfig(mixed_precision=run), RunConfig(threads=1))
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.count("\n") == (said != "")


def test_nothing_is_measured_on_a_cpu_without_bf16_that_computes_in_fp32(monkeypatch, capsys):
    monkeypatch.setattr(precision, "bf16_instructions", lambda: None)
    monkeypatch.setattr(precision, "bf16_speed", lambda: pytest.fail("it costs a tenth of a second"))
    launch.make_accelerator(FitConfig(mixed_precision="no"), RunConfig(threads=1))
    assert capsys.readouterr().out == ""


def test_it_is_said_once_for_teacher_control_and_student(monkeypatch, capsys):
    monkeypatch.setattr(precision, "bf16_instructions", lambda: "amx_bf16")
    monkeypatch.setattr(precision, "bf16_speed", lambda: 2.0)
    distil("--out", "run", "--epochs", "1", "--control")
    assert capsys.readouterr().out.count("multiplies bf16 in hardware") == 1


def test_the_measurement_changes_no_random_number():
    before = torch.get_rng_state()
    precision.bf16_speed.cache_clear()
    assert precision.bf16_speed() > 0
    assert torch.equal(torch.get_rng_state(), before)


EMULATED = "from kd.training.precision import *; advise_precision('bf16'); print(bf16_speed())"


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="of x86 alone")
def test_emulated_bf16_is_warned_of():
    """oneDNN told to do without the instructions: eight times as slow as fp32 on a CPU that has them."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", EMULATED], env=env, capture_output=True, text=True, check=True)
    *said, speed = done.stdout.splitlines()
    assert float(speed) < 0.8
    assert said[0].startswith("warning: this CPU")


@pytest.fixture(scope="module")
def synthetic():
    return load_data(DataConfig("synthetic"))


@contextmanager
def convolutions():
    """Collects the types in which convolutions answer."""
    kinds: set[torch.dtype] = set()

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            kinds.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield kinds
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        teach("--model", "resnet8", "--epochs", "1", "--out", str(folder))
    return str(folder)


HALF = {"no": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", ["no", "bf16"])
def test_evaluation_teacher_cache_and_comparison_compute_in_the_runs_precision(kind, teacher_run, synthetic, tmp_path):
    config = BenchConfig("synthetic", "resnet8", batch_size=50, threads=1)
    accelerator, job = start_in(kind, config), config.job(kind)
    data = synthetic
    teacher = load_teachers([teacher_run], data, accelerator.device, False)
    distiller = build_distiller(job, data, teacher)
    batch = next(Batches(data, job, accelerator).epoch(0))
    parts = {
        "validation": lambda: validate(distiller.deployed, validation(data, job, accelerator)),
        "test": lambda: score_test_split(distiller.deployed, {}, data, job, accelerator, teacher),
        "live teacher": lambda: live_logits(teacher.network, accelerator)(batch),
        "its features": lambda: live_logits(teacher.network, accelerator, ("layer2",))(batch),
        "cache": lambda: cached_logits(teacher, data, job, accelerator, tmp_path),
        "comparison": lambda: gradient_norms(distiller, batch, Outputs(torch.ones(50, 10)), accelerator),
    }
    for name, part in parts.items():
        with convolutions() as kinds:
            result = part()
        assert kinds == {HALF[kind]}, name
        if isinstance(result, Outputs):
            assert result.logits.dtype == torch.float32, "losses are not in half precision"
    assert {path.stem for path in tmp_path.glob("*/logits.npy")} == {"logits"}


def gradients(kind: str, model: str, data) -> tuple[torch.Tensor, float]:
    """One step's gradients in one vector, and its loss."""
    config = BenchConfig("synthetic", model, batch_size=100, threads=1)
    accelerator, job = start_in(kind, config), config.job(kind)
    distiller = build_distiller(job, data)
    distiller.train()
    batch = next(Batches(data, job, accelerator).epoch(0))
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    loss = sum(accelerator.prepare(distiller)(batch, Outputs(3 * logits)).terms.values())
    loss.backward()
    return torch.cat([part.grad.flatten() for part in distiller.parameters()]), loss.item()


@pytest.mark.parametrize(
    ("model", "error"), [("tests.networks:plain", 0.02), ("tests.networks:perceptron", 0.02), ("resnet8", 0.2)]
)
def test_a_steps_gradients_in_bf16_are_those_of_fp32_to_its_rounding(model, error, synthetic):
    """bf16 keeps 8 bits: 0.4% of each value, which layers and their BatchNorms add up. The loss is in float32."""
    (full, loss), (half, half_loss) = (gradients(kind, model, synthetic) for kind in ("no", "bf16"))
    assert not torch.equal(full, half), "and it is another precision"
    assert half_loss == pytest.approx(loss, rel=2e-3)
    assert (half - full).norm() < error * full.norm()


@pytest.mark.parametrize("model", ["tests.networks:deep", "tests.networks:perceptron"])
def test_training_in_bf16_ends_as_training_in_fp32(model):
    lines = {}
    for kind in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        teach("--model", model, "--mixed-precision", kind, "--out", kind)
        lines[kind] = [json.loads(line) for line in Path(kind, "metrics.jsonl").read_text().splitlines()]
    for full, half in zip(lines["no"], lines["bf16"], strict=True):
        assert half["train/loss"] == pytest.approx(full["train/loss"], rel=0.01)
        assert half["val/loss"] == pytest.approx(full["val/loss"], rel=0.02)
    assert lines["no"][-1]["train/loss"] < 0.95 * lines["no"][0]["train/loss"], "and it trains"
    weights = [Path(kind, "model.safetensors").read_bytes() for kind in lines]
    assert weights[0] != weights[1]
