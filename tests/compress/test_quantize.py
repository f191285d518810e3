"""Low precision: weights and activations have the documented levels, in training and in saved files."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import kd
import kd.runs.load
from kd.compress import plain_weights
from kd.compress.quantize import quantize_activations, rounded_activation, rounded_weight, straight_through
from kd.compress.sparsity import inner_layers
from kd.config import CompressConfig, DataConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.losses.apprentice import soft_cross_entropy
from kd.models import build_model
from kd.report.costs import Costs
from kd.report.groups import by_data
from kd.runs.folder import run_identity
from kd.runs.results import collect_runs
from kd.study import plan
from kd.teachers.live import fold_batchnorm
from kd.training.evaluate import predict_logits
from kd.training.setup import build_network
from kd.types import Outputs
from kd.utils.files import write_json
from tests import networks
from tests.conftest import ROOT
from tests.losses.test_methods import FEW, quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.pairs import batch_of, build, terms_of
from tests.report.test_report import fake_run
from tests.run_scripts import TEACHER, distil, script, torchrun
from tests.training.test_resume import differs_when_killed

DEEP = ["--student", "tests.networks:deep"]
LOW = ["--weight-bits", "2", "--activation-bits", "4"]


def student(trained: str, *args: str) -> None:
    distil(*DEEP, *FEW, "--init", trained, "--teacher", trained, "--trust-code", *args)


def naive_weight(row: list[float], bits: int) -> list[float]:
    if bits == 2:
        threshold = 0.7 * sum(map(abs, row)) / len(row)
        large = [abs(w) for w in row if abs(w) > threshold]
        scale = sum(large) / max(len(large), 1)
        return [0.0 if abs(w) <= threshold else scale if w > 0 else -scale for w in row]
    step = max(map(abs, row)) / {4: 7, 8: 127}[bits]
    return [step * round(w / step) if step else 0.0 for w in row]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_take_the_documented_levels_of_their_channel(bits):
    weight = (
        torch.randn(6, 5, 3, 3, dtype=torch.double) * torch.logspace(-4, 3, 6, dtype=torch.double)[:, None, None, None]
    )
    weight[2] = 0
    rounded = rounded_weight(weight, bits)
    expected = torch.tensor([naive_weight(row, bits) for row in weight.flatten(1).tolist()], dtype=torch.double)
    torch.testing.assert_close(rounded.flatten(1), expected, rtol=1e-12, atol=0)
    assert max(len(row.unique()) for row in rounded) <= 2**bits - 1
    torch.testing.assert_close(rounded_weight(rounded, bits), rounded, rtol=1e-6, atol=0)


def test_ternary_scales_are_the_best_for_their_threshold():
    row = torch.randn(1, 200)
    rounded = rounded_weight(row, 2)
    error = lambda scale: (row - rounded * scale).square().sum()  # noqa: E731
    assert error(1.0) < min(error(0.98), error(1.02))


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_take_steps_over_each_images_own_range(bits):
    x = torch.randn(3, 2, 16, 16) * torch.tensor([1.0, 50.0, 0.01])[:, None, None, None]
    x[1] = x[1].relu()
    rounded = rounded_activation(x, bits)
    for one, image in zip(rounded, x):
        step = (max(image.max(), 0) - min(image.min(), 0)) / (2**bits - 1)
        assert len(one.unique()) <= 2**bits
        # Half a step, plus half a step if the range is shifted to include an exact zero.
        assert (one - image).abs().max() <= 1.001 * step
        torch.testing.assert_close((one / step).round() * step, one, rtol=1e-4, atol=1e-6)
        assert len(one.unique()) > 2 ** (bits - 2)
    torch.testing.assert_close(rounded_activation(x[1:2], bits), rounded[1:2], rtol=0, atol=0)
    assert torch.equal(rounded[1] == 0, rounded[1].abs() < 1e-12)
    assert not rounded_activation(torch.zeros(2, 3), bits).any()


def test_values_are_rounded_to_the_last_bit_and_gradients_are_not():
    x, rounded = (1e4 * torch.randn(500)).requires_grad_(), torch.rand(500)
    through = straight_through(x, rounded)
    assert torch.equal(through, rounded)
    (through * torch.arange(500.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(500.0))


def test_inner_layers_are_all_but_the_first_and_the_last():
    assert inner_layers(networks.deep(4), (8, 8), "deep", 4) == ("3", "6")
    names = inner_layers(build_model("resnet8", 4, (8, 8)), (8, 8), "resnet8", 4)
    assert names[0] == "layer1.0.conv1"
    assert {"conv1", "fc"}.isdisjoint(names)
    assert "layer3.0.shortcut.0" in names
    with pytest.raises(UserError, match="plain: has no layer between its first and its last one"):
        inner_layers(networks.plain(4), (8, 8), "plain", 4)


def test_a_layer_that_computes_its_weight_is_not_compressed():
    network = networks.deep(4)
    weight_norm(network[3])
    with pytest.raises(UserError, match="deep: 3 has a parametrization of its own; compress it without"):
        inner_layers(network, (8, 8), "deep", 4)


@pytest.mark.timm
def test_both_heads_of_a_distilled_transformer_stay_as_they_are():
    pytest.importorskip("timm")
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    name = "timm/deit_tiny_distilled_patch16_224"
    layers = inner_layers(build_model(name, 4, (32, 32), arguments=arguments), (32, 32), name, 4)
    assert {"patch_embed.proj", "head", "head_dist"}.isdisjoint(layers)
    assert "blocks.1.mlp.fc2" in layers


def test_a_low_precision_student_resumes_to_the_same_bytes_and_is_saved_with_its_levels(trained, monkeypatch):
    assert differs_when_killed(monkeypatch, partial(student, trained, *LOW), 3) == []
    network, full = kd.load("run", trust_code=True), kd.load(trained, trust_code=True)
    assert not any(is_parametrized(module) for module in network.modules())
    for name in ("3", "6"):
        weight = network.get_submodule(name).weight
        assert max(len(row.unique()) for row in weight) == 3
    assert all(len(network[index].weight[0].unique()) > 20 for index in (0, 11))
    assert not torch.equal(network[0].weight, full[0].weight)  # the first layer learns as well
    summary = json.loads(Path("run/summary.json").read_text())
    data = load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))
    logits = predict_logits(network, data.test, data, Accelerator(cpu=True), 40)
    torch.testing.assert_close(logits, load_file("run/test_logits.safetensors")["logits"], rtol=1e-5, atol=1e-5)
    zeros = sum(int((network[index].weight == 0).sum()) for index in (3, 6))
    assert summary["sparsity"] == zeros / (2 * 576)
    rest = sum(part.numel() * part.element_size() for part in network.state_dict().values()) - 2 * 576 * 4
    assert summary["packed_bytes"] == rest + 2 * (576 // 4 + 8 * 4)
    assert (summary["weight_bits"], summary["activation_bits"], summary["init"]) == (2, 4, trained)


def test_fine_tuning_starts_from_the_trained_weights_and_bakes_as_torch_does(trained):
    data = load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))
    config = parse(distill_defaults, "", [*DEEP, *FEW, "--data", "synthetic", "--init", trained, "--weight-bits", "4"])
    full = kd.load(trained, trust_code=True)
    network, recipe = build_network(config.job(), data)
    weights = plain_weights(network)
    assert weights.keys() == full.state_dict().keys()
    for name, tensor in full.state_dict().items():
        expected = rounded_weight(tensor, 4) if name in ("3.weight", "6.weight") else tensor
        assert torch.equal(weights[name], expected), name
    for name in recipe["layers"]:
        remove_parametrizations(network.get_submodule(name), "weight", leave_parametrized=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def test_a_rounded_teacher_has_the_same_logits_when_it_is_folded():
    network = networks.deep(4).eval()
    quantize_activations(network, ("3", "6"), 4)
    image = torch.randn(6, 3, 8, 8)
    plain = networks.deep(4).eval()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(fold_batchnorm(network)(image), network(image), rtol=1e-3, atol=1e-4)
    assert (plain(image) - network(image)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--student", "tests.networks:normalised"], "is a tests.networks:deep, not a tests.networks:normalised"),
        (["--classes", "3", "--sparsity", "0.5"], "--sparsity: needs a finished run of the same network on the same"),
        (["--init", "nothing"], "--init nothing: no such run folder; name where that run lies now"),
        (["--init", "unfinished"], "unfinished has no finished run"),
    ],
)
def test_an_init_that_does_not_fit_is_refused_before_any_file_is_written(trained, args, words):
    Path("unfinished").mkdir()
    with pytest.raises(UserError, match=words):
        student(trained, *args, "none", "--out", "run")
    assert not list(Path("run").glob("*"))


@pytest.mark.parametrize("args", [["--weight-bits", "3"], ["--activation-bits", "2"]])
def test_bits_that_are_not_offered_are_refused_with_those_that_are(args, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(distill_defaults, "", args)
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"'{args[1]}' for argument '{args[0]}'. Expected one of ('32', '8', '4'" in message


def test_the_student_alone_is_compressed_alike_and_the_teacher_never():
    config = parse(distill_defaults, "", ["--init", "run", *LOW])
    assert config.job().compress == config.control_job().compress == CompressConfig("run", 2, 4)
    assert config.teacher_job().compress == CompressConfig()
    asked = plan.read_command_line(["--preset", "digits", "--init", "run", *LOW])
    assert all("--weight-bits" in task.args for task in (*asked.controls(), asked.student("kd", 0)))


def test_only_flags_that_are_set_are_part_of_a_runs_identity(trained):
    data, accelerator = load_data(DataConfig(source="synthetic")), Accelerator(cpu=True)
    flags = {entry.name for entry in dataclasses.fields(CompressConfig)}
    job = parse(distill_defaults, "", []).job()
    assert not flags & run_identity(job, data, accelerator).keys()
    job = parse(distill_defaults, "", ["--init", trained, *LOW]).job()
    identity = run_identity(job, data, accelerator)
    assert {flag: identity[flag] for flag in flags & identity.keys()} == {
        "init": kd.runs.load.load_network(Path(trained), trust_code=True).weights_sha256,
        "weight_bits": 2,
        "activation_bits": 4,
    }


def test_the_report_never_averages_or_compares_a_compressed_student_with_a_plain_one():
    for seed in (0, 1):
        for role in ("none", "kd"):
            fake_run(f"runs/{role}-{seed}", role, seed)
            low = fake_run(f"runs/low-{role}-{seed}", role, seed)
            record = json.loads((low / "config.json").read_text())
            record["identity"] |= {"weight_bits": 2, "init": "a" * 64}
            write_json(low / "config.json", record)
    runs, others = collect_runs(["runs"])
    assert (len(runs), others) == (8, [])
    (groups,) = by_data(runs).values()
    assert [len(group.runs) for group in groups] == [2] * 4
    for group in (group for group in groups if group.distilled):
        assert [control.flags.get("weight_bits") for control in group.controls] == [group.flags.get("weight_bits")]
    assert sum("weight bits 2" in group.label for group in groups) == 2
    costs = Costs(Path("costs.json"), trust_code=True, measure_again=True)
    assert all(costs.of(group.runs[0]) for group in groups)
    assert len(json.loads(Path("costs.json").read_text())["networks"]) == 2


def test_soft_cross_entropy_agrees_with_a_naive_loop():
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    total = 0.0
    for z_s, z_t in zip(student, teacher):
        total -= sum(z_t.softmax(0)[k].item() * z_s.log_softmax(0)[k].item() for k in range(7))
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(total / 5, rel=1e-9)


def test_schemes_b_and_c_are_kd_with_these_flags():
    """What kd/losses/apprentice.py and docs/compress.md say: the paper's two terms for the student, a half each."""
    distiller, teacher = build("kd", alpha=0.5, temperature=1.0)
    batch, student = batch_of(torch.arange(12)), distiller.student
    sum(terms_of(distiller, teacher, batch).values()).backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    logits = student(batch.image)
    soft = soft_cross_entropy(logits, teacher(batch.image).logits)
    (0.5 * F.cross_entropy(logits, batch.label) + 0.5 * soft).backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in student.parameters()])
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


def test_the_documented_commands_for_every_scheme_parse():
    lines = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8").splitlines()
    schemes = [line.split("#")[0].split()[3:] for line in lines if line.rpartition("# ")[2].startswith("scheme ")]
    configs = [parse(distill_defaults, "", args) for args in schemes]
    assert [config.job().method_name for config in configs] == ["apprentice", "kd", "kd"]
    assert [(config.method.alpha, config.method.temperature) for config in configs[1:]] == [(0.5, 1.0)] * 2
    assert [config.compress.init for config in configs] == [None, None, "RUN"]
    assert all(config.compress.weight_bits == 2 for config in configs)


def test_the_teacher_of_scheme_a_learns_from_the_labels_alone():
    distiller, _ = build("apprentice", alpha=0.0)
    terms = distiller(batch_of(torch.arange(12)), None)[1]
    sum(terms.values()).backward()
    assert not any(parameter.grad.any() for parameter in distiller.loss.teacher.parameters())
    assert all(parameter.grad.any() for name, parameter in distiller.student.named_parameters() if "weight" in name)
    with torch.no_grad():
        logits = distiller.loss.teacher(batch_of(torch.arange(12)).image)
        wanted = 0.5 * soft_cross_entropy(distiller.student(batch_of(torch.arange(12)).image), logits)
    torch.testing.assert_close(terms["soft"], wanted)
    assert isinstance(distiller.loss(Outputs(logits), None, batch_of(torch.arange(12))), dict)


def test_the_partner_is_in_the_checkpoint_and_not_in_what_is_exported():
    distil(*DEEP, *FEW, "apprentice", "--partner", "tests.networks:normalised", "--weight-bits", "4", "--out", "run")
    network = kd.load("run", trust_code=True)
    assert isinstance(network[6], nn.Conv2d)
    assert json.loads(Path("run/summary.json").read_text())["params"] == sum(p.numel() for p in network.parameters())
    (checkpoint, *_) = sorted(Path("run/checkpoint").glob("step-*/model.safetensors"))
    assert sum(name.startswith("loss.teacher.") for name in load_file(checkpoint)) > 5


@pytest.mark.slow
def test_two_processes_have_the_same_zeros_and_levels():
    few = ["--data", "synthetic", "--batch-size", "50", "--epochs", "1", "--log-every", "3"]
    cpu = {"ACCELERATE_USE_CPU": "true"}
    first = script("train_teacher.py", *TEACHER, "--model", "tests.networks:deep", "--out", "first")
    assert first.returncode == 0, first.stderr
    args = [*few, "--model", "tests.networks:deep", "--init", "first", "--sparsity", "0.5", "--weight-bits", "4"]
    done = script("train_teacher.py", *args, "--out", "run", env=cpu, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    network = kd.load("run", trust_code=True)
    weights = [network[index].weight for index in (3, 6)]
    assert sum((weight == 0).sum() for weight in weights) >= 576
    assert max(len(row.unique()) for weight in weights for row in weight) <= 15
