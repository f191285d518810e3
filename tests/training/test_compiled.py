"""Compiled where it pays: one graph for each method, compiled once for each network, teacher and scoring too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from kd.config import FitConfig, RunConfig
from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.errors import UserError, remedy_for
from kd.training import evaluate
from kd.training.launch import make_accelerator
from kd.training.trainer import COMPILING, GRAPHS_PAY, Trainer
from tests.conftest import ROOT
from tests.run_scripts import SMALL, STUDENT, distil, metrics_of, script, teach, torchrun


def python(*command: str, timeout: int = 600, **env: str) -> str:
    """What a Python process of its own prints; the shape checks of the tests are nothing that torch could trace."""
    settings = {**os.environ, **env}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_methods_step_is_one_graph_compiled_once_for_all_epochs():
    assert int(python("-m", "tests.compiled", "eager").split()[0]) >= 31


@pytest.mark.slow
def test_backward_passes_are_compiled_once_too():
    methods = ("kd", "dist", "sp", "crd", "mlkd", "ofa")
    assert int(python("-m", "tests.compiled", "aot_eager", *methods).split()[0]) == len(methods)


def test_a_process_may_train_by_more_methods_than_torch_compiles_by_default():
    code = (
        "from tests.compiled import *; print(train_one_after_another('kd none dkd dist nkd wttm sp pkt vid'.split()))"
    )
    assert int(python("-c", code)) == 9


SCRIPT = f"""
import collections, json, runpy, sys, torch, kd.training.launch, kd.training.evaluate
real, graphs = torch.compile, collections.Counter()
def eagerly(function, **options):
    name = type(function).__name__ if isinstance(function, torch.nn.Module) else function.__name__
    def backend(graph, inputs):
        graphs[name] += 1
        return graph.forward
    return real(function, backend=backend, fullgraph=%s, dynamic=False)
torch.compile = eagerly
kd.training.launch.compiles = lambda fit, on_cpu: True
kd.training.evaluate.PAYS = 6
sys.argv = ["distill_student.py", *{STUDENT}, "--threads", "1", "--wandb", "disabled", *sys.argv[1:]]
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path({str(ROOT / "distill_student.py")!r}, run_name="__main__")
finally:
    print("GRAPHS", json.dumps(graphs))
"""


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], ["--mixed-precision", "bf16", "--ema", "0.5"]])
def test_a_start_compiles_each_network_once_and_trains_like_an_eager_one(args):
    """Teacher and student: each one's step and scoring, and the teacher's answers, over epochs with scoring between."""
    args = ["--epochs", "3", *args]
    printed = python("-c", SCRIPT % True, "--out", "compiled", *args)
    assert '{"Distiller": 2, "Sequential": 2, "answer": 1}' in printed
    assert printed.count(COMPILING) == 2
    distil("--out", "plain", *args)
    near = {"rel": 2e-2, "abs": 1.5} if "bf16" in args else {"rel": 1e-5}
    for line, other in zip(metrics_of(Path("compiled")), metrics_of(Path("plain")), strict=True):
        assert line == pytest.approx(other, **near)


@pytest.mark.slow
def test_two_compiled_processes_train_like_one_that_is_not(tmp_path):
    """By a method that gathers the batch: the graph breaks there, and nothing else changes."""
    program = tmp_path / "program.py"
    program.write_text(SCRIPT % False)
    plain = [
        "--student",
        "tests.networks:plain",
        "--batch-size",
        "58",
        "--lr",
        "0.005",
        "--teacher",
        "teacher",
        "--trust-code",
    ]
    teach("--model", "tests.networks:plain", "--out", "teacher")
    two = script(str(program), *plain, "--out", "two", "dist", env={"ACCELERATE_USE_CPU": "true"}, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr[-2000:]
    distil(*plain, "--out", "one", "dist")
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


INDUCTOR = """
import sys, torch, torch._dynamo.utils
from tests.compiled import train
torch.set_num_threads(1)
train("kd", "inductor", "bf16")
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_inductor_in_half_precision_agrees_with_eager_and_the_next_start_finds_its_code_on_disk(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert int(python("-c", INDUCTOR, **cache)) == 0
    assert int(python("-c", INDUCTOR, **cache)) >= 1


@pytest.fixture
def asked(monkeypatch) -> list:
    """What torch.compile is asked for, and does not do, as a launch on CUDA would."""
    found = []

    def compile(function, **options):
        found.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("kd.training.launch.compiles", lambda fit, on_cpu: fit.compile)
    return found


def modes(asked: list) -> dict[str, str]:
    """The mode of each compiled part but the views, which have none and are compiled where there is a GPU."""
    named = {getattr(function, "__name__", type(function).__name__): options for function, options in asked}
    named.pop("_weak", None)
    assert all((options["backend"], options["dynamic"]) == ("inductor", False) for options in named.values())
    return {name: options.get("mode", "default") for name, options in named.items()}


def test_step_teacher_and_scoring_are_compiled_and_without_compile_nothing_is(asked, monkeypatch):
    monkeypatch.setattr(evaluate, "PAYS", 1)
    distil("--out", "run")
    assert modes(asked) == {"Distiller": "default", "answer": "default", "Sequential": "default"}
    asked.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    distil("--out", "other", "--no-compile")
    assert asked == []


def test_scoring_is_compiled_only_in_runs_that_score_much(asked):
    distil("--out", "run")
    assert set(modes(asked)) == {"Distiller", "answer"}


def test_graphs_are_told_where_a_step_begins_and_scoring_uses_none(asked, monkeypatch, capsys):
    begun, steps, real = [], [], Trainer.record
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    monkeypatch.setattr(Trainer, "record", lambda *args: steps.append(len(begun)) or real(*args))
    monkeypatch.setattr(evaluate, "PAYS", 1)
    teach("--out", "run", "--compile-mode", "reduce-overhead")
    assert modes(asked) == {"Distiller": "reduce-overhead", "Sequential": "default"}
    assert steps == [*range(1, 1 + 36)], "before each step"
    assert GRAPHS_PAY not in capsys.readouterr().out
    begun.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    teach("--out", "other")
    assert begun == []
    assert COMPILING + GRAPHS_PAY in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compile-mode", "max-autotune", "--no-compile"], "--no-compile compiles nothing"),
        (["--compile-mode", "reduce-overhead", "--accumulate", "2"], "with --accumulate a CUDA graph would overwrite"),
    ],
)
def test_a_mode_beside_a_flag_that_makes_it_void_or_wrong_is_refused(flags, message):
    with pytest.raises(UserError, match=f"--compile-mode {flags[1]}: {message}"):
        parse(train_defaults, "", [*SMALL, *flags])


def test_a_mode_is_refused_where_nothing_is_compiled_and_kept_where_something_is(asked, monkeypatch):
    accelerator = make_accelerator(FitConfig(compile_mode="max-autotune"), RunConfig(threads=1))
    assert accelerator.state.dynamo_plugin.mode == "max-autotune"
    monkeypatch.setattr("kd.training.launch.compiles", lambda fit, on_cpu: False)
    with pytest.raises(UserError, match="--compile-mode max-autotune: kd compiles on CUDA only; leave it out"):
        make_accelerator(FitConfig(compile_mode="max-autotune"), RunConfig(threads=1))


def test_a_graph_that_overwrites_what_is_needed_has_a_remedy():
    error = RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run")
    assert "leave --compile-mode out" in remedy_for(error)
