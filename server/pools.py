"""The pools that are open: who holds them, and which one makes room when there are too many."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge3 import __version__
from merge3.checkpoint.beside import PROCESSORS, speaking_files
from merge3.engine import PoolInfo
from merge3.errors import BadInput, Busy, NotFound
from merge3.experts import Experts
from merge3.recipe import DTYPES, ModelRef, Tokenizer
from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3_server.catalog import Catalog
from merge3_server.host import PoolSpec
from merge3_server.scheduler import Scheduler
from merge3_server.security import Roots
from merge3_server.settings import Settings

OPERATOR = "the operator"  # holds the pools of the command line, for good
MAX_MODELS = 64


@dataclass(eq=False)
class Open:
    """info: None until it is open. holders: drivers that opened it and have not closed it."""

    spec: PoolSpec
    opening: asyncio.Task | None = None
    info: PoolInfo | None = None
    resident: int = 0
    holders: set[str] = field(default_factory=set)
    used: float = field(default_factory=time.monotonic)

    def message(self) -> pb.Pool:
        """The pool as drivers see it."""
        return convert.pool_to(
            self.info,
            pool_id=self.spec.pool_id,
            dtype=self.spec.dtype,
            holders=len(self.holders),
            resident_bytes=self.resident,
            version=__version__,
            tokenizer=spaces.tokenizer_to(self.spec.tokenizer),
        )


class Pools:
    """Opens by name below the roots, once per pool however many ask."""

    def __init__(self, settings: Settings, scheduler: Scheduler, catalog: Catalog):
        self.settings, self.scheduler, self.catalog = settings, scheduler, catalog
        self.roots = Roots(settings.roots)
        self._open: dict[str, Open] = {}

    async def open(
        self,
        driver: str,
        models: tuple[str, ...],
        dtype: str,
        tokenizer: Tokenizer | None = None,
        tower: Mapping[str, str] | None = None,
        experts: str = "",
    ) -> Open:
        """Open a pool for a driver, or share the one that is open or opening. experts: how they are held; empty: as the
        settings say. Raises Busy where there is no room."""
        held = Experts.parse(experts) if experts else self.settings.experts
        spec = self._spec(models, dtype, tokenizer, dict(tower or {}), held)
        if spec.pool_id not in self._open:
            await self._leave_stale(spec)
            await self._make_room()
        if spec.pool_id not in self._open:  # nobody opened it while room was made
            entry = self._open[spec.pool_id] = Open(spec)
            entry.opening = asyncio.create_task(self._begin(driver, entry))
        entry = self._open[spec.pool_id]
        await asyncio.shield(entry.opening)  # one driver that leaves does not stop the opening others wait for
        entry.holders.add(driver)
        entry.used = time.monotonic()
        return entry

    def get(self, pool_id: str) -> Open:
        """An open pool, from now on recently used. Raises NotFound."""
        entry = self._open.get(pool_id)
        if entry is None or entry.info is None:
            raise NotFound("pool_id", f"{pool_id[:64]!r} is not open", "OpenPool first")
        entry.used = time.monotonic()
        return entry

    def list(self) -> list[Open]:
        """The pools that have been opened; those still opening are not among them."""
        return [entry for entry in self._open.values() if entry.info is not None]

    async def close(self, driver: str, pool_id: str) -> int:
        """Holders left; the last one's leaving frees the pool."""
        entry = self.get(pool_id)
        entry.holders.discard(driver)
        if not entry.holders:
            await self._free(entry)
        return len(entry.holders)

    async def _begin(self, driver: str, entry: Open) -> None:
        try:
            done = await self.scheduler.broadcast(driver, "open", entry.spec)
            info, entry.resident = done[0].result
            entry.info = replace(info, workers=len(self.scheduler.workers))
        finally:
            if entry.info is None and self._open.get(entry.spec.pool_id) is entry:
                del self._open[entry.spec.pool_id]

    async def _free(self, entry: Open) -> None:
        del self._open[entry.spec.pool_id]
        self.catalog.forget_pool(entry.spec.pool_id)
        await self.scheduler.broadcast(OPERATOR, "close", entry.spec.pool_id)

    async def _leave_stale(self, spec: PoolSpec) -> None:
        """Close pools of these models whose files are others by now, where nobody has used them for long."""
        for entry in self.list():
            if entry.spec.places == spec.places and entry.spec.stamp != spec.stamp and self._idle(entry):
                await self._free(entry)

    def _idle(self, entry: Open) -> bool:
        return OPERATOR not in entry.holders and entry.used < time.monotonic() - self.settings.limits.idle

    async def _make_room(self) -> None:
        """At the limit, close the pool that nobody has used for longest: its drivers may have died."""
        limits = self.settings.limits
        while len(self._open) >= limits.pools:
            idle = [entry for entry in self.list() if self._idle(entry)]
            if not idle:
                raise Busy(
                    "pools",
                    f"{len(self._open)} are open",
                    f"at most {limits.pools}",
                    "close one, or start with --max-pools",
                )
            await self._free(min(idle, key=lambda e: e.used))

    def _spec(
        self,
        models: tuple[str, ...],
        dtype: str,
        tokenizer: Tokenizer | None,
        tower: dict[str, str],
        experts: Experts,
    ) -> PoolSpec:
        if not 1 <= len(models) <= MAX_MODELS:
            raise BadInput("models", f"{len(models)} models", f"1 to {MAX_MODELS}, base first")
        if dtype not in ("", *DTYPES):
            raise BadInput("dtype", f"found {dtype[:40]!r}", ", ".join(DTYPES))
        places, names = {}, []
        for i, model in enumerate(models):
            ref = ModelRef.parse(model, f"models[{i}]")
            if ref.revision or (ref.lora and ref.lora.revision):
                raise BadInput(f"models[{i}]", f"a revision in {model[:100]!r}", "a path below the daemon's roots")
            names.append(str(ref))
            for part in (ref, ref.lora):
                if part is not None:
                    places[part.path] = self.roots.directory(part.path)
        stamp = _stamp(places.values())
        told: tuple = (names, sorted(places.items()), dtype, stamp)
        if tokenizer is not None:
            tokenizer.check_models(names)
            told += (tokenizer,)
        if tower:
            told += (sorted(tower.items()),)
        if experts:
            told += (str(experts),)
        pool_id = hashlib.sha256(repr(told).encode()).hexdigest()[:32]
        device, budget = self.settings.device, self.settings.memory_budget
        return PoolSpec(pool_id, tuple(names), places, dtype, device, budget, tokenizer, tower, experts, stamp)


def _stamp(places: Iterable[str]) -> str:
    """Of the files that make these models, another one when a file is changed or replaced: who opens a pool gets what
    lies there now, not what lay there when another driver opened it."""
    found = []
    for place in sorted(set(places)):
        files = {*Path(place).glob("*.safetensors*"), *speaking_files(Path(place)).values()}  # an index, too
        files |= {Path(place) / name for name in PROCESSORS}
        for file in sorted(filter(Path.is_file, files)):
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest()
