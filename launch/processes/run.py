"""Starts several processes of one `relearn` command on this machine.

usage: python launch/processes/run.py -n 2 [--logs=FOLDER] -- relearn audit --config=... --workdir=...

What process K writes is in FOLDER/process-K.log ("logs" by default); process 0's is shown, too. Ctrl-C and SIGTERM
reach all of them. Where one fails or is killed, the others are ended, and the exit status is that of the first that
failed (128 and the number of the signal that killed it).
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from types import FrameType

GRACE = 5.0  # seconds in which the others may end by themselves; as many again between SIGTERM and SIGKILL
SHOWN = 20  # lines at the end of a log


def free_port() -> int:
  """A port of this machine that nobody uses now."""
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return int(found.getsockname()[1])


def start(command: list[str], count: int, logs: pathlib.Path) -> dict[int, subprocess.Popen[bytes]]:
  """The processes by their number, each in a group of its own, so that a terminal's Ctrl-C reaches it once, from us."""
  logs.mkdir(parents=True, exist_ok=True)
  flags = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
  found = {}
  for number in range(count):
    with (logs / f"process-{number}.log").open("wb") as log:
      found[number] = subprocess.Popen([*command, *flags, f"--process_id={number}"],
                                       stdout=subprocess.PIPE if number == 0 else log, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
  return found


def copy(process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
  """Shows what process 0 writes, and writes it down."""
  assert process.stdout
  with log.open("wb") as file:
    while chunk := os.read(process.stdout.fileno(), 65536):
      file.write(chunk)
      file.flush()
      sys.stdout.buffer.write(chunk)
      sys.stdout.flush()


def send(processes: dict[int, subprocess.Popen[bytes]], number: int) -> None:
  """Sends a signal to those that are still there."""
  for process in processes.values():
    if process.returncode is None:
      try:
        os.kill(process.pid, number)
      except ProcessLookupError:
        pass


def wait(processes: dict[int, subprocess.Popen[bytes]]) -> tuple[int, int]:
  """Number and exit status of the first process that fails, once all have ended; (0, 0) where none does."""
  by_pid, first, timers = {process.pid: number for number, process in processes.items()}, (0, 0), []
  while any(process.returncode is None for process in processes.values()):
    pid, how = os.wait()
    if pid not in by_pid:
      continue
    status = os.waitstatus_to_exitcode(how)
    processes[by_pid[pid]].returncode = status
    if status and not timers:
      first = by_pid[pid], status if status > 0 else 128 - status
      for seconds, number in ((GRACE, signal.SIGTERM), (2 * GRACE, signal.SIGKILL)):
        timers.append(threading.Timer(seconds, send, (processes, number)))
        timers[-1].daemon = True
        timers[-1].start()
  for timer in timers:
    timer.cancel()
  return first


def main() -> int:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("-n", "--number", type=int, required=True, help="processes")
  parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("logs"), help="folder")
  parser.add_argument("command", nargs="+", help="after --: relearn COMMAND --flag=value ...")
  given = parser.parse_args()
  processes = start(given.command, given.number, given.logs)

  def forward(number: int, _: FrameType | None) -> None:
    send(processes, number)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  shown = threading.Thread(target=copy, args=(processes[0], given.logs / "process-0.log"))
  shown.start()
  number, status = wait(processes)
  shown.join()
  if status:
    log = given.logs / f"process-{number}.log"
    print(f"\nprocess {number} of {given.number} ended first, with status {status}: {log}", file=sys.stderr)
    if number:
      print(*log.read_text(errors="replace").splitlines()[-SHOWN:], sep="\n", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit(main())
