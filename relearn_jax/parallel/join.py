"""How the processes of one command find each other, and how they end: together.

A process that fails says so in the coordinator's store. A thread of every other one watches for that and ends its
process, wherever that is waiting: in an exchange of arrays, for a decision, or at a barrier. A process that is killed
can say nothing; the connection to the coordinator, or its heartbeat, does.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from absl import flags

from relearn_jax.config_files import PATHS
from relearn_jax.errors import InputError
from relearn_jax.interrupts import INTERRUPTED, PREEMPTED, Preempted
from relearn_jax.parallel import processes
from relearn_jax.process import CLOSED_PIPE, leave
from relearn_jax.workdir import differences, to_dict, without

FAILED, GONE = "relearn/failed", "relearn/gone/"
HEARTBEAT = 30  # seconds without one, after which a process counts as killed
FAREWELL = 5.0  # seconds that the coordinator waits for the others to hear of a failure
LEAVING = 0.5  # seconds that they have to be gone once they have said so: without a coordinator they would be aborted
LOST = 1  # exit status where another process was lost
FLAGS = ("coordinator_address", "num_processes", "process_id", "initialization_timeout")
PLACES = ("workdir", "output", "model", "prompts", "data", "tensorboard")  # may be called otherwise on another host
LOSSES = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "Connection closed by peer", "Connection reset by peer")
_ending = threading.Lock()


def define_flags(values: flags.FlagValues) -> None:
  """The flags of commands that run on several processes."""
  flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for every process; where SLURM, "
                      "Open MPI, Kubernetes or a TPU pod starts several, it is found.", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "Processes that run this command together; 1: this one alone, "
                       "whatever the environment says.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values)
  flags.DEFINE_float("initialization_timeout", 300.0, "Seconds to wait for all of them at the start.",
                     flag_values=values)


def take_flags(arguments: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
  """These flags, and the other arguments: processes meet before anything else is looked at, to fail together."""
  values = flags.FlagValues()
  define_flags(values)
  values.set_gnu_getopt(True)
  return values, values(["relearn", *arguments], known_only=True)[1:]


def several_by_environment(environment: Mapping[str, str]) -> bool:
  """Whether a scheduler has started several processes of this command; looks at variables alone, and connects nowhere.

  A job that may have several is not enough: a command in its script is one process until `srun` starts more.
  """
  def above_one(name: str) -> bool:
    return environment.get(name, "").isdecimal() and int(environment[name]) > 1
  has = lambda *names: all(name in environment for name in names)
  if has("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
    return above_one("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
  return (above_one("OMPI_COMM_WORLD_SIZE") or has("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
          or "," in hosts or above_one("MEGASCALE_NUM_SLICES"))


@contextlib.contextmanager
def together(values: flags.FlagValues, name: str, interrupted: str) -> Iterator[None]:
  """Joins the other processes of a command, if there are any; at the end of the block they all leave.

  Where the block fails in one of several, every process ends here, with its exit status and its message.

  Args:
    values: from `take_flags`.
    name: of the command.
    interrupted: what is said after Ctrl-C, or SIGTERM.

  Raises:
    InputError: the others cannot be reached.
  """
  if not _asked_for(values):
    yield
    return
  join(values.coordinator_address, values.num_processes, values.process_id, values.initialization_timeout)
  if processes.is_alone():
    yield
    return
  watcher = threading.Thread(target=_watch, args=(name,), daemon=True)
  watcher.start()
  try:
    yield
    processes.barrier()
  except (InputError, flags.Error) as error:
    _fail(2, f"relearn {name}", str(error))
  except KeyboardInterrupt:
    _fail(INTERRUPTED, "", interrupted)
  except Preempted:
    _fail(PREEMPTED, "", interrupted)
  except BrokenPipeError:
    _fail(CLOSED_PIPE, f"relearn {name}", "the output's reader has gone")
  except Exception as error:
    _fail_unexpectedly(name, error)
  _part(watcher)


def _asked_for(values: flags.FlagValues) -> bool:
  """Whether flags or environment say that there are other processes."""
  address, count, me = (getattr(values, flag) for flag in FLAGS[:3])
  if count is not None and count < 1:
    raise InputError(f"is {count}", field="--num_processes", mend="expected at least 1")
  if count == 1:
    return False
  given = {"--coordinator_address": address, "--num_processes": count, "--process_id": me}
  missing = [flag for flag, value in given.items() if value is None]
  found = several_by_environment(os.environ) or _on_tpu_vm()
  if missing and len(missing) < 3 and not found:
    raise InputError("is not given", field=missing[0], mend=f"give {', '.join(given)} together")
  if count is not None and me is not None and not 0 <= me < count:
    raise InputError(f"is {me}", field="--process_id", mend=f"expected 0 to {count - 1}")
  if address is not None and not address.rpartition(":")[2].isdecimal():
    raise InputError(f"is {address!r}", field="--coordinator_address", mend="expected HOST:PORT")
  return found or not missing


def _on_tpu_vm() -> bool:
  """Whether this is a machine of Google's with TPUs, which may be one of a pod: what it is, it tells when asked."""
  devices = any(pathlib.Path("/dev").glob("accel*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
  return devices and "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None


def join(address: str | None, count: int | None, me: int | None, timeout: float) -> None:
  """Connects to the other processes; what is None is found in the environment.

  Args:
    address: of process 0, as HOST:PORT.
    count: of processes.
    me: number of this one.
    timeout: seconds to wait for the others.

  Raises:
    InputError: nothing answers there, or the environment does not say what is missing.
  """
  import jax
  from jax._src import distributed  # the store has no public name; Orbax takes it from here, too
  if count is None and "OMPI_COMM_WORLD_SIZE" in os.environ:  # of Open MPI 5, JAX finds no coordinator, nor the rest
    count, me = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK"))
  end = time.monotonic() + timeout
  if me and address:
    _reach(address, timeout)
  # Where it gives up, the runtime aborts the process with a trace of its own.
  alarm = threading.Timer(end - time.monotonic(), _nobody_came, (address, count, timeout))
  alarm.daemon = True
  alarm.start()
  jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
  # On CPU programs that do not depend on each other may run at once, and their exchanges then meet, or wait, for ever.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  try:
    jax.distributed.initialize(address, count, me, initialization_timeout=int(timeout) + 60,
                               heartbeat_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    raise InputError(f"cannot be used ({str(error).splitlines()[0]})", field="--coordinator_address",
                     mend=f"give {', '.join(FLAGS[:3])} yourself, or --num_processes=1") from None
  finally:
    alarm.cancel()
  state = distributed.global_state
  if state.num_processes > 1:
    processes.meet(state.client, state.process_id, state.num_processes)


def _reach(address: str, timeout: float) -> None:
  """Waits until something answers at an address."""
  host, _, port = address.rpartition(":")
  end = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise InputError(f"is {address}, and nothing answers there within {timeout:g} s "
                         f"({error.strerror or error})", field="--coordinator_address",
                         mend="start process 0, too, and give an address of its host that this one reaches") from None
    time.sleep(0.2)


def _nobody_came(address: str | None, count: int | None, timeout: float) -> None:
  where = "the coordinator that the environment names" if address is None else address
  whom = "the other processes" if count is None else f"all {count} processes"
  _say(f"relearn: {whom} have not met at {where} within {timeout:g} s (--initialization_timeout); start all of them, "
       "with the same address, which every host must reach")
  leave(2)


def check_started_alike(values: flags.FlagValues, name: str) -> None:
  """Refuses processes with another command, other flags, another configuration or other code.

  Args:
    values: the command's flags, but for those that `take_flags` took.
    name: of the command.

  Raises:
    InputError: on every process, naming in what which of them differ from process 0.
  """
  if processes.is_alone():
    return
  root = pathlib.Path(__file__).parents[1]
  code = hashlib.sha256()
  for file in sorted(root.rglob("*.py")):
    code.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
  version = lambda package: f"{package} {metadata.version(package)}"
  own = (*PLACES, "config", "?", "help", "helpfull", "helpshort", "helpxml")
  mine: dict[str, Any] = {f"--{flag}": str(values[flag].value) for flag in values if flag.split(".")[0] not in own}
  mine |= {"command": name, "code": f"{version('relearn_jax')} ({code.hexdigest()[:12]})", "jax": version("jax")}
  if "config" in values:
    mine["config"] = without(to_dict(values.config), PATHS)
  processes.check_alike(lambda: mine, differences, "the processes were not started alike",
                        mend="start all with the same command, files and version")


def _watch(name: str) -> None:
  """Ends this process where another one says that it failed, or where the coordinator is gone."""
  try:
    said = json.loads(processes.wait(FAILED))
  except RuntimeError as error:
    _end(LOST, f"relearn {name}: process 0 is lost ({str(error).splitlines()[0]})")
  if said is not None:
    who, status, prefix, text = said
    _end(status, f"{prefix}{': ' if prefix else ''}process {who}: {text}" if prefix else text)


def _fail(status: int, prefix: str, text: str) -> NoReturn:
  """Tells the others, and ends."""
  with contextlib.suppress(RuntimeError):  # another has failed, too, or the coordinator is gone
    processes.put(FAILED, json.dumps([processes.number(), status, prefix, text]).encode())
  _end(status, f"{prefix}: {text}" if prefix else f"\n{text}")


def _fail_unexpectedly(name: str, error: Exception) -> NoReturn:
  time.sleep(2 * processes.PATIENCE_MS / 1000)  # it may follow from what another has said; then this one ends here
  first = str(error).splitlines()[0] if str(error) else type(error).__name__
  if any(word in str(error) for word in LOSSES):
    _fail(LOST, f"relearn {name}", f"the connection to another process is lost ({first})")
  traceback.print_exception(error)
  _fail(1, f"relearn {name}", f"{type(error).__name__}: {first}")


def _end(status: int, text: str) -> NoReturn:
  """Ends this process; the one that holds the store after the others have read there why."""
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # the other thread is about to end the process
  _say(text)
  with contextlib.suppress(RuntimeError):
    if processes.is_first():
      processes.wait_for_all(GONE, FAREWELL)
      time.sleep(LEAVING)
    else:
      processes.put(f"{GONE}{processes.number()}", b"")
  leave(status)


def _say(text: str) -> None:
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)


def _part(watcher: threading.Thread) -> None:
  """The end of a command that has done its work."""
  import jax
  if processes.is_first():
    processes.put(FAILED, b"null")
  watcher.join()
  jax.distributed.shutdown()
