"""Where numbers go, and that Weights & Biases can fail as it likes."""

import sys
from pathlib import Path

import pytest

from kd.config import RunConfig
from kd.report.document import Heading, Table
from kd.study.__main__ import track_report
from kd.training import tracking
from tests.run_scripts import metrics_of, teach


class FakeRun:
    """Records what W&B would be told; raises where asked to."""

    dir, offline, resumed = "here", True, False

    def __init__(self, fail: str = ""):
        self.fail, self.calls, self.summary = fail, [], {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fail:
                raise ConnectionError("the service is gone")

        return call


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for the service; returns a function that starts a teacher's run against it."""
    import wandb

    monkeypatch.delenv("WANDB_MODE")

    def run(fail: str = "", *args: str, modes=("offline",)):
        fake, started = FakeRun(fail), []

        def init(**options):
            started.append(options)
            if options["mode"] not in modes:
                raise wandb.errors.CommError("unreachable")
            return fake

        monkeypatch.setattr(wandb, "init", init)
        teach("--out", f"run-{fail}", "--wandb", "offline", *args)
        return fake, started

    return run


def test_row_42_wandb_gets_the_same_numbers_under_the_same_names(wandb):
    fake, started = wandb()
    *logged, media = [args[0] for name, args, _ in fake.calls if name == "log"]
    assert media.keys() == {"curves", "results"}
    clean = [{key: value for key, value in line.items() if key != "images_per_second"} for line in logged]
    assert clean == metrics_of(Path("run-"))
    assert fake.summary["status"] == "finished"
    assert (started[0]["group"], started[0]["job_type"]) == ("report", "teacher")
    assert started[0]["config"]["batch_size"] == 50
    assert started[0]["tags"] == ["report", "tests.networks:normalised", "none", "synthetic"]
    assert ("define_metric", ("*",), {"step_metric": "epoch"}) in fake.calls


@pytest.mark.parametrize("fail", ["define_metric", "log", "finish"])
def test_row_42_wandb_raising_anywhere_changes_nothing(wandb, fail, capsys):
    wandb(fail)
    assert "the run continues without it" in capsys.readouterr().out
    teach("--out", "quiet")
    assert metrics_of(Path(f"run-{fail}")) == metrics_of(Path("quiet"))
    assert Path(f"run-{fail}/summary.json").exists()


def test_row_42_without_the_library_at_all_nothing_changes(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", None)
    teach("--out", "without", "--wandb", "offline")
    assert "W&B failed to start" in capsys.readouterr().out
    teach("--out", "quiet")
    assert metrics_of(Path("without")) == metrics_of(Path("quiet"))
    track_report([], Path("report"), RunConfig(wandb="offline", wandb_group="study"))
    assert "W&B failed to keep the report" in capsys.readouterr().out


@pytest.mark.parametrize("resumed", [False, True])
def test_a_resumed_run_that_wandb_does_not_know_is_told_all_of_it(wandb, resumed, monkeypatch):
    """The service goes on with what it has; offline each resumption begins an empty folder."""
    log = tracking.Tracker.log

    def stops(self, line):
        log(self, line)
        if line["epoch"] == 2:  # of which no checkpoint knows yet
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking.Tracker, "log", stops)
        wandb()
    monkeypatch.setattr(FakeRun, "resumed", resumed)
    fake, _ = wandb("", "--resume")
    logged = [args[0]["epoch"] for name, args, _ in fake.calls if name == "log" and "epoch" in args[0]]
    assert logged == ([2] if resumed else [1, 2])


def test_each_set_of_images_keeps_its_tables(monkeypatch):
    wandb = pytest.importorskip("wandb")
    fake = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: fake)
    Path("report.html").write_text("page")
    table = lambda cell: Table(("network",), [(cell,)])  # noqa: E731
    blocks = [Heading(1, "What was gained"), Heading(2, "On a/x"), Heading(3, "Accuracy"), table("x")]
    blocks += [Heading(2, "On a/y"), Heading(3, "Accuracy"), table("y"), Heading(2, "Not counted"), table("z")]
    track_report(blocks, Path(), RunConfig(wandb="offline", wandb_group="study"))
    (media,) = [args[0] for name, args, _ in fake.calls if name == "log"]
    kept = {name: value.data for name, value in media.items() if name != "report"}
    assert kept == {"On a.x/Accuracy": [["x"]], "On a.y/Accuracy": [["y"]], "Not counted": [["z"]]}


def test_an_unreachable_service_falls_back_to_offline(wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    _, started = wandb("", "--wandb", "online")
    assert [options["mode"] for options in started] == ["online", "offline"]
    assert "the run is stored offline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "env", "key", "mode"),
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "offline", True, "offline"),
        ("online", None, False, "offline"),
        ("disabled", None, True, "disabled"),
    ],
)
def test_row_42_wandb_never_prompts(asked, env, key, mode, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", "/nonexistent")
    if env:
        monkeypatch.setenv("WANDB_MODE", env)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking.wandb_mode(asked) == mode


def test_a_key_in_netrc_is_found(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.has_wandb_key()
