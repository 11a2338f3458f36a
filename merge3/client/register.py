"""What RegisterItems sends: everything by digest, and only what the daemon lacks by content."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from merge3.errors import ItemsError
from merge3.irt import ItemBank
from merge3.registration import Registration
from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks import Item
from merge3.tasks.items import located

_CHUNK = 1 << 20  # bytes per message, well below gRPC's default limit of four megabytes
Send = Callable[[Iterator[pb.RegisterItemsRequest]], pb.RegisterItemsResponse]


class Registrar:
    """Remembers what the daemon was sent, so that a subset of known items costs a few bytes each."""

    def __init__(self, send: Send):
        self._send = send
        self._messages: dict[Item, tuple[bytes, pb.Item]] = {}
        self._banks: dict[int, tuple[ItemBank, bytes, bytes]] = {}  # by identity: (the bank, digest, content)
        self._sent: set[bytes] = set()

    def register(self, pool_id: str, registration: Registration) -> str:
        """The registration's id with the daemon. Free where the daemon has it all; else what is missing is sent.

        Raises ItemsError naming the item that the daemon refuses, with the file and line only we know.
        """
        header = pb.RegisterHeader(
            pool_id=pool_id,
            seed=registration.seed,
            chat=registration.chat is True,
            chats={} if isinstance(registration.chat, bool) else registration.chat,
            heads=registration.heads,
            weights=registration.weights,
            objectives=registration.objectives,
            space=None if registration.space is None else spaces.space_to(registration.space),
        )
        blobs: dict[bytes, bytes] = {}
        for task, estimator in registration.estimators.items():
            bank, content = self._bank(estimator.bank)
            message = convert.estimator_to(estimator, bank)
            blobs |= {bank: content, convert.digest(message): message.SerializeToString(deterministic=True)}
            header.estimators[task] = convert.digest(message)
        items = registration.items
        entries = [self._message(item) for item in items]
        wanted = {d for d, _ in entries if d not in self._sent} | {d for d in blobs if d not in self._sent}
        for _ in range(3):
            try:
                response = self._send(self._requests(header, entries, blobs, wanted))
            except ItemsError as error:
                raise located(error, items) from None
            if response.items_id:
                self._sent |= {d for d, _ in entries} | set(blobs)
                return response.items_id
            wanted = {entries[i][0] for i in response.missing_entries} | set(response.missing_blobs)
        raise ItemsError(
            "items", f"the daemon forgets them while they are sent ({len(items)})", "a daemon with a larger store"
        )

    def _requests(self, header, entries, blobs, wanted: set[bytes]) -> Iterator[pb.RegisterItemsRequest]:
        yield pb.RegisterItemsRequest(header=header)
        for digest, content in blobs.items():
            if digest in wanted:
                for start in range(0, len(content), _CHUNK):
                    part = content[start : start + _CHUNK]
                    yield pb.RegisterItemsRequest(
                        blob=pb.Blob(digest=digest, data=part, last=start + _CHUNK >= len(content))
                    )
        chunk, size = pb.Entries(), 0
        for digest, message in entries:
            chunk.entries.add(digest=digest, item=message if digest in wanted else None)
            size += 40 + (message.ByteSize() if digest in wanted else 0)
            if size > _CHUNK:
                yield pb.RegisterItemsRequest(entries=chunk)
                chunk, size = pb.Entries(), 0
        yield pb.RegisterItemsRequest(entries=chunk)

    def _message(self, item: Item) -> tuple[bytes, pb.Item]:
        if item not in self._messages:
            message = convert.item_to(item)
            self._messages[item] = convert.digest(message), message
        return self._messages[item]

    def _bank(self, bank: ItemBank) -> tuple[bytes, bytes]:
        if id(bank) not in self._banks:
            message = convert.bank_to(bank)
            self._banks[id(bank)] = bank, convert.digest(message), message.SerializeToString(deterministic=True)
        return self._banks[id(bank)][1:]
