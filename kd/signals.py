"""Being asked to stop: remembered until training can save, instead of dying in the middle of a step."""

import signal


class StopRequests:
    """Within it SIGTERM and the first Ctrl-C set `number`; a second Ctrl-C stops at once."""

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # only the main thread may; elsewhere the caller's own handling stands
                break
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
