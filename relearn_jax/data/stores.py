"""Folders of finished files, on a disk or in an object store, whose files are fetched where they are asked for."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import replace_file
from relearn_jax.workdir import one_at_a_time

AT_ONCE = 16  # questions to a store that are under way together
CHUNK = 2**22  # bytes of a file that are fetched at once
AGAIN = "copy the folder again, whole"


@dataclasses.dataclass(frozen=True)
class File:
  """What is known of a file beforehand.

  Attributes:
    name: in its folder.
    bytes: its size.
    sha256: of its contents, in hexadecimal.
  """

  name: str
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Store:
  """A folder that is read.

  Attributes:
    place: a path, or an address that fsspec knows, such as gs://bucket/folder, s3:// or https://.
    cache: where files of an address are kept, a folder of each address; processes of one host share it.
  """

  place: str
  cache: pathlib.Path

  @property
  def is_remote(self) -> bool:
    """Whether files are fetched."""
    return "://" in self.place

  def path(self, name: str) -> str:
    """A file's, for messages."""
    return f"{self.place.rstrip('/')}/{name}" if self.is_remote else str(pathlib.Path(self.place) / name)

  def read(self, name: str, mend: str) -> bytes:
    """A small file.

    Raises:
      InputError: it is not there, or cannot be read.
    """
    try:
      return bytes(_system(self.place).cat_file(self.path(name)))
    except Exception as error:  # each kind of store has its own
      raise self._trouble(name, error, mend) from None

  def check(self, files: Iterable[File]) -> None:
    """Looks whether files are there in their sizes; nothing is read.

    Raises:
      InputError: naming one that is missing, or was cut.
    """
    def look(file: File) -> None:
      try:
        size = _system(self.place).size(self.path(file.name))
      except Exception as error:
        raise self._trouble(file.name, error, AGAIN) from None
      if size is not None and size != file.bytes:  # of some addresses it is not told
        raise InputError(f"has {size} bytes, and was written with {file.bytes}", file=self.path(file.name), mend=AGAIN)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      list(pool.map(look, files))

  def check_contents(self, files: Iterable[File]) -> None:
    """Reads files of a disk, and compares them with what was written; those of an address are as they are fetched.

    Raises:
      InputError: naming one that cannot be read, or is another.
    """
    def look(file: File) -> None:
      try:
        with self.local(file).open("rb") as content:
          digest = hashlib.file_digest(content, "sha256").hexdigest()
      except OSError as error:
        raise self._trouble(file.name, error, AGAIN) from None
      self._check_digest(file, digest)
    if not self.is_remote:
      with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(look, files))

  def _check_digest(self, file: File, digest: str) -> None:
    if digest != file.sha256:
      raise InputError("is not what was written: its SHA-256 is another", file=self.path(file.name), mend=AGAIN)

  def local(self, file: File) -> pathlib.Path:
    """Where a file lies on this host, or will once it is fetched."""
    if not self.is_remote:
      return pathlib.Path(self.place) / file.name
    return self.cache / hashlib.sha256(self.place.encode()).hexdigest()[:16] / f"{file.sha256[:16]}-{file.name}"

  def fetch(self, file: File) -> None:
    """Makes `local` be there: complete, and once a host.

    Raises:
      InputError: it cannot be fetched, or is not what was written.
    """
    target = self.local(file)
    if not self.is_remote or _is_whole(target, file):
      return
    with one_at_a_time(target.with_name(f"{target.name}.lock"), "RELEARN_CACHE"):
      if not _is_whole(target, file):
        self._copy(file, target)

  def _copy(self, file: File, target: pathlib.Path) -> None:
    def write(temporary: pathlib.Path) -> None:
      digest = hashlib.sha256()
      with temporary.open("wb") as out:
        for chunk in self._chunks(file):
          digest.update(chunk)
          out.write(chunk)
      self._check_digest(file, digest.hexdigest())
    replace_file(target, write)

  def _chunks(self, file: File) -> Iterable[bytes]:
    try:
      with _system(self.place).open(self.path(file.name), "rb") as source:
        while chunk := source.read(CHUNK):
          yield chunk
    except Exception as error:
      raise self._trouble(file.name, error, AGAIN) from None

  def _trouble(self, name: str, error: Exception, mend: str) -> InputError:
    if isinstance(error, FileNotFoundError):
      return InputError("does not exist", file=self.path(name), mend=mend)
    if isinstance(error, ImportError):
      return InputError(f"cannot be read ({error})", file=self.path(name),
                        mend="pip install 'relearn_jax[stores]' for gs:// and s3://, or copy it to a disk")
    said = (getattr(error, "strerror", None) or f"{type(error).__name__}: {error}").split("\n")[0][:200]
    return InputError(f"cannot be read ({said})", file=self.path(name),
                      mend="give a place that this host may read (credentials are found as fsspec finds them)")


def _is_whole(target: pathlib.Path, file: File) -> bool:
  """Whether a file was fetched; a host that lost its power may have cut it since."""
  try:
    return target.stat().st_size == file.bytes
  except FileNotFoundError:
    return False


@functools.lru_cache(maxsize=8)
def _system(place: str) -> Any:
  """The file system of a place."""
  import fsspec
  return fsspec.core.url_to_fs(place)[0]
