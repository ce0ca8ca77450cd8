import os
import signal
import time

import pytest
from test_batches import plan

from defectnet.batches import phonon_batch, relax_batch
from defectnet.interruption import SIGNALS, Interrupted, stops_in_time, uninterrupted
from defectnet.records import RecordStore, read_record


def now(number):
    """Send a signal to this process; Python runs its handler before the next statement."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_ends_the_block_and_names_itself(number):
    with pytest.raises(Interrupted, match=signal.Signals(number).name), stops_in_time(None):
        now(number)
        pytest.fail("went on")


def test_stops_before_the_limit_and_not_much_before():
    began, minutes = time.monotonic(), 0.01
    with pytest.raises(Interrupted, match="nearly over"), stops_in_time(minutes):
        while time.monotonic() - began < 5:
            time.sleep(0.001)
    assert 0.8 * 60 * minutes < time.monotonic() - began < 60 * minutes


def test_handlers_and_alarm_are_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stops_in_time(10.0):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_second_signal_does_not_disturb_the_cleaning_up():
    cleaned = False
    with pytest.raises(Interrupted, match="SIGUSR1"), stops_in_time(None):
        try:
            now(signal.SIGUSR1)
        finally:
            now(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_signal_waits_until_something_is_written():
    written = False
    with pytest.raises(Interrupted), stops_in_time(None), uninterrupted():
        now(signal.SIGTERM)
        written = True
    assert written


def test_interrupted_batch_keeps_what_is_finished_and_records_no_failure(hosts, config, store, monkeypatch):
    host = hosts[:1]
    plans = {one.id: plan(one, config) for one in host}
    relaxations = relax_batch(host, plans, config, store)
    save = RecordStore.save

    def then_end(*arguments):
        save(*arguments)
        now(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted), stops_in_time(None):
        patch.setattr(RecordStore, "save", then_end)
        phonon_batch(relaxations, plans, config, store)
    (finished,) = (store.root / "phonons").glob("*/*.h5")
    assert read_record(finished).done
    before = finished.stat().st_mtime_ns
    entries = phonon_batch(relaxations, plans, config, store)
    assert {entry.status for entry in entries} == {"done"} and len(entries) == 3
    assert finished.stat().st_mtime_ns == before
