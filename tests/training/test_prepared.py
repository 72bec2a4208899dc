"""Rows that are prepared and streamed are those of the source: as tokens, in training, after a kill; or are refused."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import resource
import shutil
import threading
from collections.abc import Callable, Iterator

import fsspec
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from relearn_jax.cases.files import read_texts
from relearn_jax.data.chat import ChatSettings
from relearn_jax.data.order import Order
from relearn_jax.data.prepared import METADATA, PreparedRows
from relearn_jax.data.rows import Encoded
from relearn_jax.data.stores import File, Store
from relearn_jax.data.texts import encode_rows
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.mesh import make_mesh, parse_mesh
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.log import StageLog
from relearn_jax.training.streams import Held, Stream
from relearn_jax.training.unlearn import unlearn
from relearn_jax.training.unlearn_rows import read_rows

from ..command import relearn
from ..small import make_tokenizer, write_checkpoint, write_lines

FORGET = [{"prompt": "James Robert", "answer": " John Michael"}, {"prompt": "David", "answer": " William"}]
NAMES = "Daniel Matthew Steven Andrew Paul Mark James Robert John Michael David William".split()
RETAIN = [{"text": " ".join(NAMES[:2 + i])} if i % 3 else
          {"prompt": NAMES[i], "answer": " " + " ".join(NAMES[i:i + 3])} for i in range(10)]
SHARDS = [f"rows-{i:05d}-of-00003.array_record" for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """A checkpoint, files to forget and to retain, and the latter as three shards."""
  root = tmp_path_factory.mktemp("prepared")
  write_checkpoint(root / "base")
  write_lines(root / "forget.jsonl", FORGET)
  write_lines(root / "retain.jsonl", RETAIN)
  done = relearn(cache, *command(root, root / "rows"))
  assert f"10 rows, 69 tokens, the longest row 11, in 3 shards: {root / 'rows'}" in done.stdout
  return root


def command(root: pathlib.Path, output: pathlib.Path, source: object = None, *more: str) -> list[object]:
  return ["prepare", f"--model={root / 'base'}", f"--source={source or root / 'retain.jsonl'}",
          f"--output={output}", "--rows_per_shard=4", *more]


def opened(place: object, cache: pathlib.Path) -> PreparedRows:
  return PreparedRows(Store(str(place), cache))


def encoded(root: pathlib.Path) -> list[Encoded]:
  file = root / "retain.jsonl"
  return encode_rows(make_tokenizer(), read_texts(file), file, 160)


def job(folder: pathlib.Path, **changes: object) -> UnlearnJob:
  values = {"model": str(folder / "base"), "method": "gd", "forget": str(folder / "forget.jsonl"),
            "retain": str(folder / "retain.jsonl"), "steps": 5, "learning_rate": 1e-3, "batch_size": 3}
  return dataclasses.replace(UnlearnJob(), **(values | changes))  # type: ignore[arg-type]


def log(workdir: pathlib.Path) -> list[dict]:
  rows = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_what_is_written_is_what_the_source_is_made_into(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows, expected = opened(folder / "rows", tmp_path), encoded(folder)
  assert rows.read(range(10)) == expected and rows.read([7, 0, 7]) == [expected[7], expected[0], expected[7]]
  counts, about = rows.about.counts, json.loads((folder / "rows" / METADATA).read_text())
  assert [(shard.name, shard.rows) for shard in counts.shards] == list(zip(SHARDS, (4, 4, 2), strict=True))
  assert sorted(path.name for path in (folder / "rows").iterdir()) == [METADATA, *SHARDS]
  assert counts.tokens == sum(len(row.ids) for row in expected)
  assert counts.longest == max(len(row.ids) for row in expected)
  assert counts.most_counted == max(len(row.ids) - row.start for row in expected)
  assert counts.largest_id == max(max(row.ids) for row in expected) and rows.about.prompts == 4
  assert about["source"]["digest"] == hashlib.sha256((folder / "retain.jsonl").read_bytes()).hexdigest()
  assert about["tokenizer"]["tokenizer.json"] == hashlib.sha256(
      (folder / "base" / "tokenizer.json").read_bytes()).hexdigest()
  for name, shard in zip(SHARDS, about["counts"]["shards"], strict=True):
    content = (folder / "rows" / name).read_bytes()
    assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_streamed_rows_train_as_those_of_the_file_and_after_a_kill(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Over the end of an epoch; what is forgotten, too. All that is logged but seconds is the same."""
  place = f"prepared:{folder / 'rows'}"
  prepared = job(folder, forget=place, retain=place, checkpoint_seconds=0.0)
  unlearn(job(folder, forget=str(folder / "retain.jsonl")), "here", tmp_path / "file")
  read, add = [], StageLog.add
  monkeypatch.setattr(PreparedRows, "read", lambda rows, places, of=PreparedRows.read: (
      read.append(len(places)), of(rows, places))[1])

  def killed(log: StageLog, step: int, *more: object) -> None:
    if step == 4:
      raise RuntimeError("killed")
    add(log, step, *more)  # type: ignore[arg-type]
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
    patch.setattr(StageLog, "add", killed)
    unlearn(prepared, "here", tmp_path / "rows")
  assert max(read) == 3  # never more than a step's
  unlearn(prepared, "here", tmp_path / "rows")
  assert log(tmp_path / "rows") == log(tmp_path / "file") and len(log(tmp_path / "rows")) == 5
  inputs = json.loads((tmp_path / "rows" / "inputs.json").read_text())
  assert inputs["forget"] == inputs["retain"] == hashlib.sha256((folder / "rows" / METADATA).read_bytes()).hexdigest()


def test_statistics_and_other_answers_need_more_than_a_step(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
  checked, tokenizer = open_checkpoint(str(folder / "base"))
  place = f"prepared:{folder / 'rows'}"
  kl = job(folder, method="kl", retain=place)
  whole = read_rows(kl, checked, tokenizer)["retain"]
  plain = read_rows(job(folder, method="kl"), checked, tokenizer)["retain"]
  assert isinstance(whole, TokenRows) and isinstance(plain, TokenRows)
  jax.tree.map(np.testing.assert_array_equal, whole, plain)
  monkeypatch.setattr("relearn_jax.training.unlearn_rows.MOST_HELD", 109)
  with pytest.raises(InputError, match=r"metadata.json: `retain` has 110 tokens .* 'kl' keeps statistics"):
    read_rows(kl, checked, tokenizer)
  with pytest.raises(InputError, match="`forget` holds tokens, and method 'idk_nll' makes data set 'idk' of the text"):
    read_rows(job(folder, method="idk_nll", forget=place), checked, tokenizer)


@pytest.mark.parametrize("sizes", ["data:2", "tensor:2", "runs:2"])
def test_processes_hold_parts_of_one_batch(folder: pathlib.Path, tmp_path: pathlib.Path, sizes: str) -> None:
  """As if each device were a process: together they read the batch, and nothing twice but what both hold."""
  mesh = make_mesh(parse_mesh(sizes))
  orders = [Order(10, 3, seed) for seed in range(2)]
  stream = Stream(opened(folder / "rows", tmp_path), orders, mesh, 2, 10)
  whole = stream.read(1)
  assert whole.tokens.shape == (2, 4, 11) and not whole.mask[:, 3].any()
  for run, order in enumerate(orders):
    for row, place in enumerate(order.places(3)):
      ids = encoded(folder)[place].ids
      assert whole.tokens[run, row, :len(ids)].tolist() == ids
  laid = stream.lay(whole)
  places = NamedSharding(mesh, PartitionSpec("runs", ("data", "fsdp"))).devices_indices_map((2, 4))
  shares = [Held([index], (2, 4), 2) for index in places.values()]
  pairs = [{(run, row) for run in share.runs for row in share.rows} for share in shares]
  assert set.union(*pairs) == {(run, row) for run in range(2) for row in range(4)}
  assert len(set.intersection(*pairs)) == (8 if sizes == "tensor:2" else 0)
  for share, (device, index) in zip(shares, places.items(), strict=True):
    own = whole.tokens[np.ix_(share.runs, share.rows)]
    shard = next(shard for shard in laid.tokens.addressable_shards if shard.device == device)
    np.testing.assert_array_equal(share.part(own, index), shard.data)


@pytest.fixture
def bucket(folder: pathlib.Path) -> Iterator[str]:
  """The prepared rows in an object store."""
  store = fsspec.filesystem("memory")
  for path in (folder / "rows").iterdir():
    store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
  yield "memory://bucket"
  store.rm("/bucket", recursive=True)


def test_of_a_store_the_shards_that_are_wanted_are_fetched_once(bucket: str, folder: pathlib.Path,
                                                                tmp_path: pathlib.Path) -> None:
  rows, store = opened(bucket, tmp_path), fsspec.filesystem("memory")
  rows.check_shards()
  assert rows.read([9, 8]) == [encoded(folder)[9], encoded(folder)[8]]
  there = lambda: sorted(path.name[17:] for path in tmp_path.rglob("*.array_record"))
  assert there() == [SHARDS[2]]
  store.pipe_file(f"/bucket/{SHARDS[2]}", b"gone")
  assert opened(bucket, tmp_path).read([9]) == [encoded(folder)[9]]
  with pytest.raises(InputError, match=f"memory://bucket/{SHARDS[2]}: has 4 bytes, and was written with"):
    rows.check_shards()
  store.pipe_file(f"/bucket/{SHARDS[0]}", b"other")
  with pytest.raises(InputError, match=f"memory://bucket/{SHARDS[0]}: is not what was written"):
    rows.read([0])
  store.rm(f"/bucket/{SHARDS[1]}")
  with pytest.raises(InputError, match=f"memory://bucket/{SHARDS[1]}: does not exist; copy the folder again"):
    rows.read([4])
  assert there() == [SHARDS[2]] and not list(tmp_path.rglob(".*.tmp*"))


def test_what_was_cut_in_the_cache_is_fetched_again(bucket: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """By a host that lost its power; one that was damaged otherwise is named as the file that it is."""
  opened(bucket, tmp_path).read([0])
  file = next(tmp_path.rglob("*.array_record"))
  whole = file.read_bytes()
  file.write_bytes(b"")
  assert opened(bucket, tmp_path).read([0]) == encoded(folder)[:1] and file.read_bytes() == whole
  file.write_bytes(bytes(len(whole)))
  with pytest.raises(InputError, match=f"{file}: is damaged .*; remove it: it is fetched again"):
    opened(bucket, tmp_path).read([0])


def test_hosts_that_share_a_cache_do_not_write_into_one_file(bucket: str, folder: pathlib.Path, tmp_path: pathlib.Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
  """Two with the same process number, on a disk that keeps no locks between hosts; both are in the middle at once."""
  monkeypatch.setattr("relearn_jax.data.stores.one_at_a_time", lambda *_: contextlib.nullcontext())
  both, chunks, hosts = threading.Barrier(2, timeout=10), Store._chunks, [opened(bucket, tmp_path) for _ in range(2)]

  def halves(store: Store, file: File) -> Iterator[bytes]:
    content = b"".join(chunks(store, file))
    yield content[:9]
    both.wait()
    yield content[9:]
  monkeypatch.setattr(Store, "_chunks", halves)
  hosts[0].store.local(hosts[0].about.counts.shards[0]).parent.mkdir(parents=True)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(lambda rows: rows.read([0]), hosts)) == [encoded(folder)[:1]] * 2
  assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_few_shards_are_open_together(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                                      ) -> None:
  """Of however many; and one that cannot be opened is not called damaged."""
  monkeypatch.setattr("relearn_jax.data.prepared.MOST_OPEN", 1)
  shutil.copytree(folder / "rows", tmp_path / "rows")
  rows, files = opened(tmp_path / "rows", tmp_path), pathlib.Path("/proc/self/fd")
  is_open = lambda file: file.is_symlink() and str(tmp_path) in str(file.readlink())
  for places in ([0], [9], [7, 0, 9, 1], range(10)):
    assert rows.read(places) == [encoded(folder)[place] for place in places]
    assert sum(map(is_open, files.iterdir())) == 1
  with concurrent.futures.ThreadPoolExecutor(2) as pool:  # neither closes what the other reads
    assert list(pool.map(rows.read, [range(10)] * 40)) == [encoded(folder)] * 40
  (tmp_path / "rows" / SHARDS[0]).unlink()
  with pytest.raises(InputError, match=rf"rows/{SHARDS[0]}: cannot be read \(No such file or directory\)"):
    rows.read([0])


def cut(folder: pathlib.Path) -> None:
  file = folder / "rows" / SHARDS[1]
  file.write_bytes(file.read_bytes()[:-1])


def exchange(folder: pathlib.Path) -> None:
  one, other = (folder / "rows" / name for name in SHARDS[:2])
  assert one.stat().st_size == other.stat().st_size
  content = one.read_bytes()
  one.write_bytes(other.read_bytes())
  other.write_bytes(content)


def rewrite(name: str, before: str, after: str) -> Callable[[pathlib.Path], None]:
  def change(folder: pathlib.Path) -> None:
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))
  return change


@pytest.mark.parametrize("damage,says", [
    (lambda folder: (folder / "rows" / SHARDS[2]).unlink(), f"rows/{SHARDS[2]}: does not exist; copy the folder again"),
    (cut, f"rows/{SHARDS[1]}: has "),
    (exchange, f"rows/{SHARDS[0]}: is not what was written: its SHA-256 is another"),
    (lambda folder: (folder / "rows" / METADATA).unlink(), f"{METADATA}: does not exist; give a folder that `relearn"),
    (rewrite(f"rows/{METADATA}", '"schema_version": 1', '"schema_version": 2'), "`schema_version` is 2, and 1 is read"),
    (rewrite(f"rows/{METADATA}", "{", ""), f"rows/{METADATA}: is no JSON"),
    (rewrite(f"rows/{METADATA}", '"rows": 4', '"rows": 5'), "`counts.rows` is 10, and its shards have 12"),
    (rewrite(f"rows/{METADATA}", '"name": "rows-', '"name": "../rows-'), "`counts.shards` has '../rows-00000"),
    (rewrite(f"rows/{METADATA}", '"chat": ""', '"chat": "f00"'), "`chat` says that prompts were rendered by a chat"),
    (rewrite("base/tokenizer.json", '"James"', '"Jim"'), "`tokenizer` is not the checkpoint's: tokenizer.json differs"),
    (rewrite("base/config.json", '"max_position_embeddings": 160', '"max_position_embeddings": 10'),
     "`counts.longest` is 11, more than the model's 10 positions"),
])
def test_rows_that_do_not_fit_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path,
                                          damage: Callable[[pathlib.Path], None], says: str) -> None:
  """Before a device is used."""
  for name in ("base", "rows"):
    shutil.copytree(folder / name, tmp_path / name)
  damage(tmp_path)
  checked, tokenizer = open_checkpoint(str(tmp_path / "base"))
  small = job(folder, model=str(tmp_path / "base"), retain=f"prepared:{tmp_path / 'rows'}")
  with pytest.raises(InputError) as caught:
    read_rows(small, checked, tokenizer)
  assert says in str(caught.value)


def test_a_shard_that_is_damaged_within_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  shutil.copytree(folder / "rows", tmp_path / "rows")
  file = tmp_path / "rows" / SHARDS[1]
  content = bytearray(file.read_bytes())
  content[100:140] = bytes(40)
  file.write_bytes(content)
  rows = opened(tmp_path / "rows", tmp_path)
  rows.check_shards()
  assert rows.read([0, 9]) == [encoded(folder)[0], encoded(folder)[9]]
  with pytest.raises(InputError, match=f"rows/{SHARDS[1]}: is damaged"):
    rows.read(range(10))


def test_what_cannot_be_prepared_leaves_nothing(folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path
                                                ) -> None:
  long = write_lines(tmp_path / "long.jsonl", [*RETAIN, {"text": "James " * 161}])
  bad = write_lines(tmp_path / "bad.jsonl", [*RETAIN, {"prompt": "James"}])
  for source, more, says in (
      (long, (), f"{long}:11: `text` has 162 tokens, more than the model's 160 positions"),
      (bad, (), f"{bad}:11: `answer` is missing"), (long, ("--columns={'text'}",), "`--columns` is"),
      (f"prepared:{folder / 'rows'}", (), "holds tokens, and text is wanted; give the source that it was prepared"),
      (long, ("--rows_per_shard=0",), "`--rows_per_shard` is 0"),
      (long, ("--chat_template",), "`--chat_template` asks for the checkpoint's chat template, which it does not")):
    done = relearn(cache, *command(folder, tmp_path / "rows", source, *more), status=2)
    assert says in done.stderr
  done = relearn(cache, *command(folder, "gs://bucket/rows"), status=2)  # type: ignore[arg-type]
  assert "gs://bucket/rows: `--output` is an address, and rows are written to a disk" in done.stderr
  assert "`--output` exists" in relearn(cache, *command(folder, folder / "rows"), status=2).stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "long.jsonl"]


def test_prompts_are_rendered_as_the_job_would(folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path
                                               ) -> None:
  """By the same template, which was told the same; of texts alone it does not matter."""
  base = shutil.copytree(folder / "base", tmp_path / "base")
  settings = json.loads((base / "tokenizer_config.json").read_text())
  template = "{% for turn in messages %}{{ turn.content }} {% endfor %}Mark"
  (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
  write_lines(tmp_path / "texts.jsonl", RETAIN[1:3])
  for name, source in (("chat", folder / "retain.jsonl"), ("texts", tmp_path / "texts.jsonl")):
    relearn(cache, *command(tmp_path, tmp_path / name, source, "--chat_template"))
  checked, tokenizer = open_checkpoint(str(base))
  read = lambda name, **more: read_rows(job(folder, model=str(base), retain=f"prepared:{tmp_path / name}", **more),
                                        checked, tokenizer)["retain"]
  plain = read_rows(job(folder, model=str(base), chat_template=True, method="kl"), checked, tokenizer)["retain"]
  jax.tree.map(np.testing.assert_array_equal, read("chat", chat_template=True, method="kl"), plain)
  told = ChatSettings(system="James")
  for more, says in (({}, "rendered by a chat template; set chat_template=True, or prepare the source again"),
                     ({"chat_template": True, "chat": told}, "`chat` is another chat template, or one that was told")):
    with pytest.raises(InputError, match=says):
      read("chat", **more)
    assert len(read("texts", **more)) == 2


def test_a_full_disk_is_told(folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))  # a shard has 128 KiB at least
  try:
    done = relearn(cache, *command(folder, tmp_path / "rows"), status=2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert f"{tmp_path / 'rows'}: `--output` cannot be written (File too large)" in done.stderr
  assert not list(tmp_path.iterdir())


def test_columns_and_tables(folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  table = tmp_path / "table.csv"
  table.write_text("name,line\nMark,James Paul\nJohn,David Mark\n")
  done = relearn(cache, *command(folder, tmp_path / "rows", table, '--columns={"text": "line"}'))
  assert "2 rows, 6 tokens, the longest row 3, in 1 shard: " in done.stdout
  assert opened(tmp_path / "rows", tmp_path).read([1])[0].ids == make_tokenizer()("David Mark")["input_ids"]
