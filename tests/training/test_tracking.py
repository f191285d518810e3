"""Where numbers go, and that Weights & Biases can fail as it likes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd.config import RunConfig
from kd.errors import UserError
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


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.filterwarnings("default")  # of TensorBoard's own dependencies
def test_tensorboard_has_every_epoch_once_after_a_kill(monkeypatch):
    pytest.importorskip("tensorboard")
    log = tracking.Tracker.log

    def stops(self, line):
        log(self, line)
        if line["epoch"] == 2:  # of which no checkpoint knows yet
            raise KeyboardInterrupt

    flags = ("--out", "run", "--epochs", "3", "--track", "tensorboard")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking.Tracker, "log", stops)
        teach(*flags)
    teach(*flags, "--resume")
    expected = [(line["epoch"], pytest.approx(line["val/top1"])) for line in metrics_of(Path("run"))]
    assert scalars(Path("run/tensorboard"), "val/top1") == expected
    assert [step for step, _ in scalars(Path("run/tensorboard"), "summary/test_top1")] == [3]
    teach("--out", "quiet", "--epochs", "3")
    assert metrics_of(Path("run")) == metrics_of(Path("quiet"))


class FakeTracker:
    """Stands in for one of Accelerate's trackers of services that are not installed."""

    def __init__(self, **options):
        self.options, self.logged, self.flags = options, [], None
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
        FakeTracker.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.flags = values

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_other_trackers_go_on_in_their_run(name, monkeypatch):
    FakeTracker.made = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, FakeTracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    log = tracking.Tracker.log

    def stops(self, line):
        log(self, line)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking.Tracker, "log", stops)
        teach("--out", "run", "--track", name)
    teach("--out", "run", "--track", name, "--resume")
    first, second = FakeTracker.made
    assert first.flags["batch_size"] == 50
    assert all(isinstance(value, bool | int | float | str) for value in first.flags.values())
    assert second.flags is None
    assert second.options.get("run_id", "abc") == "abc"
    assert (name == "mlflow") == ("run_id" in second.options)
    steps = [entry if entry == "finished" else entry[0] for entry in first.logged + second.logged]
    assert steps == [1, 1, 2, 2, "finished"]  # the first epoch had no checkpoint yet


def test_a_tracker_that_raises_stops_nothing(monkeypatch, capsys):
    def breaks(**_):
        raise ConnectionError("no server")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", breaks)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    teach("--out", "run", "--track", "mlflow")
    assert (
        "mlflow failed to start (ConnectionError: no server); the run continues without it" in capsys.readouterr().out
    )
    assert Path("run/summary.json").exists()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="--track trackio: is not installed: pip install trackio"):
        RunConfig(track=("trackio",)).check()
    RunConfig(track=("wandb",)).check()


def test_without_wandb_in_the_list_there_is_no_wandb(wandb, monkeypatch):
    FakeTracker.made = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", FakeTracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    _, started = wandb("", "--track", "mlflow")
    assert not started
    assert FakeTracker.made
