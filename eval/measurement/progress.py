"""One line of progress with the time left, at most every few seconds."""

import time


def minutes(seconds: float) -> str:
    """m:ss"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Calls `report("WHAT: DONE/TOTAL, left M:SS")` now and then; `note` is appended."""

    def __init__(self, report, what: str, total: int, every: float = 5.0):
        self.report, self.what, self.total, self.every = report, what, total, every
        self.started = self.shown = time.time()

    def __call__(self, done: int, note: str = "") -> None:
        now = time.time()
        if now - self.shown >= self.every or done == self.total:
            self.shown = now
            left = (now - self.started) / max(done, 1) * (self.total - done)
            self.report(f"{self.what}: {done}/{self.total}{note}, left {minutes(left)}")
