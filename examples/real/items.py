"""Items for the search and others for the final table. The encoder's are written by hand, sre.jsonl and general.jsonl:
six questions a topic, whose candidates are the topic's six texts. So whole topics go to one side: a text that the
search has seen as a candidate is in no test item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge3.files import write_atomically

HERE = Path(__file__).parent
HAND_WRITTEN = ("sre", "general")
TEST_SHARE = 0.45


def read_rows(file: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def by_topic(rows: Sequence[dict[str, Any]], share: float = TEST_SHARE) -> tuple[list, list]:
    """(search, test): `share` of the topics, chosen by a hash of their names, are for the test."""
    topics = sorted({row["topic"] for row in rows}, key=lambda topic: hashlib.sha256(topic.encode()).digest())
    test = set(topics[: round(len(topics) * share)])
    return [row for row in rows if row["topic"] not in test], [row for row in rows if row["topic"] in test]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(file, text)


def write_encoder_items(folder: Path) -> None:
    """NAME.jsonl for the search and NAME-test.jsonl, of both hand-written files."""
    for name in HAND_WRITTEN:
        search, test = by_topic(read_rows(HERE / f"{name}.jsonl"))
        write_rows(folder / f"{name}.jsonl", search)
        write_rows(folder / f"{name}-test.jsonl", test)
