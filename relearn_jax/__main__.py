"""The process of the `relearn` command."""

import sys

from relearn_jax.interrupts import PREEMPTED, Preempted, end_interrupted, handle_interrupts


def main() -> int:
  """Runs the command line of this process; see `relearn_jax.cli.main`."""
  interrupted = f"relearn {' '.join(sys.argv[1:2])}".rstrip() + ": interrupted"
  handle_interrupts(interrupted)
  try:
    from relearn_jax.cli import main as run  # after the handler, since it takes a while
    return run()
  except KeyboardInterrupt:
    end_interrupted(interrupted)
  except Preempted:
    end_interrupted(interrupted, PREEMPTED)


if __name__ == "__main__":
  sys.exit(main())
