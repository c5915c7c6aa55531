"""What is told of a failure that PyTorch wrapped."""

import errno
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ternlm.checkpoint.causes import cause_of


class FullDisk(io.BytesIO):
    """Has room for little: the directory that is written last still fits."""

    def write(self, data):
        if len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_here_and_on_the_other_ranks():
    with pytest.raises(RuntimeError) as caught:
        torch.save({"x": torch.zeros(10_000)}, FullDisk())
    assert "No space left on device" in cause_of(caught.value)
    arrived = pickle.loads(pickle.dumps(caught.value))  # as DCP hands it to the others: without its cause
    told = cause_of(CheckpointException("write", {1: (arrived, None)}))
    assert told.startswith("writing failed; is the disk full? (RuntimeError: [enforce fail at inline_container.cc")
