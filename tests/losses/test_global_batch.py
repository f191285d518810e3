"""Two processes with half a batch each train like one process with the whole batch."""

import warnings

import pytest
import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel

from kd.config import METHODS
from tests.pairs import SAMPLES, batch_of, build

# The others normalise over each process's own share without --sync-batchnorm.
METHODS_WITHOUT_BATCHNORM = [*sorted(METHODS.keys() - {"fitnet", "reviewkd", "simkd"}), "kd+crd+at"]
FLAGS = {"ofa": {"student_layers": ("2",)}}  # the last stage's exit has no BatchNorm
STEPS, BATCH = 3, 16


def train(method: str, process: int, processes: int) -> dict[str, torch.Tensor]:
    """Weights and buffers after three steps, and the last step's terms averaged over processes."""
    distiller, teacher = build(method, **FLAGS.get(method, {}))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
    model = DistributedDataParallel(distiller) if processes > 1 else distiller
    share = BATCH // processes
    for step in range(STEPS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))
        batch = batch_of(order[process * share : (process + 1) * share], step, method)
        with torch.no_grad():
            outputs = teacher.of_batch(batch)
        terms = model(batch, outputs).terms
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    total = torch.stack([term.detach() for term in terms.values()])
    if processes > 1:
        distributed.all_reduce(total)
    return {**distiller.state_dict(), "terms": total / processes}


def worker(process: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
    torch.save({method: train(method, process, 2) for method in METHODS_WITHOUT_BATCHNORM}, f"{folder}/{process}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("two"))
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{process}.pt") for process in range(2)]


@pytest.mark.parametrize("method", METHODS_WITHOUT_BATCHNORM)
def test_two_processes_train_as_one(two, method):
    one = train(method, 0, 1)
    for name, expected in one.items():
        first, second = (process[method][name] for process in two)
        rounding = 1e-3 if name == "terms" else 1e-4  # pkt multiplies its own by 30,000
        assert torch.allclose(first, expected, rtol=rounding, atol=rounding / 10), name
        assert torch.equal(first, second), f"{name} differs between the processes"
