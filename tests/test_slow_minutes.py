"""Which tests `--slow-minutes` leaves out, and that it says so."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("minutes, passed, left_out", [("0", 1, 2), ("60", 3, 0)])
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_slow_tests_that_come_too_late(pytester, monkeypatch, minutes, passed, left_out, workers):
  monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
  pytester.makeini("[pytest]\nmarkers = slow: as here")
  pytester.makepyfile(
    """
    import pytest

    @pytest.mark.slow
    def test_first(): pass

    @pytest.mark.slow
    def test_second(): pass

    def test_quick(): pass
    """
  )
  options = "-p", "slow_minutes", "--strict-markers", f"--slow-minutes={minutes}", *workers
  result = pytester.runpytest_subprocess(*options)
  result.assert_outcomes(passed=passed, skipped=left_out)
  result.stdout.fnmatch_lines([f"{left_out} slow tests left out: --slow-minutes"])
