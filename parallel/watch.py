"""Several processes watch each other: where one ends before its work does, the others end too, with one line.

JAX's own way is to abort every process with a page of C++, or to raise an error in whatever waited for the one that is
gone, and it calls nothing of ours. So each process holds a connection to process 0, which the kernel closes with the
process, and what the runtime says to its service passes through here as well: it doesn't see that process 0 is gone
before this does. Who learns of a loss ends its process from the watching thread, whatever the main thread waits for.
"""

import contextlib
import os
import socket
import threading
import time

_HELLO = b"crescendo "  # what no other protocol on that port begins with
_GOODBYE = b"goodbye\n"


class Watch:
    """One process among several, at the address of process 0.

    Attributes:
      index: this process's number.
      count: how many there are.
      left: whether this process' work is done.
      alone: whether it ends by an error of its own, of which it speaks itself.
    """

    def __init__(self, host: str, port: int, index: int, count: int, silence_seconds: float):
        """Begins to watch nothing yet.

        Args:
          host: of process 0.
          port: where it listens.
          index: this process's number.
          count: how many there are.
          silence_seconds: how long a process that is there may say nothing.
        """
        self.index = index
        self.count = count
        self.left = False
        self.alone = False
        self._said_goodbye: set[int] = set()
        self._address = host, port
        self._silence_seconds = silence_seconds
        self._ending = threading.Lock()
        self._others: list[socket.socket] = []

    def begin(self) -> str:
        """Watches, on threads; as another process than 0, waits until that listens.

        Returns:
          `HOST:PORT` where this process's runtime finds the service; as process 0, where the service is to be.

        Raises:
          OSError: as process 0, when it can't listen at its port.
        """
        if self.index == 0:
            service = _listener("127.0.0.1", 0)
            inner = service.getsockname()[1]
            service.close()  # for the runtime, which takes no socket
            _in_thread(self._accept, _listener("", self._address[1]), ("127.0.0.1", inner), self._greet)
            return f"127.0.0.1:{inner}"
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=5)
            except OSError:
                time.sleep(0.2)
            else:
                break
        connection.sendall(_HELLO + b"%d\n" % self.index)
        self._watch(connection, 0)
        local = _listener("127.0.0.1", 0)
        _in_thread(self._accept, local, self._address, self._forward)
        return f"127.0.0.1:{local.getsockname()[1]}"

    def leave(self) -> None:
        """Tells the others that this process' work is done, before it ends."""
        self.left = True
        self._tell(_GOODBYE)

    def end_alone(self) -> None:
        """From here on nothing is said of the others: this process is about to end by an error of its own."""
        if not self.alone:
            self.alone = True
            self._ending.acquire(timeout=1)

    def lost(self, index: int) -> None:
        """Ends this process because another one has ended without a goodbye."""
        self._ending.acquire()  # for good: of several threads one speaks
        self._tell(b"%d\n" % index)
        line = (
            f"error: process {index} of the {self.count} of this run has ended: see its own output; the same command "
            "on every host goes on from the last checkpoint\n"
        )
        os.write(2, line.encode())
        os._exit(2)

    def _tell(self, line: bytes) -> None:
        for connection in self._others:
            with contextlib.suppress(OSError):
                connection.sendall(line)

    def _watch(self, connection: socket.socket, index: int) -> None:
        """Says that this process is there, and listens to the other one."""
        self._others.append(connection)
        connection.settimeout(self._silence_seconds)
        _notices_silence(connection)
        _in_thread(self._listen, connection, index)
        _in_thread(self._speak, connection)

    def _listen(self, connection: socket.socket, index: int) -> None:
        """Empty lines, until one says goodbye or names who has ended, or nothing comes any more."""
        lost = index
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                if line == _GOODBYE:
                    self._said_goodbye.add(index)
                    return
                if line.strip().isdigit():
                    lost = int(line)
                    break
        self.lost(lost)

    def _speak(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"\n")
                time.sleep(self._silence_seconds / 10)

    def _accept(self, listener: socket.socket, address: tuple[str, int], handle) -> None:
        while True:
            connection, _ = listener.accept()
            _in_thread(handle, connection, address)

    def _greet(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """As process 0: another process, or its runtime, which wants the service."""
        if connection.recv(1, socket.MSG_PEEK) != _HELLO[:1]:
            self._forward(connection, address)
            return
        with connection.makefile("rb") as lines:
            said = lines.readline(100)
        if said.startswith(_HELLO) and said[len(_HELLO) :].strip().isdigit():
            self._watch(connection, int(said[len(_HELLO) :]))

    def _forward(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """Between a runtime and the service."""
        try:
            further = socket.create_connection(address, timeout=5)
        except OSError:
            connection.close()  # the runtime tries again
            return
        further.settimeout(None)
        _in_thread(_copy, connection, further)
        _copy(further, connection, before_the_end=self._service_gone)

    def _service_gone(self) -> None:
        """The runtime isn't told before the watch has ended the process."""
        if self.index and 0 not in self._said_goodbye:
            time.sleep(5)


def _copy(source: socket.socket, target: socket.socket, before_the_end=lambda: None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    before_the_end()
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _in_thread(function, *arguments) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _listener(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port))


def _notices_silence(connection: socket.socket) -> None:
    """The connection breaks within 30 s when its other end's host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # macOS calls the first one otherwise
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
