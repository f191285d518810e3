"""Where a run lies, how it is saved and followed. None of it changes the weights."""

from dataclasses import dataclass
from typing import Literal

from kd.errors import require


@dataclass(frozen=True)
class RunConfig:
    out: str | None = None
    """Run folder; runs/<preset>/<what>-<model>-seed<seed>-<hash> if left out."""
    resume: bool = False
    """Continue the run in the folder; an error if there is none."""
    auto_resume: bool = False
    """Continue if there is something to continue, else start."""
    resume_inexact: bool = False
    """With either of them: continue with another number of processes. The global batch stays as it is, and the learning
    rate; the bits do not."""
    save_every: int = 0
    """Save every so many steps as well as after every epoch; 0 for epochs only."""
    log_every: int = 50
    """Read losses from the device, and agree to stop, every so many steps."""
    diagnose_every: int = 200
    """Compare the gradients of distillation and cross-entropy every so many steps, at some cost; 0 for never."""
    threads: int | None = None
    """CPU threads of each process; left out: all the cores it may use."""
    test: bool = True
    """Read the test split at the end. --no-test leaves it unread and the summary's test keys null, for settings that
    are compared on validation; the same command without it then only reads the test split."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a key is found, else offline."""
    wandb_project: str = "kd"
    """Project in Weights & Biases."""
    wandb_group: str | None = None
    """Group in Weights & Biases; the preset's name if left out."""

    def check(self) -> None:
        require(self.save_every >= 0, f"--save-every {self.save_every}: give 0 or more")
        require(self.diagnose_every >= 0, f"--diagnose-every {self.diagnose_every}: give 0 or more")
        require(self.log_every >= 1, f"--log-every {self.log_every}: give 1 or more")
        require(self.threads is None or 1 <= self.threads <= 1024, f"--threads {self.threads}: give 1 to 1024")
        require(not (self.resume and self.auto_resume), "--resume and --auto-resume: give one of them")
        require(
            not self.resume_inexact or self.resume or self.auto_resume,
            "--resume-inexact: says how to continue; give --resume or --auto-resume with it",
        )
