"""Compares what the two ends of every stream say about it: what was finished on one is what looks complete on the other.

Each end reports once, out of band, so the comparison does not depend on the connection that is cut. The rules are those
of a user: an EOF is exactly what was written and finished, byte for byte; what was cut or given up never looks complete;
nothing that was finished is reset unless somebody asked for it; a code that travels is the one that was sent.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

Record = dict[str, Any]

#: Seconds for which one end may still report after the other.
PATIENCE = 60.0


class Ledger:
    """Pairs the reports of both ends; keeps only those whose other half has not come."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[float, Record]] = {}
        #: Sessions of which one side has let go with an error or an abort, by the name they have there.
        self._cut: dict[str, float] = {}
        #: Faults, unless the session of the writer turns out to be one of them.
        self._suspected: list[tuple[float, str, str]] = []
        #: Streams compared, and what was found about them.
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, record: Record, now: float) -> list[str]:
        """Take in what one end says; return what is wrong with the stream if it was the second one."""
        other = self._waiting.pop(record["label"], None)
        if other is None:
            self._waiting[record["label"]] = (now, record)
            return []
        self.counts["streams compared"] += 1
        one = other[1]
        if one["side"] == record["side"]:
            return [f"stream {record['label']}: two reports of one side"]
        return self._compare(one, record, now) + self._compare(record, one, now)

    def cut(self, session: str, now: float) -> None:
        """A session ended so that what was finished in it may be lost."""
        self._cut[session] = now

    def expire(self, now: float, patience: float = PATIENCE) -> list[str]:
        """Forget what is old. Streams of which only one end ever heard may not have looked complete."""
        faults = [fault for since, session, fault in self._suspected if session not in self._cut]
        self._suspected.clear()
        self._cut = {session: since for session, since in self._cut.items() if now - since <= patience}
        for label, (since, record) in list(self._waiting.items()):
            if now - since > patience:
                del self._waiting[label]
                self.counts["streams of which one end heard"] += 1
                if record["end"] == "eof":
                    faults.append(f"stream {label}: EOF of what nobody wrote: {record}")
        return faults

    def _compare(self, writer: Record, reader: Record, now: float) -> list[str]:
        """One direction of a stream."""
        about = f"stream {writer['label']} ({writer['what']}), written by the {writer['side']}"
        if reader["end"] == "eof":
            self.counts["directions complete"] += 1
            if not writer["finished"]:
                return [f"{about}: a cut stream looked complete: {writer} {reader}"]
            if (writer["wrote"], writer["wrote_digest"]) != (reader["read"], reader["read_digest"]):
                return [f"{about}: wrong bytes: {writer} {reader}"]
            self.counts["bytes compared"] += reader["read"]
            return []
        if reader["code"] is None:
            return []
        gave_up = writer["gave_up"]
        if gave_up is None:
            if writer["finished"] and not writer["late"]:
                fault = f"{about}: a reset that nobody asked for: {writer} {reader}"
                self._suspected.append((now, writer["session"], fault))
            return []
        if reader["code"] not in (0, gave_up):
            return [f"{about}: reset with code {gave_up}, heard {reader['code']}"]
        self.counts["reset codes heard"] += bool(gave_up) and reader["code"] == gave_up
        return []
