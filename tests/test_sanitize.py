"""What compute-sanitizer watches can be chosen by name."""

import pytest

from experiments import sanitize


def test_kernels_are_chosen_by_parts_of_their_names():
  found = [(name, print, ()) for name in ("swiglu", "swiglu, kept", "exchange.send, 2 devices")]
  names = lambda *parts: [name for name, *_ in sanitize.chosen(iter(found), parts)]  # noqa: E731
  assert names() == [name for name, *_ in found]
  assert names("swiglu") == ["swiglu", "swiglu, kept"]
  assert names("kept", "exchange") == ["swiglu, kept", "exchange.send, 2 devices"]
  with pytest.raises(ValueError, match="'gelu' is part of no kernel's name: swiglu; swiglu, kept;"):
    names("swiglu", "gelu")


def test_the_kernels_between_devices_are_watched_too():
  names = [name for name, *_ in sanitize.calls_between_devices()]
  assert names == [f"exchange.{name}, 4 devices" for name in ("send", "mxfp4", "collect")]
