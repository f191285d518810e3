"""That tests.same_bytes sees what differs, and nothing else."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests import same_bytes
from tests.conftest import ROOT
from tests.same_bytes import COMMANDS, Side, compare_folders, run_methods, with_needs, with_shared_methods

RUN = ROOT / "tests" / "runs" / "written_by_9b93d35"
STEP = "student/checkpoint/step-9"
KEPT = "runs/cache/teacher-a7e2e4dbf937"


@pytest.fixture(autouse=True)
def pair():
    for name in ("before", "now"):
        shutil.copytree(RUN, name)
    assert compare() == []


def compare() -> list[str]:
    return compare_folders(Path("before"), Path("now"))


def flip(name: str, at: int) -> None:
    content = bytearray(Path("now", name).read_bytes())
    content[at] ^= 1
    Path("now", name).write_bytes(content)


def edit(name: str, *keys: str | int, value: object) -> None:
    """Set one value of a JSON file."""
    path = Path("now", name)
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "finished/model.safetensors",
        "finished/best.safetensors",
        "finished/test_logits.safetensors",
        f"{STEP}/optimizer.safetensors",
        f"{KEPT}/logits.npy",
    ],
)
def test_a_changed_byte_is_reported(name):
    flip(name, -1)
    (found,) = compare()
    assert found.startswith(f"{name}: ")


def test_a_changed_tensor_is_named():
    flip("finished/model.safetensors", -1)
    (found,) = compare()
    assert found.startswith("finished/model.safetensors: 4.weight 'float32[4, 128] sha256 ")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("finished/summary.json", ("test_top1",)),
        ("finished/config.json", ("identity", "lr")),
        ("finished/config.json", ("flags", "data", "workers")),
        (f"{STEP}/state.json", ("state", "step")),
        (f"{STEP}/state.json", ("state", "sums", "rows", 0, 0)),
        (f"{STEP}/manifest.json", ("model.safetensors",)),
        (f"{KEPT}/manifest.json", ("identity", "teacher_sha256")),
    ],
)
def test_a_changed_value_is_reported(name, keys):
    edit(name, *keys, value=12345)
    (found,) = compare()
    assert found.startswith(f"{name}: {'.'.join(map(str, keys))} ")
    assert found.endswith("before, 12345 now")


def test_a_changed_metric_is_reported_to_its_last_bit():
    path = Path("now/finished/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["val/loss"] = float(np.nextafter(lines[1]["val/loss"], 1))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = compare()
    assert found.startswith("finished/metrics.jsonl: 1.val/loss ")


def test_another_order_of_keys_and_another_type_are_reported():
    path = Path("now/finished/summary.json")
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(summary.items()))))
    assert compare() == ["finished/summary.json: keys in another order"]
    path.write_text(json.dumps(summary | {"epochs": float(summary["epochs"])}))
    assert compare() == ["finished/summary.json: epochs 2 before, 2.0 now"]


def test_many_differences_in_one_file_take_three_lines():
    for key in ("test_top1", "test_top5", "test_nll", "epochs"):
        edit("finished/summary.json", key, value=12345)
    assert len(found := compare()) == 3
    assert found[-1] == "finished/summary.json: 2 more differences"


def test_names_are_compared():
    Path("now/finished/best.safetensors").unlink()
    Path(f"now/{KEPT}").rename("now/runs/cache/teacher-000000000000")
    found = compare()
    assert "finished/best.safetensors: only before" in found
    assert f"{KEPT}/logits.npy: only before" in found
    assert "runs/cache/teacher-000000000000/logits.npy: only now" in found
    assert len(found) == 5


def test_known_new_files_are_none_of_the_differences_and_old_ones_that_are_gone_are():
    for name in ("levels-0123456789abcdef.json", "about.json"):
        Path("now/runs/cache", name).write_text("{}")
    assert compare() == []
    for name in ("levels-0123456789abcdef.json", "about.json"):
        Path("now/runs/cache", name).rename(Path("before/runs/cache", name))
    assert len(compare()) == 2
    Path("now/runs/cache/levels.txt").write_text("")
    assert "runs/cache/levels.txt: only now" in compare()


def test_a_flag_that_older_versions_lack_may_have_its_default_and_no_other_value():
    path = Path("now/finished/config.json")
    config = json.loads(path.read_text())
    config["flags"]["data"] |= {"no_labels": False}
    path.write_text(json.dumps(config))
    assert compare() == []
    config["flags"]["data"] |= {"label_share": 0.5}
    path.write_text(json.dumps(config))
    assert compare() == ["finished/config.json: flags.data.label_share 1.0 before, 0.5 now"]


def test_what_a_clock_measured_is_not_compared():
    for key in ("seconds", "images_per_second"):
        edit("finished/summary.json", key, value=12345)
    edit(f"{STEP}/state.json", "state", "seconds", value=12345)
    edit(f"{STEP}/state.json", "state", "timing", value={})
    edit(f"{STEP}/manifest.json", "state.json", value="another sha256")
    edit("finished/config.json", "git_commit", value="another")
    Path("now/finished/curves.png").write_bytes(b"a picture")
    assert compare() == []


def test_a_pt2_file_is_compared_but_for_its_id_and_the_modules_of_kd():
    def write(folder: str, module: str, weight: bytes) -> None:
        with zipfile.ZipFile(Path(folder, "model.pt2"), "w") as archive:
            archive.writestr("model/models/model.json", f"L__self__,,{module}.Deployed")
            archive.writestr("model/data/weight_0", weight)
            archive.writestr("model/.data/serialization_id", folder)

    write("before", "kd.shipping.deploy", b"1")
    write("now", "kd.export.deployed", b"1")
    assert compare() == []
    write("now", "kd.export.deployed", b"2")
    (found,) = compare()
    assert found.startswith("model.pt2: model/data/weight_0 ")


def test_each_command_comes_after_those_that_it_needs():
    for name in COMMANDS:
        names = with_needs([name])
        assert names[-1] == name
        assert all(set(COMMANDS[one].needs) <= set(names[:place]) for place, one in enumerate(names))


def test_methods_that_one_version_lacks_are_named_and_left_out(monkeypatch, capsys):
    ran, listed = [], {"old": "none kd gone", "new": "none new kd"}
    monkeypatch.setattr(same_bytes, "ask", lambda side, code: listed[side.checkout.name])
    monkeypatch.setattr(same_bytes, "run", lambda line: lambda side, folder: ran.append(line.split()[-1]))
    sides = with_shared_methods(Side(Path("old"), Path("before")), Side(Path("new"), Path("now")))
    lines = ["not compared, as only before: gone", "not compared, as only now: new"]
    assert capsys.readouterr().out.splitlines() == lines
    for side in sides:
        run_methods(side, Path("now"))
    assert ran == ["none", "kd"] * 2
    listed["old"] = ""
    with pytest.raises(same_bytes.Failed, match=r"old: kd\.config lists no methods"):
        with_shared_methods(*sides)
