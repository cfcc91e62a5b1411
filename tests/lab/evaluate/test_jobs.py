"""Workers of an evaluation."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from corematching.lab.evaluate.jobs import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()  # nothing of the parent runs any more
    parent.wait()
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


CREW = """
import os, signal, threading, time
from corematching.lab.evaluate import Plan
from corematching.lab.evaluate.jobs import Crew

def load():
    os.write(1, b"loading\\n")  # in one piece, beside the other worker's
    threading.Event().wait()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    with Crew({count}, load, None, {}, Plan()):
        os.write(1, b"started\\n")
        while True:
            time.sleep(0.05)  # the signal may reach another thread, which wakes no waiting one
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["at once", "while they load"])
def test_workers_are_not_waited_for_after_an_interrupt(tmp_path, when):
    script = tmp_path / "crew.py"
    count = 2 if when == "while they load" else 1
    script.write_text(CREW.replace("{count}", str(count)))
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for expected in ["started"] + ["loading"] * (count if when == "while they load" else 0):
            assert parent.stdout.readline().strip() == expected
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGINT)
        parent.wait(60)  # without an end to them, for ever
    finally:
        parent.kill()
    _, left = psutil.wait_procs(workers, timeout=30)  # one is Python's own, which ends last
    assert len(workers) >= 2 and not left
