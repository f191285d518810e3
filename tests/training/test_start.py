"""What a network starts from, and what of it stays as it is."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import kd
from kd.compress.prune import resize
from kd.config import DataConfig, Job
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.models import build_model
from kd.models.features import Tap
from kd.models.pretrained import Flags
from kd.runs.folder import run_identity
from kd.teachers.live import live_logits
from kd.teachers.load import TeacherNetwork, load_teacher
from kd.training.evaluate import predict_logits
from kd.training.setup import build_distiller, build_network
from kd.training.start import check_start, start_from
from tests import networks
from tests.conftest import ROOT
from tests.losses.test_methods import quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.pairs import batch_of, build
from tests.run_scripts import (
    SMALL,
    differences,
    distil,
    metrics_of,
    newest_checkpoint,
    script,
    teach,
    torchrun,
)
from tests.training.test_resume import differs_when_killed

DEEP = "tests.networks:deep"
EXPECTS = {"image_size": [24, 20], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
LAYERS = ("0", "1", "3", "4")  # of `deep`: two convolutions with their BatchNorm
CPU = torch.device("cpu")


@pytest.fixture
def data():
    return load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))


@pytest.fixture
def six():
    return load_data(DataConfig(source="synthetic", classes=6, val_fraction=0.8))


def job_of(*args: str, model: str = DEEP) -> Job:
    return parse(train_defaults, "", ["--data", "synthetic", "--model", model, *args]).job()


def started(job: Job, data):
    """The job's network before its first step, and the data as it sees them."""
    job, data = start_from(job, data)
    return build_network(job, data).module, data, job


def file_of(path: str, network: torch.nn.Module, **expects) -> str:
    torch.save(network.state_dict(), path)
    Path(path).with_suffix(".json").write_text(json.dumps({**EXPECTS, **expects}))
    return path


def same(one: dict, other: dict) -> set[str]:
    return {name for name in one if one[name].shape == other[name].shape and torch.equal(one[name], other[name])}


# A run


def test_a_run_on_the_same_classes_starts_as_it_always_did(trained, data, capsys):
    job = job_of("--init", trained)
    assert start_from(job, data) == (job, data)
    network, _, _ = started(job, data)
    weights = load_file(Path(trained, "model.safetensors"))
    assert same(weights, network.state_dict()) == weights.keys()
    assert "last layer" not in capsys.readouterr().out


def test_a_run_on_other_classes_gets_a_new_last_layer(trained, six, capsys):
    job = job_of("--init", trained)
    assert start_from(job, six) == (job, six), "its network sees the data as any network does"
    network, _, _ = started(job, six)
    weights, fresh = load_file(Path(trained, "model.safetensors")), build_network(job_of(), six).module.state_dict()
    assert weights.keys() - same(weights, network.state_dict()) == {"11.weight", "11.bias"}
    assert {"11.weight", "11.bias"} <= same(fresh, network.state_dict())
    lines = [line for line in capsys.readouterr().out.splitlines() if "last layer" in line]
    assert lines == [f"--init {trained}: a new last layer 11 for 6 classes, in place of the 4 that its weights know"]


def test_classes_in_another_order_are_other_classes(trained, data):
    turned = dataclasses.replace(data, classes=tuple(reversed(data.classes)))
    network, _, _ = started(job_of("--init", trained), turned)
    weights = load_file(Path(trained, "model.safetensors"))
    assert weights.keys() - same(weights, network.state_dict()) == {"11.weight", "11.bias"}


def test_a_pruned_run_keeps_its_shapes_under_a_new_last_layer(trained, six):
    shutil.copytree(trained, "pruned")
    shapes = {"6": [8, 5, 1], "7": [5], "11": [20, 4]}
    pruned = networks.deep(4)
    resize(pruned, shapes)
    torch.nn.init.normal_(pruned[6].weight)
    save_file(pruned.state_dict(), "pruned/model.safetensors")
    for name, change in (("model", {"compression": {"shapes": shapes}}), ("summary", {"weights_sha256": None})):
        path = Path("pruned", f"{name}.json")
        content = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    network, _, _ = started(job_of("--init", "pruned"), six)
    assert torch.equal(network[6].weight, pruned[6].weight)
    assert network[11].weight.shape == (6, 20)
    assert network[11].weight.abs().max() > 0
    path = Path("pruned/model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resized": [24, 24]}))
    assert started(job_of("--init", "pruned"), six)[2].resized == (24, 24), "one that resizes inside goes on to"


def test_a_run_from_the_hub(trained, six, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: trained)
    network, _, _ = started(job_of("--init", "someone/net"), six)
    assert torch.equal(network[0].weight, load_file(Path(trained, "model.safetensors"))["0.weight"])
    identity = run_identity(job_of("--init", "someone/net"), six, Accelerator(cpu=True))
    assert identity["init"] == json.loads(Path(trained, "summary.json").read_text())["weights_sha256"]


# Weights from elsewhere


def test_a_file_keeps_its_normalisation_and_the_datas_size(data, capsys):
    network = networks.deep(7)
    file_of("big.pth", network)
    own, seen, job = started(job_of("--init", "big.pth"), data)
    assert (list(seen.mean), list(seen.std)) == (EXPECTS["mean"], EXPECTS["std"])
    assert seen.fingerprint == data.fingerprint
    assert (job.origin.image_size, job.resized) == (data.size, data.size)
    assert network.state_dict().keys() - same(network.state_dict(), own.state_dict()) == {"11.weight", "11.bias"}
    printed = capsys.readouterr().out
    assert "images at 16 x 16 pixels; normalised as they expect (mean 0.5/0.4/0.3, std 0.2/0.25/0.3)" in printed
    assert "trained at 20 x 24" in printed
    changed = start_from(job_of("--init", file_of("big.pth", network, std=[0.3] * 3)), data)[0]
    identities = [run_identity(one, data, Accelerator(cpu=True)) for one in (job, changed)]
    assert {key for key in identities[0] if identities[0][key] != identities[1][key]} == {"init"}


def test_named_classes_in_the_same_order_keep_the_last_layer(data):
    network = networks.deep(4)
    own, _, _ = started(job_of("--init", file_of("big.pth", network, classes=list(data.classes))), data)
    assert same(network.state_dict(), own.state_dict()) == network.state_dict().keys()


def test_a_network_of_one_size_sees_the_images_at_that_size(data):
    torch.manual_seed(0)
    file_of("vit.pth", networks.vit(7), image_size=[8, 8])
    teach("--model", "tests.networks:vit", "--classes", "4", "--val-fraction", "0.8", "--init", "vit.pth", *OUT)
    info = json.loads(Path("run/model.json").read_text())
    assert (info["image_size"], info["resized"]) == ([16, 16], [8, 8])
    assert (info["mean"], info["std"]) == (EXPECTS["mean"], EXPECTS["std"])
    seen = dataclasses.replace(data, mean=tuple(info["mean"]), std=tuple(info["std"]))
    network = kd.load("run", trust_code=True)
    logits = predict_logits(network, data.test, seen, Accelerator(cpu=True), 40)
    torch.testing.assert_close(logits, load_file("run/test_logits.safetensors")["logits"], rtol=1e-4, atol=1e-4)
    # As a start again it keeps its size and normalisation, and as a teacher it renormalises.
    job, again = start_from(job_of("--init", "run", model="tests.networks:vit"), data)
    assert (job.origin.image_size, again.mean) == ((8, 8), tuple(EXPECTS["mean"]))
    teacher = load_teacher(Path("run"), data, CPU, True)
    images = torch.rand(12, 3, 16, 16)
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    own_mean, own_std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    found = teacher.network((images - mean) / std)
    torch.testing.assert_close(found, network((images - own_mean) / own_std), rtol=1e-3, atol=1e-4)


OUT = ["--epochs", "1", "--out", "run"]


def test_a_student_from_a_file_under_the_recipes_own_teacher():
    file_of("six.pth", networks.deep(6))
    flags = ["--student", DEEP, "--init", "six.pth", "--teacher-model", DEEP, "--teacher-init", "six.pth", "--control"]
    distil(*flags, "--epochs", "1", "--out", "run")
    summary = json.loads(Path("run/summary.json").read_text())
    teacher = json.loads(Path(summary["teacher"], "summary.json").read_text())
    assert teacher["init"] == summary["init"] == "six.pth"
    assert summary["teacher_test_top1"] == pytest.approx(teacher["test_top1"], abs=0.5), "each sees its own data"
    for folder in ("run", summary["teacher"], summary["control"]):
        assert json.loads(Path(folder, "model.json").read_text())["mean"] == EXPECTS["mean"]
    plain = load_data(DataConfig("synthetic"))
    config = json.loads(Path("run/config.json").read_text())
    assert config["identity"]["data"] == plain.fingerprint


def test_the_published_weights_of_the_network_itself(monkeypatch, data, tmp_path):
    from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch/hub/checkpoints" / Path(ShuffleNet_V2_X0_5_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    published = shufflenet_v2_x0_5().state_dict()
    torch.save(published, place)
    name = "torchvision/shufflenet_v2_x0_5"
    larger = dataclasses.replace(data, size=(64, 64))
    network, seen, job = started(job_of("--init", "pretrained", model=name), larger)
    assert published.keys() - same(published, network.state_dict()) == {"fc.weight", "fc.bias"}
    assert seen.mean == pytest.approx((0.485, 0.456, 0.406))
    assert job.origin.source == "pretrained"
    other = started(job_of("--init", name, model=name), larger)[2]
    assert other.origin.sha256 == job.origin.sha256


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (DEEP, ["--init", "pretrained"], "nobody publishes weights of tests.networks:deep; give --model torchvision"),
        ("torchvision/resnet19", ["--init", "pretrained"], "unknown model 'torchvision/resnet19'"),
        (DEEP, ["--init", "none.pth"], "--init none.pth: no such file"),
        (DEEP, ["--init", "nothing"], "--init nothing: no such run folder"),
        (DEEP, ["--init", "alone.pth"], "--init alone.pth: weights do not say .*write alone.json"),
        ("resnet8", ["--init", "deep.pth"], "--init deep.pth: its weights do not fit the network resnet8: .*--model"),
        (DEEP, ["--init", "deep.pth", "--sparsity", "0.5"], "--sparsity: needs a finished run of the same network"),
        (DEEP, ["--init", "deep.pth", "--prune", "0.5"], "--prune: needs a finished run of the same network"),
        ("torchvision/googlenet", ["--init", "pretrained"], "googlenet: rescales its images internally"),
    ],
)
def test_an_init_that_cannot_be_is_refused_before_any_data_is_read(model, args, words):
    torch.save(networks.deep(4).state_dict(), "alone.pth")
    file_of("deep.pth", networks.deep(4))
    with pytest.raises(UserError, match=words) as caught:
        check_start(job_of(*args, model=model))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=words.replace("--init", "--teacher-init").replace("--model", "--teacher-model")
    ):
        check_start(job_of(*args, model=model), Flags("--teacher-init", "--teacher-model"))


def test_row_44_an_unknown_network_is_named_before_any_data_is_read(monkeypatch):
    monkeypatch.setattr("kd.data.load_data", None)
    for train, flag in ((teach, "--model"), (distil, "--student"), (distil, "--teacher-model")):
        with pytest.raises(UserError, match=r"unknown model 'resnet9': did you mean resnet8"):
            train(flag, "resnet9")


def test_the_scripts_check_it_before_any_data_is_read(monkeypatch):
    monkeypatch.setattr("kd.data.load_data", None)
    with pytest.raises(UserError, match=r"--init none.pth: no such file"):
        teach("--init", "none.pth")
    with pytest.raises(UserError, match=r"--init none.pth: no such file"):
        distil("--init", "none.pth")
    with pytest.raises(UserError, match=r"--teacher-init none.pth: no such file"):
        distil("--teacher-init", "none.pth")


# Arguments of the constructor

DROPPED = ["--model", "tests.networks:dropped"]


def test_model_args_build_the_network_and_whatever_loads_it_again(data):
    teach(*DROPPED, "--model-args", "width=6,rate=0.25", *OUT)
    assert json.loads(Path("run/model.json").read_text())["model_args"] == "rate=0.25,width=6"
    network = kd.load("run", trust_code=True)
    assert (network[0].out_channels, network[4].p) == (6, 0.25)
    distil("--teacher", "run", "--trust-code", "--epochs", "1", "--out", "student")
    teach(*DROPPED, "--model-args", "width=6", "--init", "run", "--epochs", "1", "--out", "again")
    with pytest.raises(UserError, match=r"0.bias is .*; it was built with --model-args rate=0.25,width=6"):
        teach(*DROPPED, "--init", "run", "--epochs", "1", "--out", "other")
    path = Path("run/model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_args": 3}))
    with pytest.raises(UserError, match=r"model.json has model_args that no run writes"):
        kd.load("run", trust_code=True)


def test_only_what_is_given_is_part_of_a_runs_identity(data):
    accelerator = Accelerator(cpu=True)
    identity = lambda *args: run_identity(job_of(*args), data, accelerator)  # noqa: E731
    plain = identity()
    assert not plain.keys() & {"model_args", "freeze", "freeze_epochs", "init", "origin"}
    assert identity("--model-args", "b=1,a=2") == identity("--model-args", "a=2,b=1") != plain
    assert identity("--freeze", "0", "1") == identity("--freeze", "1", "0") != plain


def test_an_argument_that_the_network_does_not_take_is_named():
    with pytest.raises(UserError, match=r"--model-args depth: tests.networks:dropped takes no such argument"):
        teach(*DROPPED, "--model-args", "depth=3")
    with pytest.raises(UserError, match="--model-args num_classes: is not for you to give"):
        teach(*DROPPED, "--model-args", "num_classes=3")
    with pytest.raises(UserError, match="--teacher-model-args width=3: is for a file of weights or the recipe's own"):
        distil("--teacher", "torchvision/resnet18", "--teacher-model-args", "width=3")


# Frozen layers


def frozen(*args: str, out: str = "run") -> dict:
    teach("--model", DEEP, "--freeze", *LAYERS, *args, "--out", out)
    return load_file(Path(out, "model.safetensors"))


def test_frozen_layers_stay_as_they_are_with_their_statistics(capsys):
    before = build_network(job_of(), load_data(DataConfig("synthetic"))).module.state_dict()
    after = frozen("--epochs", "1")
    kept = {name for name in before if name.split(".")[0] in LAYERS}
    assert same(before, after) == kept
    assert "--freeze: 824 of 1,746 parameters stay as they are\n" in capsys.readouterr().out


def test_at_first_frozen_is_frozen_then_trained():
    constant = ["--schedule", "constant"]
    whole = frozen("--epochs", "1", *constant, out="frozen")
    later = frozen("--epochs", "2", "--freeze-epochs", "1", *constant, "--save-every", "18")
    states = {int(path.name[5:]): path for path in Path("run/checkpoint").glob("step-*")}
    optimizer = load_file(states[36] / "optimizer.safetensors")
    assert len({key.split("/")[0] for key in optimizer}) == 11, "all are trained in the end"
    assert not same({key: value for key, value in whole.items() if "tracked" not in key}, later)
    held = frozen("--epochs", "1", "--freeze-epochs", "1", *constant, out="held")
    assert same(whole, held) == whole.keys(), "an epoch held is an epoch frozen"
    ours, theirs = (
        {len(load_file(newest_checkpoint(Path(out)) / "optimizer.safetensors"))} for out in ("held", "frozen")
    )
    assert ours == theirs, "nothing of the held ones is in the optimizer's state yet"


@pytest.mark.parametrize("step", [17, 18, 19])
def test_row_1_killed_around_the_end_of_the_frozen_epochs(monkeypatch, quick, step):  # noqa: F811
    flags = ["--model", DEEP, "--freeze", *LAYERS, "--freeze-epochs", "1", "--save-every", "6"]
    run = lambda *args: teach(*flags, *args)  # noqa: E731
    assert differs_when_killed(monkeypatch, run, step) == []


def test_held_layers_are_trained_alike_whether_their_gradients_are_computed_or_not():
    """Several processes compute and drop them; one process does not compute them."""
    one, teacher = build("kd")
    one.held = tuple(one.student[0].parameters())
    other = copy.deepcopy(one)
    results = []
    for distiller, with_gradients in ((one, False), (other, True)):
        optimizer = torch.optim.SGD(distiller.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for step in range(4):
            distiller.hold(step < 2, with_gradients)
            distiller.train()
            batch = batch_of(torch.arange(12))
            sum(distiller(batch, teacher(batch.image)).terms.values()).backward()
            distiller.drop_held_gradients()
            assert (distiller.student[0].weight.grad is None) == (step < 2)
            assert distiller.student[0].training == (step >= 2)
            assert len(distiller.trained_parameters()) == (4 if step < 2 else 6)
            optimizer.step()
            optimizer.zero_grad()
        results.append(distiller.state_dict())
    assert same(*results) == results[0].keys()


def test_the_layers_that_are_named_are_held(data):
    job = parse(distill_defaults, "", ["--student", DEEP, "--freeze", "3", "--freeze-epochs", "1", "none"]).job()
    distiller = build_distiller(job, data)
    assert {id(part) for part in distiller.held} == {id(part) for part in distiller.student[3].parameters()}


@pytest.mark.parametrize(("method", "held"), [("deit", {"layer1", "fc"}), ("simkd", {"layer1"})])
def test_a_method_that_wraps_the_student_still_holds_its_layers(data, method, held):
    """simkd takes the student's own classifier away, of which nothing is left to hold."""
    job = parse(
        distill_defaults, "", ["--student", "resnet8", "--freeze", "layer1", "fc", "--freeze-epochs", "1", method]
    ).job()
    network = build_model("resnet8", 10, data.size)
    distiller = build_distiller(job, data, TeacherNetwork(network, Path("x"), "y", {"model": "resnet8"}, 10))
    inner = distiller.get_submodule(distiller.bare)
    assert distiller.bare == "student.student"
    named = {id(part): name.partition(".")[0] for name, part in inner.named_parameters()}
    assert {named[id(part)] for part in distiller.held} == held


@pytest.mark.parametrize(("method", "frozen"), [("simkd", {"layer3"}), ("simkd+rkd", set())])
def test_what_no_loss_sees_is_frozen(data, method, frozen):
    """With several processes DDP would wait for its gradients; rkd sees what simkd leaves out."""
    prefix = "--simkd" if "+" in method else "-"
    layers = [f"{prefix}-student-layers", "layer2", f"{prefix}-teacher-layers", "layer3"]
    job = parse(distill_defaults, "", ["--student", "resnet8", method, *layers]).job()
    taught = TeacherNetwork(build_model("resnet20", 10, data.size), Path("x"), "y", {"model": "resnet20"}, 10)
    torch.nn.init.normal_(taught.network.fc.weight)
    taught.network.eval().requires_grad_(False)
    distiller = build_distiller(job, data, taught)
    inner = distiller.get_submodule(distiller.bare)
    assert {name.partition(".")[0] for name, part in inner.named_parameters() if not part.requires_grad} == frozen
    batch = batch_of(torch.arange(12))._replace(image=torch.randn(12, 3, *data.size))
    outputs = Tap(taught.network, distiller.loss.teacher_layers)(batch.image)
    sum(distiller.train()(batch, outputs).terms.values()).backward()
    assert all(part.grad is not None for part in distiller.parameters() if part.requires_grad)


def test_what_its_author_froze_stays_frozen(data):
    job = job_of("--freeze", "3", "--freeze-epochs", "1")
    network = build_network(job, data)
    network.module[3].weight.requires_grad_(False)
    distiller = build_distiller(job, data, network=network)
    distiller.hold(False, with_gradients=False)
    assert not distiller.student[3].weight.requires_grad


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["2"], "--freeze 2: has no weights; name another layer"),
        (["layer1"], "--freeze layer1: tests.networks:deep has no such layer; there are 0, 1, 3, 4, 6, 7, 11"),
        (["0.weigth"], "no such layer; did you mean 0.weight"),
        (["0", "1", "3", "4", "6", "7", "11"], "leaves nothing of tests.networks:deep to train"),
    ],
)
def test_layers_that_cannot_be_frozen_are_refused(layers, words, data):
    with pytest.raises(UserError, match=words):
        build_network(job_of("--freeze", *layers), data)


def test_single_parameters_can_be_frozen(data):
    network = build_network(job_of("--freeze", "0.weight", "1"), data).module
    fixed = {name for name, part in network.named_parameters() if not part.requires_grad}
    assert fixed == {"0.weight", "1.weight", "1.bias"}


@pytest.mark.slow
def test_row_3_frozen_at_first_on_two_processes():
    cpu = {"ACCELERATE_USE_CPU": "true"}
    flags = [*SMALL, "--model", "tests.networks:plain", "--freeze", "0", "--freeze-epochs", "1", "--batch-size", "58"]
    flags += ["--save-every", "5"]
    two = script("train_teacher.py", *flags, "--out", "two", env=cpu, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    one = script("train_teacher.py", *flags, "--out", "one")
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    kill = ("tests/faults.py", "kill:12", str(ROOT / "train_teacher.py"))  # of the 15 steps of the frozen epoch
    assert script(*kill, *flags, "--out", "killed", env=cpu, launcher=torchrun(2)).returncode != 0
    resumed = script("train_teacher.py", *flags, "--out", "killed", "--resume", env=cpu, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert differences(Path("two"), Path("killed")) == []


# Dropout


def test_row_1_dropout_is_a_function_of_the_step(monkeypatch, quick):  # noqa: F811
    run = lambda *args: teach(*DROPPED, *args)  # noqa: E731
    assert differs_when_killed(monkeypatch, run, 11) == []


def test_dropout_is_drawn_anew_in_every_step_whatever_was_drawn_between(monkeypatch, quick):  # noqa: F811
    from kd.training import trainer

    teach(*DROPPED, "--out", "quiet", "--save-every", "7")
    real = trainer.validate

    def drawing(*args):
        torch.rand(5)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", drawing)
        teach(*DROPPED, "--out", "drawing", "--save-every", "7")
    assert differences(Path("quiet"), Path("drawing")) == []
    with monkeypatch.context() as patch:  # the test can fail
        patch.setattr("kd.utils.rng.seed_step", lambda *args: None)
        patch.setattr(trainer, "validate", drawing)
        teach(*DROPPED, "--out", "unseeded", "--save-every", "7")
    assert differences(Path("quiet"), Path("unseeded")) != []


def test_a_live_teacher_draws_nothing_before_the_student():
    torch.manual_seed(0)
    teacher = live_logits(networks.normalised(5).eval().requires_grad_(False), Accelerator(cpu=True))
    before = torch.random.get_rng_state()
    teacher(batch_of(torch.arange(12)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_student_with_dropout_learns_the_same_from_a_live_and_a_cached_teacher(quick):  # noqa: F811
    teach("--epochs", "1", "--out", "teacher")
    flags = [
        "--student",
        "tests.networks:dropped",
        "--teacher",
        "teacher",
        "--trust-code",
        "--views",
        "1",
        "--epochs",
        "1",
    ]
    distil(*flags, "--out", "live")
    distil(*flags, "--out", "cached", "--cache-teacher", "--cache-dtype", "float32")
    assert Path("live/model.safetensors").read_bytes() == Path("cached/model.safetensors").read_bytes()


def test_weights_of_another_library_name_the_network_that_they_do_not_fit(monkeypatch, data, tmp_path):
    from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch/hub/checkpoints" / Path(ShuffleNet_V2_X0_5_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    torch.save(shufflenet_v2_x0_5().state_dict(), place)
    with pytest.raises(UserError, match=r"do not fit the network resnet8: .*; name the right one with --model"):
        started(job_of("--init", "torchvision/shufflenet_v2_x0_5", model="resnet8"), data)
