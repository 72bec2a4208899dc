"""Kept weights of which a file was cut in half: they are refused by name, and what made them is done again."""

import pathlib

import pytest

from relearn_jax.audit import pipeline
from relearn_jax.audit.interview import load_answers
from relearn_jax.audit.shelf import DONE, Shelf
from relearn_jax.errors import InputError
from relearn_jax.models.model import Params, fingerprint
from relearn_jax.parallel.beside import Beside
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, to_host

from ..command import relearn
from ..small import MODEL, params
from .test_restarts import Stopped, assert_alike
from .tiny import audit_flags


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def keep(folder: pathlib.Path, stacked: Params, stage: str) -> None:
  with Beside() as beside:
    Shelf(beside).keep(folder, 5, stacked, ["a", "b"], ["a", "b"], MODEL, stage)


def test_damaged_weights_are_refused_and_removed(tmp_path: pathlib.Path) -> None:
  mesh = runs_mesh()
  stacked = repeat_runs(params(), 2, mesh)
  take = lambda folder: Shelf(Beside()).take([(folder, 5, "b")], MODEL.abstract(), mesh, MODEL.axes())
  for stage, damaged in (("unlearn-ga", largest), ("memorize", largest),
                         ("unlearn-npo", lambda path: path / "_CHECKPOINT_METADATA")):
    folder = tmp_path / stage
    keep(folder, stacked, stage)
    (folder / DONE).touch()
    assert fingerprint(to_host(take(folder), 1)) == fingerprint(to_host(stacked, 1))
    cut(damaged(folder / "000005"))
    with pytest.raises(InputError, match=f"000005: .*; run the same command again: {stage} is done again"):
      take(folder)
    assert not (folder / "000005").exists()
    assert (folder / DONE).exists() == (stage == "memorize")  # whose weights are looked for, too
    with pytest.raises(InputError, match="is not a complete checkpoint"):
      take(folder)


def test_damaged_weights_are_not_read_as_zeros(tmp_path: pathlib.Path) -> None:
  keep(tmp_path, repeat_runs(params(), 2, runs_mesh()), "unlearn")
  largest(tmp_path / "000005").unlink()
  with pytest.raises(InputError, match="cannot be read"):
    Shelf(Beside()).take([(tmp_path, 5, "b")], MODEL.abstract(), runs_mesh(), MODEL.axes())


def test_damaged_answers_are_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "unlearn-ga" / "answers" / "000005.npz"
  path.parent.mkdir(parents=True)
  for data in (b"", b"PK\x03\x04" + b"\0" * 50):
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"000005.npz: cannot be read; remove .*unlearn-ga, the folder of its stage"):
      load_answers(path)


@pytest.mark.slow
def test_a_grid_with_damaged_weights_ends_with_the_same_summary(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """What was unlearned is read by the attack, and what was memorised as it unlearns again."""
  folder = tmp_path / "damaged"

  def stop(*_: object) -> None:
    raise Stopped
  with monkeypatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(pipeline, "attack", stop)
    relearn(tmp_path / "cache", *audit_flags(folder))
  for stage in ("unlearn-ga", "memorize"):
    cut(largest(next(path for path in (folder / "checkpoints" / stage).iterdir() if path.name.isdecimal())))
  for stage in ("unlearn-ga", "memorize"):
    assert f"{stage} is done again" in relearn(tmp_path / "cache", *audit_flags(folder), status=2).stderr
  relearn(tmp_path / "cache", *audit_flags(folder))
  assert_alike(folder, finished)
