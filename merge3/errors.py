"""The error tree. Every error says where, what was found, what was expected, and may give a hint.

Merge3Error
├── BadInput             the caller can fix it: exit code 2
│   ├── RecipeError      a recipe or its parameters
│   ├── CheckpointError  a checkpoint, its tensors or its files
│   ├── ItemsError       an items file; LogitsError (tasks/forward.py): a model without usable logits
│   ├── ResponsesError   a response matrix or an item bank (irt/responses.py)
│   ├── ConfigError      an evolve configuration
│   ├── ResumeMismatch   a run directory that this configuration did not make
│   ├── NotFound         a pool, items or a model that the daemon does not have
│   ├── Denied           a path outside the daemon's roots
│   └── Unauthenticated  no token, a wrong one, or one that has expired
├── ResourceError        memory, disk or permission ran out
│   └── Busy             a queue or a limit is full; come back after `retry_after` seconds
├── Cancelled            whoever asked has left
└── Unavailable          a build, device or service that is not there
"""

from __future__ import annotations


class Merge3Error(Exception):
    """One line for people; `reason` (a word) and `code` (a gRPC status name) for machines."""

    reason = "error"
    code = "INTERNAL"
    exit_code = 1

    def __init__(self, where: str, found: str = "", expected: str = "", hint: str = ""):
        self.where, self.found, self.expected, self.hint = str(where), found, expected, hint
        super().__init__(self.line())

    def line(self) -> str:
        """`where: found; expected ... (hint)`, without the parts that are empty."""
        text = self.where
        if self.found:
            text += f": {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.hint:
            text += f" ({self.hint})"
        return text


class Merge3Warning(UserWarning):
    """What is merged all the same, but is seldom meant: one line, said once. `--strict` makes it an error."""


class BadInput(Merge3Error, ValueError):
    """What the caller gave cannot be used; nothing was written."""

    reason, code, exit_code = "bad_input", "INVALID_ARGUMENT", 2


class RecipeError(BadInput):
    """A recipe, its method, parameters or layers."""

    reason = "recipe"


class CheckpointError(BadInput):
    """A checkpoint: missing, damaged, or not fitting the others."""

    reason, code = "checkpoint", "FAILED_PRECONDITION"


class ItemsError(BadInput):
    """An items file, or items that this model cannot answer."""

    reason = "items"


class ConfigError(BadInput):
    """An evolve configuration, or a genome of another space."""

    reason = "config"


class ResourceError(Merge3Error):
    """The disk is full, memory is short, or a path may not be written."""

    reason, code, exit_code = "resource", "RESOURCE_EXHAUSTED", 2


class ResumeMismatch(BadInput):
    """A run directory that this configuration did not make."""

    reason, code = "resume_mismatch", "FAILED_PRECONDITION"


class NotFound(BadInput):
    """A pool, items or a model that the daemon does not have, or not any more."""

    reason, code = "not_found", "NOT_FOUND"


class Denied(BadInput):
    """A path outside the daemon's roots."""

    reason, code = "denied", "PERMISSION_DENIED"


class Unauthenticated(BadInput):
    """No token, a wrong one, or one that has expired."""

    reason, code = "unauthenticated", "UNAUTHENTICATED"


class Busy(ResourceError):
    """A queue is full for now. retry_after: seconds until it may have room; 0 where waiting does not help."""

    reason = "busy"

    def __init__(self, where: str, found: str = "", expected: str = "", hint: str = "", retry_after: float = 0.0):
        super().__init__(where, found, expected, hint)
        self.retry_after = retry_after


class Cancelled(Merge3Error):
    """Whoever asked has left, or the deadline has passed; work stopped between two batches."""

    reason, code = "cancelled", "CANCELLED"


class Unavailable(Merge3Error):
    """A build, device, package or service that is not there."""

    reason, code = "unavailable", "UNAVAILABLE"
