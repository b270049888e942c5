"""`pytest --slow-minutes=40`: no slow test begins later than that, and it is said how many did not.

For CI, whose machines differ by a factor of three and end what takes too long.
"""

import time

import pytest

_REASON = "slow, and its minutes are over"


def pytest_addoption(parser):
  parser.addoption("--slow-minutes", type=float, help="from when on slow tests are left out")


def pytest_configure(config):
  minutes = config.getoption("--slow-minutes")
  if minutes is not None:
    config.pluginmanager.register(_Limit(time.monotonic() + 60 * minutes))


class _Limit:
  def __init__(self, end: float):
    self._end, self._left_out = end, 0

  @pytest.hookimpl(tryfirst=True)  # before any fixture
  def pytest_runtest_setup(self, item):
    if item.get_closest_marker("slow") and time.monotonic() > self._end:
      pytest.skip(_REASON)

  def pytest_runtest_logreport(self, report):
    self._left_out += report.skipped and _REASON in str(report.longrepr)

  def pytest_terminal_summary(self, terminalreporter):
    terminalreporter.write_line(f"{self._left_out} slow tests left out: --slow-minutes")
