"""Tests of the package; here, how their programs are compiled.

Nearly all of the suite's time is compilation of small programs that run for moments, so XLA is told to optimise
little: some eight times faster. An XLA_FLAGS that is given holds instead, an empty one too, as in
benchmarks/nightly.sh, which compiles as users do.
"""

import os

# Read when JAX first asks for a device; processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", " ".join([
    "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1"]))  # one part: there are as many workers as cores
