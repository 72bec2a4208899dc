"""The launcher: logs by process, signals to all, the status of the first that failed."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from .several import LAUNCH

# In place of a command: what it does follows from the number that the launcher gave it.
START = "import os, signal, sys, time\nme = int(sys.argv[-1].partition('=')[2])\nprint('this is', me, flush=True)\n"


def start(tmp_path: pathlib.Path, body: str, number: int = 3) -> subprocess.Popen[str]:
  return subprocess.Popen([*LAUNCH, "-n", str(number), f"--logs={tmp_path / 'logs'}", "--", sys.executable, "-c",
                           START + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_has_a_log_and_its_own_flags(tmp_path: pathlib.Path) -> None:
  process = start(tmp_path, "print(*sys.argv[1:-1])\n")
  out, error = process.communicate(timeout=60)
  assert process.returncode == 0 and not error
  first, flags = out.splitlines()
  assert first == "this is 0" and flags.split()[0].startswith("--coordinator_address=localhost:")
  assert flags.split()[1] == "--num_processes=3"
  assert [(tmp_path / "logs" / f"process-{me}.log").read_text() for me in range(3)] == [
      f"this is {me}\n{flags}\n" for me in range(3)]


@pytest.mark.parametrize(("body", "status"), [
    ("if me == 1: sys.exit(7)\ntime.sleep(0.5)\nsys.exit(3)\n", 7),
    ("if me == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.5)\nsys.exit(3)\n", 137)])
def test_the_first_that_fails_gives_the_status(tmp_path: pathlib.Path, body: str, status: int) -> None:
  process = start(tmp_path, body)
  _, error = process.communicate(timeout=60)
  assert process.returncode == status
  assert f"process 1 of 3 ended first, with status {status}: {tmp_path / 'logs' / 'process-1.log'}\nthis is 1" in error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_all(tmp_path: pathlib.Path, number: int, status: int) -> None:
  """Each says so itself; none is left."""
  process = start(tmp_path, f"""
signal.signal({int(number)}, lambda *_: (print('ended', flush=True), os._exit({status})))
print('ready', flush=True)
time.sleep(60)
""")
  logs = [tmp_path / "logs" / f"process-{me}.log" for me in range(3)]
  end = time.monotonic() + 30
  while not all(log.exists() and "ready" in log.read_text() for log in logs):
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(number)
  process.communicate(timeout=30)
  assert process.returncode == status
  assert all(log.read_text().endswith("ready\nended\n") for log in logs)


def test_those_that_are_left_are_ended(tmp_path: pathlib.Path) -> None:
  """Where one fails and the others do not notice."""
  begin = time.monotonic()
  process = start(tmp_path, "if me == 2: sys.exit(5)\ntime.sleep(100)\n")
  process.communicate(timeout=60)
  assert process.returncode == 5 and time.monotonic() - begin < 30
