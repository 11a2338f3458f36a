"""The log: one line per event on standard error, for people or as JSON, each with its request's id."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from merge3_server.interceptors import request_id

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Formatter(logging.Formatter):
    """A record, its request's id and its other fields as one line."""

    def __init__(self, as_json: bool):
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line (more with a traceback as text): JSON, or `time level [request id] message key=value ..`."""
        fields = {k: v for k, v in vars(record).items() if k not in _OWN and v is not None}
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self.as_json:
            line = {
                "time": at,
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
            line |= {"request_id": request_id.get()} | fields | ({"trace": trace} if trace else {})
            return json.dumps(line, default=str)
        extra = "".join(f" {k}={v}" for k, v in fields.items())
        return f"{at} {record.levelname.lower()} [{request_id.get()}] {record.getMessage()}{extra}" + (
            f"\n{trace}" if trace else ""
        )


def set_up(as_json: bool, verbose: bool) -> None:
    """Send the logger `merge3` to standard error. as_json: a JSON object per record; verbose: debugging too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(as_json))
    logger = logging.getLogger("merge3")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
