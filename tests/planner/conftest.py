"""Lets the tests import the runs that they share, and the benchmark's modules, which are siblings on its own path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
