"""Signals that ask a run to save: SIGTERM and SIGINT to leave after it, SIGUSR1 to go on."""

import signal
import threading
import time

REPEAT_SECONDS = 1.0  # torchrun passes a Ctrl-C on to processes that have had it already


class Signals:
    """
    Notes what is asked for while it is installed (a context manager); the training loop looks at
    `stop` and `save` between updates. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.stop = self.save = False
        self._interrupted_at = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            handlers = {"SIGTERM": self._on_stop, "SIGINT": self._on_interrupt,
                        "SIGUSR1": self._on_save}
            for name, handler in handlers.items():
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            # whoever is leaving because of a Ctrl-C can still get its repetition
            leaving = self.stop and self._interrupted_at is not None and error[0] is None
            if not (number == signal.SIGINT and leaving):
                signal.signal(number, handler)

    def _on_stop(self, number, frame):
        self.stop = True

    def _on_interrupt(self, number, frame):
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        if now - self._interrupted_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self.stop = True

    def _on_save(self, number, frame):
        self.save = True
