"""Text of TensorFlow Datasets, read without TensorFlow: prepared folders, names of the catalogue, what is wrong."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from relearn_jax.cases.sources import read, read_source, source_input
from relearn_jax.errors import InputError


class Books(tfds.core.GeneratorBasedBuilder):
  """Ten rows, written as a prepared data set is."""

  VERSION = tfds.core.Version("1.0.0")
  ROWS: list[dict[str, Any]] = []

  def _info(self) -> Any:
    kinds = {"question": tfds.features.Text(), "answer": tfds.features.Text(), "number": tfds.features.Scalar(np.int64),
             "keywords": tfds.features.Sequence(tfds.features.Text())}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

  def _split_generators(self, dl_manager: Any) -> Any:
    return {"train": enumerate(self.ROWS)}

  def _generate_examples(self) -> Any:
    raise AssertionError("the split has its rows")


def prepared(folder: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
  """A folder of TensorFlow Datasets with these rows."""
  Books.ROWS = rows
  builder = Books(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


def test_a_prepared_folder_is_read_without_tensorflow(tmp_path: pathlib.Path) -> None:
  rows = [{"question": f"q{i} ü", "answer": f"a{i}", "number": i, "keywords": ["x", f"y{i}"]} for i in range(10)]
  folder = prepared(tmp_path / "tfds", rows)
  found = read(f"tfds:{folder}")
  assert sorted(found.rows, key=lambda row: row["number"]) == rows and found.revision == ""
  assert read(f"tfds:{folder}:train[2:5]").rows == list(found.rows)[2:5]
  assert read_source(f"tfds:{folder}", {"prompt": "question"}, {"prompt": str, "keywords": list})[0].line == 1
  assert source_input(f"tfds:{folder}:train") == found.digest != source_input(f"tfds:{folder}:train[:9]")
  for split, problem in (("test", "Unknown split 'test'"), ("train[:0]", "0 length"), ("train[:x]", "Error parsing")):
    with pytest.raises(InputError, match=f"cannot be read .*{problem}"):
      read(f"tfds:{folder}:{split}")


def test_a_name_is_found_among_what_is_prepared(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """`Books` is of the catalogue as soon as its class is there."""
  rows = [{"question": "q", "answer": "a", "number": 1, "keywords": []}]
  prepared(tmp_path, rows)
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  assert list(read("tfds:books").rows) == list(read("tfds:books:1.0.0:train").rows) == rows
  with pytest.raises(InputError, match="tfds:books:2.0.0: cannot be read .*2.0.0"):
    read("tfds:books:2.0.0")


def test_bytes_that_are_no_text_are_told(tmp_path: pathlib.Path) -> None:
  folder = prepared(tmp_path / "tfds", [{"question": b"caf\xe9", "answer": "a", "number": 0, "keywords": []}])
  with pytest.raises(InputError, match="tfds:.*:1: `question` is not UTF-8 .byte 4.; prepare"):
    read(f"tfds:{folder}")


@pytest.mark.parametrize("place", ["no_such_data_set", "no/such/folder", "."])
def test_a_data_set_that_is_not_there_is_told(place: str) -> None:
  with pytest.raises(InputError, match="cannot be read .*; expected tfds:NAME/CONFIG:SPLIT, or the folder"):
    read(f"tfds:{place}")
