"""kd.export. Tests that trace a network run a subprocess: in this process the shape checks would be traced too."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

import kd
from kd.config import DataConfig
from kd.data import load_data
from kd.errors import UserError
from kd.export import build, source
from kd.export.__main__ import main
from kd.export.deployed import Deployed, bake
from kd.export.int8 import Quantized
from kd.export.measure import candidates, format_verdicts, measure_files
from kd.export.source import read_source
from kd.models import build_model
from kd.models.cost import count_params
from kd.predict import main as predict
from kd.report import plots
from kd.report.costs import measure_cost
from kd.runs.public import public_text
from kd.training import evaluate
from kd.utils.files import read_json, read_weights, sha256_file, write_folder, write_json, write_weights
from tests.conftest import ROOT
from tests.run_scripts import distil, teach

PARTS = {"model.safetensors", "model.json", "summary.json", "config.json", "preprocessing.json", "README.md"}
TABLES = {"export.json", "export.md"}
GRAPHS = {"model.onnx", "model.int8.onnx", "model.pt2"}

SCORE = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
expects = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
assert [entry.name for entry in session.get_inputs()] == [expects["input"]]
images, labels = numpy.load(sys.argv[2]), numpy.load(sys.argv[3])
assert list(images.shape[1:]) == expects["shape"][1:] and str(images.dtype) == expects["dtype"]
starts = range(0, len(images), 60)
logits = [session.run([expects["output"]], {expects["input"]: images[start : start + 60]})[0] for start in starts]
best = numpy.concatenate(logits).argmax(axis=1)
assert not {"torch", "kd", "torchvision"} & {name.split(".")[0] for name in sys.modules}
print(json.dumps([100 * float((best == labels).mean()), [expects["classes"][number] for number in best[:5]]]))
"""

STOPPED_HALFWAY = """
import os, runpy, sys, time
from kd.export import __main__ as export, build
from kd.export.onnx_files import errors_as_messages

def write_half(folder, *rest):
    (folder / "model.onnx").write_bytes(b"half")
    with errors_as_messages("model.onnx"):
        os.kill(os.getpid(), {number})
        time.sleep(60)

build.write_formats = write_half
sys.argv[1:] = [sys.argv[1], "--formats", "safetensors", "--no-table"]
runpy.run_path(export.__file__, run_name="__main__")
"""


def export(run: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kd.export", str(run), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def run_of(run: Path, folder: Path, model: str, trained: nn.Module | None = None) -> Path:
    """A finished run of another network on the same data, with `trained`'s weights or fresh ones."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("export", "checkpoint", "lock"))
    info = read_json(run / "model.json") | {"model": model}
    torch.manual_seed(0)
    network = trained or build_model(model, info["num_classes"], tuple(info["image_size"]))
    write_weights(folder / "model.safetensors", network.state_dict())
    write_json(folder / "model.json", info)
    sha256 = sha256_file(folder / "model.safetensors")
    facts = {"params": sum(p.numel() for p in network.parameters()), "weights_sha256": sha256}
    write_json(folder / "summary.json", read_json(run / "summary.json") | facts)
    return folder


@pytest.fixture
def run(resnet8_run, tmp_path) -> Path:
    return shutil.copytree(resnet8_run, tmp_path / "run")


# ---- safetensors only, in this process


def test_safetensors_with_its_table(run, capsys):
    main([str(run), "--formats", "safetensors", "--license", "mit"])
    assert {path.name for path in (run / "export").iterdir()} == PARTS | TABLES
    assert [path.name for path in run.glob(".*")] == []
    table = read_json(run / "export" / "export.json")
    (row,) = table["rows"]
    assert row["top1"] == read_json(run / "summary.json")["test_top1"]
    assert (row["agreement"], row["largest_difference"]) == (100.0, 0.0)
    assert row["latency_ms"] > 0
    assert row["images_per_second"] > 0
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card
    assert f"{row['top1']:.2f}" in card
    assert "1 thread" in capsys.readouterr().out


def test_an_export_is_a_run_folder_without_local_paths(run):
    summary = read_json(run / "summary.json")
    write_json(run / "summary.json", summary | {"teacher": f"{run.parent}/big", "control": f"{run.parent}/alone"})
    main([str(run), "--formats", "safetensors", "--no-table"])
    images = torch.rand(4, 3, 16, 16)
    shutil.move(run / "export", "elsewhere")
    assert torch.equal(kd.load("elsewhere")(images), kd.load(run)(images))
    for path in Path("elsewhere").iterdir():
        assert str(run.parent).encode() not in path.read_bytes(), path.name
    assert read_json(Path("elsewhere/summary.json"))["teacher"] == "big"


@pytest.mark.parametrize("teacher", ["{place}/in here/big", "in here/big", "{place}/weights/big.pth", "big.pth"])
def test_why_a_teacher_is_not_measured_names_no_local_path(run, teacher):
    teacher = teacher.format(place=run.parent)
    summary = read_json(run / "summary.json") | {"teacher": teacher, "teacher_model": "resnet8"}
    write_json(run / "summary.json", summary)
    if teacher.endswith(".pth"):  # without the JSON file that it needs
        Path(teacher).parent.mkdir(exist_ok=True)
        Path(teacher).write_bytes(b"weights")
    main([str(run), "--formats", "safetensors"])
    (note,) = read_json(run / "export" / "export.json")["notes"]
    assert note.startswith("The teacher's cost is not measured: ")
    assert Path(teacher).name in note
    for path in (run / "export").iterdir():
        text = path.read_bytes()
        assert str(run.parent).encode() not in text, path.name
        assert b"in here" not in text, path.name


def test_text_keeps_no_path_of_the_machine():
    home, here = Path.home(), Path.cwd()
    said = f"{home}/runs/big/x.json: broken; save https://a.org/b.pth as {home}/.cache/torch/b.pth, or {here}/w.json"
    said += " (see '/mnt/data/c.json') and/or ask"
    text = public_text(said, ["~/runs/big", "/", "."])
    assert (
        text
        == f"big/x.json: broken; save https://a.org/b.pth as b.pth, or {here.name}/w.json (see 'c.json') and/or ask"
    )


def test_a_path_among_a_methods_own_flags_is_shortened(run):
    config = read_json(run / "config.json")
    own = {"table": f"{run.parent}/codes.csv", "more": [f"{run.parent}/a"], "kind": "soft", "alpha": 0.5}
    config["flags"]["method"], config["identity"] = own, config["identity"] | {"table": own["table"]}
    write_json(run / "config.json", config)
    main([str(run), "--formats", "safetensors", "--no-table"])
    config = read_json(run / "export" / "config.json")
    assert config["flags"]["method"] == {"table": "codes.csv", "more": ["a"], "kind": "soft", "alpha": 0.5}
    assert config["identity"]["table"] == "codes.csv"


def test_a_link_named_export_is_refused(run):
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (run / "export").symlink_to(elsewhere)
    with pytest.raises(UserError, match="export: is a link, which an export would replace; remove it"):
        main([str(run), "--formats", "safetensors", "--no-table"])
    assert (run / "export").is_symlink()


def test_a_file_managers_leftovers_stop_no_export(run):
    main([str(run), "--formats", "safetensors", "--no-table"])
    (run / "export" / ".DS_Store").write_bytes(b"icons")
    main([str(run), "--formats", "safetensors", "--no-table"])
    assert {path.name for path in (run / "export").iterdir()} == PARTS


def test_moved_data_keeps_the_image_size_of_its_set():
    config, here = DataConfig("food101"), lambda config, recorded: source._moved(config, recorded, "photos")
    assert (here(config, {}).source, here(config, {}).image_size) == ("photos", 224)
    assert here(config, {"data": {"folder": True}}).image_size is None
    assert here(dataclasses.replace(config, image_size=64), {}).image_size == 64
    assert here(DataConfig("digits"), {}).image_size is None


def test_workers_are_asked_for_no_more_images_than_in_training(run, monkeypatch):
    data, exported = load_data(DataConfig("synthetic")), read_source(run, False)
    assert source.scoring_batch(exported, data) == 256
    monkeypatch.setattr(source, "WorkerRows", type(data.test))
    trained = exported.config["flags"]["fit"]["batch_size"]
    assert source.scoring_batch(exported, data) == trained < 256
    asked, read = [], type(data.test).batches
    watched = lambda self, indices, device: asked.extend(map(len, indices)) or read(self, indices, device)  # noqa: E731
    monkeypatch.setattr(type(data.test), "batches", watched)
    build.calibration_images(exported, data, 128)
    files, _ = candidates(run, exported, data, False)
    measure_files(files, data, 1, source.scoring_batch(exported, data))
    assert max(asked) <= trained


@pytest.mark.parametrize("name", ["write_pt2", "open_pt2"])
def test_what_breaks_a_pt2_file_is_one_message_and_a_full_disk_another(run, name, monkeypatch):
    def breaks(error):
        def stop(*_):
            raise error

        monkeypatch.setattr(build, name, stop)
        with pytest.raises(UserError) as caught:
            main([str(run), "--formats", "pt2", "--no-table"])
        return str(caught.value)

    for step in ("trace", "rounds_activations", "write_pt2"):
        monkeypatch.setattr(build, step, lambda *_: None)
    assert breaks(RuntimeError("no schema\nfor it")) == (
        "model.pt2: cannot be made (RuntimeError: no schema for it); leave it out of --formats"
    )
    assert "cannot be written ([Errno 28] No space left on device); check" in breaks(
        OSError(28, "No space left on device")
    )
    assert not (run / "export").exists()


def test_a_failure_keeps_the_old_export_and_leaves_no_partial_files(run, monkeypatch):
    main([str(run), "--formats", "safetensors", "--no-table"])
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    entries = sorted(path.name for path in run.iterdir())

    def fails(folder, *rest):
        (folder / "model.onnx").write_bytes(b"half")
        raise UserError("the exporter fails")

    monkeypatch.setattr("kd.export.build.write_formats", fails)
    with pytest.raises(UserError, match="the exporter fails"):
        main([str(run), "--formats", "safetensors", "--no-table"])
    assert before == {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert entries == sorted(path.name for path in run.iterdir())


def test_leftovers_of_a_killed_export_are_removed(run):
    for state in ("partial", "old"):
        (run / f".export.{state}").mkdir()
        (run / f".export.{state}" / "model.onnx").write_bytes(b"half")
    main([str(run), "--formats", "safetensors", "--no-table"])
    assert {path.name for path in (run / "export").iterdir()} == PARTS
    assert [path.name for path in run.glob(".*")] == []


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "made"
    write_folder(folder, lambda partial: (partial / "one").write_text("1"))
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr("kd.utils.files.os.replace", second_fails)
    with pytest.raises(OSError, match="no space"):
        write_folder(folder, lambda partial: (partial / "two").write_text("2"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in folder.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "onxx"], "--formats onxx: no such format; did you mean onnx"),
        (["--all", "--formats", "onnx"], "--all and --formats: give one of them"),
        (["--calibration", "0"], "--calibration 0: give 1 or more"),
        (["--threads", "0"], "--threads 0: give 1 or more"),
        (["--private"], "--private: needs --push USER/NAME"),
        (["--calibration", "64"], "--calibration: needs --formats int8, or --all"),
        (
            ["--no-table", "--formats", "int8", "--threads", "2"],
            "--threads: only used for the table; drop it or --no-table",
        ),
        (["--min-agreement", "101"], "--min-agreement 101.0: give a percentage, 0 to 100"),
        (
            ["--formats", "onnx", "--no-table", "--min-agreement", "0"],
            "--min-agreement: only used for the table and int8; drop it or --no-table",
        ),
        (["--no-table", "--data", "nonsense"], "--data: only used for the table and int8; drop it or --no-table"),
        (["--formats", "safetensors", "--data", "digits"], "--data digits: has other images"),
        (["--formats", "safetensors", "--data", "gone"], "--data gone: no such folder.*have moved, give --data FOLDER"),
    ],
)
def test_bad_flags_are_one_message(run, flags, message):
    with pytest.raises(UserError, match=message):
        main([str(run), *flags])
    assert not (run / "export").exists()


@pytest.mark.parametrize("key", ["test_top1", "params", "seed", "method", "test_images", "model", "script"])
def test_a_summary_without_a_required_key_is_one_message(run, key):
    summary = read_json(run / "summary.json")
    del summary[key]
    write_json(run / "summary.json", summary)
    with pytest.raises(UserError, match=r"summary\.json"):
        main([str(run), "--formats", "safetensors"])
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [(("flags", part), None) for part in ("compress", "views", "fit", "method", "run", "data")]
    + [(("flags", "compress", "init"), 3), (("flags", "origin"), {"source": 3}), (("flags", "data", "source"), None)]
    + [(("flags",), []), (("identity",), None), (("versions",), "3.11"), (("data",), [1])],
)
def test_a_damaged_configuration_is_one_message(run, place, value):
    config = part = read_json(run / "config.json")
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    write_json(run / "config.json", config)
    with pytest.raises(UserError, match=r"config\.json: is not a run's configuration"):
        main([str(run), "--formats", "safetensors"])
    assert not (run / "export").exists()


def test_an_export_is_not_exported_again(run):
    main([str(run), "--formats", "safetensors", "--no-table"])
    with pytest.raises(UserError, match="export: is already an export"):
        main([str(run / "export"), "--formats", "safetensors", "--no-table"])
    assert {path.name for path in (run / "export").iterdir()} == PARTS
    main([str(run), "--formats", "safetensors", "--no-table"])


def test_a_file_named_export_is_one_message(run):
    (run / "export").write_text("years of work")
    with pytest.raises(UserError, match="export: is a file, not an export folder"):
        main([str(run), "--formats", "safetensors", "--no-table"])
    assert (run / "export").read_text() == "years of work"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_export_leaves_no_files(run, number, code):
    """The signal arrives where an exporter's exceptions become messages."""
    program = STOPPED_HALFWAY.format(number=int(number))
    entries = sorted(path.name for path in run.iterdir())
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, sorted(path.name for path in run.iterdir())) == (code, entries), done.stderr
    assert done.stderr == "interrupted: no partial export is left; the same command starts over\n"


def test_an_unfinished_run_and_one_without_test_results_are_refused(run):
    summary = read_json(run / "summary.json")
    write_json(run / "summary.json", summary | {key: None for key in summary if key.startswith("test_")})
    with pytest.raises(UserError, match="--no-test, and the table would read the test set"):
        main([str(run), "--formats", "safetensors"])
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="has no finished run"):
        main([str(run)])
    assert not (run / "export").exists()


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_module_names_the_extra_to_install(run, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module} is not installed: pip install -e '\.\[export\]'"):
        main([str(run), "--formats", "int8"])


def test_other_files_in_the_export_folder_are_not_removed(run):
    (run / "export").mkdir()
    (run / "export" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"export: contains thesis\.tex, not written by kd\.export"):
        main([str(run), "--formats", "safetensors", "--no-table"])
    assert (run / "export" / "thesis.tex").exists()


def test_parametrized_weights_are_baked_with_their_exact_values():
    class Rounded(nn.Module):
        def forward(self, weight):
            return (weight * 8).round() / 8

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), weight_norm(nn.Linear(144, 5)))
    register_parametrization(network[0], "weight", Rounded())
    images = torch.rand(2, 3, 8, 8)
    before = network(images)
    baked = bake(network)
    assert not any(is_parametrized(module) for module in baked.modules())
    assert torch.equal(baked(images), before)
    assert torch.equal(baked[0].weight * 8, (baked[0].weight * 8).round())
    assert not [name for name in baked.state_dict() if "parametrizations" in name]


def test_a_deployed_network_normalises(run):
    data = load_data(DataConfig("synthetic"))
    network = kd.load(run)
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    images = data.test.images[:9]
    with torch.no_grad():
        expected = network((images / 255 - mean) / std)
    deployed = Deployed(network, read_json(run / "model.json"))
    assert torch.allclose(deployed(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("runs/big", "big"),
        ("/home/somebody/runs/big", "big"),
        ("../weights/big.pth", "big.pth"),
        ("timm/big.pth", "big.pth"),
        ("/home/somebody/.cache/huggingface/hub/models--user--net.v1/snapshots/0a1b2c", "user/net.v1@0a1b2c"),
    ],
)
def test_only_the_last_component_of_a_path_is_kept_and_public_names_whole(run, name, public):
    summary, config = read_json(run / "summary.json"), read_json(run / "config.json")
    write_json(run / "summary.json", summary | {"teacher": [name, name], "init": name, "probe_data": name})
    flags = config["flags"] | {"origin": {"source": name}}
    write_json(run / "config.json", config | {"flags": flags, "teacher": [name]})
    main([str(run), "--formats", "safetensors", "--no-table"])
    summary, config = (read_json(run / "export" / name) for name in ("summary.json", "config.json"))
    assert (summary["teacher"], summary["init"], summary["probe_data"]) == ([public, public], public, public)
    assert (config["flags"]["origin"]["source"], config["teacher"]) == (public, [public])
    assert f"follow {public}, {public}" in (run / "export" / "README.md").read_text().replace("\\", "")


def test_only_the_last_component_of_a_data_folder_is_kept(tmp_path, monkeypatch):
    for split, count in (("train", 30), ("test", 6)):
        for label, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            place = tmp_path / "clinic" / "patients" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), tuple(part + number for part in colour)).save(place / f"{number}.png")
    flags = ("--model", "resnet8", "--batch-size", "10", "--epochs", "1", "--out", "run")
    teach("--data", "clinic/patients", *flags)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for extra in (["--no-table"], ["--data", str(tmp_path / "clinic" / "patients")]):
        main([str(tmp_path / "run"), "--formats", "safetensors", *extra])
        for path in (tmp_path / "run" / "export").iterdir():
            assert b"clinic" not in path.read_bytes(), path.name
        card = (tmp_path / "run" / "export" / "README.md").read_text()
        assert "trained on patients" in card
        assert "datasets:" not in card


@pytest.mark.parametrize(
    ("recorded", "head"),
    [({"folder": False}, ["datasets:", "- somebody/pictures", "type: somebody/pictures"]), ({}, [])],
)
def test_a_hub_data_set_is_named_without_its_revision(run, recorded, head):
    """A run that did not record whether its data was a folder keeps only the last component."""
    config = read_json(run / "config.json")
    config["flags"]["data"]["source"], config["data"] = "somebody/pictures@v2", recorded
    write_json(run / "config.json", config)
    main([str(run), "--formats", "safetensors", "--no-table"])
    head_of_card = (run / "export" / "README.md").read_text().split("---\n")[1]
    assert [line for line in head if line not in head_of_card] == []
    assert ("somebody" in head_of_card) == bool(head)
    assert "pictures@v2" not in head_of_card.replace("name: somebody/pictures@v2", "")


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder with a teacher (big), its student (run) and the student alone."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--epochs", "1", "--out", "big")
        distil(
            *("--student", "resnet8", "--epochs", "1", "--teacher", "big", "--trust-code", "--control", "--out", "run")
        )
    return folder


def test_the_teachers_row_needs_the_network_that_taught(chain, resnet8_run):
    shutil.copytree(chain, ".", dirs_exist_ok=True)
    flags = ["run", "--formats", "safetensors", "--trust-code"]
    main(flags)
    table = read_json(Path("run/export/export.json"))
    assert ([row["name"] for row in table["rows"]], table["notes"]) == (["model.safetensors", "teacher"], [])
    shutil.rmtree("big")
    for why in (r"big: no such run folder", r"big: is no longer the network that taught this student"):
        main(flags)
        table = read_json(Path("run/export/export.json"))
        assert [row["name"] for row in table["rows"]] == ["model.safetensors"]
        (note,) = table["notes"]
        assert re.fullmatch(rf"The teacher's cost is not measured: {why}.*\.", note)
        shutil.copytree(resnet8_run, "big", dirs_exist_ok=True)


def test_row_49_a_strangers_teacher_runs_no_code_either(chain):
    """Row 49 of the faults: a run names the network of its teacher's file."""
    shutil.copytree(chain / "run", "stranger")
    Path("strangers_teacher.py").write_text("import os; os.mkdir('exploded')")
    shutil.copyfile("stranger/model.safetensors", "stranger/w.safetensors")
    expects = {"image_size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "classes": list("0123456789")}
    write_json(Path("stranger/w.json"), expects)
    summary = read_json(Path("stranger/summary.json"))
    named = {"teacher": "stranger/w.safetensors", "teacher_model": "strangers_teacher:build"}
    write_json(Path("stranger/summary.json"), summary | named)
    main(["stranger", "--formats", "safetensors"])
    (note,) = read_json(Path("stranger/export/export.json"))["notes"]
    assert "building strangers_teacher:build runs its author's code; --trust-code" in note
    assert not Path("exploded").exists()


def test_a_teacher_is_built_with_the_arguments_of_its_training():
    model, size = "tests.networks:dropped", (16, 16)
    arguments = {"rate": 0.25, "width": 6}
    write_weights(Path("w.safetensors"), build_model(model, 10, size, arguments=arguments).state_dict())
    classes = [f"picture {number}" for number in range(10)]
    write_json(Path("w.json"), {"image_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "classes": classes})
    taught = ("--teacher", "w.safetensors", "--teacher-model", model, "--teacher-model-args", "rate=0.25,width=6")
    distil(*taught, "--student", "resnet8", "--epochs", "1", "--out", "run")
    main(["run", "--formats", "safetensors", "--trust-code"])
    table = read_json(Path("run/export/export.json"))
    assert ([row["name"] for row in table["rows"]], table["notes"]) == (["model.safetensors", "teacher"], [])


def test_a_teachers_accuracy_is_the_same_in_its_run_and_in_its_students(chain):
    summary = read_json(chain / "run" / "summary.json")
    assert summary["teacher_test_top1"] == read_json(chain / "big" / "summary.json")["test_top1"]


def test_the_control_has_the_same_network_recipe_and_seed(chain, resnet8_run):
    shutil.copytree(chain, ".", dirs_exist_ok=True)
    control = Path(read_json(Path("run/summary.json"))["control"])
    row, score = "the same, trained alone", f"{read_json(control / 'summary.json')['test_top1']:.2f}"

    def rows() -> list[str]:
        main(["run", "--formats", "safetensors", "--no-table"])
        return [line for line in Path("run/export/README.md").read_text().splitlines() if row in line]

    assert [line.split("|")[2].strip() for line in rows()] == [score]
    config, summary = read_json(control / "config.json"), read_json(control / "summary.json")
    others = {"data": "0" * 64, "model": "resnet14", "lr": 0.3, "role": "teacher", "classes": 9, "weight_bits": 2}
    for key, value in others.items():
        write_json(control / "config.json", config | {"identity": config["identity"] | {key: value}})
        assert rows() == [], key
    write_json(control / "config.json", config | {"identity": config["identity"] | {"seed": 5}})
    write_json(control / "summary.json", summary | {"seed": 5})
    assert rows() == []
    write_json(control / "summary.json", {})
    assert rows() == []
    shutil.rmtree(control)
    assert rows() == []


def test_calibration_uses_training_images_only(run):
    data = load_data(DataConfig("synthetic"))
    chosen = build.calibration_images(read_source(run, False), data, 100)
    assert len({image.tobytes() for image in chosen}) == 100
    train = {image.numpy().tobytes() for image in data.train.images}
    others = {image.numpy().tobytes() for split in (data.val, data.test) for image in split.images}
    assert {image.tobytes() for image in chosen} <= train - others


def test_every_table_gives_the_same_accuracy_and_cost_of_one_network(run):
    """summary.json, metrics.jsonl, the saved logits, the report's costs, the export's table and card."""
    main([str(run), "--formats", "safetensors"])
    summary, (row,) = read_json(run / "summary.json"), read_json(run / "export" / "export.json")["rows"]
    cost = measure_cost(run, trust_code=False)
    assert (row["macs"], row["bytes"]) == (cost.macs, cost.bytes)
    assert row["params"] == summary["params"] == count_params(kd.load(run))
    saved = read_weights(run / "test_logits.safetensors")
    for key, value in evaluate.test_scores(saved["logits"], saved["labels"]).items():
        assert summary[key] == value, key
    assert row["top1"] == summary["test_top1"] == confusion_accuracy(saved)
    points = plots.reliability(saved["logits"], saved["labels"])
    assert sum(accuracy * count for _, accuracy, count in points) / len(saved["labels"]) == pytest.approx(
        summary["test_top1"] / 100
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val/top1" in line]
    best = max(line["val/top1"] for line in validated)
    assert (summary["val_top1_last"], summary["val_top1_best"]) == (validated[-1]["val/top1"], best)
    assert summary["best_epoch"] == next(line["epoch"] for line in validated if line["val/top1"] == best)


def confusion_accuracy(saved: dict) -> float:
    """Accuracy as a confusion matrix by numpy gives it."""
    logits, labels = saved["logits"].numpy(), saved["labels"].numpy()
    matrix = np.zeros((logits.shape[1],) * 2)
    np.add.at(matrix, (labels, logits.argmax(axis=1)), 1)
    return 100 * float(np.trace(matrix) / matrix.sum())


def pretend_int8(monkeypatch, agreement: float) -> None:
    """Export as if int8 had been written and agreed with the network on so many images."""
    quantized = Quantized("all values", 9, ("conv1",), agreement, 512)

    def write(folder, *rest):
        (folder / "model.int8.onnx").write_bytes(b"int8")
        return build.Written({}, quantized)

    def measure(files, *how):
        (row,) = measure_files(files, *how)
        return [row, row | {"name": "model.int8.onnx", "agreement": agreement}]

    monkeypatch.setattr(build, "write_formats", write)
    monkeypatch.setattr(build, "candidates", lambda *given: (candidates_of_torch(*given), ()))
    monkeypatch.setattr(build, "measure_files", measure)


def candidates_of_torch(folder, source, data, trust_code):
    (folder / "model.int8.onnx").rename(folder / "kept")
    files, _ = candidates(folder, source, data, trust_code)
    (folder / "kept").rename(folder / "model.int8.onnx")
    return files[:1]


@pytest.mark.parametrize(
    ("flags", "images"), [([], "the 250 test images"), (["--no-table"], "the 512 training images that set its ranges")]
)
def test_a_file_that_predicts_otherwise_is_refused_and_the_old_export_stays(run, flags, images, monkeypatch):
    main([str(run), "--formats", "safetensors", "--no-table"])
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    pretend_int8(monkeypatch, 42.5)
    message = f"model.int8.onnx: it agrees with the network on 42.50% of {images}, and --min-agreement is 90; nothing"
    with pytest.raises(UserError, match=f"{message} was written; leave int8 out of --formats, or give --min-.* 42 "):
        main([str(run), "--formats", "int8", *flags])
    assert before == {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert list(run.glob(".*")) == []


@pytest.mark.parametrize("flags", [[], ["--no-table"]])
@pytest.mark.parametrize(("agreement", "warned"), [(42.5, True), (90.0, False), (99.0, False)])
def test_a_file_kept_on_request_carries_a_warning_everywhere(run, flags, agreement, warned, monkeypatch, capsys):
    pretend_int8(monkeypatch, agreement)
    main([str(run), "--formats", "int8", *flags, *(["--min-agreement", "42"] if warned else [])])
    printed, texts = capsys.readouterr(), [(run / "export" / "README.md").read_text()]
    if not flags:
        texts.append((run / "export" / "export.md").read_text())
        numbers = read_json(run / "export" / "export.json")
        texts.append("\n".join(numbers["notes"]))
        assert numbers["int8"]["float_layers"] == ["conv1"]
    for text in texts:
        assert ("WARNING: model.int8.onnx predicts otherwise than the network" in text) == warned
        assert "1 of 9 layers stay in float32 (conv1)" in text
    assert printed.err.startswith("warning: model.int8.onnx predicts otherwise") == warned
    assert warned or printed.err == ""


@pytest.mark.parametrize("rounding", [False, True])
def test_a_float_file_that_answers_otherwise_is_refused(run, rounding):
    source = read_source(run, False)
    right = lambda images: source.network(torch.from_numpy(images)).detach().numpy()  # noqa: E731
    assert build.compare_with_torch(source, rounding, "model.onnx", right) == 0
    with pytest.raises(UserError, match=r"model.onnx: its logits differ from torch's by up to 1 .*nothing was written"):
        build.compare_with_torch(source, rounding, "model.onnx", lambda images: right(images) + 1)


def test_a_slower_file_is_called_slower():
    row = {"top1": 90.0, "bytes": 100, "latency_ms": 2.0, "images_per_second": 100.0}
    rows = [row | {"name": "model.safetensors"}, row | {"name": "model.onnx", "latency_ms": 1.0}]
    rows.append(row | {"name": "model.int8.onnx", "bytes": 26, "latency_ms": 4.0, "images_per_second": 99.0})
    one, other = format_verdicts(rows, {"test_top1": 90.0})
    assert "2.00 times as fast for one image and no faster (1.00 times) for 64" in one
    assert "0.260 of its size, slower (0.25 times as fast) for one image and no faster (0.99 times)" in other


# ---- graph formats, in a subprocess


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[Path, str]:
    """A distilled run exported to every format, and what was printed."""
    folder = tmp_path_factory.mktemp("shipped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        distil("--student", "resnet8", "--lr", "0.1", "--epochs", "4", "--out", str(folder))
        done = export(folder, "--all", "--trust-code", "--threads", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


@pytest.mark.slow
def test_every_format_has_a_file_and_a_row(shipped):
    run, printed = shipped
    assert {path.name for path in (run / "export").iterdir()} == PARTS | TABLES | GRAPHS
    table = read_json(run / "export" / "export.json")
    names = ["model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx", "teacher"]
    assert [row["name"] for row in table["rows"]] == names
    assert all(row["latency_ms"] > 0 and row["macs"] > 0 and row["bytes"] > 0 for row in table["rows"])
    assert (table["threads"], table["calibration_images"]) == (2, 512)
    summary, teacher = read_json(run / "summary.json"), table["rows"][-1]
    assert (teacher["top1"], teacher["agreement"]) == (summary["teacher_test_top1"], summary["agreement"])
    assert "2 threads" in printed
    for path in (run / "export").iterdir():
        assert str(run.parent).encode() not in path.read_bytes(), path.name
        assert str(ROOT).encode() not in path.read_bytes(), path.name


@pytest.mark.slow
def test_float_files_match_torch_and_int8_nearly(shipped):
    rows = {row["name"]: row for row in read_json(shipped[0] / "export" / "export.json")["rows"]}
    assert rows["model.safetensors"]["top1"] > 60  # well above chance
    for name in ("model.onnx", "model.pt2"):
        assert rows[name]["largest_difference"] <= 1e-4
        assert rows[name]["top1"] == rows["model.safetensors"]["top1"]
    int8 = rows["model.int8.onnx"]
    assert int8["largest_difference"] > 1e-4  # really quantised
    assert abs(int8["top1"] - rows["model.onnx"]["top1"]) <= 1
    assert int8["agreement"] > 97


@pytest.mark.slow
def test_int8_weights_have_seven_bits_and_one_scale_per_channel(shipped):
    """More bits overflow on x86 processors without VNNI; accuracy on other processors would not show it."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(shipped[0] / "export" / "model.int8.onnx").graph
    arrays = {array.name: to_array(array) for array in graph.initializer}
    weights = {name: array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim == 4}
    assert len(weights) == 9
    assert 60 < max(np.abs(array.astype(int)).max() for array in weights.values()) <= 64
    given = {node.input[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    assert all(arrays[given[name][1]].shape == array.shape[:1] for name, array in weights.items())
    exact = {node.output[0] for node in graph.node if node.op_type in ("Cast", "Mul")}  # of the normalisation
    assert not [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in exact]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_an_onnx_file_scores_the_test_set_with_its_runtime_only(shipped, tmp_path, name):
    data = load_data(DataConfig("synthetic"))
    np.save("images.npy", data.test.images.numpy())
    np.save("labels.npy", data.test.labels.numpy())
    shutil.copy(shipped[0] / "export" / name, tmp_path / "alone.onnx")  # one file is enough
    command = [sys.executable, "-I", "-c", SCORE, "alone.onnx", "images.npy", "labels.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    top1, names = json.loads(done.stdout)
    rows = {row["name"]: row for row in read_json(shipped[0] / "export" / "export.json")["rows"]}
    assert top1 == pytest.approx(rows[name]["top1"])
    assert set(names) <= set(data.classes)


@pytest.mark.slow
def test_a_pt2_file_loads_with_torch_only(shipped):
    run = shipped[0]
    extra = {"preprocessing.json": ""}
    code = "import sys, torch\n"
    code += f"extra = {extra!r}\nnetwork = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
    code += "images = torch.arange(3 * 3 * 256).remainder(256).to(torch.uint8).reshape(3, 3, 16, 16)\n"
    code += "torch.save((network(images).detach(), network(images[:1]).detach(), extra), 'logits.pt')\n"
    code += "assert 'kd' not in sys.modules\n"
    command = [sys.executable, "-c", code, str(run / "export" / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    three, one, extra = torch.load("logits.pt")
    deployed = Deployed(kd.load(run), read_json(run / "model.json"))
    expected = deployed(torch.arange(3 * 3 * 256).remainder(256).to(torch.uint8).reshape(3, 3, 16, 16))
    assert torch.allclose(three, expected, atol=1e-5)
    assert torch.allclose(one, expected[:1], atol=1e-5)
    assert json.loads(extra["preprocessing.json"]) == read_json(run / "export" / "preprocessing.json")


@pytest.mark.slow
def test_an_untraceable_network_is_one_message_and_keeps_the_old_export(run):
    main([str(run), "--formats", "safetensors", "--no-table"])
    other = run_of(run, run.parent / "other", "tests.networks:by_value")
    shutil.copytree(run / "export", other / "export")
    before = {path.name: path.read_bytes() for path in (other / "export").iterdir()}
    done = export(other, "--formats", "onnx", "--no-table", "--trust-code")
    assert done.returncode == 2
    assert "tests.networks:by_value cannot be exported" in done.stderr
    assert done.stderr.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (other / "export").iterdir()}
    assert list(other.glob(".*")) == []
    untrusted = export(other, "--formats", "onnx", "--no-table")
    assert (untrusted.returncode, "--trust-code" in untrusted.stderr) == (2, True)


@pytest.mark.slow
def test_int8_is_a_quarter_of_a_resnet18(run):
    other = run_of(run, run.parent / "other", "resnet18")
    done = export(other, "--formats", "onnx", "int8", "--no-table", "--calibration", "64")
    assert done.returncode == 0, done.stderr
    size = {name: (other / "export" / name).stat().st_size for name in ("model.onnx", "model.int8.onnx")}
    assert size["model.int8.onnx"] <= 0.27 * size["model.onnx"]
    assert {path.name for path in (other / "export").iterdir()} == PARTS | {"model.onnx", "model.int8.onnx"}


@pytest.mark.slow
def test_a_network_that_rounds_its_activations_is_exported(run):
    other = run_of(run, run.parent / "other", "tests.networks:rounding")
    done = export(other, "--formats", "onnx", "pt2", "--trust-code")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read_json(other / "export" / "export.json")["rows"]}
    assert rows["model.onnx"]["agreement"] >= 98


@pytest.mark.slow
def test_simkds_deployed_network_is_exported(tmp_path):
    flags = ("--student", "resnet8", "--teacher-model", "resnet8", "--epochs", "1", "--out", "run", "simkd")
    distil(*flags)
    done = export(Path("run"), "--formats", "onnx", "int8", "pt2")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read_json(Path("run/export/export.json"))["rows"]}
    assert rows["model.onnx"]["largest_difference"] <= 1e-4
    assert rows["model.onnx"]["params"] == read_json(Path("run/summary.json"))["params"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The run of a pruned, sparse and quantised student, exported."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet8", "--lr", "0.1", "--epochs", "4", "--out", "full")
        flags = ("--prune", "0.3", "--sparsity", "0.6", "--weight-bits", "2", "--activation-bits", "8")
        distil("--student", "resnet8", "--init", "full", *flags, "--lr", "0.01", "--epochs", "2", "--out", "run")
        done = export(Path("run"), "--formats", "onnx", "int8", "pt2")
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_exports_of_a_compressed_student_keep_its_levels_and_zeros(small, name):
    import onnx
    from onnx.numpy_helper import to_array

    graph, summary = onnx.load(small / "export" / name).graph, read_json(small / "summary.json")
    arrays = [to_array(array) for array in graph.initializer]
    inner = [array for array in arrays if array.ndim == 4 and array.shape[1] != 3]  # not the first layer
    assert len(inner) == len(read_json(small / "model.json")["compression"]["layers"])
    assert max(len(np.unique(channel)) for array in inner for channel in array) == 3
    assert summary["sparsity"] > 0.6
    # BatchNorm and int8 scales are folded into these weights; neither turns another value into zero.
    assert sum((array == 0).sum() for array in inner) / sum(array.size for array in inner) == summary["sparsity"]


@pytest.mark.slow
def test_a_compressed_students_table_and_predictions(small, capsys):
    table, summary = read_json(small / "export" / "export.json"), read_json(small / "summary.json")
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx", "teacher"]
    assert rows["model.safetensors"]["top1"] == summary["test_top1"] > 60
    assert all(rows[name]["agreement"] > 97 for name in GRAPHS)
    assert rows["model.onnx"]["macs"] == summary["macs"] <= 0.7 * rows["teacher"]["macs"]
    assert [row["packed_bytes"] for row in rows.values()] == [summary["packed_bytes"], *[None] * 4]
    page = (small / "export" / "export.md").read_text()
    assert f"{summary['packed_bytes'] / 1e6:.2f} MB" in page
    assert "no file here is packed" in page
    data = load_data(DataConfig("synthetic"))
    for row in range(20):
        Image.fromarray(data.test.images[row].numpy().transpose(1, 2, 0)).save(f"{row:02}.png")
    wanted = [data.classes[label] for label in data.test.labels[:20]]
    for name in ("", "model.onnx", "model.int8.onnx"):
        predict([str(small / "export" / name), ".", "--json"])
        found = [one["predictions"][0]["class"] for one in json.loads(capsys.readouterr().out)]
        assert sum(one == other for one, other in zip(found, wanted, strict=True)) >= 18
