"""`torchrun` whose exit status is the job's: `python -m jobs.torchrun --standalone --nproc-per-node gpu -m jobs NAME …`.

torchrun itself ends with 1 however its processes ended, so a scheduler would repeat a job that its input or a gate had stopped
for good. Its arguments are torchrun's own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

FINAL = (2, 3)
"""Recipe or input at fault, refused by a gate. No process ends so by accident, so one that does speaks for all."""


def main(argv: Sequence[str]) -> int:
    """Runs the job's processes; the exit status that one process alone would have had."""
    # what it logs of a failure would come after the job's own line with the remedy, which is to be the last
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(list(argv))
    except ChildFailedError as error:
        ends = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        final = [status for status in ends.values() if status in FINAL]
        if not final:
            first, _ = error.get_first_failure()
            print(f"torchrun: process {first} ended with status {ends[first]}", file=sys.stderr, flush=True)
        return final[0] if final else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
