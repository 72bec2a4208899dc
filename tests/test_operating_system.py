"""Disks, terminals, pipes, home folders and interrupts: a message and a status, never a traceback."""

import dataclasses
import errno
import gc
import io
import os
import pathlib
import platform
import subprocess
import sys

import jax.numpy as jnp
import pytest

from relearn_jax import cli
from relearn_jax.audit.audit_config import Audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.cli import main
from relearn_jax.commands import COMMANDS
from relearn_jax.config_files import PATHS, expand_config, expand_paths, fields_of, last_values
from relearn_jax.data.chat import ChatSettings
from relearn_jax.parallel import start
from relearn_jax.process import disk_trouble
from relearn_jax.training import checkpoints
from relearn_jax.training.job import UnlearnJob

from .command import ROOT, argv, environment, relearn

HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
  """Lets `relearn report` raise this."""
  def run(values: object) -> str:
    raise error
  monkeypatch.setitem(cli.COMMANDS, "report", dataclasses.replace(COMMANDS["report"], run=run))


def orbax_says(path: pathlib.Path, number: int) -> ValueError:
  return ValueError(f'RESOURCE_EXHAUSTED: Failed writing: "{path}": Failed to write 9 bytes to file 12: '
                    f"{os.strerror(number)} [os_error_code='{number}']")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_trouble_with_a_disk_names_flag_and_path(number: int, cache: pathlib.Path, tmp_path: pathlib.Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
  file = tmp_path / "w" / "results.parquet"
  wrapped = RuntimeError("a thread failed")
  wrapped.__cause__ = OSError(number, os.strerror(number), str(file))
  for error in (wrapped.__cause__, wrapped, orbax_says(file, number), ExceptionGroup("two", [wrapped, KeyError("x")])):
    fails(monkeypatch, error)
    said = relearn(cache, "report", f"--workdir={tmp_path / 'w'}", status=2).stderr
    assert said.startswith(f"relearn report: {file}: `--workdir` cannot be ") and f"({os.strerror(number)});" in said
    assert said.count("\n") == 1
  fails(monkeypatch, OSError(number, os.strerror(number)))  # as of a write, which names no file
  assert f" {tmp_path / 'w'}: `--workdir` cannot be " in relearn(
      cache, "report", f"--workdir={tmp_path / 'w'}", status=2).stderr
  fails(monkeypatch, OSError(number, os.strerror(number), str(cache / "base")))
  assert f"{cache / 'base'}: `RELEARN_CACHE` cannot" in relearn(cache, "report", "--workdir=w", status=2).stderr


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("RESOURCE_EXHAUSTED: out of memory"), AssertionError(28),
                                   FileNotFoundError(errno.ENOENT, "No such file", "x"), TypeError("[28]")])
def test_errors_of_the_program_stay_what_they_are(error: Exception, cache: pathlib.Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
  assert disk_trouble(error, {"--workdir": "w"}) is None
  fails(monkeypatch, error)
  with pytest.raises(type(error)):
    relearn(cache, "report", "--workdir=w")


def test_a_checkpoint_that_cannot_be_written_is_trouble_of_the_disk(tmp_path: pathlib.Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
  (tmp_path / "stage").touch()  # a file where the folder should be
  with pytest.raises(Exception) as caught:
    checkpoints.save_tree(tmp_path / "stage" / "000001", {"a": jnp.ones((1, 2))}, 1, {})
  trouble = disk_trouble(caught.value, {"--workdir": str(tmp_path)})
  assert trouble is not None and trouble.field == "--workdir"
  assert not any(record.exc_info for record in caplog.records)


def test_a_plain_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", out)
  monkeypatch.setitem(cli.COMMANDS, "report", dataclasses.replace(COMMANDS["report"], run=lambda _: "dépôt"))
  assert main(["report"]) == 0
  assert out.buffer.getvalue() == b"d\\xe9p\\xf4t\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--help"], ["nothing"]])
def test_a_closed_pipe_is_quiet(arguments: list[str], cache: pathlib.Path) -> None:
  read, write = os.pipe()
  os.close(read)  # gone before the first line
  streams = {"stdout": write, "stderr": subprocess.PIPE} if arguments == ["--help"] else {"stderr": write}
  done = subprocess.run(argv(*arguments), env=environment(cache), check=False, cwd=ROOT, **streams)  # type: ignore[call-overload]
  os.close(write)
  assert done.returncode == 141 and not done.stderr


def test_a_full_disk_under_the_output_is_a_message(cache: pathlib.Path) -> None:
  with open("/dev/full", "w") as full:
    done = subprocess.run(argv("--help"), stdout=full, stderr=subprocess.PIPE, text=True, env=environment(cache),
                          check=False, cwd=ROOT)
  assert done.returncode == 2 and "output cannot be written (No space left on device)" in done.stderr
  assert done.stderr.count("\n") == 1


def test_an_interrupted_process_leaves_at_once(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Nothing of the interpreter is taken down; and nothing is promised that a command cannot keep."""
  left: list[int] = []
  said: list[str] = []
  fails(monkeypatch, KeyboardInterrupt())
  monkeypatch.setattr(cli, "handle_interrupts", said.append)
  monkeypatch.setattr(os, "_exit", left.append)
  monkeypatch.setattr(sys, "argv", ["relearn", "report", "--workdir=w"])
  out = io.StringIO()
  monkeypatch.setattr(sys, "stderr", out)
  main()
  assert left == [130] and out.getvalue() == "\nrelearn report: interrupted\n"
  assert said == ["relearn report: interrupted"]
  assert {name for name, command in COMMANDS.items() if command.continues} == {"unlearn", "sweep", "audit", "serve"}


@pytest.mark.parametrize("body", [
    "os.kill(os.getpid(), signal.SIGINT)",
    # What libraries in C++ make of it: the interrupt is lost.
    "try:\n  os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n  pass"])
def test_an_interrupt_of_the_first_imports(cache: pathlib.Path, tmp_path: pathlib.Path, body: str) -> None:
  (tmp_path / "absl").mkdir()
  (tmp_path / "absl" / "__init__.py").write_text(f"import os, signal\n{body}\nraise ImportError('was imported')\n")
  done = subprocess.run(argv("audit"), env=environment(cache, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"), cwd=tmp_path,
                        capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nrelearn audit: interrupted\n")


def test_an_interrupt_is_not_lost_in_the_collection_of_garbage(cache: pathlib.Path) -> None:
  code = ("import gc, signal\nfrom relearn_jax.interrupts import handle_interrupts\n"
          "handle_interrupts('relearn x: interrupted')\nprint('before')\n"
          "try:\n  signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n  print('raised')\n"
          "def _xla_gc_callback(*args):\n  signal.raise_signal(signal.SIGINT)\n"
          "gc.callbacks.append(_xla_gc_callback)\ngc.collect()\nprint('after')\n")
  done = subprocess.run([sys.executable, "-c", code], env=environment(cache), cwd=ROOT, capture_output=True, text=True,
                        timeout=60, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (130, "before\nraised\n", "\nrelearn x: interrupted\n")
  assert any(callback.__name__ == "_xla_gc_callback" for callback in gc.callbacks)  # it is JAX's own name


def test_a_tilde_is_the_home_folder(cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  flags = {"generate": ("model", "prompts", "output"), "score": ("model", "data", "output"), "report": ("workdir",),
           "export": ("checkpoint", "output")}
  for name, names in flags.items():
    seen: dict[str, str] = {}
    take = lambda values, names=names, seen=seen: seen.update({flag: values[flag].value for flag in names}) or ""
    monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(COMMANDS[name], run=take))
    relearn(cache, name, *(f"--{flag}=~/{flag}" for flag in names))
    assert seen == {flag: str(tmp_path / flag) for flag in names}
  for config in (UnlearnJob(chat=ChatSettings(system="~/x")), Audit(FilesConfig())):
    named = [(holder, field.name) for holder in (config, *vars(config).values()) if dataclasses.is_dataclass(holder)
             for field in dataclasses.fields(holder) if field.name in PATHS]
    assert len(named) >= 7
    value = lambda field, home: (f"{home}/{field}",) if field == "relearn" else f"{home}/{field}"
    for holder, field in named:
      setattr(holder, field, value(field, "~"))
    expand_paths(config)
    assert all(getattr(holder, field) == value(field, tmp_path) for holder, field in named)
  assert fields_of(UnlearnJob(chat=ChatSettings(system="~/x")))["chat.system"] == "~/x"  # no path
  for line in (["--config=~/c.py:x"], ["--config", "~/c.py:x"]):
    assert expand_config([*line, "--config.model=~/m"])[-2].endswith(f"{tmp_path}/c.py:x")
  monkeypatch.setenv("RELEARN_CACHE", "~/cache")
  assert start.cache_dir() == tmp_path / "cache"
  assert not (tmp_path / "~").exists()


def test_of_a_tuple_set_twice_the_last_value_counts(tmp_path: pathlib.Path, cache: pathlib.Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
  line = ["--config=c.py", "--config.seeds=(0,)", "--config.arms.method=a", "--config.seeds", "(1,)",
          "--config.arms.method=b", "--config.seeds=(7, 8)"]
  assert last_values(line, Audit(FilesConfig())) == [
      "--config=c.py", "--config.arms.method=a", "--config.arms.method=b", "--config.seeds=(7, 8)"]
  seen: list[tuple[int, ...]] = []
  monkeypatch.setitem(cli.COMMANDS, "audit", dataclasses.replace(
      COMMANDS["audit"], run=lambda values: seen.append(values.config.seeds) or "done"))
  relearn(cache, "audit", f"--config={ROOT / 'configs' / 'checkpoint.py'}", *line[1:2], *line[3:5], *line[6:])
  assert seen == [(7, 8)]


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(os, "cpu_count", lambda: 64)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
  assert start.num_cores() == 2
  monkeypatch.delattr(os, "sched_getaffinity")
  assert start.num_cores() == 64


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("told", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_memory_of_a_step_is_kept_for_the_next(told: dict[str, str]) -> None:
  """Pages that are mapped anew when 64 MB are used again, after they were let go of."""
  code = """
import resource
from relearn_jax.host_memory import keep_memory
kept = keep_memory()
use = lambda: len(b"x" * 2**26)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
before = faults()
use()
print(kept, faults() - before)
"""
  clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}
  done = subprocess.run([sys.executable, "-c", code], env=clean | told | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT,
                        capture_output=True, text=True, check=True)
  kept, faults = done.stdout.split()
  assert kept == str(not told)
  assert int(faults) < 100 if not told else int(faults) > 1000, faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not HUGE_PAGES.exists(),
                    reason="needs glibc on Linux")
def test_memory_lies_on_huge_pages_after_some_was_given_back_too() -> None:
  code = """
import pathlib
from relearn_jax import host_memory
host_memory.keep_memory()
def huge():
  held = b"x" * 2**27
  line = next(line for line in pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHuge" in line)
  return int(line.split()[1]) / 2**17
print(huge())
host_memory.let_go()
print(huge())
"""
  clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}
  done = subprocess.run([sys.executable, "-c", code], env=clean | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT,
                        capture_output=True, text=True, check=True)
  first, second = map(float, done.stdout.split())
  if first < 0.8:
    pytest.skip("the system gives no huge pages, or has none left")
  assert second > 0.8
