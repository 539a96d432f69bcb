"""A judge that crashes and hangs when it is told to, for tests of the workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from hostile.jobs import Job, Verdict


class FakeJudge:
    """Does what the job's kind says."""

    def __init__(self, good: Path, scratch: Path) -> None:
        self._good, self._scratch = good, scratch

    def judge(self, job: Job) -> Verdict:
        if job.source == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job.source == "exit":
            os._exit(3)
        if job.source == "hang":
            time.sleep(60)
        if job.source == "slow once":  # as on a machine that is busy with something else
            mark = self._good / "was slow"
            if not mark.exists():
                mark.touch()
                time.sleep(60)
        return Verdict("nothing", "right")
