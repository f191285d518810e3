"""Two machines without a common disk, as two forked processes: each has a folder, a data cache and a local rank 0.

Each child sees what torchrun sets on a machine of its own; they meet on this one. Nothing in kd/ knows of this.
"""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState

from kd.errors import exit_code
from tests.forks import _free_port
from tests.run_scripts import distil, teach

PATIENCE = 100.0  # seconds after which a run counts as hung
SCRIPTS = {"teach": teach, "distil": distil}


class Ended(NamedTuple):
    """How one process ended."""

    code: int | None  # None: it was still running when the patience was at its end
    log: str
    answer: object = None


def two_nodes(work: Callable[[int], object], shared: bool = False, local: bool = False) -> list[Ended]:
    """`work(rank)` in two processes that find each other, in node0/ and node1/ of the present folder.

    `shared`: both in the present folder, with one data cache, as on a shared disk. `local`: as two processes of one
    machine.
    """
    port, running = _free_port(), {}
    sys.stdout.flush()
    for rank in range(2):
        folder = Path.cwd() if shared or local else Path(f"node{rank}").absolute()
        folder.mkdir(exist_ok=True)
        process = os.fork()
        if not process:
            _child(work, rank, folder, port, local)
        running[process] = rank
    return _wait(running)


def run_nodes(kind: str, *flags: str, shared: bool = False) -> list[Ended]:
    """A script on two nodes; `kind` is teach or distil."""
    return two_nodes(lambda rank: SCRIPTS[kind](*flags), shared)


def _child(work: Callable, rank: int, folder: Path, port: int, local: bool) -> None:
    code = 70
    try:
        os.chdir(folder)
        output = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["KD_CACHE"] = str(folder / "data")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"LOCAL_RANK": str(rank * local), "LOCAL_WORLD_SIZE": str(1 + local)}
        os.environ |= {"GROUP_RANK": str(rank * (not local)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        # Not what pytest has put in their place, which the parent writes to as well.
        sys.stdout = sys.stderr = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        AcceleratorState._reset_state(reset_partial_state=True)

        def act() -> None:
            (folder / f"answer{rank}").write_bytes(pickle.dumps(work(rank)))

        code = exit_code(act, "")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(running: dict[int, int]) -> list[Ended]:
    """A launcher ends nobody here: whoever hangs after the other's end is seen to hang."""
    ended: dict[int, int | None] = {}
    start = time.monotonic()
    while running and time.monotonic() - start < PATIENCE:
        for process, rank in list(running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                del running[process]
                ended[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for process, rank in running.items():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        ended[rank] = None
    return [_ended(rank, ended[rank]) for rank in range(2)]


def _ended(rank: int, code: int | None) -> Ended:
    folder = next(folder for folder in (Path(f"node{rank}"), Path()) if (folder / f"log{rank}").exists())
    answer = folder / f"answer{rank}"
    found = pickle.loads(answer.read_bytes()) if code == 0 and answer.exists() else None
    answer.unlink(missing_ok=True)
    return Ended(code, (folder / f"log{rank}").read_text(), found)
