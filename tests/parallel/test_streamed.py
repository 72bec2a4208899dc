"""Processes that stream one data set: what they train on is what one process trains on, and each reads its share."""

import contextlib
import functools
import http.server
import json
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from safetensors.numpy import load_file

from relearn_jax.data.order import Order
from relearn_jax.training.log import StageLog

from ..command import ROOT, environment, relearn
from ..small import write_checkpoint, write_lines

NAMES = "Daniel Matthew Steven Andrew Paul Mark James Robert John Michael David William".split()
RETAIN = [{"prompt": NAMES[i % 12], "answer": " " + " ".join(NAMES[i % 5:i % 5 + 1 + i % 7])} for i in range(23)]
BATCH, STEPS = 8, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """A checkpoint, files to forget and to retain, the latter prepared; and what one process makes of the file."""
  root = tmp_path_factory.mktemp("streamed")
  write_checkpoint(root / "base")
  write_lines(root / "forget.jsonl", [{"prompt": "James Robert", "answer": " John"}, {"text": "Joseph Thomas Charles"}])
  write_lines(root / "retain.jsonl", RETAIN)
  relearn(cache, "prepare", f"--model={root / 'base'}", f"--source={root / 'retain.jsonl'}",
          f"--output={root / 'rows'}", "--rows_per_shard=5")
  relearn(cache, *line(root, root / "one", root / "retain.jsonl"), "--mesh=fsdp:1")
  return root


def line(root: pathlib.Path, workdir: pathlib.Path, retain: object, *more: str) -> list[str]:
  return ["unlearn", f"--config={ROOT / 'configs' / 'unlearn.py'}", f"--config.model={root / 'base'}",
          "--config.method=gd", f"--config.forget={root / 'forget.jsonl'}", f"--config.retain={retain}",
          f"--config.steps={STEPS}", f"--config.batch_size={BATCH}", "--config.learning_rate=1e-3",
          f"--workdir={workdir}", *more]


def together(number: int, cache: pathlib.Path, reads: pathlib.Path, arguments: Sequence[str]) -> list[list[list[int]]]:
  """Runs a command on some processes; of each process, the places that it has read, by step."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  reads.mkdir()
  every = [subprocess.Popen(
      [sys.executable, "-m", "tests.parallel.reading", str(reads / str(me)), *arguments,
       f"--coordinator_address=localhost:{port}", f"--num_processes={number}", f"--process_id={me}"],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=environment(cache, JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)))
      for me in range(number)]
  for process in every:
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 0, shown
  return [[json.loads(row) for row in (reads / str(me)).read_text().splitlines()] for me in range(number)]


def assert_like_one(root: pathlib.Path, workdir: pathlib.Path) -> None:
  """Logged as by one process that reads the file, and the same weights, up to rounding."""
  ours, theirs = ([json.loads(row) for row in (folder / "train_log.jsonl").read_text().splitlines()]
                  for folder in (workdir, root / "one"))
  assert len(ours) == STEPS
  for mine, row in zip(ours, theirs, strict=True):
    assert (mine["step"], mine["tokens"]) == (row["step"], row["tokens"])
    np.testing.assert_allclose(mine["losses"], row["losses"], atol=2e-5)
  one, other = (load_file(folder / "model" / "model.safetensors") for folder in (root / "one", workdir))
  for name, weight in one.items():
    np.testing.assert_allclose(other[name], weight, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number,mesh", [(1, "fsdp:1"), (2, "fsdp:2"), (4, "data:2,fsdp:2"), (2, "tensor:2")])
def test_each_process_reads_its_share_of_one_batch(folder: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path,
                                                   number: int, mesh: str) -> None:
  reads = together(number, cache, tmp_path / "reads", line(
      folder, tmp_path / "w", f"prepared:{folder / 'rows'}", f"--mesh={mesh}"))
  assert_like_one(folder, tmp_path / "w")
  order = Order(len(RETAIN), BATCH, 0)
  for step in range(STEPS):
    batch = sorted(order.places(step * BATCH).tolist())
    shares = [rows[step] for rows in reads]
    if "tensor" in mesh:  # every device holds all rows
      assert all(share == sorted(set(batch)) for share in shares)
    else:
      assert sorted(place for share in shares for place in share) == batch
      assert all(len(share) == BATCH // number for share in shares)
  assert all(len(rows) == STEPS for rows in reads)  # and nothing else, nor beyond the last step


@pytest.mark.slow
def test_two_go_on_where_one_was_killed(folder: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
  """With the rows that it had not taken yet, though it had read ahead."""
  add = StageLog.add
  arguments = line(folder, tmp_path / "w", f"prepared:{folder / 'rows'}", "--config.checkpoint_seconds=0")

  def killed(log: StageLog, step: int, *more: object) -> None:
    if step == 3:
      raise RuntimeError("killed")
    add(log, step, *more)  # type: ignore[arg-type]
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
    patch.setattr(StageLog, "add", killed)
    relearn(cache, *arguments, "--mesh=fsdp:1")
  reads = together(2, cache, tmp_path / "reads", [*arguments, "--mesh=fsdp:2"])
  assert_like_one(folder, tmp_path / "w")
  order = Order(len(RETAIN), BATCH, 0)
  for step, shares in enumerate(zip(*reads, strict=True), 2):
    assert sorted(place for share in shares for place in share) == sorted(order.places(step * BATCH).tolist())


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_: object) -> None:
    pass


@contextlib.contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
  """The address of a folder on a server of this machine."""
  with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(_Quiet, directory=folder)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/rows"
    server.shutdown()


@pytest.mark.slow
def test_shards_of_an_address_are_fetched(folder: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """By two processes, which share the copies; a shard that is missing there ends both before a device is used."""
  with served(folder) as address:
    together(2, cache, tmp_path / "reads", line(folder, tmp_path / "w", f"prepared:{address}"))
    assert_like_one(folder, tmp_path / "w")
    copies = [path.name[17:] for path in (cache / "prepared").rglob("*.array_record")]
    assert sorted(copies) == [f"rows-{i:05d}-of-00005.array_record" for i in range(5)]
    shard = folder / "rows" / "rows-00003-of-00005.array_record"
    shard.rename(tmp_path / "away")
    try:
      done = relearn(cache, *line(folder, tmp_path / "again", f"prepared:{address}"), status=2)
    finally:
      (tmp_path / "away").rename(shard)
    assert f"{address}/{shard.name}: does not exist; copy the folder again, whole" in done.stderr
    assert not (tmp_path / "again").exists()
