"""Stop strings: where a completion ends that the model itself would have run on."""

from collections.abc import Sequence


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
  """Where the first stop string to be complete begins and ends in a text; of two, the longer one."""
  found = [(begin + len(string), begin) for string in stop if (begin := text.find(string)) >= 0]
  return min(found)[::-1] if found else None


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
  """The text before the first stop string to be complete; all of it where there is none."""
  span = find_stop(text, stop)
  return text if span is None else text[:span[0]]
