"""Rendered rows as Arrow columns: in memory, or mapped from a file that a run before has written.

A table holds a record per row of the data file, in its order, the faulty ones with what is wrong with them. Rows become
Python objects when they are asked for, one at a time, so that a million of them take the memory of a step's.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa

from tunesmith.caller import told
from tunesmith.data.records import Records
from tunesmith.data.records.found import for_one_row
from tunesmith.data.render import Renderer
from tunesmith.types import Conversation, Fault, Message, Origin, Rendered

CHUNK = 2048
"""Rows that are rendered together, and that a batch of a table holds."""

_LETTERS = 4 << 20
"""Of rows that are Python objects at once with their tokens, which take some twenty bytes for a letter."""
_KEY_BYTES = 16
_DOCUMENT = pa.struct([("token_ids", pa.list_(pa.uint32())), ("replies", pa.list_(pa.list_(pa.uint32(), 2)))])
_FAULT_PARTS = ("field", "found", "expected", "fix")
SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("documents", pa.list_(_DOCUMENT)),
        ("n_tokens", pa.int64()),
        ("n_supervised", pa.int64()),
        ("longest", pa.int64()),  # tokens of the longest document
        ("key", pa.binary(_KEY_BYTES)),  # equal where the documents' token ids are
        ("prompt_key", pa.binary(_KEY_BYTES)),  # equal where the ids in front of the last reply are
        ("fault", pa.struct([(part, pa.string()) for part in _FAULT_PARTS])),
    ]
)


@dataclass(frozen=True)
class Row:
    """A trainable row: what it says and its documents (one, but for templates that rewrite history)."""

    conversation: Conversation
    documents: tuple[Rendered, ...]


def render(records: Records, renderer: Renderer, share: int = 0, of: int = 1) -> Iterator[pa.RecordBatch]:
    """The rows of a file read and rendered, `CHUNK` in a batch; of every `of` batches the one numbered `share`.

    Raises DataError where the file as a whole can not be read on.
    """
    rows = records.rows(CHUNK, share, of)
    while chunk := list(itertools.islice(rows, CHUNK)):
        parts = [_batch(part, renderer) for part in _parts(chunk)]
        yield parts[0] if len(parts) == 1 else pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def _parts(chunk: Sequence[Conversation | Fault]) -> Iterator[Sequence[Conversation | Fault]]:
    """Rows whose texts together have no more than `_LETTERS`, or one row."""
    first = letters = 0
    for number, row in enumerate(chunk):
        own = sum(len(message.content) for message in row.messages) if isinstance(row, Conversation) else 0
        if letters + own > _LETTERS and number > first:
            yield chunk[first:number]
            first, letters = number, 0
        letters += own
    yield chunk[first:]


def _batch(chunk: Sequence[Conversation | Fault], renderer: Renderer) -> pa.RecordBatch:
    results = renderer.render_all(row for row in chunk if isinstance(row, Conversation))
    records: list[dict[str, object]] = []
    for row in chunk:
        result = next(results) if isinstance(row, Conversation) else row
        messages = [message.as_dict() for message in row.messages] if isinstance(row, Conversation) else None
        record: dict[str, object] = {"line": row.origin.line, "messages": messages}
        if isinstance(result, Fault):
            record["fault"] = {part: getattr(result, part) for part in _FAULT_PARTS}
        else:
            record["documents"] = [{"token_ids": d.token_ids, "replies": d.replies} for d in result]
            record["n_tokens"] = sum(len(document.token_ids) for document in result)
            record["n_supervised"] = sum(document.n_supervised for document in result)
            record["longest"] = max(len(document.token_ids) for document in result)
            record["key"] = _key([document.token_ids for document in result])
            record["prompt_key"] = _key([result[-1].prompt_ids])
        records.append(record)
    return pa.RecordBatch.from_pylist(records, SCHEMA)


def _key(ids: Sequence[Sequence[int]]) -> bytes:
    return hashlib.blake2b(str(list(map(tuple, ids))).encode(), digest_size=_KEY_BYTES).digest()


def faults_of(table: pa.Table, records: Records) -> list[Fault]:
    """What is wrong with the faulty rows, in the order of the file."""
    faulty = table.filter(table.column("fault").is_valid()).select(["line", "fault"])
    found = [
        Fault(records.origin(record["line"]), **record["fault"])
        for batch in faulty.to_batches()
        for record in batch.to_pylist()
    ]
    if len(faulty) < len(table):
        found = [replace(fault, fix=for_one_row(fault.fix)) for fault in found]
    return [replace(fault, fix=told(fault.fix)) for fault in found]  # a table may be read by another caller


class Rows(Sequence[Row]):
    """Rows of a table that are not faulty, in the order of the file; each is made when it is asked for."""

    def __init__(self, table: pa.Table, records: Records, numbers: np.ndarray | None = None) -> None:
        """`numbers`: which records of the table (int64), by default all that are not faulty."""
        self._table, self._records = table, records
        good = table.column("fault").is_null().to_numpy() if numbers is None else ()
        self._numbers: np.ndarray = np.flatnonzero(good) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        (record,) = self._table.slice(self._numbers[index], 1).to_pylist()
        origin = self._records.origin(record["line"])
        return Row(
            Conversation(tuple(Message(**message) for message in record["messages"]), origin),
            tuple(
                Rendered(tuple(document["token_ids"]), tuple(map(tuple, document["replies"])), origin)
                for document in record["documents"]
            ),
        )

    def pick(self, wanted: np.ndarray) -> Rows:
        """Some of these rows: a flag for each of them."""
        return Rows(self._table, self._records, self._numbers[wanted])

    def origin(self, index: int) -> Origin:
        return self._records.origin(int(self.lines[index]))

    @cached_property
    def lines(self) -> np.ndarray:
        """Where each row begins (int64)."""
        return self._column("line")

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """Tokens of each row (int64)."""
        return self._column("n_tokens")

    @cached_property
    def n_supervised(self) -> np.ndarray:
        """Tokens of each row that are learned (int64)."""
        return self._column("n_supervised")

    @cached_property
    def longest(self) -> np.ndarray:
        """Tokens of each row's longest document (int64)."""
        return self._column("longest")

    def repeats(self) -> list[tuple[int, int]]:
        """Rows with the same token ids as an earlier one, each with the first of them; ascending."""
        return _equal(self._keys("key"))

    def contradictions(self) -> list[tuple[int, int]]:
        """Rows with the prompt of an earlier one and another reply, each with the first row of it; ascending."""
        keys = self._keys("key")
        return [
            (again, first) for again, first in _equal(self._keys("prompt_key")) if (keys[again] != keys[first]).any()
        ]

    def among(self, others: Rows) -> list[tuple[int, int]]:
        """Rows with the same token ids as one of `others`, each with the first of those; ascending."""
        keys = np.concatenate([others._keys("key"), self._keys("key")])
        n = len(others)
        return [(again - n, first) for again, first in _equal(keys) if first < n <= again]

    def _keys(self, name: str) -> np.ndarray:
        """(rows, 2) uint64."""
        return np.frombuffer(b"".join(self._column(name)), dtype=np.uint64).reshape(-1, 2)

    def _column(self, name: str) -> np.ndarray:
        column = self._table.column(name)
        return column.take(pa.array(self._numbers)).to_numpy()


def _equal(keys: np.ndarray) -> list[tuple[int, int]]:
    """Indices of keys (n, 2) that equal an earlier one, each with the first of them; ascending."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first comes first
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    pairs, first = [], 0
    for place in np.flatnonzero(same):
        first = first if place and same[place - 1] else order[place]
        pairs.append((int(order[place + 1]), int(first)))
    return sorted(pairs)
