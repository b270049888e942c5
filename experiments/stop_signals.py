"""Ctrl-C and SIGTERM, heard whatever the main thread is doing.

A thread waits for them: a handler would run only after a compilation, and JAX may swallow the
KeyboardInterrupt that Python raises.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
  """They end the process with status 128 + number: at once, or after the step in hand."""

  def __init__(self):
    self.number: int | None = None  # of the first that came `after_step`
    self.before_exit: Callable[[int], None] = lambda number: None  # is told the signal's number
    self._after_step = False

  def listen(self) -> "StopSignals":
    """To be called before other threads begin: they inherit that the signals are blocked."""
    for number in _NUMBERS:
      signal.signal(number, signal.SIG_DFL)  # a background job ignores SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    threading.Thread(target=self._wait, daemon=True).start()
    return self

  @contextlib.contextmanager
  def after_step(self) -> Iterator[None]:
    """Within, a signal does no more than set `number`: the loop reads it, saves and stops."""
    self._after_step = True
    try:
      yield
    finally:
      self._after_step = False

  def _wait(self) -> None:
    while True:
      number = signal.sigwait(_NUMBERS)
      print(f"\n{'stopping after this step' if self._after_step else 'stopped'}", file=sys.stderr)
      if not self._after_step:
        sys.stderr.flush()
        with contextlib.suppress(Exception):
          self.before_exit(number)
        os._exit(128 + number)
      self.number = self.number or number
