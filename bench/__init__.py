"""The benchmark: what the server takes, each time against what it stands on. `./run.sh bench` runs all of it.

Sections are modules, each with `measure(bench, section)`; common.py holds what they share.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
