"""How many processor cores there are to work with. No torch here."""

import os


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Those for each of this machine's processes of one run."""
    return max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
