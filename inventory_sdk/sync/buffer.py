"""Entries that arrived and are not in the ledger yet: any order in, consecutive runs out. Pure data, no I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

from inventory_sdk.ledger.protocol import ForkFound
from inventory_sdk.model import JournalEntry
from inventory_sdk.stock.journal import UnreadableEntry, decode
from inventory_sdk.sync.queues.protocol import Message

REMEMBERED: Final = 20_000
"""Applied entries whose text is remembered (as a hash), so that their late copies need neither decoding nor SQL."""


class Buffer:
    """One partition, one epoch. ``watermark`` is the last entry that is in the ledger; nothing past a gap ever comes out."""

    def __init__(self, partition: int, epoch: int, watermark: int) -> None:
        self.partition = partition
        self.epoch = epoch
        self.watermark = watermark
        self.highest = watermark
        self.unreadable: dict[int, UnreadableEntry] = {}
        self._entries: dict[int, JournalEntry] = {}
        self._bodies: dict[int, str] = {}
        self._messages: dict[int, list[Message]] = {}
        self._done: list[Message] = []
        self._old: dict[int, JournalEntry] = {}
        self._remembered: OrderedDict[int, int] = OrderedDict()

    def receive(self, message: Message) -> None:
        """Take in a message of this epoch. ``ForkFound``: another entry has the same position."""
        sequence = message.sequence
        if sequence > self.watermark:
            # Read first: of a fork, only the copy that stays may be acknowledged with its sequence.
            self.read(sequence, message.body)
            self._messages.setdefault(sequence, []).append(message)
        elif self._remembered.get(sequence) == hash(message.body):
            self._done.append(message)
        else:
            # Applied, but by another worker or long ago: the ledger compares the nonce before this copy is acknowledged.
            try:
                entry = decode(self.partition, self.epoch, sequence, message.body)
            except UnreadableEntry:
                # The ledger has this position; a damaged copy of it has nothing to say.
                self._done.append(message)
                return
            self._same(self._old.get(sequence), entry)
            self._old[sequence] = entry
            self._messages.setdefault(sequence, []).append(message)

    def read(self, sequence: int, body: str) -> None:
        """Take in an entry as the journal (or a message) has it. ``ForkFound``: another entry has the same position."""
        if sequence <= self.watermark or self._bodies.get(sequence) == body:
            return
        try:
            entry = decode(self.partition, self.epoch, sequence, body)
        except UnreadableEntry as error:
            if sequence not in self._entries:
                self.unreadable[sequence] = error
                self.highest = max(self.highest, sequence)
            return
        self._same(self._entries.get(sequence), entry)
        # A readable copy stands for an unreadable one (a message may be damaged, the journal not).
        self.unreadable.pop(sequence, None)
        self._entries[sequence] = entry
        self._bodies[sequence] = body
        self.highest = max(self.highest, sequence)

    def _same(self, known: JournalEntry | None, entry: JournalEntry) -> None:
        if known is not None and known.nonce != entry.nonce:
            raise ForkFound(
                f"two entries stand at {self.partition}/{self.epoch}-{entry.sequence}: nonces {known.nonce!r} and {entry.nonce!r}"
            )

    @property
    def operations(self) -> int:
        """Operations that wait, behind gaps or not."""
        return sum(len(entry.operations) for entry in self._entries.values())

    @property
    def waiting(self) -> int:
        """Entries that wait, behind gaps or not, unreadable ones included."""
        return len(self._entries) + len(self.unreadable)

    def run(self, operations: int, after: int | None = None) -> list[JournalEntry]:
        """Consecutive entries right after the watermark (or ``after``) that carry at most ``operations``, but at least one."""
        taken: list[JournalEntry] = []
        carried = 0
        sequence = (self.watermark if after is None else after) + 1
        while (entry := self._entries.get(sequence)) is not None:
            carried += len(entry.operations)
            if taken and carried > operations:
                break
            taken.append(entry)
            sequence += 1
        return taken

    def first_missing(self) -> int | None:
        """The lowest sequence between watermark and the highest received that is not here; None: no hole."""
        for sequence in range(self.watermark + 1, self.highest):
            if sequence not in self._entries and sequence not in self.unreadable:
                return sequence
        return None

    def gap(self) -> list[int]:
        """The sequences right after the watermark that nobody brought, up to the first that is here, readable or not."""
        here = min([*self._entries, *self.unreadable], default=self.highest + 1)
        return list(range(self.watermark + 1, here))

    def held(self) -> UnreadableEntry | None:
        """Why the entry right after the watermark can't be read, if it is that."""
        return self.unreadable.get(self.watermark + 1)

    def set_aside_old(self) -> list[JournalEntry]:
        """Forget the old copies without acknowledging them; which they were."""
        aside = self.old()
        for entry in aside:
            del self._old[entry.sequence]
            self._messages.pop(entry.sequence, None)
        return aside

    def old(self) -> list[JournalEntry]:
        """Copies of entries at or below the watermark that the ledger must compare before they are acknowledged."""
        return [self._old[sequence] for sequence in sorted(self._old)]

    def body(self, sequence: int) -> str:
        """The text of a waiting entry."""
        return self._bodies[sequence]

    def headers(self, entries: Sequence[JournalEntry]) -> list[Mapping[str, str]]:
        """What came along with the messages of these entries."""
        return [message.headers for entry in entries for message in self._messages.get(entry.sequence, ()) if message.headers]

    def moved(self, watermark: int, applied: Sequence[JournalEntry] = ()) -> None:
        """The ledger's watermark is here now. What is at or below it and was compared (``applied``) can be acknowledged;
        what another worker applied becomes old and is compared first."""
        for entry in applied:
            body = self._bodies.pop(entry.sequence, None)
            if body is not None:
                self._remembered[entry.sequence] = hash(body)
            self._entries.pop(entry.sequence, None)
            self._old.pop(entry.sequence, None)
            self._done.extend(self._messages.pop(entry.sequence, ()))
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        self.watermark = max(self.watermark, watermark)
        self.highest = max(self.highest, self.watermark)
        for sequence in [s for s in self._entries if s <= self.watermark]:
            entry = self._entries.pop(sequence)
            self._bodies.pop(sequence)
            if sequence in self._messages:
                self._old[sequence] = entry
        for sequence in [s for s in self.unreadable if s <= self.watermark]:
            # Another worker could read it; its messages are as good as applied.
            del self.unreadable[sequence]
            self._done.extend(self._messages.pop(sequence, ()))

    def acknowledgeable(self) -> list[Message]:
        """Messages whose entries are in the ledger; each is handed out once."""
        done, self._done = self._done, []
        return done
