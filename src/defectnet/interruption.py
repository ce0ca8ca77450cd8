"""Stopping in time: a job that is told to end, or that is about to run out of it, keeps what it has.

Schedulers announce the end of a job by SIGTERM (SLURM: time limit, preemption, scancel) or, where asked to, SIGUSR1.
Both, and an alarm shortly before a time limit, are turned into an exception in the main thread, exactly like Ctrl-C:
records that are written are whole, chunks of a long computation are in its checkpoint, and the next attempt goes on.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""

MARGIN_SHARE, MARGIN_MAX_S = 0.1, 120.0
"""What is left of the time limit when a job stops, for the last forward pass, for cleaning up and for the scheduler."""


class Interrupted(BaseException):
    """The job has to end now. Like KeyboardInterrupt no Exception, so that nobody takes it for a failed computation."""


class _State:
    """Of this process: whether interruptions wait at the moment, and the reason of one that does."""

    held = False
    waiting = ""


@contextlib.contextmanager
def stops_in_time(minutes: float | None) -> Iterator[None]:
    """Raise :class:`Interrupted` inside the block on one of :data:`SIGNALS`, or when ``minutes`` are nearly over.

    Main thread only. Signals that follow the first one are ignored: cleaning up is already under way.
    """

    def stop(number: int, _frame: object) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        reason = f"{minutes:g} minutes are nearly over" if number == signal.SIGALRM else signal.Signals(number).name
        if _State.held:
            _State.waiting = reason
        else:
            raise Interrupted(reason)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    if minutes is not None:
        limit = 60.0 * minutes
        signal.setitimer(signal.ITIMER_REAL, limit - min(MARGIN_SHARE * limit, MARGIN_MAX_S))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interruption back while something is written that is too good to lose; it comes at the end of the block.

    Not by masking signals: any thread may receive them, the handler runs in the main one.
    """
    _State.held = True
    try:
        yield
    finally:
        _State.held = False
        if _State.waiting:
            reason, _State.waiting = _State.waiting, ""
            raise Interrupted(reason)
