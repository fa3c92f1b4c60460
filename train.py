"""Train a network through compute-in-memory arrays.

python train.py --config FILE[:options] [--workdir DIR] [--config.field=value ...]
python train.py --config configs/digits.py:weight=column,psum=layer,adc_bits=2 --config.epochs=60

The same as `cimjax train`; `python train.py --help` explains it. Starting again with --workdir resumes a run.
"""

import sys

from cimjax.cli import start

if __name__ == "__main__":
    sys.exit(start(["train", *sys.argv[1:]]))
