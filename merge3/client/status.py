"""What a daemon holds and does, for a person or a machine."""

from __future__ import annotations

import json
import sys
import time

from google.protobuf.json_format import MessageToDict

from merge3.client.channel import Target, translated
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc import merge3_pb2_grpc


def show(target: Target, as_json: bool) -> None:
    """Ask once and print."""
    status = status_of(target)
    if as_json:
        print(_json(status))
        return
    from rich.console import Console

    Console().print(_page(status, target.address))


def status_of(target: Target, seconds: float = 30) -> pb.StatusResponse:
    """What a daemon says of itself, within so many seconds. Raises Unavailable, and what calls raise."""
    with target.channel() as channel, translated(target.address):
        stub = merge3_pb2_grpc.Merge3Stub(channel)
        return stub.Status(pb.StatusRequest(), metadata=target.metadata(), timeout=seconds)


def watch(target: Target, interval: float, as_json: bool) -> None:
    """Print every `interval` seconds until Ctrl-C; a daemon that goes away is waited for."""
    from rich.live import Live

    from merge3.errors import Unavailable

    live = Live(refresh_per_second=4) if not as_json and sys.stdout.isatty() else None
    with live or _nothing():
        while True:
            try:
                with target.channel() as channel, translated(target.address):
                    stub = merge3_pb2_grpc.Merge3Stub(channel)
                    for status in stub.Watch(pb.WatchRequest(interval_seconds=interval), metadata=target.metadata()):
                        if live:
                            live.update(_page(status, target.address))
                        else:
                            print(_json(status) if as_json else _line(status), flush=True)
            except Unavailable as error:
                print(f"{error}; trying again", file=sys.stderr)
                time.sleep(max(1.0, interval))


def _json(status: pb.StatusResponse) -> str:
    return json.dumps(
        MessageToDict(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )


def _line(s: pb.StatusResponse) -> str:
    busy = ", ".join(f"{w.name} {w.busy_with or 'idle'}" for w in s.workers)
    return f"{s.state}  {s.candidates_per_minute:.0f}/min  {s.evaluated} candidates  {s.queued} queued  {busy}"


def _page(s: pb.StatusResponse, address: str):
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "state",
        f"{s.state}, up {s.uptime_seconds / 60:.0f} min, version {s.version}, "
        f"{s.resident_bytes / 2**30:.2f} GiB resident",
    )
    facts.add_row("candidates", f"{s.evaluated:,} evaluated, {s.candidates_per_minute:.0f} in the last minute")
    facts.add_row("queue", f"{s.queued} of {s.queue_limit}")
    for w in s.workers:
        facts.add_row(f"worker {w.name}", f"{w.device}, process {w.pid}: {w.busy_with or 'idle'}")
    pools = Table("pool", "models", "parameters", "resident", "held by", title="pools", title_justify="left")
    for p in s.pools:
        pools.add_row(
            p.pool_id[:8],
            "\n".join(p.models),
            f"{p.parameters:,}",
            f"{p.resident_bytes / 2**30:.2f} GiB",
            str(p.holders),
        )
    drivers = Table("driver", "queued", "evaluated", "idle", title="drivers", title_justify="left")
    for d in s.drivers:
        drivers.add_row(d.name, str(d.queued), str(d.evaluated), f"{d.idle_seconds:.0f} s")
    return Panel(
        Group(facts, *([pools] if s.pools else []), *([drivers] if s.drivers else [])),
        title=f"merge3-server at {address}",
    )


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
