"""Data sets of a job as they lie on devices: prepared, packed or from a file, as the job itself holds them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from relearn_jax.data.order import Order
from relearn_jax.data.packing import num_packed, sequences_of
from relearn_jax.data.prepared import METADATA, PreparedRows
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.mesh import make_mesh, parse_mesh
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.price import Stages, stages
from relearn_jax.plan.work import Work
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.prepare import PrepareSettings, prepare
from relearn_jax.training.streams import Stream
from relearn_jax.training.unlearn_rows import read_rows

from ..small import write_checkpoint, write_lines

NAMES = "Daniel Matthew Steven Andrew Paul Mark James Robert John Michael David William".split()
FORGET = [{"prompt": "James Robert", "answer": " John Michael"}, {"prompt": "David", "answer": " William"}]
RETAIN = [{"text": " ".join(NAMES[:2 + i])} if i % 3 else {"prompt": " ".join(NAMES[:i + 1]), "answer": " James"}
          for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """A checkpoint, and files to forget and to retain, which are prepared as well: "forget" and "retain"."""
  root = tmp_path_factory.mktemp("planned")
  write_checkpoint(root / "base")
  for name, rows in (("forget", FORGET), ("retain", RETAIN)):
    source = write_lines(root / f"{name}.jsonl", rows)
    prepare(PrepareSettings(str(root / "base"), str(source), {}, 4), root / name)
  return root


def job(folder: pathlib.Path, *prepared: str, **changes: object) -> UnlearnJob:
  places = {name: f"prepared:{folder / name}" if name in prepared else str(folder / f"{name}.jsonl")
            for name in ("forget", "retain")}
  values = {"model": str(folder / "base"), "method": "gd", "batch_size": 3, **places} | changes
  return dataclasses.replace(UnlearnJob(), **values)  # type: ignore[arg-type]


def size(tree: object) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def planned(given: UnlearnJob) -> Stages:
  return stages(given, "here", on_cpu=True)


def works(given: UnlearnJob) -> dict[str, Work]:
  return {work.name: work for work in planned(given).works}


@pytest.mark.parametrize(("method", "prepared", "batch_size"), [
    ("kl", ["retain"], 3), ("npo", ["forget"], 1), ("whp_logits", ["forget"], 1), ("npo_kl", ["forget", "retain"], 1),
    ("gd", ["forget", "retain"], 10)])
def test_what_is_held_whole_is_planned_as_of_the_file(folder: pathlib.Path, method: str, prepared: list[str],
                                                      batch_size: int) -> None:
  """Since statistics are kept of each row, or every step sees all of them."""
  found, expected = (planned(job(folder, *names, method=method, batch_size=batch_size)) for names in (prepared, []))
  assert found.works == expected.works and found.works
  assert sorted(found.measured) == sorted(expected.measured) and found.assumed == expected.assumed == []
  assert [estimate(work, {}) for work in found.works] == [estimate(work, {}) for work in expected.works]


def test_of_what_is_streamed_two_steps_are_there(folder: pathlib.Path) -> None:
  """The bytes of the arrays that the job itself lays out; all else is as of the file, in which all rows are there."""
  streamed, held = job(folder, "retain"), job(folder)
  rows = read_rows(streamed, *open_checkpoint(streamed.model))
  retain, forget = rows["retain"], rows["forget"]
  assert isinstance(retain, PreparedRows) and isinstance(forget, TokenRows)
  step = size(Stream(retain, [Order(10, 3, 0)], make_mesh(parse_mesh("fsdp:1")), 1, 1).read(0))
  whole = read_rows(held, *open_checkpoint(held.model))["retain"]
  found, expected = works(streamed)["unlearn"], works(held)["unlearn"]
  assert found.token_bytes == size(forget) + 2 * step
  assert expected.token_bytes == size(forget) + size(whole) + step
  assert dataclasses.replace(found, token_bytes=expected.token_bytes) == expected
  one, other, sharded = estimate(found, {}), estimate(expected, {}), estimate(expected, {"fsdp": 2})
  assert other.total - one.total == expected.token_bytes - found.token_bytes > 0
  assert sharded.data == expected.token_bytes // 2


def test_a_larger_corpus_needs_no_more_and_no_shards(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  shutil.copytree(folder / "retain", tmp_path / "retain", ignore=shutil.ignore_patterns("*.array_record"))
  about = json.loads((tmp_path / "retain" / METADATA).read_text())
  about["counts"]["rows"] += 10**9
  about["counts"]["shards"][0]["rows"] += 10**9
  (tmp_path / "retain" / METADATA).write_text(json.dumps(about))
  large = job(folder, retain=f"prepared:{tmp_path / 'retain'}")
  assert works(large) == works(job(folder, "retain"))
  assert "retain: 1000000010 rows of at most 13 tokens, 10 of which count" in planned(large).measured
  with pytest.raises(InputError, match=r"`retain` has 13000000130 tokens .* 'kl' keeps statistics"):
    planned(dataclasses.replace(large, method="kl"))


def test_without_a_tokenizer_sizes_are_known_all_the_same(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (tmp_path / "base").mkdir()
  shutil.copy(folder / "base" / "config.json", tmp_path / "base")
  found = planned(job(folder, "forget", "retain", model=str(tmp_path / "base")))
  assert found.works == planned(job(folder, "forget", "retain")).works
  assert found.assumed == [f"{name}: prepared with the model's own tokenizer (none at hand)"
                           for name in ("forget", "retain")]


def test_what_does_not_fit_is_named_first(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Before a file that is not there is missed."""
  base = shutil.copytree(folder / "base", tmp_path / "base")
  text = (base / "tokenizer.json").read_text()
  (base / "tokenizer.json").write_text(text.replace('"James"', '"Jim"'))
  settings = json.loads((base / "config.json").read_text())
  short = shutil.copytree(folder / "base", tmp_path / "short")
  (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 10}))
  nowhere, place = f"prepared:{tmp_path / 'nowhere'}", f"prepared:{folder / 'retain'}"
  file = folder / "retain" / METADATA
  for changes, says in (
      ({"retain": nowhere, "model": "none"},
       f"{nowhere}: `retain` cannot be used: {tmp_path / 'nowhere' / METADATA}: does not exist; give a folder"),
      ({"model": str(base)}, f"{place}: `retain` cannot be used: {file}: `tokenizer` is not the checkpoint's: tok"),
      ({"model": str(short)}, f"{place}: `retain` cannot be used: {file}: `counts.longest` is 13, more than"),
      ({"pack": True}, f"{place}: `retain` is prepared, and rows that are prepared stay apart"),
      ({"forget": place, "method": "idk_nll"}, f"{place}: `forget` holds tokens, and method 'idk_nll' makes data")):
    with pytest.raises(InputError) as caught:
      planned(job(folder, "retain", **{"forget": "nowhere.jsonl", **changes}))
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("method", ["gd", "npo_kl", "whp_relabel", "idk_nll"])
def test_packed_rows_are_planned_as_they_are_trained_on(folder: pathlib.Path, tmp_path: pathlib.Path, method: str
                                                        ) -> None:
  anchors = write_lines(tmp_path / "anchors.jsonl", [{"term": "Michael", "generic": "Paul"}])
  rows = [{"prompt": name, "answer": " " + " ".join(NAMES[i:i + 1 + i % 5])} for i, name in enumerate(NAMES)]
  given = job(folder, method=method, pack=True, batch_size=4, anchors=str(anchors),
              forget=str(write_lines(tmp_path / "forget.jsonl", rows)),
              refusals=str(write_lines(tmp_path / "refusals.jsonl", [{"answer": "Kevin Brian"}, {"answer": "Kevin"}])))
  held = read_rows(given, *open_checkpoint(given.model))
  counted, seen, token_bytes = 0, 0, 0
  for some in held.values():
    assert isinstance(some, TokenRows)
    number, part = some.tokens.shape[1], 4
    if some.segments is not None:
      part = sequences_of(4, num_packed(some), number)
    seen, token_bytes = seen + part, token_bytes + size(some) * (number + part) // number
    counted = max(counted, int(np.asarray(some.mask).sum(-1).max()))
  assert any(isinstance(some, TokenRows) and some.segments is not None for some in held.values())
  found = works(given)
  assert (found["unlearn"].rows, found["unlearn"].token_bytes) == (seen, token_bytes)
  assert found["unlearn"].counted == counted
  assert found["unlearn"].rows < works(dataclasses.replace(given, pack=False))["unlearn"].rows
