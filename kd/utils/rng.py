"""Random choices as pure functions of (seed, number, sample index).

They are the same on every device, for any number of processes and after any resume, so training has no random state
to save.
"""

import hashlib
from functools import lru_cache

import torch
from accelerate.utils import set_seed
from jaxtyping import Float, Int
from torch import Tensor

_MASK = 0xFFFFFFFF


@torch.compiler.assume_constant_result
def derive(*words: int | str) -> int:
    """A seed of 63 bits for a purpose: derive(seed, "network")."""
    return _derived("/".join(map(str, words)))


@lru_cache(4096)
def _derived(words: str) -> int:
    digest = hashlib.sha256(words.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*words: int | str) -> None:
    """Seed Python's, NumPy's and torch's generators for a purpose (NumPy takes 32 bits)."""
    set_seed(derive(*words) & _MASK)


def seed_step(seed: int, step: int, process: int, device: torch.device) -> None:
    """Seed torch for one step's dropout and the like: different on each process, equal after a resume.

    The generators of the CPU, by which a network may draw which layers to skip, and of this process's device; those
    that torch.manual_seed seeds, which tries every kind of device there is and takes 50 times as long.
    """
    number = derive(seed, "step", step, process)
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def order(seed: int, epoch: int, size: int) -> Int[Tensor, "n"]:
    """The order in which an epoch visits `size` samples."""
    bits = random_bits(torch.arange(size), seed, "order", epoch)
    return torch.argsort(bits, stable=True)


def random_below(limit: int, index: Int[Tensor, "*n"], *words: int | str) -> Int[Tensor, "*n"]:
    """An integer in [0, limit) for each index, uniform to within 2^-32 * limit."""
    return (random_bits(index, *words) * limit) >> 32


def random_uniform(index: Int[Tensor, "*n"], *words: int | str) -> Float[Tensor, "*n"]:
    """A number in [0, 1) for each index, on a grid of 2^-24 (exact in float32 on every device)."""
    return (random_bits(index, *words) >> 8).float() * 2.0**-24


def random_bits(index: Int[Tensor, "*n"], *words: int | str) -> Int[Tensor, "*n"]:
    """32 random bits for each index; independent for different words (a seed, an epoch, a purpose, ...)."""
    key = derive(*words)
    return _mix(_mix(_mix(index & _MASK) ^ (key & _MASK)) ^ (key >> 32))


def _mix(bits: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    # A 32-bit finaliser with full avalanche ("lowbias32", Wellons 2018) in int64: products wrap modulo 2^64 on every
    # device alike, and the low 32 bits of a wrapped product are right.
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)
