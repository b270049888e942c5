"""What an installed fp4jax says of itself."""

import importlib.metadata
import importlib.resources

import fp4jax


def test_the_version_is_that_of_the_distribution():
  assert importlib.metadata.version("fp4jax") == fp4jax.__version__


def test_the_license_and_the_types_come_along():
  assert importlib.metadata.metadata("fp4jax")["License-Expression"] == "Apache-2.0"
  for package in ("fp4jax", "pallas_kernels"):
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
