"""Weights of models that are given: read ahead where there is room, and equal to those that are read when wanted."""

import jax
import jax.numpy as jnp
import pytest

from relearn_jax.audit import given
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.export import export
from relearn_jax.models.model import fingerprint
from relearn_jax.parallel.memory import host_room
from relearn_jax.parallel.mesh import make_mesh, parse_mesh

from ..small import MODEL, params

MESH = make_mesh(parse_mesh("runs:1,fsdp:2"), jax.devices()[:2])
F32 = jnp.float32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> given.Given:
  root = tmp_path_factory.mktemp("given")
  for name, tree in (("U", params()), ("N", jax.tree.map(lambda leaf: leaf * 1e6, params(1)))):
    export(tree, MODEL, root / name)
  return given.Given({name: check_checkpoint(root / name) for name in ("U", "N")}, MODEL, MESH)


def test_what_is_read_ahead_is_what_is_taken(weights: given.Given, monkeypatch: pytest.MonkeyPatch) -> None:
  wanted = load_params(weights.checked["U"], MODEL, mesh=MESH)
  monkeypatch.setattr(given, "host_room", lambda: 2.0**34)
  weights.read_ahead([("U", F32), ("N", jnp.float16)])
  with monkeypatch.context() as patch:
    patch.setattr(given, "load_params", None)  # it is not read again
    found = weights.take("U", F32)
    assert fingerprint(found) == fingerprint(wanted)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, wanted)
    with pytest.raises(InputError, match="is too large for float16"):  # said where it is wanted
      weights.take("N", jnp.float16)
  weights.read_ahead([("U", F32)])
  weights.read_ahead([])  # another stage was done in its place
  monkeypatch.setattr(given, "load_params", lambda *_, **__: "read now")
  assert weights.take("U", F32) == "read now"


def test_frozen_weights_stay_until_others_are_wanted(weights: given.Given) -> None:
  first = weights.freeze("U", F32)
  assert weights.freeze("U", F32) is first
  assert weights.freeze("U", jnp.bfloat16) is not first and weights.freeze("U", F32) is not first
  weights.take("U", F32)
  assert weights._frozen is None  # two models need not fit


def test_nothing_is_read_ahead_without_room(weights: given.Given, monkeypatch: pytest.MonkeyPatch) -> None:
  assert host_room() == 0  # on CPU the devices have been promised it
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(MODEL.abstract()))
  for room, number in ((0, 0), (given.SHARE * size, 1), (2 * given.SHARE * size, 2)):
    monkeypatch.setattr(given, "host_room", lambda room=room: room)
    weights.read_ahead([])
    weights.read_ahead([("U", F32), ("N", F32)])
    assert len(weights._read) == number
