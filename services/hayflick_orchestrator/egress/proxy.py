"""Accepts at workers' doors, asks the rules, dials, and passes bytes on until someone ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING

import h11

from hayflick_orchestrator.egress import requests
from hayflick_orchestrator.egress.worker import Allowance, Connection
from hayflick_rpc import hosts

if TYPE_CHECKING:
    from hayflick_orchestrator.egress.requests import Plain, Tunnel, Wanted

MAX_CONNECTIONS = 32
CHUNK_BYTES = 64 * 1024
HEAD_SECONDS = 10.0
RESOLVE_SECONDS = 5.0
DIAL_SECONDS = 10.0
IDLE_SECONDS = 300.0
MAX_ADDRESSES = 4
EXHAUSTED_SECONDS = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_STATUS = {400: "Bad Request", 403: "Forbidden", 502: "Bad Gateway"}


log = logging.getLogger(__name__)


class Refused(Exception):
    """The rules do not allow it; the text is the verdict."""


class Unreachable(Exception):
    """It is allowed, and cannot be reached; the text is the verdict."""


class WorkerProxy:
    """The proxy of one worker, on the listening socket that its init made."""

    def __init__(self, listener: socket.socket, allowance: Allowance) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._listener.setblocking(False)
        self.allowance = allowance
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._accepting = asyncio.create_task(self._accept())

    def release(self) -> None:
        """Let bytes pass again."""
        for connection in self.allowance.connections:
            if connection.timer is not None:
                connection.timer.reschedule(self._loop.time() + IDLE_SECONDS)
        self.allowance.flowing.set()

    async def narrow(self, rules: tuple[hosts.Rule, ...], limit_bytes: int | None) -> None:
        """Allow this and no more; return when what is no longer allowed is cut."""
        self.allowance.narrow(rules, limit_bytes)
        cut = [one.task for one in self.allowance.connections if one.verdict]
        await asyncio.gather(*cut, return_exceptions=True)

    async def close(self) -> None:
        """Refuse whoever comes from now on, and cut those who came."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.cancel()
        self.allowance.cut_all("closed")
        tasks = [one.task for one in self.allowance.connections]
        await asyncio.gather(self._accepting, *tasks, return_exceptions=True)

    async def _accept(self) -> None:
        with self._listener:
            while True:
                await self._room.acquire()
                try:
                    sock, _ = await self._loop.sock_accept(self._listener)
                except OSError as error:
                    self._room.release()
                    if error.errno not in _EXHAUSTED:
                        return
                    await asyncio.sleep(EXHAUSTED_SECONDS)
                    continue
                task = asyncio.create_task(self._serve(sock))
                task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection failed", exc_info=error)

    async def _serve(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(task)
        self.allowance.connections.add(connection)
        with sock:
            try:
                reader, writer = await asyncio.open_connection(sock=sock, limit=CHUNK_BYTES)
                writer.transport.set_write_buffer_limits(high=CHUNK_BYTES)
                try:
                    await self._answer(connection, reader, writer)
                finally:
                    writer.transport.abort() if connection.verdict else writer.close()
            except (asyncio.CancelledError, OSError, EOFError, TimeoutError):
                if connection.address is not None or connection.verdict:
                    self.allowance.told(connection, connection.verdict or "ended")
            else:
                if connection.address is not None:
                    self.allowance.told(connection, connection.verdict or "ended")
            finally:
                self.allowance.connections.discard(connection)

    async def _answer(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        wanted: Wanted | None = None
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                wanted = await requests.read(reader, writer)
            if wanted is None:
                return
            connection.host, connection.port = wanted.host, wanted.port
            outside = await self._reach(connection)
        except requests.BadRequest as error:
            self.allowance.denied(connection, f"bad_request_{error}")
            if str(error) != "socks":
                _say(writer, wanted, 400, requests.SOCKS_REFUSED)
        except Refused as error:
            self.allowance.denied(connection, str(error))
            _say(writer, wanted, 403, requests.SOCKS_REFUSED)
        except Unreachable as error:
            self.allowance.told(connection, str(error))
            connection.address = None  # told already
            _say(writer, wanted, 502, requests.SOCKS_UNREACHABLE)
        else:
            with outside:
                far_reader, far_writer = await asyncio.open_connection(sock=outside, limit=CHUNK_BYTES)
                far_writer.transport.set_write_buffer_limits(high=CHUNK_BYTES)
                try:
                    ends = _Ends(reader, writer, far_reader, far_writer)
                    await self._pass(connection, wanted, ends)
                finally:
                    far_writer.transport.abort() if connection.verdict else far_writer.close()

    async def _reach(self, connection: Connection) -> socket.socket:
        """Return a connection to what is wanted.

        The name is resolved once, every address it has is checked, and one of
        these very addresses is dialled: an answer that changes later changes nothing.

        Raises:
            Refused: the rules do not allow it.
            Unreachable: it does not answer.
        """
        allowance, name, port = self.allowance, connection.host, connection.port
        if allowance.exhausted:
            raise Refused("budget")
        if verdict := hosts.refusal(allowance.rules, name, port):
            raise Refused(verdict)
        if isinstance(name, str):
            addresses = await self._resolve(name, port)
        else:
            addresses = [name]
        listed = [one for one in addresses if any(rule.allows(one, port) for rule in allowance.rules)]
        for address in addresses:
            if not hosts.may_dial(allowance.rules, address, port):
                raise Refused("private_address")
            if address not in listed and _is_ours(address):
                raise Refused("host_of_its_own")
        for address in addresses[:MAX_ADDRESSES]:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                async with asyncio.timeout(DIAL_SECONDS):
                    await self._loop.sock_connect(sock, (str(address), port))
            except (OSError, TimeoutError):
                sock.close()
                continue
            except BaseException:
                sock.close()
                raise
            connection.address = address
            return sock
        raise Unreachable("unreachable")

    async def _resolve(self, name: str, port: int) -> list[hosts.Address]:
        # As it stands, and not below a domain of the host's search list (resolv.conf(5)).
        asked = f"{name}." if "." in name else name
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self._loop.getaddrinfo(asked.encode(), port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            raise Unreachable("unresolved") from None
        return list(dict.fromkeys(ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found))

    async def _pass(self, connection: Connection, wanted: Wanted, ends: _Ends) -> None:
        async with asyncio.timeout(IDLE_SECONDS) as timer:
            connection.timer = timer
            if isinstance(wanted, requests.Plain):
                out = self._request(connection, wanted, ends)
            else:
                out = self._tunnel(connection, wanted, ends)
            ways = [asyncio.create_task(out), asyncio.create_task(self._back(connection, ends))]
            try:
                await asyncio.gather(*ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _tunnel(self, connection: Connection, wanted: Tunnel, ends: _Ends) -> None:
        if wanted.socks:
            ends.writer.write(requests.socks_answer(requests.SOCKS_DONE))
        else:
            ends.writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        data = wanted.early or await ends.reader.read(CHUNK_BYTES)
        while data:
            await self._out(connection, ends, data)
            data = await ends.reader.read(CHUNK_BYTES)
        with contextlib.suppress(OSError):
            ends.far_writer.write_eof()

    async def _request(self, connection: Connection, wanted: Plain, ends: _Ends) -> None:
        server = h11.Connection(h11.CLIENT)
        await self._out(connection, ends, server.send(wanted.head) or b"")
        if wanted.client.they_are_waiting_for_100_continue:
            ends.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            while not isinstance(event := wanted.client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    wanted.client.receive_data(await ends.reader.read(CHUNK_BYTES))
                elif isinstance(event, h11.Data):
                    await self._out(connection, ends, server.send(event) or b"")
                else:
                    raise EOFError
            if data := server.send(h11.EndOfMessage(headers=event.headers)):
                await self._out(connection, ends, data)
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            raise EOFError from error
        # One request a connection: a second one could be for another host.

    async def _out(self, connection: Connection, ends: _Ends, data: bytes) -> None:
        count = await self._crossing(connection, len(data))
        connection.sent_bytes += count
        ends.far_writer.write(data[:count])
        await ends.far_writer.drain()
        self._check(connection, count, data)

    async def _back(self, connection: Connection, ends: _Ends) -> None:
        while data := await ends.far_reader.read(CHUNK_BYTES):
            count = await self._crossing(connection, len(data))
            connection.received_bytes += count
            ends.writer.write(data[:count])
            await ends.writer.drain()
            self._check(connection, count, data)
        with contextlib.suppress(OSError):
            ends.writer.write_eof()

    async def _crossing(self, connection: Connection, wanted: int) -> int:
        await self.allowance.flowing.wait()
        assert connection.timer is not None
        connection.timer.reschedule(self._loop.time() + IDLE_SECONDS)
        return self.allowance.take(wanted)

    def _check(self, connection: Connection, count: int, data: bytes) -> None:
        if count < len(data):
            # What was allowed is on its way; close instead of abort, so that it arrives.
            self.allowance.told(connection, "budget")
            connection.address = None
            raise EOFError


class _Ends:
    """The four ends of a connection that is passed on."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        self.reader, self.writer = reader, writer
        self.far_reader, self.far_writer = far_reader, far_writer


def _is_ours(address: hosts.Address) -> bool:
    """Return whether *address* is one of this very host: only those can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def _say(writer: asyncio.StreamWriter, wanted: Wanted | None, status: int, socks: int) -> None:
    """Tell the client in its own language that it gets nothing."""
    if isinstance(wanted, requests.Tunnel) and wanted.socks:
        writer.write(requests.socks_answer(socks))
        return
    line = f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    writer.write(line.encode())
