"""The cost of fedloom beside other ways of doing the same work; every contest first asserts equal results.

`python -m benchmarks` runs them all; docs/benchmarks.md says what each measures.
"""

import os

# Set before torch reads them. OpenMP threads that spin while idle slow a busy machine down many times over.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)
