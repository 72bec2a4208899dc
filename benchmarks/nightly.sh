#!/usr/bin/env bash
# All tests, the slow ones too, compiled as users' programs are; says when, on what, and which versions.
# usage: benchmarks/nightly.sh [PYTEST_ARGUMENT ...]   needs `pip install -e '.[test,parity]'`
set -euo pipefail
cd "$(dirname "$0")/.."
date -u "+%Y-%m-%d %H:%M UTC"
echo "$(nproc) cores of $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(uname -sr)"
python - <<'PYTHON'
import importlib.metadata
import platform

print("Python", platform.python_version())
for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "peft", "pytest"):
  try:
    print(name, importlib.metadata.version(name))
  except importlib.metadata.PackageNotFoundError:
    print(name, "is not installed")
PYTHON
XLA_FLAGS="" python -m pytest -m "slow or not slow" --durations=30 "$@"
