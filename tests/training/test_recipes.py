"""Optimizers, groups of parameters, averages, accumulation, schedules and --steps, on trainings of milliseconds."""

import itertools
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import kd
from kd.config import DataConfig, FitConfig, NoneConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, settle, train_defaults
from kd.config.flags import TIMM_OPTIMIZERS, TORCH_OPTIMIZERS
from kd.data import load_data
from kd.errors import UserError
from kd.losses import CrossEntropy, Distiller
from kd.models import build_model
from kd.runs import checkpoint
from kd.teachers.load import TeacherNetwork
from kd.training import meter, optimizers, trainer
from kd.training.average import Average, too_long, weights_in
from kd.training.optimizers import check_optimizer
from kd.training.schedule import lr_at
from kd.training.setup import build_distiller, settle_by_data
from tests.conftest import ROOT
from tests.pairs import batch_of
from tests.run_scripts import TEACHER, differences, distil, metrics_of, newest_checkpoint, script, teach, torchrun
from tests.training.recipes import Killed, differ_when_killed, fit_of, last_checkpoint, lines_of, train

CPU = {"ACCELERATE_USE_CPU": "true"}


# --- optimizers


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_row_1_each_optimizer_resumes_to_the_same_bytes(name):
    fit = fit_of(optimizer=name, decay_norm_and_bias=False, weight_decay=0.05)
    assert differ_when_killed(fit, "perceptron" if name == "muon" else "normalised") == []


@pytest.mark.parametrize("name", [*TIMM_OPTIMIZERS, "timm/adan", "timm/muon", "timm/sgdw"])
def test_row_1_each_optimizer_of_timm_resumes_to_the_same_bytes(name):
    pytest.importorskip("timm")
    optimizers.check_optimizer(fit_of(optimizer=name))
    assert differ_when_killed(fit_of(optimizer=name, decay_norm_and_bias=False)) == []


@pytest.mark.parametrize("forgotten", ["state", "groups", "ema"])
def test_the_oracle_sees_what_a_checkpoint_forgets(monkeypatch, forgotten):
    real = checkpoint.restore

    def forgetful(folder, module, optimizer):
        state, others = real(folder, module, optimizer)
        if forgotten == "state":
            optimizer.state.clear()
        elif forgotten == "groups":
            optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        else:
            others["ema"] = others["best"]
        return state, others

    monkeypatch.setattr(checkpoint, "restore", forgetful)
    assert differ_when_killed(fit_of(optimizer="adamw", ema=0.9)) != []


OWN = [
    *((name, {}) for name in TORCH_OPTIMIZERS if name != "muon"),
    ("sgd", {"momentum": 0.5, "nesterov": True}),
    ("adamw", {"betas": (0.5, 0.7)}),
    ("adamw", {"eps": 0.1}),
    ("rmsprop", {"eps": 0.1}),
]


@pytest.mark.parametrize(("name", "flags"), OWN)
def test_an_optimizer_is_torchs_own(name, flags):
    """Its steps are those of the class, called by hand with its own defaults but for the flags given."""
    fit = fit_of(optimizer=name, weight_decay=0.01, **flags)
    options = ({"momentum": 0.9} if name == "sgd" else {}) | flags
    distiller, module = distiller_of("normalised"), distiller_of("normalised")
    ours = optimizers.make_optimizer(distiller, fit, "x", Accelerator(cpu=True))
    theirs = optimizers.TORCH[name](module.parameters(), 0.01, weight_decay=0.01, **options)
    for part, optimizer in ((distiller, ours), (module, theirs)):
        for _ in range(3):
            torch.manual_seed(0)
            sum((parameter**2).sum() for parameter in part.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, distiller.parameters(), module.parameters()))
    assert type(ours) is type(theirs)


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    distiller = distiller_of("perceptron")
    fit = fit_of(optimizer="muon", weight_decay=0.1, decay_norm_and_bias=False)
    optimizer = optimizers.make_optimizer(distiller, fit, "x", Accelerator(cpu=True))
    hidden = [distiller.student[2].weight, distiller.student[6].weight]
    assert [id(p) for group in optimizer.muon.param_groups for p in group["params"]] == [id(p) for p in hidden]
    twin = distiller_of("perceptron")
    matrices = [twin.student[2].weight, twin.student[6].weight]
    muon = torch.optim.Muon(matrices, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in twin.parameters() if all(p is not matrix for matrix in matrices)]
    flat, deep = [p for p in rest if p.ndim < 2], [p for p in rest if p.ndim > 1]
    groups = [{"params": flat, "weight_decay": 0.0}, {"params": deep, "weight_decay": 0.1}]
    adamw = torch.optim.AdamW(groups, 0.01)
    for part, steps in ((distiller, [optimizer]), (twin, [muon, adamw])):
        for _ in range(3):
            sum((parameter**2).sum() for parameter in part.parameters()).backward()
            for one in steps:
                one.step()
            part.zero_grad()
    assert all(map(torch.equal, distiller.parameters(), twin.parameters()))
    line = optimizers.describe(optimizer, fit)
    assert "Muon on 2 matrices" in line
    assert "weight decay 0.1 on 3 tensors, none on 5 biases and normalisations" in line


def test_muon_needs_a_hidden_linear_layer():
    with pytest.raises(UserError, match=r"--optimizer muon: resnet8 trains no hidden linear layer.*timm/muon"):
        optimizers.make_optimizer(
            distiller_of("normalised"), fit_of(optimizer="muon"), "resnet8", Accelerator(cpu=True)
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer", "adamv"], "--optimizer adamv: no such optimizer: did you mean adam"),
        (["--optimizer", "adamw", "--betas", "0.9"], "--betas 0.9: give two numbers"),
        (["--optimizer", "adamw", "--betas", "0.9", "1.5"], "--betas 0.9 1.5: give numbers from 0, below 1"),
        (["--betas", "0.9", "0.99"], "--betas: sgd has none"),
        (["--optimizer", "lion", "--eps", "1e-6"], "--eps: lion has none"),
        (["--layer-decay", "2"], "--layer-decay 2.0: give a number above 0, up to 1"),
        (["--ema", "1"], "--ema 1.0: give a number between 0 and 1"),
        (["--accumulate", "0"], "--accumulate 0: give 1 or more"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--min-lr", "1"], "--min-lr 1.0: give 0 or more, at most the peak, 0.05"),
        (["--min-lr", "0.01", "--schedule", "constant"], "--min-lr: --schedule constant never falls"),
        (["--warmup-start", "0.01"], "--warmup-start: needs --warmup-epochs"),
        (["--lr-per-256", "-1"], "--lr-per-256 -1.0: give a number above 0"),
    ],
)
def test_row_44_wrong_values_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        teach(*flags)


def test_lion_and_lamb_are_timms(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="--optimizer lion: needs timm: pip install timm"):
        optimizers.check_optimizer(fit_of(optimizer="lion"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/adahessian", "needs second derivatives"),
        ("timm/lyon", "did you mean lion"),
        ("timm/bnbadam", "timm cannot make it"),
        ("timm/kron", "keeps what no checkpoint here can hold|timm cannot make it"),  # the latter from our own warnings
        ("timm/adafactorbv", "keeps what no checkpoint here can hold"),  # a mean in bfloat16
    ],
)
def test_what_timm_cannot_make_or_no_checkpoint_holds_is_refused(name, words):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=f"--optimizer {name}: .*({words})"):
        optimizers.check_optimizer(fit_of(optimizer=name))


@pytest.mark.parametrize("flags", [["--optimizer", "muon"], ["--layer-decay", "0.7"]])
def test_what_a_student_cannot_take_is_said_before_its_teacher_is_trained(flags):
    with pytest.raises(UserError, match=r"tests.networks:normalised(.s layers is not known| trains no hidden)"):
        distil(*flags)
    assert not Path("runs").exists()


# --- groups of parameters


def distiller_of(model: str, seed: int = 0) -> Distiller:
    torch.manual_seed(seed)
    name = model if "/" in model or model.startswith("resnet") else f"tests.networks:{model}"
    network = build_model(name, 10, (32, 32))
    return Distiller(network, CrossEntropy(NoneConfig(), kd.types.Pair(kd.types.Outputs(torch.zeros(2, 10)), None)))


def test_by_default_one_group_decays_everything():
    groups = optimizers.group_parameters(distiller_of("resnet8"), fit_of(), "resnet8")
    assert len(groups) == 1
    optimizer = optimizers.build(fit_of(weight_decay=0.1), groups, {})
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizers.describe(optimizer, fit_of()) is None


def test_biases_and_normalisation_are_spared():
    distiller = distiller_of("resnet8")
    fit = fit_of(optimizer="adamw", weight_decay=0.05, decay_norm_and_bias=False)
    optimizer = optimizers.make_optimizer(distiller, fit, "resnet8", Accelerator(cpu=True))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    wanted = {id(module.weight) for module in distiller.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert decayed == wanted
    free = sum(1 for p in distiller.parameters()) - len(decayed)
    line = optimizers.describe(optimizer, fit)
    assert f"weight decay 0.05 on {len(decayed)} tensors, none on {free} biases and normalisations" in line


def test_frozen_parameters_are_left_out():
    distiller = distiller_of("resnet8")
    distiller.student.conv1.requires_grad_(False)
    optimizer = optimizers.make_optimizer(distiller, fit_of(), "resnet8", Accelerator(cpu=True))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(distiller.student.conv1.weight) not in trained


def test_layer_decay_by_the_stages_of_kds_networks():
    scales = optimizers.layer_scales(build_model("resnet8", 10, (32, 32)), 0.5, "resnet8")
    assert scales["fc.weight"] == 1
    assert scales["conv1.weight"] == min(scales.values()) < scales["layer3.0.conv1.weight"] == 0.5
    names = list(scales)
    assert [scales[name] for name in names] == sorted(scales.values()), "rises with depth"
    with pytest.raises(UserError, match="--layer-decay: the order of mine's layers is not known"):
        optimizers.layer_scales(build_model("tests.networks:plain", 10, (32, 32)), 0.5, "mine")


def two_heads(model: str) -> Distiller:
    job = parse(distill_defaults, "", ["--student", model, "deit"]).job()
    data = load_data(DataConfig("synthetic"))
    teacher = TeacherNetwork(build_model("resnet8", 10, data.size), Path("x"), "y", {"model": "resnet8"}, 10)
    return build_distiller(job, data, teacher)


def test_a_students_layers_keep_their_scale_behind_a_second_head():
    plain, wrapped = distiller_of("resnet8"), two_heads("resnet8")
    assert wrapped.bare == "student.student"
    found = []
    for distiller in (plain, wrapped):
        groups = optimizers.group_parameters(distiller, fit_of(layer_decay=0.5), "resnet8")
        scales = {id(part): kind.lr_scale for kind, parts in groups.items() for part in parts}
        named = distiller.get_submodule(distiller.bare).named_parameters()
        found.append({name: scales[id(part)] for name, part in named})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 4


def test_what_timm_does_not_decay_is_spared_behind_a_second_head():
    pytest.importorskip("timm")
    distiller = two_heads("timm/vit_tiny_patch16_224")
    assert distiller.bare == "student.student"
    spared = optimizers.without_decay(distiller)
    assert {"student.student.pos_embed", "student.student.cls_token"} <= spared
    assert "student.distillation_head.weight" not in spared


def test_muon_of_an_embedder_and_of_compressed_weights():
    """A network without a classifier has none to spare, and a quantised weight has another name."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6))
    assert optimizers.muon_names(network, "muon", headless=False) == {"0.weight"}
    assert optimizers.muon_names(network, "muon", headless=True) == {"0.weight", "2.weight", "4.weight"}
    torch.nn.utils.parametrize.register_parametrization(network[0], "weight", nn.Identity())
    assert optimizers.muon_names(network, "muon", headless=False) == {"0.parametrizations.weight.original"}


def test_layer_decay_and_no_decay_are_timms_own():
    pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    name = "timm/vit_tiny_patch16_224"
    distiller = distiller_of(name)
    student = distiller.student
    fit = fit_of(optimizer="adamw", weight_decay=0.05, decay_norm_and_bias=False, layer_decay=0.75)
    optimizer = optimizers.make_optimizer(distiller, fit, name, Accelerator(cpu=True))
    settings = lambda groups: {  # noqa: E731
        id(p): (group["weight_decay"], group.get("lr_scale", 1.0)) for group in groups for p in group["params"]
    }
    theirs = param_groups_layer_decay(student, 0.05, student.no_weight_decay(), layer_decay=0.75)
    ours, wanted = settings(optimizer.param_groups), settings(theirs)
    assert ours.keys() == wanted.keys()
    assert all(ours[key] == pytest.approx(wanted[key]) for key in ours)
    assert "in the first of 14 layers" in optimizers.describe(optimizer, fit)


def test_the_learning_rate_follows_the_scale(monkeypatch):
    rates, real = [], trainer.Trainer.record

    def record(self, *args):
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        real(self, *args)

    monkeypatch.setattr(trainer.Trainer, "record", record)
    monkeypatch.setattr(optimizers, "STAGES", {"tests.networks:normalised": ("0", "1")})
    assert differ_when_killed(fit_of(layer_decay=0.5, schedule="constant")) == []
    assert all(step == pytest.approx([0.0025, 0.005, 0.01]) for step in rates)


# --- averages


def test_the_average_is_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    network = build_model("tests.networks:normalised", 10, (16, 16)).train()
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = Average(network, 0.9)
    for step in range(4):
        network(torch.randn(8, 3, 16, 16))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        theirs.update_parameters(network)
    wanted = theirs.module.state_dict()
    floats = [name for name, tensor in wanted.items() if tensor.is_floating_point()]
    assert any("running_var" in name for name in floats)
    assert all(torch.equal(ours.weights[name], wanted[name]) for name in floats)
    assert not torch.equal(ours.weights["1.running_mean"], network[1].running_mean), "and it is no copy"


def test_tables_of_integers_are_copied():
    network = nn.Linear(2, 2)
    network.register_buffer("index", torch.arange(1000))
    found = Average(network, 0.999)
    for step in range(3):
        found.update(step)
    assert torch.equal(found.weights["index"], torch.arange(1000))


def test_an_average_over_most_of_the_run_is_warned_of():
    assert too_long(0.999, 4000) is None
    assert too_long(None, 1) is None
    assert (
        too_long(0.999, 500) == "--ema 0.999: averages over about 1000 steps, and the run has 500; 0.98 suits it better"
    )


def test_other_weights_are_taken_out_again():
    network = nn.Linear(2, 2)
    before = network.weight.clone()
    with pytest.raises(ZeroDivisionError), weights_in(network, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}):
        assert torch.equal(network.weight, torch.ones(2, 2))
        raise ZeroDivisionError
    assert torch.equal(network.weight, before)


def test_an_average_changes_nothing_else_and_is_scored():
    one, two = train("one", fit_of()), train("two", fit_of(ema=0.8))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    plain, averaged = lines_of("one"), lines_of("two")
    extra = {"val/top1_ema", "val/loss_ema"}
    assert [{key: line[key] for key in line.keys() - extra} for line in averaged] == plain
    assert all(line["val/loss_ema"] != line["val/loss"] for line in averaged)


def test_row_1_an_average_resumes_to_the_same_bytes():
    assert differ_when_killed(fit_of(ema=0.7, optimizer="adamw")) == []


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--out", "run", "--model", "resnet8", "--ema", "0.8", "--lr", "0.2", "--val-fraction", "0.5")
    return folder / "run"


def test_averaged_weights_are_saved_scored_and_loaded(averaged_run, capsys):
    from kd.config import DataConfig
    from kd.data import load_data
    from kd.runs.table import show_results
    from kd.training.evaluate import predict_logits, test_scores

    summary = json.loads((averaged_run / "summary.json").read_text())
    data = load_data(DataConfig(source="synthetic", val_fraction=0.5))
    network = kd.load(averaged_run, weights="ema")
    scores = test_scores(predict_logits(network, data.test, data, Accelerator(cpu=True), 50), data.test.labels)
    for key in ("test_top1", "test_top5", "test_nll", "test_ece"):
        assert summary[f"{key}_ema"] == pytest.approx(scores[key], rel=1e-5)
    assert summary["test_nll_ema"] != summary["test_nll"]
    assert summary["val_top1_ema"] == metrics_of(averaged_run)[-1]["val/top1_ema"]
    last = kd.load(averaged_run)
    assert not torch.equal(last.fc.weight, network.fc.weight)
    assert kd.load(averaged_run, weights="best").fc.weight.shape == last.fc.weight.shape
    show_results(averaged_run)
    assert "test@ema" in capsys.readouterr().out


def test_weights_that_a_run_lacks_are_named(averaged_run, tmp_path):
    with pytest.raises(UserError, match="weights 'emo': did you mean ema"):
        kd.load(averaged_run, weights="emo")
    spoilt = tmp_path / "copy"
    shutil.copytree(averaged_run, spoilt)
    content = bytearray((spoilt / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (spoilt / "ema.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"ema.safetensors changed since its run wrote it"):
        kd.load(spoilt, weights="ema")
    (spoilt / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema.safetensors is not there: only a run with --ema has one"):
        kd.load(spoilt, weights="ema")


def test_averaged_weights_are_exported_with_their_scores(averaged_run):
    from kd.export.__main__ import main

    main([str(averaged_run), "--formats", "safetensors", "--weights", "ema"])
    exported = averaged_run / "export"
    assert (exported / "model.safetensors").read_bytes() == (averaged_run / "ema.safetensors").read_bytes()
    whole, summary = (json.loads((folder / "summary.json").read_text()) for folder in (averaged_run, exported))
    assert (summary["test_top1"], summary["weights"]) == (whole["test_top1_ema"], "ema")
    rows = json.loads((exported / "export.json").read_text())["rows"]
    assert rows[0]["top1"] == pytest.approx(whole["test_top1_ema"])
    assert torch.equal(kd.load(exported).fc.weight, kd.load(averaged_run, weights="ema").fc.weight)
    assert "Averaged weights (--ema)" in (exported / "README.md").read_text()


def test_the_report_has_a_column_for_averages(averaged_run):
    from kd.report.groups import group_runs
    from kd.report.tables import accuracy_table, run_table
    from kd.runs.results import collect_runs

    groups = group_runs(collect_runs([str(averaged_run)])[0], {})
    for table in (accuracy_table(groups), run_table(groups)):
        assert "test@ema" in table.markdown()


# --- the clock


class Watch:
    """Time that passes only when a test says so."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now, self.patch = 1000.0, patch

    def monotonic(self) -> float:
        return self.now

    def takes(self, seconds: float, owner: object, name: str) -> None:
        """Let each call of the owner's function take so long."""
        real = getattr(owner, name)

        def call(*args, **options):
            self.now += seconds
            return real(*args, **options)

        self.patch.setattr(owner, name, call)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """The trainer's clock and its meter's: 2 seconds for a step of 50 images, 30 for a validation."""
    watch = Watch(monkeypatch)
    watch.takes(2, trainer.Trainer, "record")
    watch.takes(30, trainer.Trainer, "_validate")
    for module in (trainer, meter):
        monkeypatch.setattr(module, "time", watch)
    monkeypatch.setattr(meter, "SETTLING", 2)
    return watch


def state_of(folder: str) -> dict:
    return json.loads((newest_checkpoint(Path(folder)) / "state.json").read_text())["state"]


def test_the_seconds_of_a_run_are_those_of_all_its_processes_and_none_between(watch):
    train("whole", fit_of())
    assert state_of("whole")["seconds"] == 8 * 2 + 2 * 30
    with pytest.raises(Killed):
        train("run", fit_of(), kill=7)
    assert state_of("run")["seconds"] == 6 * 2 + 30
    watch.now += 1000
    train("run", fit_of())
    assert state_of("run")["seconds"] == 8 * 2 + 2 * 30


def test_images_per_second_are_those_of_steps_without_validating_and_saving(watch):
    watch.takes(70, checkpoint, "snapshot")
    train("whole", fit_of())
    speeds = [json.loads(line)["images_per_second"] for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert speeds == [25, 25]
    assert state_of("whole")["timing"] == {"images": 2 * 50 + 3 * 50, "seconds": 2 * 2 + 3 * 2}, "as from the third on"
    with pytest.raises(Killed):
        train("run", fit_of(), kill=7)
    watch.now += 1000
    assert state_of("run")["timing"] == {"images": 2 * 50, "seconds": 2 * 2}, "of the third step and the sixth"
    train("run", fit_of(epochs=3))
    assert state_of("run")["timing"] == {"images": 5 * 50, "seconds": 5 * 2}


# --- gradients


@pytest.mark.parametrize("clip", [None, 0.05, 1000.0])
def test_a_gradient_longer_than_clip_norm_is_shortened_to_it(monkeypatch, clip):
    """Plain SGD moves the weights by the learning rate times the gradient."""
    lengths, moves, real = [], [], trainer.Trainer.update

    def update(self):
        parameters = list(self.distiller.parameters())
        flat = lambda tensors: torch.cat([tensor.detach().flatten() for tensor in tensors]).double()  # noqa: E731
        before, gradient = flat(parameters), flat(parameter.grad for parameter in parameters)
        real(self)
        lengths.append(gradient.norm().item())
        moves.append((flat(parameters) - before).norm().item())

    monkeypatch.setattr(trainer.Trainer, "update", update)
    train("run", fit_of(lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.0, clip_norm=clip, epochs=1))
    assert min(lengths) > 0.05
    assert moves == pytest.approx([0.1 * min(length, clip or length) for length in lengths], rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_computes_in_the_precision_that_was_asked_for(monkeypatch, precision, dtype):
    found, real = [], trainer.Trainer.step

    def note(module, inputs, output):
        found.append((output.dtype, module.weight.dtype))

    def step(self, batch):
        handle = self.distiller.student[0].register_forward_hook(note)
        real(self, batch)
        handle.remove()

    monkeypatch.setattr(trainer.Trainer, "step", step)
    teach("--out", "run", "--steps", "2", "--mixed-precision", precision)
    assert found == [(dtype, torch.float32)] * 2


# --- accumulation


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("taught", [False, True])
def test_accumulated_gradients_are_the_whole_batchs(parts, taught):
    """50 images in parts of unequal size; clipped, so that the norm is the whole gradient's too."""
    flags = {"clip_norm": 0.1, "optimizer": "sgd", "lr": 0.1}
    whole = train("whole", fit_of(**flags), "plain", taught=taught)
    cut = train("cut", fit_of(**flags, accumulate=parts), "plain", taught=taught)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    for line, other in zip(lines_of("whole"), lines_of("cut"), strict=True):
        line["train/gradient_ratio"] = other["train/gradient_ratio"] = 0  # measured on one part
        assert line == pytest.approx(other, rel=1e-4)


def test_a_batch_is_cut_into_parts_in_order():
    batch = batch_of(torch.arange(10))
    mixed = batch._replace(mix=kd.types.Mix(batch.label.flip(0), torch.rand(10)), strong=torch.rand(10, 3, 4, 4))
    parts = trainer.split(mixed, 3)
    assert [len(part.label) for part in parts] == [4, 3, 3]
    for field in ("image", "label", "index", "strong"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(mixed, field))
    for field in ("label", "weight"):
        assert torch.equal(torch.cat([getattr(part.mix, field) for part in parts]), getattr(mixed.mix, field))
    for part in parts:
        assert (part.view, part.epoch, part.step) == (mixed.view, mixed.epoch, mixed.step)
    assert [(part.mix, part.strong) for part in trainer.split(batch, 3)] == [(None, None)] * 3
    assert trainer.split(batch, 1)[0] is batch
    assert len(trainer.split(batch, 99)) == 10


def test_row_1_accumulation_resumes_to_the_same_bytes():
    assert differ_when_killed(fit_of(accumulate=3, ema=0.9, optimizer="adamw"), taught=True) == []


@pytest.mark.slow
def test_row_1_kill_9_in_mid_epoch_with_adamw_average_and_accumulation():
    args = [*TEACHER, "--save-every", "5", "--threads", "1", "--optimizer", "adamw", "--lr", "0.002"]
    args += ["--ema", "0.9", "--accumulate", "3", "--no-decay-norm-and-bias"]
    whole = script("train_teacher.py", *args, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    killed = script("tests/faults.py", "kill:29", str(ROOT / "train_teacher.py"), *args, "--out", "run")
    assert killed.returncode == -signal.SIGKILL
    saved = newest_checkpoint(Path("run")).name
    assert saved in ("step-20", "step-25"), "the thread that writes may be killed too"
    resumed = script("train_teacher.py", *args, "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.slow
def test_row_25_row_46_two_processes_accumulate_and_average_as_one_does():
    args = [*TEACHER, "--model", "tests.networks:plain", "--val-fraction", "0.101", "--batch-size", "58"]
    args += ["--optimizer", "adamw", "--lr", "0.002", "--ema", "0.9", "--accumulate", "3", "--steps", "20"]
    args += ["--eps", "1e-4", "--clip-norm", "1"]  # an eps that small gradients do not reach, whose signs are rounding
    two = script("train_teacher.py", *args, "--out", "two", env=CPU, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    one = script("train_teacher.py", *args, "--out", "one")
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    tensors = [checkpoint.read_tensors(newest_checkpoint(Path(name)) / "ema.safetensors") for name in ("one", "two")]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_needs_a_network_that_offers_it():
    with pytest.raises(UserError, match=r"--gradient-checkpointing: tests.networks:normalised does not offer it"):
        teach("--gradient-checkpointing")


@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing"]])
def test_gradient_checkpointing_is_on_if_asked_for(monkeypatch, flags):
    """Of a network that offers it by timm's name."""
    asked = []
    offer = lambda network, enable: asked.append(enable)  # noqa: E731
    monkeypatch.setattr(nn.Sequential, "set_grad_checkpointing", offer, raising=False)
    teach("--out", "run", "--steps", "1", *flags)
    assert asked == [True] * len(flags)


@pytest.mark.timm
def test_gradient_checkpointing_runs_each_block_once_more_a_step(monkeypatch):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Block

    calls, real = [], Block.forward

    def forward(self, *args, **options):
        calls.append(self)
        return real(self, *args, **options)

    monkeypatch.setattr(Block, "forward", forward)
    found = []
    for name, flags in (("plain", []), ("twice", ["--gradient-checkpointing"])):
        calls.clear()
        teach("--out", name, "--model", "tests.networks:timm_vit", "--steps", "2", *flags)
        found.append(len(calls))
    assert found[1] - found[0] == 4 * 2, "four blocks, two steps"


def test_gradient_checkpointing_computes_the_same():
    pytest.importorskip("timm")
    args = ["--model", "timm/vit_tiny_patch16_224", "--epochs", "1"]
    args += ["--val-fraction", "0.9", "--optimizer", "adamw", "--ema", "0.9", "--lr", "0.0001"]
    teach("--out", "plain", *args)
    teach("--out", "twice", *args, "--gradient-checkpointing")
    ours, theirs = (checkpoint.read_tensors(Path(name, "model.safetensors")) for name in ("plain", "twice"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)


# --- schedules and length


def rates(**flags) -> list[float]:
    fit = fit_of(**{"lr": 0.1, "epochs": 10} | flags)
    return [lr_at(step, 10, fit) for step in range(fit.total_steps(10))]


def test_one_cycle_rises_and_falls_in_straight_lines():
    found = rates(schedule="one-cycle", min_lr=0.01)
    assert found[0] == pytest.approx(0.1 / 30)
    assert found[29] == found[30] == pytest.approx(0.1)
    assert found[65] == pytest.approx((0.1 + 0.01) / 2)
    falls = [one - other for one, other in itertools.pairwise(found[30:])]
    assert falls == pytest.approx([0.09 / 70] * 69)
    assert rates(schedule="one-cycle", warmup_epochs=2.0)[20] == pytest.approx(0.1)


def test_the_end_and_the_start_of_the_rate():
    cosine = rates(min_lr=0.02, warmup_epochs=2.0, warmup_start=0.005)
    assert cosine[0] == 0.005
    assert cosine[10] == pytest.approx((0.1 + 0.005) / 2)
    assert cosine[20] == pytest.approx(0.1)
    assert 0.02 < cosine[-1] < 0.0201
    assert cosine[60] == pytest.approx(0.06)
    assert rates(schedule="step", min_lr=0.005)[-1] == 0.005


def test_the_rate_grows_with_the_batch(capsys):
    settled = settle(FitConfig(batch_size=128, lr_per_256=0.1), 1000, 1)
    assert settled.lr == pytest.approx(0.05)
    teach("--out", "run", "--lr-per-256", "0.256", "--epochs", "1")
    assert "lr 0.05 = 0.256 per 256 x batch 50; --lr is not used" in capsys.readouterr().out
    teach("--out", "other", "--lr", "0.05", "--epochs", "1")
    identities = [json.loads(Path(name, "config.json").read_text())["identity"] for name in ("run", "other")]
    assert identities[0] == identities[1]
    with pytest.raises(UserError, match=r"--min-lr 0.1: give 0 or more, at most the peak, 0.05"):
        teach("--lr-per-256", "0.256", "--min-lr", "0.1")


@pytest.mark.parametrize("preset", ["crd", "own"])  # the networks decide on the rate, or the data
def test_the_rate_per_256_stands_in_place_of_what_a_preset_leaves_open(preset):
    config = parse(train_defaults, "", ["--preset", preset, "--data", "synthetic", "--lr-per-256", "0.256"])
    settled = settle_by_data(config, load_data(config.data), Accelerator(cpu=True))
    batch = {"crd": 64, "own": 32}[preset]
    assert settled.job().fit.lr == pytest.approx(0.001 * batch)


def test_flags_that_the_length_of_the_run_makes_void_are_named(capsys):
    with pytest.raises(UserError, match=r"--mix-off-epochs 3: give fewer than the 1 of --epochs"):
        teach("--steps", "9", "--epochs", "5", "--mixup", "1", "--mix-off-epochs", "3")
    teach("--out", "run", "--epochs", "1", "--warmup-epochs", "4", "--freeze", "0", "--freeze-epochs", "2")
    said = capsys.readouterr().out
    assert "--warmup-epochs 4: the run has 1, so that the learning rate ends at 0.25 of its peak" in said
    assert "stay as they are for the first 2 epochs, which is the whole run" in said


@pytest.mark.parametrize("steps", [1, 4, 6, 8])
def test_a_run_of_steps_ends_in_mid_epoch(steps):
    fit = settle(fit_of(steps=steps, epochs=99), 200, 1)
    assert fit.epochs == -(-steps // 4)
    train("run", fit)
    lines = lines_of("run")
    assert [line["step"] for line in lines] == [4, steps][-fit.epochs :]
    assert all("val/top1" in line for line in lines)
    assert newest_checkpoint(Path("run")).name == f"step-{steps}"


def test_row_1_a_run_of_steps_resumes_to_the_same_bytes():
    fit = settle(fit_of(steps=9, schedule="one-cycle", min_lr=0.001), 200, 1)
    assert differ_when_killed(fit, kill=8) == []
    assert lines_of("run")[-1]["step"] == 9


def test_steps_of_a_whole_epoch_are_that_epoch():
    steps, epochs = train("one", settle(fit_of(steps=8), 200, 1)), train("two", fit_of(epochs=2))
    assert all(map(torch.equal, steps.state_dict().values(), epochs.state_dict().values()))
    assert last_checkpoint("one") == last_checkpoint("two")


def test_the_scripts_take_steps(capsys):
    teach("--out", "run", "--steps", "25")
    said = capsys.readouterr().out
    assert "25 steps = 1.389 epochs of 18 steps; --epochs is not used" in said
    assert "recipe report: 25 steps, batch 50" in said
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 25)
    teach("--out", "run", "--steps", "25")
    with pytest.raises(UserError, match="steps 25 there, 30 here"):
        teach("--out", "run", "--steps", "30", "--resume")


def test_checkpoints_of_impossible_steps_are_refused():
    state = checkpoint.State(step=9, history=[{}])
    with pytest.raises(UserError, match="the checkpoint says step 9 after 1 epochs"):
        checkpoint.check_position(state, 4, 9)
    checkpoint.check_position(checkpoint.State(step=9, history=[{}, {}, {}]), 4, 9)
    with pytest.raises(UserError, match="impossible"):
        checkpoint.check_position(checkpoint.State(step=9, history=[{}] * 4), 4, 9)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"epochs": 1, "warmup_epochs": 0.04}, 10),
        ({"epochs": 2, "warmup_epochs": 0.5}, 5),
        ({"epochs": 1, "schedule": "one-cycle"}, 4),
        ({"epochs": 1, "warmup_epochs": 0.07}, 100),
    ],
)
def test_no_step_of_a_warm_up_is_above_the_peak(flags, steps):
    """It may end within a step."""
    fit = FitConfig(lr=0.2, **flags)
    rates = [lr_at(step, steps, fit) for step in range(fit.total_steps(steps))]
    assert max(rates) <= 0.2
    assert max(rates) == pytest.approx(0.2, rel=0.2)


@pytest.mark.timm
@pytest.mark.parametrize("flags", [{"betas": (0.9, 0.99)}, {"eps": 1e-3}])
def test_timms_optimizers_refuse_what_they_do_not_have(flags):
    pytest.importorskip("timm")
    (name,) = flags
    with pytest.raises(UserError, match=f"--{name}: timm/sgdw has none; leave it out"):
        check_optimizer(FitConfig(lr=0.1, optimizer="timm/sgdw", **flags))
    check_optimizer(FitConfig(lr=0.1, optimizer="timm/adamw", **flags))
