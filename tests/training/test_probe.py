"""--probe: an embedding's scores in a run and afterwards; they change nothing else, and survive kills."""

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from kd.config import DataConfig, RunConfig
from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.data import load_data
from kd.data.dataset import load_probe
from kd.errors import UserError
from kd.export.card import CardContent, write_card
from kd.models import build_model
from kd.report.groups import by_data
from kd.report.tables import accuracy_table, loss_table, run_table
from kd.runs.folder import _tell_unprobed
from kd.runs.results import checked_summary, collect_runs, summary_of
from kd.runs.table import plain_table, show_results
from kd.training import probe as probing
from kd.training.probe import Probe, due, main
from kd.training.probe_scores import knn_accuracy, linear_probe_accuracy
from tests.data.test_dataset import picture
from tests.run_scripts import TEACHER, differences, distil, metrics_of, script, teach, torchrun
from tests.training.test_resume import Killed, die_at

PROBED = ["--probe", "synthetic", "--classes", "3", "--model", "resnet8"]  # five steps an epoch
KEYS = {"probe/knn", "probe/linear"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        teach(*PROBED, "--probe-every", "1", "--out", "run")
    return folder


def summary_at(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def seen_with(probe: str = "digits", source: str = "synthetic"):
    return load_data(DataConfig(source), RunConfig(probe=probe))


def test_scores_are_those_of_features_computed_by_hand():
    seen = seen_with("synthetic")
    network = build_model("resnet8", 10, seen.size)
    probe = Probe(network, "resnet8", seen, "synthetic", Accelerator(cpu=True), 64)
    mean, std = (torch.tensor(part)[:, None, None] for part in (seen.mean, seen.std))
    features = []
    with torch.no_grad():
        for split in (seen.probe.train, seen.probe.test):
            images = (split.images / 255 - mean) / std
            hidden = []
            hook = network.eval().fc.register_forward_pre_hook(lambda _, inputs, to=hidden: to.append(inputs[0]))
            network(images)
            hook.remove()
            features.append(hidden[0])
    torch.testing.assert_close(probe.features(seen.probe.test), features[1], rtol=1e-4, atol=1e-5)
    pair = features[0], seen.probe.train.labels, features[1], seen.probe.test.labels
    scores = probe.score(seen.probe.test)
    assert scores["knn"] == pytest.approx(knn_accuracy(*pair), abs=0.5)
    assert scores["linear"] == pytest.approx(linear_probe_accuracy(*pair), abs=0.5)


def test_the_network_is_left_as_it_was():
    seen = seen_with()
    network = build_model("tests.networks:normalised", 10, seen.size).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    Probe(network, "tests.networks:normalised", seen, "digits", Accelerator(cpu=True), 50).score(seen.probe.test)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_without_classifier_is_scored_by_its_output(capsys):
    seen = seen_with()
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    network.weight = torch.nn.Parameter(torch.zeros(1))
    probe = Probe(network, "mine:network", dataclasses.replace(seen, classes=()), "digits", Accelerator(cpu=True), 64)
    assert (probe.layers, probe.width) == ((), 12)
    assert probe.score(seen.probe.test)["knn"] > 50
    assert "ends in no linear layer" not in capsys.readouterr().out
    Probe(network, "mine:network", seen, "digits", Accelerator(cpu=True), 64)
    assert "mine:network ends in no linear layer over its classes: its output is scored" in capsys.readouterr().out


def test_images_get_the_runs_size_and_normalisation(capsys):
    seen = seen_with()
    asked = []
    network = build_model("resnet8", 10, seen.size)
    probe = Probe(network, "resnet8", seen, "digits", Accelerator(cpu=True), 64)
    network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    probe.features(seen.probe.test)
    mean, std = (torch.tensor(part)[:, None, None] for part in (seen.mean, seen.std))
    images = (seen.probe.test.images[:64] / 255 - mean) / std
    wanted = torch.nn.functional.interpolate(images, seen.size, mode="bilinear", antialias=True)
    torch.testing.assert_close(asked[0], wanted, rtol=1e-4, atol=1e-5)
    assert (
        "359 test images of 10 classes, resized from 8 x 8 to 16 x 16; 64 features of each" in capsys.readouterr().out
    )


def test_features_that_fill_the_memory_are_refused(monkeypatch):
    seen = seen_with()
    monkeypatch.setattr(probing, "memory_limit", lambda: 2**20)
    with pytest.raises(UserError, match=r"--probe digits: its features would take .* name a smaller set"):
        Probe(build_model("resnet8", 10, seen.size), "resnet8", seen, "digits", Accelerator(cpu=True), 64)


def test_features_that_are_not_finite_are_refused():
    seen = seen_with()
    network = build_model("resnet8", 10, seen.size)
    network.layer3[0].conv1.weight.data[:] = float("nan")
    probe = Probe(network, "resnet8", seen, "digits", Accelerator(cpu=True), 64)
    with pytest.raises(UserError, match="features are not finite"):
        probe.score(seen.probe.test)


def test_epochs_that_are_due():
    assert [epoch for epoch in range(7) if due(3, epoch, 7)] == [2, 5, 6]
    assert [epoch for epoch in range(7) if due(0, epoch, 7)] == [6]


def test_a_probe_changes_nothing_but_its_own_numbers(run):
    teach(*PROBED[2:], "--out", "plain")
    plain = Path("plain")
    assert differences(plain, run) == ["metrics.jsonl"]  # of plain's keys
    assert [{key: line[key] for key in line.keys() - KEYS} for line in metrics_of(run)] == metrics_of(plain)
    assert summary_at(run).keys() - summary_at(plain).keys() == {"probe_data", "probe_knn", "probe_linear"}
    identity = [json.loads((path / "config.json").read_text())["identity"] for path in (plain, run)]
    assert identity[0] == identity[1]


def test_the_test_split_is_read_once_at_the_end(run, monkeypatch):
    assert all(line.keys() >= KEYS for line in metrics_of(run))
    read, real = [], Probe.features

    def noted(self, split, told):
        read.append("test" if split is self.data.test else "val" if split is self.data.val else "train")
        return real(self, split, told)

    monkeypatch.setattr(Probe, "features", noted)
    teach(*PROBED, "--out", "again")
    assert read == ["train", "val", "train", "test"]
    assert metrics_of(Path("again"))[-1].keys() >= KEYS
    assert not KEYS & metrics_of(Path("again"))[0].keys(), "only after the last epoch"
    read.clear()
    teach(*PROBED, "--out", "untested", "--no-test")
    assert read == ["train", "val"]
    assert [summary_at(Path("untested"))[key] for key in ("probe_data", "probe_knn")] == ["synthetic", None]
    teach(*PROBED, "--out", "untested", "--auto-resume")
    assert summary_at(Path("untested"))["probe_knn"] == summary_at(run)["probe_knn"]


@pytest.mark.parametrize("step", [6, 8])
def test_row_1_killed_between_two_probes_it_resumes_to_the_same_bytes(run, monkeypatch, step):
    with monkeypatch.context() as patch:
        die_at(patch, step)
        with pytest.raises(Killed):
            teach(*PROBED, "--probe-every", "1", "--out", "run")
    teach(*PROBED, "--probe-every", "1", "--out", "run", "--resume")
    assert differences(run, Path("run")) == []


@pytest.mark.parametrize("number", [1, 3])  # within an epoch's probe; in that of the test split
def test_row_2_killed_while_it_probes_it_resumes_to_the_same_bytes(run, monkeypatch, number):
    with monkeypatch.context() as patch:
        calls, real = [], probing.linear_probe_accuracy

        def dies(*args, **options):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return real(*args, **options)

        patch.setattr(probing, "linear_probe_accuracy", dies)
        with pytest.raises(Killed):
            teach(*PROBED, "--probe-every", "1", "--out", "run")
    teach(*PROBED, "--probe-every", "1", "--out", "run", "--resume")
    assert differences(run, Path("run")) == []


def test_the_command_gives_the_runs_own_numbers(run, capsys):
    scores = main([str(run), "--data", "synthetic", "--classes", "3"])
    summary = summary_at(run)
    assert [scores["knn"], scores["linear"]] == [summary["probe_knn"], summary["probe_linear"]]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{run}: kNN {scores['knn']:.2f}, linear probe {scores['linear']:.2f} percent of the test")
    random = [str(run), "--data", "synthetic", "--classes", "3", "--random"]
    fresh = main(random)
    assert fresh != scores
    assert main(random) == fresh
    assert main([*random, "--seed", "1"]) != fresh
    assert "resnet8 with fresh weights: kNN" in capsys.readouterr().out


def test_wrong_flags_and_data_are_named_as_they_were_typed(run):
    with pytest.raises(UserError, match=r"--probe digitz: no such folder.*did you mean digits"):
        teach(*PROBED[2:], "--probe", "digitz")
    with pytest.raises(UserError, match="--data digitz: no such folder"):
        main([str(run), "--data", "digitz"])
    with pytest.raises(UserError, match="--seed 1: is for fresh weights; add --random"):
        main([str(run), "--data", "synthetic", "--seed", "1"])
    with pytest.raises(UserError, match="--probe-every 2: needs --probe DATA"):
        RunConfig(probe_every=2).check()
    with pytest.raises(UserError, match="--probe-label fine: needs --probe DATA"):
        RunConfig(probe_label="fine").check()
    with pytest.raises(UserError, match="--probe-every -1: give 0 or more"):
        RunConfig(probe="digits", probe_every=-1).check()
    with pytest.raises(UserError, match="--probe-label label: leave it out for the built-in set digits"):
        load_probe("digits", DataConfig("synthetic"), (8, 8), "label")


def test_images_without_labels_cannot_be_probed(monkeypatch, tmp_path):
    whole = load_data(DataConfig("digits"))
    bare = dataclasses.replace(whole.train, labels=torch.full_like(whole.train.labels, -1))
    monkeypatch.setattr("kd.data.dataset.load_data", lambda config: dataclasses.replace(whole, train=bare))
    with pytest.raises(UserError, match="--probe digits: its images have no labels; name a labelled set"):
        load_probe("digits", DataConfig("synthetic"), (8, 8))
    monkeypatch.undo()
    picture(0, (16, 16)).save(f"{tmp_path}/a.png")
    with pytest.raises(UserError, match=r"--probe .*: a.png is in no class folder[^-]*$"):  # not: give --no-labels
        load_probe(str(tmp_path), DataConfig("synthetic"), (16, 16))


def test_the_probes_splits_are_those_of_a_run_on_the_same_labels_and_else_the_same_for_all():
    splits = {"val_fraction": 0.5, "split_seed": 3}
    usual = load_probe("digits", DataConfig("synthetic", **splits), (8, 8))
    for flags in ({"imbalance": 0.1, "label_share": 0.1}, {"no_labels": True, **splits}):
        other = load_probe("digits", DataConfig("digits", **flags), (8, 8))
        assert all(getattr(usual, name).sha256 == getattr(other, name).sha256 for name in ("train", "val", "test"))
    trained = load_data(DataConfig("digits", **splits))
    probed = load_probe("digits", DataConfig("digits", **splits), (8, 8))
    assert probed.val.sha256 == trained.val.sha256
    assert load_probe("digits", DataConfig("digits", val_fraction=0.0), (8, 8)).val is None


def test_a_finished_run_says_how_it_is_probed(run, capsys):
    teach(*PROBED[2:], "--out", "plain")
    capsys.readouterr()
    teach(*PROBED, "--out", "plain", "--auto-resume")
    said = "plain: finished without --probe synthetic; python -m kd.training.probe plain --data synthetic measures it"
    assert said in capsys.readouterr().out
    assert "probe_knn" not in summary_at(Path("plain"))
    model = ["--model", "tests.networks:normalised", "--epochs", "1", "--out", "own"]
    teach(*PROBED[2:], *model)
    capsys.readouterr()
    teach(*PROBED, *model, "--auto-resume")
    assert "kd.training.probe own --data synthetic --trust-code measures" in capsys.readouterr().out
    job = parse(train_defaults, "", ["--model", "resnet8", "--probe", "set", "--probe-label", "fine"]).job()
    inspect.unwrap(_tell_unprobed)(SimpleNamespace(path=Path("own"), summary={}), job)
    assert "kd.training.probe own --data set --label fine measures" in capsys.readouterr().out


def test_a_probe_whose_test_split_was_not_read_says_so(run, capsys):
    flags = ["--student", "resnet8", "--teacher", str(run), "--epochs", "1", "--warmup-epochs", "0"]
    flags += ["--probe", "digits"]
    distil(*flags, "--no-test", "--out", "e", "embed")
    said = "embedding on digits, student (embed): the probe's test split was not read (--no-test)"
    assert said in capsys.readouterr().out
    distil(*flags, "--out", "e", "embed")
    said = "e: never read the test split of --probe digits; python -m kd.training.probe e --data digits measures it"
    assert said in capsys.readouterr().out


def test_report_and_card_of_an_embedder_have_its_scores(run):
    flags = ["--student", "resnet8", "--teacher", str(run), "--epochs", "1", "--warmup-epochs", "0"]
    distil(*flags, "--probe", "digits", "--out", "e", "embed")
    summary = checked_summary(Path("e/summary.json"))
    groups = next(iter(by_data(collect_runs(["e"])[0]).values()))
    table = loss_table(groups)
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert cells["kNN"] == f"{summary['probe_knn']:.2f}"
    assert "on the test split of digits (--probe)" in table.note
    config = json.loads(Path("e/config.json").read_text())
    expects = {"classes": [], "shape": [1, 3, 16, 16], "embedding": 64}
    write_card(Path("card.md"), CardContent(summary, config, None, expects, [], []), "mit", None)
    written = Path("card.md").read_text()
    assert f"kNN {cells['kNN']} and linear probe {summary['probe_linear']:.2f} percent" in written
    assert "not scored here" not in written


def test_tables_report_and_card_have_the_scores(run, capsys):
    summary = checked_summary(run / "summary.json")
    knn, linear = f"{summary['probe_knn']:.2f}", f"{summary['probe_linear']:.2f}"
    show_results(run)
    assert (
        f"embedding on synthetic, percent of its test images: teacher: kNN {knn}, linear probe {linear}\n"
        in capsys.readouterr().out
    )
    head, rows = plain_table(run, summary)
    assert dict(zip(head, rows[0], strict=True))["probe_knn"] == summary["probe_knn"]
    groups = next(iter(by_data(collect_runs([str(run)])[0]).values()))
    table = accuracy_table(groups)
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert (cells["kNN"], cells["linear probe"]) == (knn, linear)
    assert "on the test split of synthetic (--probe)" in table.note
    assert "kNN" in run_table(groups).head
    config = json.loads((run / "config.json").read_text())
    expects = {"classes": ["a"], "shape": [1, 3, 16, 16]}
    write_card(Path("card.md"), CardContent(summary, config, None, expects, [], []), "mit", None)
    assert (
        f"Its embedding on the test images of synthetic: kNN {knn} and linear probe {linear} percent."
        in Path("card.md").read_text()
    )
    assert "probe_knn" not in summary_of(summary | {"weights": "last"}, "ema"), "the average's was not measured"


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one():
    """`plain` has no normalisation: both train alike to rounding."""
    args = [*TEACHER, "--model", "tests.networks:plain", "--wandb", "disabled", "--probe", "digits", "--threads", "1"]
    one = script("train_teacher.py", *args, "--out", "one")
    two = script("train_teacher.py", *args, "--out", "two", env={"ACCELERATE_USE_CPU": "true"}, launcher=torchrun(2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    first, second = (summary_at(Path(name)) for name in ("one", "two"))
    for key in ("probe_knn", "probe_linear"):
        assert first[key] == pytest.approx(second[key], abs=0.6)  # two of 359 images
    assert two.stdout.count("probe digits: ") == 1
