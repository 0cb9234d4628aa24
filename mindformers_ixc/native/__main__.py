"""`python -m mindformers_ixc.native`: builds the kernels for the CPU now and says where they are, or why not."""
from __future__ import annotations

import sys

from mindformers_ixc.errors import BuildError
from mindformers_ixc.native.building import build

if __name__ == "__main__":
    try:
        print(build(again=True))
    except BuildError as error:
        sys.exit(str(error))
