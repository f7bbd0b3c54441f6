"""
Signals during training: those of STOP_SIGNALS and SIGINT (Ctrl-C) ask a run to save and stop,
SIGUSR1 to save and continue.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# what a scheduler (SIGUSR2 is Grid Engine's), a closed terminal (SIGHUP, on Windows SIGBREAK) and a
# limit of CPU time send before the process must end
STOP_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK", "SIGXCPU", "SIGUSR2")
WATCH_SECONDS = 4.0  # between two looks of the thread that watches
REPEAT_SECONDS = 1.0  # within this time, a second SIGINT is the same Ctrl-C, passed on by torchrun


def is_ignored_hangup(number: int) -> bool:
    """Whether this is SIGHUP, and the process was started so that it ignores it, as nohup does."""
    return (number == getattr(signal, "SIGHUP", None)
            and signal.getsignal(number) == signal.SIG_IGN)


class Signals:
    """
    A context manager that records signals instead of acting on them. The training loop reads `stop`
    and `save` between updates. A second Ctrl-C raises KeyboardInterrupt at once.

    A thread calls `watch(terminated, is_blocked)` after SIGTERM, and every WATCH_SECONDS before it,
    also while the main thread waits for a device. `is_blocked()` says whether the main thread has
    not noticed SIGTERM yet.
    """

    def __init__(self, watch: Callable[[bool, Callable[[], bool]], None] | None = None) -> None:
        self.stop = self.save = False
        self._watch = watch
        self._interrupted_at: float | None = None  # time of the first SIGINT, in seconds
        self._previous_handlers: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, ...] = ()  # the end to read from, the end to write to
        self._previous_wakeup_fd = -1

    @staticmethod
    def ignore_save_requests() -> None:
        """Ignore SIGUSR1, which would end a process that does not handle it."""
        if hasattr(signal, "SIGUSR1"):  # Windows has no SIGUSR1
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            handlers = dict.fromkeys(STOP_SIGNALS, self._on_terminate)
            handlers |= {"SIGINT": self._on_interrupt, "SIGUSR1": self._on_save}
            for name, handler in handlers.items():
                number = getattr(signal, name, None)  # no system has all of them
                if number is None or is_ignored_hangup(number):
                    continue
                self._previous_handlers[number] = signal.signal(number, handler)
            if self._watch:
                self._start_watching()
        return self

    def _start_watching(self) -> None:
        """Start the thread that calls `watch`. It ends with this context, or with the process."""
        # a handler runs in the main thread, and only between two steps of Python. The number of the
        # signal, however, is written to this socket at once
        self._sockets = socket.socketpair()
        self._sockets[0].settimeout(WATCH_SECONDS)
        self._sockets[1].setblocking(False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(
            self._sockets[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._keep_watching, daemon=True).start()

    def _keep_watching(self) -> None:
        assert self._watch
        with self._sockets[0] as receiver:
            while True:
                try:
                    received = receiver.recv(1)
                except TimeoutError:
                    self._watch(False, lambda: False)
                    continue
                if not received:  # the other end is closed
                    return
                if received == bytes([signal.SIGTERM]):
                    self._watch(True, lambda: not self.stop)

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        # torchrun forwards Ctrl-C, and this second SIGINT may come late. If the run stops because
        # of Ctrl-C, keep our SIGINT handler installed until the process ends
        stops_by_interrupt = (self.stop and self._interrupted_at is not None
                              and error_type is None)
        if self._sockets:
            signal.set_wakeup_fd(self._previous_wakeup_fd)
            self._sockets[1].close()  # ends the thread
        for number, handler in self._previous_handlers.items():
            if not (number == signal.SIGINT and stops_by_interrupt):
                signal.signal(number, handler)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        if now - self._interrupted_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
