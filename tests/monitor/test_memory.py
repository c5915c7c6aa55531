import torch

from ternlm.monitor.memory import peak_memory


def test_the_process_peak_grows_by_what_is_touched_and_stays():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    size = before.num_bytes + 64 * 2**20  # more than the process ever held
    block = torch.ones(size, dtype=torch.uint8)
    held = peak_memory(cpu).num_bytes
    del block
    assert before.holder == "process"
    assert held - before.num_bytes >= 64 * 2**20
    assert peak_memory(cpu).num_bytes >= held
