import subprocess
import sys

MEASURE = """
import torch
from ternlm.monitor.memory import peak_memory
cpu = torch.device("cpu")
before = peak_memory(cpu)
block = torch.ones(before + 64 * 2**20, dtype=torch.uint8)  # more than the process ever held
held = peak_memory(cpu)
del block
print(before, held, peak_memory(cpu))
"""


def test_the_process_peak_grows_by_what_is_touched_and_stays():
    # A process of its own: this one may have held gigabytes in tests before, and the block must exceed that.
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert held - before >= 64 * 2**20
    assert after >= held - 2**20  # Linux adds its processors' own counts up now and then: proc(5), VmHWM is inexact
