"""What lies behind one of PyTorch's errors."""

from torch.distributed.checkpoint.api import CheckpointException

# What PyTorch's zip writer says instead of the operating system's reason, which is lost on its way to another rank.
_WRITER_FAILED = ("unexpected pos ", "PytorchStreamWriter failed")


def cause_of(trouble: BaseException) -> str:
    """Return the first line of what went wrong, which DCP hides behind the number of the rank."""
    if isinstance(trouble, CheckpointException):
        trouble = next((cause for cause, _ in trouble.failures.values()), trouble)
    behind: BaseException | None = trouble
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__  # a full disk, say, behind a writer's complaint
    trouble = behind or trouble
    lines = str(trouble).strip().splitlines()
    line = f"{type(trouble).__name__}: {lines[0] if lines else 'no more is known'}"
    if any(words in line for words in _WRITER_FAILED):
        return f"writing failed; is the disk full? ({line})"
    return line
