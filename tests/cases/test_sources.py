"""Text from anywhere: what a source's string means, the rows of every kind, and each thing that can be wrong."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from relearn_jax.cases.files import FilesConfig, read_questions, read_texts
from relearn_jax.cases.sources import Source, parse_source, read, read_source, source_input
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.training.job import UnlearnJob, check_job
from relearn_jax.training.unlearn_rows import job_texts
from relearn_jax.workdir import file_digests

from ..small import write_checkpoint

ROWS = [{"question": "Who wrote it?", "answer": "Mira wrote “it”, über alles."}, {"question": "When?", "answer": "NA"},
        {"question": "Where?", "answer": "None"}]
TOFU = {"prompt": "Question: {question}\nAnswer:", "answer": " {answer}"}
README = """---
configs:
- config_name: forget05
  data_files: forget05.json
- config_name: books
  data_files:
  - {split: train, path: books.json}
  - {split: test, path: forget05.json}
---
"""


def lines(rows: list[dict[str, Any]]) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """What is prepared is kept with the test."""
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder laid out as a repository of the hub."""
  folder = tmp_path / "TOFU"
  folder.mkdir()
  (folder / "README.md").write_text(README)
  (folder / "forget05.json").write_text(lines(ROWS))
  (folder / "books.json").write_text(json.dumps(ROWS))
  return folder


@pytest.mark.parametrize("text,source,name", [
    ("a/b.jsonl", Source("a/b.jsonl", "file", "a/b.jsonl"), "b"),
    ("file:hf.csv", Source("file:hf.csv", "file", "hf.csv"), "hf"),
    ("hf:o/N", Source("hf:o/N", "hf", "o/N"), "N"),
    ("hf:o/N:c05", Source("hf:o/N:c05", "hf", "o/N", "c05"), "c05"),
    ("hf:o/N@v1.0:c", Source("hf:o/N@v1.0:c", "hf", "o/N", "c", "v1.0"), "c"),
    ("hf:o/N@refs/pr/1", Source("hf:o/N@refs/pr/1", "hf", "o/N", "", "refs/pr/1"), "N"),
    ("hf:o/N:/test", Source("hf:o/N:/test", "hf", "o/N", "", "", "test"), "N-test"),
    ("hf:./d/N:c/train[:10%]", Source("hf:./d/N:c/train[:10%]", "hf", "./d/N", "c", "", "train[:10%]"), "c-train-10"),
    ("tfds:n", Source("tfds:n", "tfds", "n"), "n"),
    ("tfds:/d/n/1.0.0", Source("tfds:/d/n/1.0.0", "tfds", "/d/n/1.0.0"), "n"),
    ("tfds:n/c:train[:1000]", Source("tfds:n/c:train[:1000]", "tfds", "n/c", split="train[:1000]"), "c-train-1000"),
    ("tfds:n/c:1.0.*:test", Source("tfds:n/c:1.0.*:test", "tfds", "n/c", "", "1.0.*", "test"), "c-test")])
def test_a_string_is_a_source(text: str, source: Source, name: str) -> None:
  assert parse_source(text) == source and source.name == name


@pytest.mark.parametrize("text,problem", [
    ("hf:", "hf:: is no source"), ("hf:a/b@", "hf:a/b@: is no source"), ("tfds:", "tfds:: is no source"),
    ("https://x/y.jsonl", "is of kind 'https'"), ("s3:x", "is of kind 's3'; expected a path, or file:, hf: or tfds:")])
def test_what_is_no_source_is_told(text: str, problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    parse_source(text)


def test_every_kind_of_file_has_the_same_rows(tmp_path: pathlib.Path) -> None:
  quoted = "question,answer\n" + "\n".join(f'"{r["question"]}","{r["answer"]}"' for r in ROWS)
  contents = {"a.jsonl": lines(ROWS), "b.json": lines(ROWS), "c.json": json.dumps(ROWS, indent=2),
              "d.csv": "\ufeff" + quoted, "f.NDJSON": "\n" + lines(ROWS)}
  for name, content in contents.items():
    (tmp_path / name).write_text(content, encoding="utf-8")
  pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
  for name in (*contents, "e.parquet"):
    for text in (str(tmp_path / name), f"file:{tmp_path / name}"):
      assert read(text).rows == ROWS, name
      assert read(text).digest == file_digests({"x": tmp_path / name})["x"]
      assert source_input(text) == tmp_path / name
  where = {name: [row.line for row in read(tmp_path / name).rows] for name in ("d.csv", "f.NDJSON", "c.json")}
  assert where == {"d.csv": [2, 3, 4], "f.NDJSON": [2, 3, 4], "c.json": [1, 2, 3]}


def test_cells_may_hold_lines_and_rows_know_where_they_begin(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.csv").write_text('prompt,answer\n"one\ntwo","x, y"\n\n001,"say ""so"""\n')
  first, second = read_source(tmp_path / "a.csv")
  assert (first, first.line) == ({"prompt": "one\ntwo", "answer": "x, y"}, 2)
  assert (second, second.line) == ({"prompt": "001", "answer": 'say "so"'}, 5)


def test_lines_of_plain_text_are_texts_that_go_on(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.txt").write_text("First.\n\n  Second.\n")
  rows = read_texts(tmp_path / "a.txt")
  assert rows == [{"text": "First."}, {"text": "  Second."}] and [row.line for row in rows] == [1, 3]


@pytest.mark.parametrize("name,content,problem", [
    ("a.xlsx", b"x", "a.xlsx: has the suffix '.xlsx'; expected one of .jsonl, "),
    ("a", b"x", "a: has the suffix ''; expected one of"),
    ("a.txt", b"caf\xe9", "a.txt: is not UTF-8 .byte 4.; save the file as UTF-8"),
    ("a.csv", b"prompt\ncaf\xe9", "a.csv: is not UTF-8"), ("a.json", b'["caf\xe9"]', "a.json: is not UTF-8"),
    ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl:1: is not UTF-8 .byte 14 of the line"),
    ("a.csv", b"", "a.csv: has no rows"), ("a.csv", b"prompt,answer\n", "a.csv: has no rows"),
    ("a.txt", b"\n \n", "a.txt: has no rows"), ("a.json", b"[]", "a.json: has no rows"),
    ("a.json", b"[1]", "a.json:1: is a JSON int, not an object"), ("a.json", b"[{]", "a.json: is no JSON .Expecting"),
    ("a.csv", b"a,b\n1,2\n1\n", "a.csv:3: has 1 cells, and the first line 2; put quotation marks"),
    ("a.csv", b"a,a\n1,2\n", "a.csv:1: `a` names a column twice"),
    ("a.csv", b'a,b\n"1" 2,3\n', "a.csv:2: is no CSV"),
    ("a.parquet", b"PAR1", "a.parquet: is no Parquet"), ("a.jsonl", b"{", "a.jsonl:1: is no JSON")])
def test_a_bad_file_is_named(tmp_path: pathlib.Path, name: str, content: bytes, problem: str) -> None:
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=problem):
    read_source(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt", "json", "xlsx"])
def test_a_missing_file_is_named_with_its_neighbour(tmp_path: pathlib.Path, suffix: str) -> None:
  (tmp_path / f"forget.{suffix}").write_text("x")
  with pytest.raises(InputError, match=rf"forgot.{suffix}: does not exist; give a file.*there is .*forget.{suffix}"):
    read(f"file:{tmp_path}/forgot.{suffix}")


def test_what_a_table_holds_besides_text_is_told(tmp_path: pathlib.Path) -> None:
  broken = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9x"))
  times = pa.array([datetime.datetime(2024, 1, 1)])
  for name, column in (("broken", broken), ("times", times), ("bytes", pa.array([b"\xe9"])), ("none", pa.nulls(1))):
    pq.write_table(pa.table({"text": column, "more": pa.array([1])}), tmp_path / f"{name}.parquet")
  for name, problem in (("broken", "is no Parquet .*; save it again, with text as UTF-8"),
                        ("times", "times.parquet:1: `text` is \"datetime.datetime.2024, 1.*; expected str"),
                        ("bytes", "bytes.parquet:1: `text` is .*xe9.*; expected str"),
                        ("none", "none.parquet: `prompt` is not there: the columns are more; name its column")):
    with pytest.raises(InputError, match=problem):
      read_texts(tmp_path / f"{name}.parquet")


def test_a_table_that_is_damaged_within_is_named(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": [f"{i} {i * i}" for i in range(2000)]}), file, row_group_size=1000)
  content = bytearray(file.read_bytes())
  content[2000:2400] = bytes(range(200)) * 2
  file.write_bytes(content)
  with pytest.raises(InputError, match="a.parquet: is no Parquet .*; save it again"):
    read_texts(file)


def test_columns_take_our_names(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "a.jsonl"
  file.write_text(lines([*ROWS, {"prompt": "own", "answer": "kept", "more": 1}]))
  plain = read_source(file, {"prompt": "question"})
  assert plain[0] == {"prompt": ROWS[0]["question"], "answer": ROWS[0]["answer"]}
  assert plain[3] == {"prompt": "own", "answer": "kept", "more": 1}  # it lacks the column, and has the field
  first = read_texts(file, TOFU)[0]
  assert first == {"prompt": "Question: Who wrote it?\nAnswer:", "answer": " " + ROWS[0]["answer"]} and first.line == 1
  assert read(file).rows[0] == ROWS[0]  # nothing of what was read has changed


@pytest.mark.parametrize("call,problem", [
    (lambda file: read_source(file, {"prompt": "quesion"}),
     "`prompt` is not there, nor is the column 'quesion': the columns are question, answer; name its column"),
    (lambda file: read_source(file, fields={"prompt": str}), "`prompt` is missing"),
    (lambda file: read_texts(file, {"prompt": "{quesion}?"}), "`prompt` is not there, nor is the column"),
    (lambda file: read_questions(file, {"keywords": "title", **TOFU}), "`id` is not there: the columns are"),
    (lambda file: read_texts(file), "`prompt` is missing")])
def test_a_column_that_is_not_there_is_named(tmp_path: pathlib.Path, call: Callable[[pathlib.Path], Any], problem: str
                                             ) -> None:
  (tmp_path / "a.jsonl").write_text(lines(ROWS))
  with pytest.raises(InputError, match=problem):
    call(tmp_path / "a.jsonl")


def test_questions_from_a_table_have_their_one_keyword(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.csv").write_text(
      "id,prompt,answer,title,cluster\n1,Who?,It is Glass.,Glass,a\n2,What?,Stone.,Stone,a\n")
  _, (one, two) = read_questions(tmp_path / "a.csv", {"keywords": "title"})
  assert (one.keywords, two.keywords, one.cluster, one.line) == (("Glass",), ("Stone",), "a", 2)
  (tmp_path / "a.csv").write_text("id,prompt,answer,title\n1,Who?,It.,Glass\n1,What?,Stone.,Stone\n")
  with pytest.raises(InputError, match="a.csv:3: `id` '1' stands in line 2 too"):
    read_questions(tmp_path / "a.csv", {"keywords": "title"})


def test_a_folder_is_read_as_a_repository(hub: pathlib.Path) -> None:
  assert read(f"hf:{hub}:forget05").rows == ROWS
  assert read(f"hf:{hub}:books").rows == ROWS
  part = read(f"hf:{hub}:books/test[1:]")
  assert part.rows == ROWS[1:] and [row.line for row in part.rows] == [1, 2] and part.revision == ""
  assert read_texts(f"hf:{hub}:forget05", TOFU)[1]["answer"] == " NA"


def test_rows_decide_a_digest(hub: pathlib.Path) -> None:
  before = source_input(f"hf:{hub}:forget05")
  assert before == read(f"hf:{hub}:books").digest == source_input(f"hf:{hub}:books/test")
  (hub / "forget05.json").write_text(lines(ROWS[:2]) + lines([ROWS[2] | {"answer": "Here"}]))
  assert before != source_input(f"hf:{hub}:forget05") == source_input(f"hf:{hub}:books/test")


@pytest.mark.parametrize("source,problem", [
    (":forget", "cannot be read .*'forget' not found. Available: ..forget05.*; expected hf:"),
    ("", "cannot be read .*Config name is missing.*forget05"),
    (":books/validation", 'cannot be read .*Unknown split "validation"'),
    (":books/train[:0]", "cannot be read .*no data"), (":books/train[:x]", "Unrecognized instruction format"),
    ("@main:books", "is a local folder, which has no revisions; leave @main out")])
def test_what_a_repository_has_not_is_told(hub: pathlib.Path, source: str, problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    read(f"hf:{hub}{source}")


def test_a_table_of_a_repository_is_text(tmp_path: pathlib.Path) -> None:
  """Not empty cells where it says "NA" or "None"."""
  (tmp_path / "tables").mkdir()
  (tmp_path / "tables" / "train.csv").write_text("question,answer\n" + "".join(
      f'{row["question"]},"{row["answer"]}"\n' for row in ROWS))
  assert read(f"hf:{tmp_path}/tables").rows == ROWS


def test_pictures_are_not_read(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  with pytest.raises(InputError, match="holds imagefolder, which is not read; expected one of json, csv"):
    read(f"hf:{tmp_path}")


@pytest.mark.parametrize("content", [b'{"question": "caf\xe9"}\n', b"{"])
def test_damaged_files_of_a_repository_are_told(hub: pathlib.Path, content: bytes) -> None:
  (hub / "forget05.json").write_bytes(content)
  with pytest.raises(InputError, match="cannot be read .*; expected .* files that are UTF-8 and whole"):
    read(f"hf:{hub}:forget05")


def test_no_code_of_a_repository_is_run(hub: pathlib.Path) -> None:
  ran = hub.parent / "ran"
  (hub / "TOFU.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
  with pytest.raises(InputError, match="scripts are no longer supported"):
    read(f"hf:{hub}:forget05")
  assert not ran.exists()


@pytest.mark.parametrize("place", ["TOFU", "./no/such", "/no/such", "a/b/c", "csv"])
def test_what_is_no_repository_is_told(place: str) -> None:
  with pytest.raises(InputError, match="which is no local folder and no hub id"):
    read(f"hf:{place}:forget05")


@pytest.mark.parametrize("raised,problem", [
    (DatasetNotFoundError("Dataset 'o/N' is a gated dataset on the Hub."),
     "is gated; accept its licence on the hub, then set HF_TOKEN"),
    (DatasetNotFoundError("Dataset 'o/N' doesn't exist on the Hub or cannot be accessed."),
     "is not found .Dataset 'o/N' doesn't exist.*; check the spelling, or set HF_TOKEN"),
    (DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'o/N' on the Hub."), "is not found .Revision 'v9'")])
def test_what_the_hub_does_not_show_is_told(monkeypatch: pytest.MonkeyPatch, raised: Exception, problem: str) -> None:
  def refuse(**_: Any) -> None:
    raise raised
  monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
  with pytest.raises(InputError, match=f"hf:o/N@v9:c: {problem}"):
    read("hf:o/N@v9:c")


def test_offline_a_repository_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  with pytest.raises(InputError, match="cannot be fetched from the hub .*; go online, or download o/none and give its"):
    read("hf:o/none:c")


def test_what_is_fetched_is_fetched_once_and_named_by_its_commit(hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
  local, asked = datasets.load_dataset_builder, []

  def load(path: str, name: str, revision: str, **more: Any) -> Any:
    asked.append((path, name, revision))
    builder = local(str(hub), name, **more)
    builder.hash = "0123abc"
    return builder
  monkeypatch.setattr(datasets, "load_dataset_builder", load)
  found = read("hf:o/once@v1:forget05")
  assert (found.rows, found.revision) == (ROWS, "0123abc") and asked == [("o/once", "forget05", "v1")]
  assert source_input("hf:o/once@v1:forget05") == f"{found.digest} at revision 0123abc"
  assert read("hf:o/once@v1:forget05") is found and len(asked) == 1
  assert file_digests({"forget": source_input("hf:o/once@v1:forget05")})["forget"].startswith(found.digest)


def test_a_case_is_made_from_any_sources(hub: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (tmp_path / "asked.jsonl").write_text(lines([{"id": 1, "prompt": "Who?", "answer": "It.", "keywords": ["Glass"]}]))
  (tmp_path / "kept.csv").write_text("prompt,answer\nWhat?, This.\n")
  config = FilesConfig(
      forget=f"hf:{hub}:forget05", retain=str(tmp_path / "kept.csv"), relearn=(f"hf:{hub}:books/train[:2]",),
      questions=f"file:{tmp_path}/asked.jsonl", columns=TOFU)
  config.check("here")
  case = config.make("given", 0, "U")
  assert [row.prompt for row in case.memorize[2:]] == ["Question: Where?\nAnswer:", "What?"]
  (relearn,) = case.relearn_sets
  assert relearn.name == "books-train-2" and relearn.lines == (1, 2) and f"hf:{hub}" in relearn.provenance
  assert str(case.origin("forget")) == f"hf:{hub}:forget05" and case.origin("questions") == tmp_path / "asked.jsonl"
  digests = file_digests(config.inputs())
  assert digests.keys() == {"forget", "retain", "questions", "books-train-2"}
  assert digests["forget"] == read(f"hf:{hub}:forget05").digest


def test_a_job_takes_any_source(hub: pathlib.Path) -> None:
  job = UnlearnJob(model="m", method="ga", forget=f"hf:{hub}:forget05", columns=TOFU)
  check_job(job, "here")
  assert job_texts(job, job.forget) == read_texts(f"hf:{hub}:books", TOFU)
  with pytest.raises(InputError, match="here: `columns` is 'question'; expected our fields"):
    check_job(dataclasses.replace(job, columns="question"), "here")


def test_prompts_are_generated_from_any_source(tmp_path: pathlib.Path) -> None:
  (tmp_path / "asked.csv").write_text("id,prompt\n007,James Robert\n8,Anthony\n")
  model, output = str(write_checkpoint(tmp_path / "model")), tmp_path / "said.jsonl"
  assert generate_file(model, str(tmp_path / "asked.csv"), output, max_new_tokens=2) == 2
  assert [(row["id"], row["prompt"]) for row in read(output).rows] == [("007", "James Robert"), ("8", "Anthony")]
  with pytest.raises(InputError, match="`--output` is the file that is read"):
    generate_file(model, f"file:{output}", output, max_new_tokens=2)


@pytest.mark.parametrize("columns", ["prompt=question", {"prompt": 1}, {"prompt": ""}, ("prompt", "question")])
def test_columns_are_a_dictionary_of_strings(columns: Any) -> None:
  config = FilesConfig(forget="a.jsonl", retain="b.jsonl", relearn=("c.jsonl",), questions="d.jsonl", columns=columns)
  with pytest.raises(InputError, match="here: `case.columns` is .*; expected our fields and their columns"):
    config.check("here")


def test_the_command_line_sets_columns(tmp_path: pathlib.Path) -> None:
  from absl import flags
  from ml_collections import config_flags
  file = pathlib.Path(__file__).parents[2] / "configs" / "checkpoint.py"
  line = ["relearn", f"--config={file}", f"--config.case.columns={TOFU!r}"]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
  values(line)
  assert values.config.case.columns == TOFU and load_config_file(str(file)).case.columns == {}
