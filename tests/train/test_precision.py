"""Which device a rank takes."""

import pytest
import torch

from ternlm.config.section import ConfigError
from ternlm.train.precision import choose_device


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_of_several_ranks_takes_its_own_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert choose_device(name, 3) == torch.device("cuda:3")


def test_one_device_for_several_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"compute\.device = 'cuda:1' must not name one device.*=cuda, and"):
        choose_device("cuda:1", 0)
