"""One process a server owns the host cache; engines map its memory over a Unix socket.

Messages are JSON objects behind a 4-byte length. The reply to ``hello`` carries the descriptor of the cache's
memory. While a model is being read, the server says ``{"wait": true}`` every half second, so that a client
can tell a slow disk from a dead server. A client that goes away loses its leases.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tiered_memory import PinnedArena
from vllm_serverless_loader.checkpoint.index import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointKey,
    CorruptCheckpointError,
    PartitionIndex,
    TensorEntry,
)
from vllm_serverless_loader.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_serverless_loader.loading.adapters import AdapterCache
from vllm_serverless_loader.loading.device_push import (
    DriverError,
    RemoteMemory,
    device_uuid,
    export,
    find_device,
)
from vllm_serverless_loader.loading.host_cache import CachedModel, HostCache, extents_of
from vllm_serverless_loader.loading.options import LoadOptions
from vllm_serverless_loader.loading.remote import is_remote, open_remote

PROTOCOL = 1
_MESSAGE_LIMIT = 64 << 20
_BEAT_S = 0.5
_ERRORS: dict[str, type[Exception]] = {
    "FileNotFoundError": FileNotFoundError,
    "CorruptCheckpointError": CorruptCheckpointError,
    "ValueError": ValueError,
    "MemoryError": MemoryError,
    "RuntimeError": RuntimeError,
    "OSError": OSError,
}


class StoreServer:
    """Serves a shared :class:`HostCache` to the engines of this machine.

    Args:
        cache: made with ``shared=True``.
        socket_path: where clients connect; readable and writable by this user alone.
        options: how models are read.
        remote_cache: folder for local copies of models whose path is a URL; without it they are refused.
        adapter_bytes: host memory for adapters, beside the pool.

    Raises:
        ValueError: the cache is not shared.
        OSError: another server listens there, or no socket can be made there.
    """

    def __init__(
        self,
        cache: HostCache,
        socket_path: str | os.PathLike[str],
        *,
        options: LoadOptions | None = None,
        remote_cache: str | os.PathLike[str] | None = None,
        adapter_bytes: int = 1 << 30,
    ) -> None:
        if cache.arena.fd is None:
            raise ValueError("store: the cache must be made with shared=True")
        self.cache = cache
        self.socket_path = Path(socket_path)
        self._options = options or LoadOptions()
        self._remote_cache = None if remote_cache is None else Path(remote_cache)
        folder = self.socket_path.absolute().with_name(self.socket_path.name + ".adapters")
        self.adapters = AdapterCache(folder, adapter_bytes, options=options)
        self._listener: socket.socket | None = None
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._accepting: threading.Thread | None = None

    def start(self) -> None:
        """Listen and serve in background threads."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_dead_socket(self.socket_path)
            try:
                listener.bind(str(self.socket_path))
            except OSError as error:
                raise OSError(error.errno, f"store: no socket at {self.socket_path}: {error}") from error
            os.chmod(self.socket_path, 0o600)
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._accepting = threading.Thread(
            target=self._accept, args=(listener,), name="store-accept", daemon=True
        )
        self._accepting.start()

    def stop(self) -> None:
        """Stop listening, drop all clients, wait for their threads. Idempotent; the cache stays open."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.socket_path.unlink(missing_ok=True)
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        assert self._accepting is not None
        self._accepting.join()
        with self._lock:
            clients = dict(self._clients)
        for connection in clients:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in clients.values():
            thread.join()
        self.adapters.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="store-client", daemon=True
            )
            with self._lock:
                self._clients[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        leases: dict[int, CachedModel] = {}
        try:
            while (request := _receive(connection)) is not None:
                self._answer(connection, request, leases)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a client that died or speaks another protocol; what it held is released below
        finally:
            for lease in leases.values():
                lease.release()
            with self._lock:
                del self._clients[connection]
            connection.close()

    def _answer(
        self, connection: socket.socket, request: Mapping[str, Any], leases: dict[int, CachedModel]
    ) -> None:
        operation = request.get("op")
        if operation == "hello":
            assert self.cache.arena.fd is not None
            reply = {"protocol": PROTOCOL, "chunk_bytes": self.cache.chunk_bytes, "pid": os.getpid()}
            _send(connection, reply, self.cache.arena.fd)
        elif operation == "open":
            self._open(connection, str(request["path"]), int(request["rank"]), leases)
        elif operation == "release":
            leases.pop(int(request["lease"])).release()
            _send(connection, {})
        elif operation == "push":
            model, device, parts = leases[int(request["lease"])], str(request["device"]), request["parts"]
            if _with_beats(connection, lambda: _push(model, device, parts)):
                _send(connection, {"pinned": self.cache.arena.pinned})
        elif operation == "adapter":
            found: list[Path] = []
            if _with_beats(connection, lambda: found.append(self.adapters.get(str(request["path"])))):
                _send(connection, {"path": str(found[0])})
        elif operation == "models":
            models = [{"path": path, "rank": rank} for path, rank in self.cache.models]
            used, capacity = self.cache.used_bytes, self.cache.capacity_bytes
            facts = {"used_bytes": used, "capacity_bytes": capacity, "pinned": self.cache.arena.pinned}
            _send(connection, {"models": models, "adapters": list(self.adapters.adapters), **facts})
        else:
            _send(connection, _refusal(ValueError(f"store: unknown operation {operation!r}")))

    def _open(self, connection: socket.socket, path: str, rank: int, leases: dict[int, CachedModel]) -> None:
        number = max(leases, default=0) + 1

        def load() -> None:
            with self._checkpoint(path, rank) as checkpoint:
                leases[number] = self.cache.load(checkpoint, options=self._options)

        if not _with_beats(connection, load):
            return
        model = leases[number]
        reply = {"lease": number, "hit": model.hit, "path": str(model.path), "chunks": list(model.chunks)}
        _send(connection, {**reply, "index": _index_to_json(model.index)})

    def _checkpoint(self, path: str, rank: int) -> Checkpoint:
        if not is_remote(path):
            return open_checkpoint(path, rank=rank)
        if self._remote_cache is None:
            raise ValueError(
                f"{path}: the store was started without a folder for remote models (--remote-cache)"
            )
        folder = self._remote_cache / hashlib.sha256(path.encode()).hexdigest()[:32]
        return open_remote(path, folder, rank=rank)

    def __enter__(self) -> StoreServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class StoreClient:
    """An engine's connection to the store. Thread-safe; context manager.

    Args:
        socket_path: of the server.
        timeout_s: how long the server may be silent.
        push: let the store copy into this process's GPU memory where it can.

    Raises:
        ConnectionError: nobody listens, or the server fell silent; the socket is named.
    """

    def __init__(
        self, socket_path: str | os.PathLike[str], *, timeout_s: float = 5.0, push: bool = True
    ) -> None:
        self._pushes = push
        self.socket_path = Path(socket_path)
        self._lock = threading.Lock()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(timeout_s)
        try:
            try:
                self._connection.connect(str(self.socket_path))
                _send(self._connection, {"op": "hello"})
                reply, fd = _receive_with_descriptor(self._connection)
            except (OSError, ValueError) as error:
                raise self._gone(error) from error
            try:
                if reply.get("protocol") != PROTOCOL:
                    raise ConnectionError(
                        f"store {self.socket_path} speaks protocol {reply.get('protocol')}, not {PROTOCOL}"
                    )
                # Page-locking it again in this process would take longer than a load.
                self._arena = PinnedArena.attach(fd, pinned=False)
            finally:
                os.close(fd)
        except BaseException:
            self._connection.close()
            raise
        self._chunk_bytes: int = reply["chunk_bytes"]

    def open(self, path: str | os.PathLike[str], rank: int = 0) -> CachedModel:
        """Lease a model from the store, which reads it if it is not there.

        Raises:
            ConnectionError: the store is gone.
            FileNotFoundError, ValueError, CorruptCheckpointError, MemoryError, OSError: as the store met
                them.
        """
        name = os.fspath(path)
        name = name if is_remote(name) else os.path.realpath(name)
        reply = self._request({"op": "open", "path": name, "rank": rank})
        lease = reply["lease"]

        def release() -> None:
            # A store that is gone has forgotten the lease.
            with suppress(OSError):
                self._request({"op": "release", "lease": lease})

        def push(index: PartitionIndex, destinations: Mapping[str, Tensor]) -> bool:
            return self._push(lease, index, destinations)

        return CachedModel(
            _index_from_json(reply["index"]),
            extents_of(self._arena.buffer, reply["chunks"], self._chunk_bytes),
            hit=reply["hit"],
            path=Path(reply["path"]),
            chunks=reply["chunks"],
            pinned=lambda: self._arena.pinned,
            release=release,
            push=push if self._pushes else None,
        )

    def _push(self, lease: int, index: PartitionIndex, destinations: Mapping[str, Tensor]) -> bool:
        """Have the store copy into GPU memory; False, with one warning, where that is impossible."""
        by_device: dict[torch.device, list[str]] = {}
        for name, tensor in destinations.items():
            by_device.setdefault(tensor.device, []).append(name)
        try:
            for device, names in by_device.items():
                if device.type != "cuda":
                    raise DriverError("not all tensors are on GPUs")
                places = export([destinations[name] for name in names])
                parts = [
                    (handle, offset, index.tensors[name].offset, index.tensors[name].num_bytes)
                    for name, (handle, offset) in zip(names, places, strict=True)
                ]
                # What the engine still does with this memory must be over.
                torch.cuda.current_stream(device).synchronize()
                message = {"op": "push", "lease": lease, "device": device_uuid(device), "parts": parts}
                self._request(message)
        except RuntimeError as error:
            warnings.warn(f"{error}; copying by way of this process", RuntimeWarning, stacklevel=2)
            self._pushes = False
            return False
        return True

    def adapter(self, path: str | os.PathLike[str]) -> Path:
        """Folder of an adapter in the store's memory, which reads it if it is not there.

        Raises:
            ConnectionError: the store is gone.
            FileNotFoundError, MemoryError, OSError: see
                :meth:`~vllm_serverless_loader.loading.adapters.AdapterCache.get`.
        """
        return Path(self._request({"op": "adapter", "path": os.path.realpath(path)})["path"])

    def models(self) -> list[dict[str, Any]]:
        """Cached models, ``{"path", "rank"}``, least recently used first."""
        return list(self.status()["models"])

    def status(self) -> dict[str, Any]:
        """``models``, ``used_bytes``, ``capacity_bytes``, and whether the pool is page-locked yet."""
        return self._request({"op": "models"})

    def close(self) -> None:
        """Disconnect; the store then releases this client's leases. Idempotent."""
        self._connection.close()
        self._arena.close()

    def _request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with self._lock:
                _send(self._connection, message)
                while (reply := _receive(self._connection)) is not None and reply.get("wait"):
                    pass
        except OSError as error:
            raise self._gone(error) from error
        if reply is None:
            raise self._gone(None)
        if "error" in reply:
            raise _ERRORS.get(reply["error"], RuntimeError)(reply["message"])
        return reply

    def _gone(self, error: Exception | None) -> ConnectionError:
        return ConnectionError(f"store {self.socket_path} does not answer: {error or 'it hung up'}")

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_beats(connection: socket.socket, work: Callable[[], None]) -> bool:
    """Do ``work``, telling the client meanwhile to wait; its error goes to the client, and False is returned.

    Raises:
        OSError: the client is gone; ``work`` has ended.
    """
    errors: list[BaseException] = []
    finished = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finished.set()

    thread = threading.Thread(target=run, name="store-work", daemon=True)
    thread.start()
    try:
        while not finished.wait(_BEAT_S):
            _send(connection, {"wait": True})
    finally:
        thread.join()
    if errors:
        _send(connection, _refusal(errors[0]))
    return not errors


def _push(model: CachedModel, device: str, parts: Sequence[tuple[str, int, int, int]]) -> None:
    """Copy (IPC handle, offset in it, first byte, bytes) of a model into another process's GPU memory."""
    with RemoteMemory(find_device(device)) as memory:
        for handle, offset, start, num_bytes in parts:
            done = 0
            for part in model.extents.parts(int(start), int(num_bytes)):
                memory.copy(handle, int(offset) + done, part)
                done += part.numel()


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket that a killed server left; refuse if one listens there."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise OSError(f"store: another server listens at {path}")


def _send(connection: socket.socket, message: Mapping[str, Any], fd: int | None = None) -> None:
    content = json.dumps(message).encode()
    packet = struct.pack("<I", len(content)) + content
    if fd is None:
        connection.sendall(packet)
    else:
        sent = socket.send_fds(connection, [packet], [fd])
        connection.sendall(packet[sent:])


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    head = _receive_exactly(connection, 4)
    return None if head is None else _receive_body(connection, head)


def _receive_body(connection: socket.socket, head: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<I", head)
    if length > _MESSAGE_LIMIT:
        raise ValueError(f"store: a message of {length} bytes")
    content = _receive_exactly(connection, length)
    if content is None:
        raise ConnectionError("the connection ended inside a message")
    message = json.loads(content)
    if not isinstance(message, dict):
        raise ValueError("store: a message that is no object")
    return message


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _receive_with_descriptor(connection: socket.socket) -> tuple[dict[str, Any], int]:
    space = socket.CMSG_SPACE(array.array("i").itemsize)
    head, ancillary, *_ = connection.recvmsg(4, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content)
    if len(head) < 4 or not fds:
        raise ConnectionError("no descriptor came with the greeting")
    try:
        return _receive_body(connection, head), fds[0]
    except BaseException:
        os.close(fds[0])
        raise


def _refusal(error: BaseException) -> dict[str, str]:
    kinds = [name for name, kind in _ERRORS.items() if isinstance(error, kind)]
    return {"error": kinds[0] if kinds else "RuntimeError", "message": str(error) or repr(error)}


def _index_to_json(index: PartitionIndex) -> dict[str, Any]:
    return {
        "rank": index.rank,
        "world_size": index.world_size,
        "num_bytes": index.num_bytes,
        "key": vars(index.key),
        "tensors": [
            [name, DTYPE_NAMES[entry.dtype], list(entry.shape), entry.offset, entry.num_bytes]
            for name, entry in index.tensors.items()
        ],
    }


def _index_from_json(content: Mapping[str, Any]) -> PartitionIndex:
    return PartitionIndex(
        content["rank"],
        content["world_size"],
        content["num_bytes"],
        LoadOptions().chunk_bytes,
        (),
        CheckpointKey(**content["key"]),
        {
            name: TensorEntry(DTYPES[dtype], tuple(shape), offset, num_bytes)
            for name, dtype, shape, offset, num_bytes in content["tensors"]
        },
    )
