"""`relearn serve`: the interface on a port, until it is interrupted; or beside other work, in a thread."""

import contextlib
import ipaddress
import logging
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relearn_jax import interrupts
from relearn_jax.errors import InputError
from relearn_jax.serve.limits import Limits
from relearn_jax.workdir import only_process

KEY = "RELEARN_API_KEY"  # variable of the environment that holds the key
EXTRA = "api"


def need_extra(package: str, name: str) -> None:
  """`InputError` where a package of the extra is not installed."""
  import importlib.util
  if importlib.util.find_spec(package) is None:
    raise InputError(f"needs the package {package}, which is not installed", field=name,
                     mend=f"pip install 'relearn_jax[{EXTRA}]'")


def parse_models(given: Sequence[str]) -> dict[str, str]:
  """Name -> checkpoint, from `NAME=DIR`.

  Raises:
    InputError: none is given, one has no name, or two have the same.
  """
  found: dict[str, str] = {}
  for text in given:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or not name.isprintable():
      raise InputError(f"is {text!r}", field="--model", mend="expected NAME=DIR")
    if name in found or name.startswith("ft:"):
      raise InputError(f"names {name!r} {'twice' if name in found else 'as a job names its models'}", field="--model",
                       mend="give every model a name of its own")
    found[name] = os.path.expanduser(folder)
  if not found:
    raise InputError("is not given", field="--model", mend="give NAME=DIR, at least once")
  return found


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches a host."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _uvicorn(app: Any, host: str, port: int) -> Any:
  import uvicorn
  # Connections are bounded, so that clients which read slowly, or not at all, hold little; headers are never logged.
  config = uvicorn.Config(app, host=host, port=port, log_level="warning", limit_concurrency=1024, backlog=1024,
                          timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="off")
  return uvicorn.Server(config)


def serve(models: Sequence[str], workdir: pathlib.Path, host: str, port: int, limits: Limits, dtype: str = "auto"
          ) -> str:
  """Serves models until the process is interrupted or terminated; returns what is said at the end.

  Raises:
    InputError: a flag or a checkpoint is wrong, the workdir is in use, or the port is.
  """
  named, key = parse_models(models), os.environ.get(KEY, "")
  need_extra("fastapi", "relearn serve")
  need_extra("uvicorn", "relearn serve")
  if not is_loopback(host) and not key:
    raise InputError(f"is {host!r}, which other machines reach, and {KEY} is not set", field="--host",
                     mend=f"set {KEY} to a key that clients send, or leave the flag out")
  if not 0 <= port < 2**16:
    raise InputError(f"is {port}", field="--port", mend="expected 0 (any) to 65535")
  from relearn_jax.serve.app import Service, make_app
  logging.getLogger("relearn_jax").setLevel(logging.INFO)
  _make(workdir)
  with only_process(workdir):
    service = Service(named, workdir, limits, dtype=dtype)
    try:
      with listening(make_app(service, key), host, port) as (url, thread):
        print(f"Serving {', '.join(named)} at {url}/v1", flush=True)
        while thread.is_alive():
          thread.join(1.0)
          if reason := interrupts.asked():  # SIGTERM, which is left to the job that is being trained
            raise reason
    except KeyboardInterrupt:
      pass
    finally:
      service.close()
  return "\nStopped; jobs that are under way go on when the same command is given again."


def _make(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=workdir, field="--workdir",
                     mend="give a folder that you may write to") from None


@contextlib.contextmanager
def listening(app: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[str, threading.Thread]]:
  """An application on a port, in a thread of its own, for the length of the block; its address, and the thread.

  Raises:
    InputError: the port cannot be had.
  """
  import socket
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      sock.bind((host, port))
    except OSError as error:
      raise InputError(f"{port} of {host} cannot be had ({error.strerror})", field="--port",
                       mend="give another, or 0") from None
    server = _uvicorn(app, host, port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="http", daemon=True)
    thread.start()
    try:
      while not server.started and thread.is_alive():
        time.sleep(0.01)
      shown = f"[{host}]" if ":" in host else host
      yield f"http://{shown}:{sock.getsockname()[1]}", thread
    finally:
      server.should_exit = True
      thread.join(15.0)


@contextlib.contextmanager
def beside(models: Mapping[str, str], workdir: pathlib.Path, limits: Limits, *, key: str = "", **more: Any
           ) -> Iterator[tuple[str, Any]]:
  """Models served on a free port of this machine for the length of the block: address of the interface, and service.

  Args:
    models, workdir, limits: see `app.Service`.
    key: that clients must send; "": none is asked for.
    **more: to `app.Service`.
  """
  need_extra("fastapi", "attack.access")
  need_extra("uvicorn", "attack.access")
  from relearn_jax.serve.app import Service, make_app
  _make(workdir)
  with only_process(workdir):
    service = Service(models, workdir, limits, **more)
    try:
      with listening(make_app(service, key)) as (url, _):
        yield f"{url}/v1", service
    finally:
      service.close()
