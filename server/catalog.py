"""What drivers have told the daemon, under content hashes, bounded: items, item banks, registrations.

Nothing here is precious. What was forgotten, or lost with a restart, drivers are asked for again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import DecodeError

from merge3.errors import BadInput, Busy, NotFound
from merge3.irt import ItemBank
from merge3.irt.estimation import Estimator
from merge3.registration import ACCURACY, Registration, check_weights
from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks import Item
from merge3_server.host import Registered
from merge3_server.settings import Limits

_ITEM_OVERHEAD = 600  # bytes that an Item takes beside its texts


class Bounded:
    """The most recently used values, up to a total size."""

    def __init__(self, limit: int):
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.limit, self.size = limit, 0

    def get(self, key: Hashable) -> Any | None:
        """The value, now the most recently used; None where there is none."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Add or replace, and make room: the least recently used go first, this one never. size: as in `limit`."""
        self.drop(key)
        self._values[key] = value, size
        self.size += size
        while self.size > self.limit and len(self._values) > 1:
            _, (_, freed) = self._values.popitem(last=False)
            self.size -= freed

    def drop(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        if key in self._values:
            self.size -= self._values.pop(key)[1]

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Accepted:
    """A registration that a host has prepared. genome_size: None where it has no space."""

    registered: Registered
    genome_size: int | None


class Catalog:
    """All of it. locate_image: from an item's image, as named, to where it lies."""

    def __init__(self, limits: Limits, locate_image: Callable[[str, str], str]):
        self.limits, self.locate_image = limits, locate_image
        self.items, self.blobs = Bounded(limits.store // 2), Bounded(limits.store // 2)
        self.registered = Bounded(limits.registrations)

    def accepted(self, pool_id: str, items_id: str) -> Accepted:
        """Raises NotFound for a registration that is not known, or is another pool's."""
        found = self.registered.get(items_id)
        if found is None or found.registered.pool_id != pool_id:
            raise NotFound("items_id", f"{items_id[:64]!r} is not registered with this pool", "RegisterItems first")
        return found

    def forget_pool(self, pool_id: str) -> None:
        """Drop the registrations of a pool."""
        for key, (value, _) in list(self.registered._values.items()):
            if value.registered.pool_id == pool_id:
                self.registered.drop(key)


@dataclass
class Gathering:
    """One RegisterItems stream, checked message by message, so that what is too much is refused early."""

    catalog: Catalog
    header: pb.RegisterHeader | None = None
    digests: list[bytes] = field(default_factory=list)
    _blobs: dict[bytes, bytearray] = field(default_factory=dict)
    _bytes: int = 0

    def add(self, request: pb.RegisterItemsRequest) -> None:
        """Take the next message. Raises BadInput where its part is not the one to come, or what is wrong with it."""
        part = request.WhichOneof("part")
        if part is None or (part == "header") != (self.header is None):
            raise BadInput(
                "RegisterItems", f"a message of {part or 'nothing'}", "first one header, then entries and blobs"
            )
        if part == "header":
            self.header = request.header
        elif part == "entries":
            for entry in request.entries.entries:
                self._add_entry(entry)
        else:
            self._add_blob(request.blob)

    def finish(self) -> tuple[Registered | None, pb.RegisterItemsResponse]:
        """(the registration, or None and what is missing)"""
        if self.header is None:
            raise BadInput("RegisterItems", "an empty stream", "a header and items")
        if not self.digests:
            raise BadInput("RegisterItems", "no items", "at least one")
        items = [self.catalog.items.get(d) for d in self.digests]
        response = pb.RegisterItemsResponse(missing_entries=[i for i, item in enumerate(items) if item is None])
        estimators = {}
        for task, key in self.header.estimators.items():
            found = self._estimator(task, key)
            if isinstance(found, bytes):
                response.missing_blobs.append(found)
            else:
                estimators[task] = found
        if response.missing_entries or response.missing_blobs:
            return None, response
        self._check(items, estimators)
        content = self.header.SerializeToString(deterministic=True) + b"".join(self.digests)
        whole = hashlib.sha256(content).hexdigest()[:32]
        h = self.header
        space = spaces.space_from(h.space) if h.HasField("space") else None
        response.items_id, response.items = whole, len(items)
        asked = Registration(
            tuple(items),
            space,
            dict(h.heads),
            dict(h.weights),
            estimators,
            tuple(h.objectives) or (ACCURACY,),
            h.seed,
            dict(h.chats) or h.chat,
        )
        return Registered(whole, h.pool_id, asked), response

    def _add_entry(self, entry: pb.Entry) -> None:
        number = len(self.digests)
        if number >= self.catalog.limits.items:
            raise Busy("RegisterItems", f"more than {number} items", f"at most {number} in one registration")
        if len(entry.digest) != 32:
            raise BadInput(f"item {number}: digest", f"{len(entry.digest)} bytes", "a SHA-256")
        self.digests.append(entry.digest)
        if not entry.HasField("item") or self.catalog.items.get(entry.digest) is not None:
            return
        if convert.digest(entry.item) != entry.digest:
            raise BadInput(f"item {number}: digest", "of something else", "the item's")
        item = convert.item_from(entry.item, f"item {number}")
        if item.image:
            item = replace(item, image=self.catalog.locate_image(item.image, f"item {item.id!r}"))
        self.catalog.items.put(entry.digest, item, entry.item.ByteSize() + _ITEM_OVERHEAD)

    def _add_blob(self, blob: pb.Blob) -> None:
        data = self._blobs.setdefault(blob.digest, bytearray())
        data += blob.data
        self._bytes += len(blob.data)
        if self._bytes > self.catalog.limits.store // 4:
            raise Busy(
                "RegisterItems",
                f"more than {self._bytes} bytes of item banks",
                f"at most {self.catalog.limits.store // 4}",
            )
        if blob.last:
            del self._blobs[blob.digest]
            if hashlib.sha256(data).digest() != blob.digest:
                raise BadInput("blob: digest", "of something else", "the blob's")
            self.catalog.blobs.put(blob.digest, bytes(data), len(data))

    def _estimator(self, task: str, key: bytes) -> Estimator | bytes:
        """The estimator, or the digest of what is missing for it."""
        data = self.catalog.blobs.get(key)
        if data is None:
            return key
        message = _parsed(pb.Estimator, data, f"estimators: {task}")
        bank = self.catalog.blobs.get((message.bank, "parsed"))  # asked for again with every renewed subset
        if bank is None:
            raw = self.catalog.blobs.get(message.bank)
            if raw is None:
                return message.bank
            bank: ItemBank = convert.bank_from(_parsed(pb.ItemBank, raw, f"estimators: {task}: bank"))
            self.catalog.blobs.put((message.bank, "parsed"), bank, len(raw))
        return convert.estimator_from(message, bank, f"estimators: {task}")

    def _check(self, items: list[Item], estimators: dict[str, Estimator]) -> None:
        tasks: dict[str, int] = {}
        for item in items:
            tasks[item.task] = tasks.get(item.task, 0) + 1
        check_weights(dict(self.header.weights), tasks)
        for task, estimator in estimators.items():
            if len(estimator.subset.index) != tasks.get(task):
                raise BadInput(
                    f"estimators: {task}",
                    f"a subset of {len(estimator.subset.index)} items",
                    f"the task's {tasks.get(task, 0)}",
                )
        if estimators and set(estimators) != set(tasks):
            raise BadInput("estimators", f"for {sorted(estimators)}", f"one for each task: {sorted(tasks)}")


def _parsed(kind, data: bytes, where: str):
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadInput(where, "not a message of that kind", kind.DESCRIPTOR.full_name) from None
