"""The error that all of `data` raises for what a user can put right: bad text, files or tokenizers."""

from ternlm.config.section import UserError


class DataError(UserError):
    """Data is wrong. The message names the file (and line), what is wrong, the rule and the remedy."""
