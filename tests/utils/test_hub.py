"""Download from and upload to the Hub, against a local server; and the messages if that fails."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kd
from kd.errors import UserError
from kd.export.__main__ import main as export
from kd.utils.hub import NEEDED
from tests.hub_server import hub


@pytest.fixture(scope="module")
def exported(resnet8_run, tmp_path_factory):
    """An export with only the files that kd.load needs and the model card."""
    run = shutil.copytree(resnet8_run, tmp_path_factory.mktemp("hub") / "run")
    export([str(run), "--formats", "safetensors", "--no-table"])
    return run / "export"


def run_with_hub(server, code: str, token: str = "") -> subprocess.CompletedProcess:
    """Run Python code in a process that uses this server as the Hub."""
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(Path.cwd() / "home"), "HF_HUB_OFFLINE": "0"}
    env = {**os.environ, **settings, "HF_TOKEN": token}
    command = [sys.executable, "-c", f"from pathlib import Path\nfrom kd.utils.hub import local_folder, push\n{code}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_only_safetensors_and_json_are_downloaded(exported):
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    files |= {"pytorch_model.bin": pickle.dumps("not this"), "networks.py": b"raise SystemExit", "extra.json": b"{}"}
    with hub({"somebody/net": files}) as server:
        fetched = run_with_hub(server, "print(local_folder('somebody/net@v2'))")
        assert fetched.returncode == 0, fetched.stderr
    assert "api/models/somebody/net/revision/v2" in server.asked
    folder = Path(fetched.stdout.strip())
    assert {path.name for path in folder.iterdir()} == set(NEEDED)
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(kd.load(folder)(images), kd.load(exported)(images))


@pytest.mark.parametrize("private", [True, False])
def test_what_is_pushed_can_be_loaded(exported, private):
    earlier = ("model.pt2", "best.safetensors", "ema.safetensors", "metrics.jsonl")  # an export's and a run's
    with hub({"me/student": {"notes.txt": b"my own", **dict.fromkeys(earlier, b"old")}}) as server:
        sent = run_with_hub(
            server, f"print(push(Path({str(exported)!r}), 'me/student', private={private}))", token="hf_right"
        )
        assert sent.stdout.strip() == f"{server.url}/me/student", sent.stderr
        assert server.created[0]["name"] == "student"
        request = server.created[0]  # older clients send "private", newer ones "visibility"
        assert request.get("private", request.get("visibility") == "private") is private
        there = server.files["me/student"]
        assert there.keys() == {path.name for path in exported.iterdir()} | {"notes.txt"}
        back = run_with_hub(server, "print(local_folder('me/student'))").stdout.strip()
    assert kd.load(back).state_dict().keys() == kd.load(exported).state_dict().keys()


def test_a_public_repository_gets_nothing_that_should_be_private(exported):
    before = {"notes.txt": b"my own"}
    code = f"import sys\nfrom kd.errors import exit_code\nfolder = Path({str(exported)!r})\n"
    code += "sys.exit(exit_code(lambda: push(folder, 'me/student', True), ''))"
    with hub({"me/student": dict(before)}, public=("me/student",)) as server:
        refused = run_with_hub(server, code, token="hf_right")
        assert server.files["me/student"] == before
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "me/student: is public on the Hub, which --private does not change; nothing was uploaded" in refused.stderr


@pytest.mark.parametrize(("private", "flag"), [(True, " --private"), (False, "")])
def test_without_a_token_the_folder_stays_and_the_message_has_the_command(exported, private, flag):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with hub({}) as server:
        code = f"import sys\nfrom kd.errors import exit_code\nfolder = Path({str(exported)!r})\n"
        refused = run_with_hub(server, code + f"sys.exit(exit_code(lambda: push(folder, 'me/student', {private}), ''))")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"run `hf upload me/student {exported}{flag}` once" in refused.stderr
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@v1"])
def test_offline_an_unknown_id_is_one_message(name):
    with pytest.raises(UserError, match=f"{name}: no such run folder, and it cannot be downloaded from the Hub"):
        kd.load(name)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/a/b", "a/b/c", "nothing", "~/runs"])
def test_a_path_is_never_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("kd.utils.hub._download", lambda name: pytest.fail(f"{name} was downloaded"))
    with pytest.raises(UserError, match="no such run folder"):
        kd.load(name)


def test_a_folder_comes_before_an_id_of_the_same_name(exported, monkeypatch):
    monkeypatch.setattr("kd.utils.hub._download", lambda name: pytest.fail(f"{name} was downloaded"))
    shutil.copytree(exported, "runs/mine")
    assert kd.load("runs/mine")(torch.rand(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", ["student", "me/", "a/b/c", "me/stu dent", "-me/student"])
def test_an_invalid_hub_id_is_refused_before_any_work(name, resnet8_run):
    with pytest.raises(UserError, match="give USER/NAME"):
        export([str(resnet8_run), f"--push={name}"])
