"""Statuses <-> our errors: the same error class is raised on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge3 import errors
from merge3.rpc import merge3_pb2 as pb

ERROR_KEY = "merge3-error-bin"
_BY_REASON: dict[str, type[errors.Merge3Error]] = {}


def _register(kind: type[errors.Merge3Error]) -> None:
    _BY_REASON[kind.reason] = kind
    for child in kind.__subclasses__():
        _register(child)


def error_to(error: errors.Merge3Error, request_id: str = "", most: int | None = None) -> pb.Error:
    """The message that trailing metadata (under ERROR_KEY) and evaluations carry. most: bytes of each text; metadata of
    more than eight kilobytes in all does not arrive."""
    return pb.Error(
        reason=error.reason,
        where=shortened(error.where, most),
        found=shortened(error.found, most),
        expected=shortened(error.expected, most),
        hint=shortened(error.hint, most),
        retry_after_ms=round(1000 * getattr(error, "retry_after", 0)),
        request_id=request_id,
    )


def shortened(text: str, most: int | None) -> str:
    """Its beginning, in so many bytes of UTF-8; a request may hold any text, and an error tells what it found."""
    data = text.encode(errors="replace")  # JSON may name halves of characters
    if most is None or len(data) <= most:
        return data.decode()
    return data[: most - 3].decode(errors="ignore") + "..."


def error_of(message: pb.Error) -> errors.Merge3Error:
    """The error behind a message, of the class it had on the other side."""
    _register(errors.Merge3Error)
    kind = _BY_REASON.get(message.reason, errors.Merge3Error)
    error = kind(message.where, message.found, message.expected, message.hint)
    if isinstance(error, errors.Busy):
        error.retry_after = message.retry_after_ms / 1000
    return error


def error_from(code: str, details: str, metadata: Mapping[str, Any]) -> errors.Merge3Error:
    """The error behind a status. code: its name; metadata: trailing."""
    if ERROR_KEY in metadata:
        return error_of(pb.Error.FromString(metadata[ERROR_KEY]))
    _register(errors.Merge3Error)
    kind = next(
        (k for k in _BY_REASON.values() if k.code == code and k is not errors.ResumeMismatch), errors.Merge3Error
    )
    return kind(details or code)
