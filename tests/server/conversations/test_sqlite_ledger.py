"""What only the embedded ledger promises: one process, private files, no lost acknowledgement, no damaged answer."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest

from server.conversations import sqlite_file
from server.conversations.ledger import (
    ConversationBusy,
    ConversationExpired,
    Durability,
    LeaseLost,
    LedgerCorrupt,
    LedgerUnavailable,
    Turn,
)
from server.conversations.sqlite_ledger import SqliteLedger
from server.conversations.sqlite_log import steady_clock
from tests.conftest import ROOT
from tests.server.conversations import first_format
from tests.server.conversations.ledgers import (
    CONVERSATION_TTL,
    DAY,
    LEASE_TTL,
    append,
    checkpoint_of,
    document,
    new_conversation,
    next_turn,
)

ID = "acme:talk"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger's file will be, in a folder that does not exist yet."""
    return tmp_path / "data" / "ledger.sqlite"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteLedger]:
    """An open ledger."""
    ledger = SqliteLedger(path)
    await ledger.open()
    yield ledger
    await ledger.close()


@contextmanager
def edited(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger's file in other hands, while no ledger has it open."""
    connection = sqlite3.connect(path, isolation_level=None)
    yield connection
    connection.close()


# -- one process, private files ---------------------------------------------------------------------------------------


async def test_a_second_process_refuses_to_start(path: Path) -> None:
    """The lock on the directory lets one ledger in, and the next one after it closed."""
    second = SqliteLedger(path)
    async with opened(path):
        with pytest.raises(LedgerUnavailable, match="another process"):
            await second.open()
    async with opened(path):
        pass


async def test_files_are_private(path: Path) -> None:
    """Only their owner can read the directory, the file, and its log, whatever the umask says."""
    umask = os.umask(0)
    try:
        async with opened(path) as ledger:
            await ledger.create(new_conversation(ID))
            modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    finally:
        os.umask(umask)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert modes == {"ledger.sqlite": 0o600, "ledger.sqlite-wal": 0o600, "ledger.sqlite-shm": 0o600}


def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    """A ledger's file that was copied or restored with wider rights gets its own back."""
    path.parent.mkdir()
    path.touch()
    path.chmod(0o644)
    ledger = SqliteLedger(path)
    asyncio.run(ledger.open())
    asyncio.run(ledger.close())
    assert path.stat().st_mode & 0o777 == 0o600


async def test_commits_are_synced_and_said_to_be(path: Path) -> None:
    """The durability of a file is `fsynced`, of memory `memory`; the file is in WAL mode with full synchronisation."""
    async with opened(path) as ledger:
        assert ledger.durability is Durability.FSYNCED
        assert await ledger._run(ledger._file.value, "PRAGMA synchronous") == 2
        assert await ledger._run(ledger._file.value, "PRAGMA journal_mode") == "wal"
    assert SqliteLedger(None).durability is Durability.MEMORY


async def test_a_closed_ledger_says_so(path: Path) -> None:
    """A call after `close`, or before `open`, raises instead of starting something."""
    ledger = SqliteLedger(path)
    with pytest.raises(LedgerUnavailable):
        await ledger.get(ID)
    await ledger.close()
    with pytest.raises(LedgerUnavailable, match="closed"):
        await ledger.get(ID)


# -- restarts ---------------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_turns_and_forgets_leases(path: Path) -> None:
    """The next process finds every turn, finds no lease in its way, and gives out higher fences."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        turn = await append(ledger, ID)
        dead, _ = await ledger.acquire(ID, "server", LEASE_TTL)
    async with opened(path) as ledger:
        assert await ledger.turns(ID) == [turn]
        lease, _ = await ledger.acquire(ID, "server", LEASE_TTL)
        assert lease.fence > dead.fence
        with pytest.raises(LeaseLost):
            await ledger.commit(dead, next_turn(turn))


WRITER = """
import asyncio, sys
from pathlib import Path
from server.conversations.sqlite_ledger import SqliteLedger
from tests.server.conversations.ledgers import append, new_conversation

async def main():
    ledger = SqliteLedger(Path(sys.argv[1]))
    await ledger.open()
    try:
        await ledger.create(new_conversation("acme:talk"))
    except Exception:
        pass
    while True:
        print((await append(ledger, "acme:talk")).version, flush=True)

asyncio.run(main())
"""


def commit_until_killed(path: Path) -> int:
    """Let another process append turns, kill it after a few, and return the last version that it acknowledged."""
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        versions = [writer.stdout.readline() for _ in range(10)]
        writer.send_signal(signal.SIGKILL)
        return int([*versions, *writer.stdout.read().split()][-1])


async def test_a_killed_process_loses_no_acknowledged_turn(path: Path) -> None:
    """After `kill -9` in the middle of writing, the log holds all that was acknowledged, and is one chain."""
    for _ in range(3):
        acknowledged = commit_until_killed(path)
    async with opened(path) as ledger:
        turns = await ledger.turns(ID)
        assert acknowledged <= len(turns) <= acknowledged + 1
        assert turns[0] == next_turn(new_conversation(ID))
        assert all(turns[number] == next_turn(turns[number - 1]) for number in range(1, len(turns)))


# -- clocks -----------------------------------------------------------------------------------------------------------


async def test_setting_the_clock_expires_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps by years, either way, changes neither leases nor times to live of a running server."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        real_time = time.time
        for years in (10, -10):
            monkeypatch.setattr(time, "time", lambda years=years: real_time() + years * 365 * 86_400)
            with pytest.raises(ConversationBusy):
                await ledger.acquire(ID, "other", LEASE_TTL)
            assert await ledger.sweep() == []
        await ledger.commit(lease, next_turn(head))


def test_the_clock_starts_at_the_time_of_day() -> None:
    """Times to live go on over a restart, because the clock begins with the wall clock's time."""
    assert abs(steady_clock()() - time.time()) < 60


async def test_time_to_live_goes_on_while_no_process_runs(path: Path) -> None:
    """A conversation that ran out between two processes has expired for the second."""
    first = SqliteLedger(path, clock=lambda: 1_000.0)
    await first.open()
    await first.create(new_conversation(ID))
    await first.close()
    second = SqliteLedger(path, clock=lambda: 1_000.0 + CONVERSATION_TTL)
    await second.open()
    with pytest.raises(ConversationExpired):
        await second.get(ID)
    await second.close()


# -- damage -----------------------------------------------------------------------------------------------------------


async def test_a_newer_schema_is_refused(path: Path) -> None:
    """A file of a later release is left alone, and the refusal says why."""
    async with opened(path):
        pass
    with edited(path) as file:
        file.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerUnavailable, match="newer release"):
        await SqliteLedger(path).open()


async def test_a_damaged_file_is_refused_at_the_start(path: Path) -> None:
    """The integrity check finds overwritten pages before anything is served from them."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        for _ in range(20):
            await append(ledger, ID)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 8192)
    with pytest.raises(LedgerCorrupt):
        await SqliteLedger(path).open()


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """Something else at the ledger's path is neither served nor overwritten."""
    path.parent.mkdir()
    path.write_bytes(b"my diary\n" * 1000)
    with pytest.raises(LedgerCorrupt):
        asyncio.run(SqliteLedger(path).open())
    assert path.read_bytes() == b"my diary\n" * 1000


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE turns SET record = x'00'",
        "UPDATE turns SET record = substr(record, 1, length(record) - 1) WHERE version = 2",
        "UPDATE turns SET record = (SELECT record FROM turns WHERE conversation_id = 'acme:other') WHERE version = 1",
        "UPDATE turns SET record = (SELECT record FROM turns WHERE conversation_id = 'acme:talk' AND version = 1)",
        "UPDATE turns SET record = CAST(zeroblob(16) || substr(record, 17) AS BLOB) WHERE version = 1",
        "DELETE FROM turns WHERE version = 1",
        "DELETE FROM turns WHERE version = 3",
        "UPDATE conversations SET version = 2",
        "UPDATE conversations SET chain = zeroblob(16)",
        "UPDATE conversations SET head = x'ff'",
        "UPDATE conversations SET head = CAST(x'9203' || substr(head, 3) AS BLOB)",
        "UPDATE conversations SET head = (SELECT head FROM conversations WHERE conversation_id = 'acme:other')",
        "UPDATE conversations SET metadata = x'c0'",
        "UPDATE checkpoints SET record = x'c0'",
    ],
)
async def test_a_damaged_record_is_never_continued_from(path: Path, damage: str) -> None:
    """Records that are cut, swapped, missing or of another format raise `LedgerCorrupt`."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation("acme:other"))
        await append(ledger, "acme:other")
        await ledger.create(new_conversation(ID))
        for _ in range(3):
            turn = await append(ledger, ID)
        await ledger.point(ID, 3, checkpoint_of(turn, "a"))
    with edited(path) as file:
        file.execute(damage)
    async with opened(path) as ledger:
        with pytest.raises(LedgerCorrupt):
            await ledger.turns(ID)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE turns SET record = x'00' WHERE version = 1",
        "UPDATE turns SET record = (SELECT record FROM turns WHERE version = 2) WHERE version = 1",
        "UPDATE turns SET reply_id = NULL WHERE version = 1; UPDATE turns SET reply_id = 'resp_1' WHERE version = 2",
        "UPDATE documents SET record = x'00'",
        "UPDATE documents SET record = (SELECT record FROM documents WHERE document_id = 'b')",
    ],
)
async def test_a_damaged_record_answers_nothing(path: Path, damage: str) -> None:
    """A reply or a document that is cut, or somebody else's, raises `LedgerCorrupt`."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        for reply_id in ("resp_1", "resp_2"):
            await append(ledger, ID, reply_id=reply_id)
        for document_id in ("a", "b"):
            await ledger.put_document(document(document_id))
    with edited(path) as file:
        file.executescript(damage)
    async with opened(path) as ledger:
        asks = (
            (ledger.get_document("completion", "a"), ledger.documents("completion"))
            if "documents" in damage
            else (ledger.find_reply(ID, "resp_1"),)
        )
        for ask in asks:
            with pytest.raises(LedgerCorrupt):
                await ask


# -- files of the first schema ----------------------------------------------------------------------------------------


def write_first_schema(path: Path) -> list[Turn]:
    """Write a file as the first release did: three turns with a checkpoint, an empty conversation, a tombstone."""
    path.parent.mkdir()
    first = next_turn(new_conversation(ID))
    second = next_turn(first)
    turns = [first, second, next_turn(second)]
    expires_at = time.time() + CONVERSATION_TTL
    with edited(path) as file:
        file.executescript(first_format.SCHEMA)
        for conversation_id, version, checkpoint in (
            (ID, 3, first_format.checkpoint_record(checkpoint_of(second, "a"))),
            ("acme:empty", 0, None),
        ):
            conversation = new_conversation(conversation_id)
            head = turns[version - 1] if version else conversation
            file.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    conversation_id,
                    first_format.head_record(conversation),
                    version,
                    head.chain,
                    head.num_tokens,
                    "request" if version else None,
                    CONVERSATION_TTL,
                    expires_at,
                    checkpoint,
                    2 if checkpoint else 0,
                ),
            )
        for turn in turns:
            record = first_format.turn_record(ID, turn)
            file.execute("INSERT INTO turns VALUES (?, ?, ?)", (ID, turn.version, record))
        file.execute("INSERT INTO tombstones VALUES ('acme:gone', ?)", (expires_at,))
    return turns


async def test_a_file_of_the_first_schema_goes_on(path: Path) -> None:
    """Its conversations keep their turns and checkpoints, gain what is new, and outlive the next restart."""
    turns = write_first_schema(path)
    async with opened(path) as ledger:
        head = await ledger.get(ID)
        assert head == msgspec.structs.replace(
            new_conversation(ID),
            version=3,
            chain=turns[2].chain,
            num_tokens=turns[2].num_tokens,
            checkpoints={2: checkpoint_of(turns[1], "a")},
        )
        assert await ledger.get("acme:empty") == new_conversation("acme:empty")
        assert await ledger.turns(ID) == turns
        with pytest.raises(ConversationExpired):
            await ledger.get("acme:gone")
        lease, _ = await ledger.acquire("acme:empty", "server", LEASE_TTL)
        assert lease.fence >= 8 << 32  # later than those of the last release's process
        turns.append(await append(ledger, ID, reply_id="resp_1"))
        garbage = await ledger.point(ID, 4, checkpoint_of(turns[3], "b"), drop=[2])
        assert garbage == [checkpoint_of(turns[1], "a")]
        await ledger.put_document(document())
    async with opened(path) as ledger:
        assert await ledger.turns(ID) == turns
        assert await ledger.find_reply(ID, "resp_1") == turns[3]
        assert (await ledger.get(ID)).checkpoints == {4: checkpoint_of(turns[3], "b")}
        assert await ledger.get_document("completion", "chatcmpl-1") == document()


async def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    """A file whose schema cannot be brought up to date is refused as it was."""
    write_first_schema(path)
    with edited(path) as file:
        file.execute("CREATE TABLE documents (mine TEXT)")
        before = list(file.iterdump())
    with pytest.raises(LedgerUnavailable, match="documents"):
        await SqliteLedger(path).open()
    with edited(path) as file:
        assert list(file.iterdump()) == before
        assert file.execute("PRAGMA user_version").fetchone() == (1,)


# -- the disk ---------------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_and_loses_nothing(path: Path) -> None:
    """While SQLite gets no room commits raise `LedgerUnavailable`, write nothing, and work again afterwards."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        turn = await append(ledger, ID)
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        too_long = next_turn(head, output_ids=tuple(range(100_000)))
        await ledger._run(ledger._file.value, "PRAGMA max_page_count = 12")
        with pytest.raises(LedgerUnavailable, match="full"):
            await ledger.commit(lease, too_long)
        assert await ledger.turns(ID) == [turn]
        await ledger._run(ledger._file.value, "PRAGMA max_page_count = 1000000")
        await ledger.commit(lease, too_long)
        assert await ledger.turns(ID, 1) == [too_long]


async def test_a_failing_write_refuses_and_loses_nothing(path: Path) -> None:
    """When the system refuses to write the file, commits raise `LedgerUnavailable`, and work again afterwards."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        turn = await append(ledger, ID)
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("ledger.sqlite-wal").stat().st_size + 100, hard))
        try:
            with pytest.raises(LedgerUnavailable):
                await ledger.commit(lease, next_turn(head))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert await ledger.turns(ID) == [turn]
        await ledger.commit(lease, next_turn(head))
    async with opened(path) as ledger:
        assert len(await ledger.turns(ID)) == 2


class UnsyncedConnection(sqlite3.Connection):
    """A connection to a disk that cannot sync."""

    def execute(self, sql: str, parameters: object = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        """Fail to commit turns as SQLite does when fsync fails."""
        if sql.startswith("INSERT INTO turns"):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error
        return super().execute(sql, parameters)  # type: ignore[arg-type]


async def test_a_failed_sync_ends_the_service(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync nothing more is acknowledged: what the disk holds is no longer known."""
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite_file.sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=UnsyncedConnection, **kwargs)
    )
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        with pytest.raises(LedgerUnavailable):
            await append(ledger, ID)
        with pytest.raises(LedgerUnavailable, match="restart"):
            await ledger.get(ID)


async def test_deleted_text_leaves_the_disk(path: Path) -> None:
    """After `delete` no file of the ledger holds the tokens any more (promise P20)."""
    async with opened(path) as ledger:
        await ledger.create(new_conversation(ID))
        lease, head = await ledger.acquire(ID, "server", LEASE_TTL)
        await ledger.commit(lease, next_turn(head, "very-secret-request", output_ids=(1,)))

        def is_on_disk() -> bool:
            return any(b"very-secret-request" in file.read_bytes() for file in path.parent.iterdir())

        assert is_on_disk()
        await ledger.delete(ID)
        assert not is_on_disk()


async def test_a_deleted_document_leaves_the_disk(path: Path) -> None:
    """A document's text is in no file of the ledger any more once it is deleted, or swept after its time."""
    now = 1_000.0
    ledger = SqliteLedger(path, clock=lambda: now)
    await ledger.open()

    def is_on_disk() -> bool:
        return any(b"very-secret-reply" in file.read_bytes() for file in path.parent.iterdir())

    await ledger.put_document(document("a", b"very-secret-reply"))
    assert is_on_disk()
    await ledger.delete_document("completion", "a")
    assert not is_on_disk()
    await ledger.put_document(document("a", b"very-secret-reply"))
    now += DAY
    await ledger.sweep()
    await ledger.close()
    assert not is_on_disk()
