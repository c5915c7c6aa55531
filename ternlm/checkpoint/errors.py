"""The error of this package. No torch here: `tern plan --what-if` looks for checkpoints without it."""

from ternlm.config.section import UserError


class CheckpointError(UserError):
    """A checkpoint can't be written, read or used. The message says which, why and what to do."""
