"""A function in a process of its own: its memory, and what it compiles, end with it."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def alone(function: Callable, *args: Any, timeout_s: float | None = None) -> Any:
  """`function(*args)` in a process of its own, which is gone afterwards, and its memory with it.

  Raises:
    ChildProcessError: it ended without a result, or had none after `timeout_s`.
    ValueError, OSError: as raised there.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_tell, args=(sender, function, *args))
  process.start()
  sender.close()
  try:
    if not receiver.poll(timeout_s):
      raise ChildProcessError(f"no result after {timeout_s:g} s")
    succeeded, result = receiver.recv()
  except EOFError:
    process.join()
    raise ChildProcessError(f"its process ended with status {process.exitcode}") from None
  finally:
    process.kill()
    process.join()
  if not succeeded:
    raise result
  return result


def _tell(sender, function, *args):
  try:
    sender.send((True, function(*args)))
  except (ValueError, OSError) as error:
    sender.send((False, error))
