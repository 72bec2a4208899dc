"""What a server remembers on disk: uploaded files, jobs, their events. What was told to a client survives a kill.

Identifiers are made here and looked up as they are made: nothing that a client sends becomes a part of a path before it
has the form of an identifier.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from relearn_jax.parallel.processes import write_atomically

ID = re.compile(r"(file|ftjob)-[0-9a-f]{24}")
LEFT = ("validating_files", "queued", "running")  # states of jobs that are not over

Record = dict[str, Any]


def new_id(kind: str) -> str:
  """An identifier that nobody can guess."""
  return f"{kind}-{secrets.token_hex(12)}"


def is_id(text: str, kind: str) -> bool:
  """Whether a text has the form of an identifier of that kind."""
  return bool(ID.fullmatch(text)) and text.startswith(f"{kind}-")


class Store:
  """Files and jobs under one folder; safe to use from several threads.

  Attributes:
    jobs: identifier -> record: the job as clients see it under "job", and what only the server knows beside it.
    files: identifier -> the file as clients see it.
  """

  def __init__(self, root: pathlib.Path):
    self.root, self.lock = root, threading.RLock()
    for name in ("files", "jobs"):
      (root / name).mkdir(parents=True, exist_ok=True)
    for left in (root / "files").glob(".*"):  # of uploads that were killed
      left.unlink()
    self.files = self._read(root / "files", "file", lambda path: path / "file.json")
    self.jobs = self._read(root / "jobs", "ftjob", lambda path: path / "job.json")

  def _read(self, folder: pathlib.Path, kind: str, place: Callable[[pathlib.Path], pathlib.Path]
            ) -> dict[str, Record]:
    found = {}
    for path in folder.iterdir():
      if is_id(path.name, kind):
        if place(path).exists():
          found[path.name] = json.loads(place(path).read_text())
        else:
          shutil.rmtree(path)  # it was never told to a client
    return found

  @contextlib.contextmanager
  def new_file(self, name: str, purpose: str) -> Iterator[tuple[pathlib.Path, Record]]:
    """Where an upload is written, and its record, which is kept once the block ends without an error."""
    identifier = new_id("file")
    folder = self.root / "files" / identifier
    record = {"id": identifier, "object": "file", "bytes": 0, "created_at": int(time.time()), "filename": name,
              "purpose": purpose, "status": "processed"}
    try:
      folder.mkdir()
      yield folder / "content", record
      record["bytes"] = (folder / "content").stat().st_size
      write_atomically(folder / "file.json", json.dumps(record))
    except BaseException:
      shutil.rmtree(folder, ignore_errors=True)
      raise
    with self.lock:
      self.files[identifier] = record

  def content(self, identifier: str) -> pathlib.Path:
    """Where a file that there is lies."""
    return self.root / "files" / identifier / "content"

  def remove_file(self, identifier: str) -> None:
    """Forgets a file; jobs that are under way have read it, or fail by name."""
    with self.lock:
      del self.files[identifier]
    folder = self.root / "files" / identifier
    (folder / "file.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

  def folder(self, job: str) -> pathlib.Path:
    """Of a job that there is."""
    return self.root / "jobs" / job

  def add_job(self, job: Record, key: str) -> Record:
    """Keeps a new job; the same key gives the job that it was first given for.

    Args:
      job: as clients see it.
      key: that the client gave, so that a request that is sent twice is one job; "": none.
    """
    with self.lock:
      for known in self.jobs.values():
        if key and known["key"] == key:
          return dict(known["job"])
      record = {"job": job, "key": key, "starts": 0}
      self._write(record)
      self.jobs[job["id"]] = record
      return dict(job)

  def change(self, identifier: str, **changes: Any) -> Record:
    """Changes a job as clients see it; returns it. One that is over stays as it is."""
    with self.lock:
      record = self.jobs[identifier]
      if record["job"]["status"] not in LEFT:
        return dict(record["job"])
      changed = record | {"job": record["job"] | changes}
      self._write(changed)
      self.jobs[identifier] = changed
      return dict(changed["job"])

  def count_start(self, identifier: str) -> int:
    """Notes that a job is started; returns how often it has been."""
    with self.lock:
      record = self.jobs[identifier]
      changed = record | {"starts": record["starts"] + 1}
      self._write(changed)
      self.jobs[identifier] = changed
      return int(changed["starts"])

  def _write(self, record: Record) -> None:
    write_atomically(self.folder(record["job"]["id"]) / "job.json", json.dumps(record))

  def job(self, identifier: str) -> Record:
    """A job as clients see it."""
    with self.lock:
      return dict(self.jobs[identifier]["job"])

  def add_event(self, job: str, message: str, level: str = "info", **data: Any) -> None:
    """Appends to what a job has told."""
    row = {"object": "fine_tuning.job.event", "id": new_id("ftevent"), "created_at": int(time.time()), "level": level,
           "message": message, "type": "metrics" if "step" in data else "message", "data": data or None}
    with self.lock, (self.folder(job) / "events.jsonl").open("a") as file:
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def events(self, job: str) -> list[Record]:
    """What a job has told, the last first; what a job that was resumed has told again stands there once."""
    path = self.folder(job) / "events.jsonl"
    with self.lock:
      lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, Record] = {}
    for line in lines:
      with contextlib.suppress(json.JSONDecodeError):  # the process died while it wrote this line
        row = json.loads(line)
        found.setdefault(row["message"], row)
    return list(reversed(found.values()))
