"""The benchmark with planted faults: no time of a kernel that computes something else.

On small inputs, with a clock that always shows a millisecond.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import kernel_cases as cases
from experiments import kernel_checks as checks
from experiments import kernel_few_rows
from experiments import kernel_rows as bench
from experiments import kernel_tables as tables
from experiments import kernel_timing as timing
from fp4jax import dequantize, ffn_gemms, formats, recipes
from fp4jax.quantized_array import QuantizedArray
from pallas_kernels import bf16_matmul
from pallas_kernels import grouped_matmul as gm


@pytest.fixture(autouse=True)
def clock(monkeypatch):
  monkeypatch.setattr(bench, "ROWS", 256)
  monkeypatch.setattr(bench, "CONTRACTION", 256)
  monkeypatch.setattr(bench, "GEMMS", [(128, 256)])
  for module in (bench, timing, kernel_few_rows):
    monkeypatch.setattr(module, "time_us", lambda program, *sets, repeats=10: {"time_us": 1e3})
  monkeypatch.setattr(bench.peers, "copy_bytes_per_second", lambda: 1e12)
  for name in ("quantizers", "matmuls"):
    monkeypatch.setattr(bench.peers, name, lambda *arguments: iter(()))


def assert_no_time(row):
  assert row["failed"] and not [key for key in row if "time" in key or "flops" in key]


def broken(case, fault):
  return dataclasses.replace(case, kernel=lambda x: fault(case.definition(x)))


def test_elementwise(monkeypatch):
  exact, close = cases.BY_NAME["quantize_mxfp4 floor"], cases.BY_NAME["swiglu_fp8_rows"]

  def one_code(out):
    return out[0].at[3, 5].add(1), *out[1:]

  def one_scale(out):
    return out[0], out[1].at[0, 7].multiply(1.25)

  fine = dataclasses.replace(exact, name="fine", kernel=exact.definition)
  unchecked = dataclasses.replace(fine, name="unchecked", definition=None)
  planted = {
    "fine": fine,
    "unchecked": unchecked,
    "wrong code": broken(exact, one_code),
    "last bits of exp": broken(close, one_code_up),
    "wrong scale": broken(close, one_scale),
  }
  monkeypatch.setattr(cases, "BY_NAME", planted)
  rows = [row for row in bench.elementwise() if row["kind"] == "elementwise"]
  good, statistical, wrong_code, last_bit, wrong_scale = rows
  assert good["equal"] and good["time_us"] == good["xla_time_us"] == 1e3
  assert "equal" not in statistical and statistical["time_us"] == 1e3
  assert last_bit["equal"] is False and last_bit["time_us"] == 1e3
  for row in (wrong_code, wrong_scale):
    assert_no_time(row)
  lines = tables.elementwise_table([{"kind": "copy", "tb_per_s": 1}, *rows]).splitlines()
  assert (
    lines[4] == "| quantize_mxfp4 floor | check failed: differs from its definition | | | | | |"
  )
  assert len({line.count("|") for line in lines[:7]}) == 1


def one_code_up(out):
  """One of 32768 codes by one place, where neither is near zero."""
  codes = jax.lax.bitcast_convert_type(out[0], jnp.uint8)
  row, column = jnp.unravel_index(jnp.argmax(jnp.abs(out[0].astype(jnp.float32))), codes.shape)
  moved = jax.lax.bitcast_convert_type(codes.at[row, column].add(-1), jnp.float8_e4m3fn)
  return moved, *out[1:]


def grouped_of(fault):
  """What the benchmark times, with float32 references for kernels and `fault` in the fp8 ones."""

  def wgrad(lhs, rhs, sizes):
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(lhs)), side="right")
    groups = jnp.where(owner[:, None] == jnp.arange(8), 1.0, 0.0)
    x, dy = (v.astype(jnp.float32) for v in (lhs, rhs))
    return jnp.einsum("mk,mn,me->ekn", x, dy, groups, precision="highest")

  def matmul(lhs, rhs, sizes, transpose_rhs=False):
    rhs = rhs if transpose_rhs else rhs.swapaxes(1, 2)
    ones = jnp.ones((lhs.shape[1] // 128, len(lhs)))
    of_rhs = jnp.ones((8, rhs.shape[1] // 128, rhs.shape[2] // 128))
    return gm.grouped_matmul_reference(lhs, ones, rhs, of_rhs, sizes)

  def faulty(reference):
    return lambda *a, **options: fault(reference(*a, **options))

  def grouped(n, k, sizes):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(timing, "ROWS", 256)
      patch.setattr(gm, "grouped_matmul", faulty(gm.grouped_matmul_reference))
      patch.setattr(gm, "grouped_wgrad", faulty(gm.grouped_wgrad_reference))
      patch.setattr(bf16_matmul, "grouped_matmul", matmul)
      patch.setattr(bf16_matmul, "grouped_wgrad", lambda x, dy, s, out_dtype: wgrad(x, dy, s))
      yield from timing.grouped(n, k, sizes)

  return grouped


@pytest.mark.slow
def test_matmuls(monkeypatch):
  monkeypatch.setattr(bench, "_SKEW", [129, 1, 0, 60, 66, 0, 0, 0])
  monkeypatch.setattr(bench, "grouped", grouped_of(lambda out: out.at[..., 5].multiply(1.2)))
  monkeypatch.setattr(bench, "compiled", lambda f, *arguments: f)  # compiling takes longer here
  rows = [row for row in bench.matmuls() if row["kind"] == "matmul"]
  assert len(rows) == 2 * 8
  for row in rows:
    if row["name"].startswith("fp8"):
      assert_no_time(row)
    else:
      assert row["time_us"] == 1e3 and row["error_to_bound"] <= 1
  lines = tables.matmul_table(rows).splitlines()
  assert "1000" not in lines[2] and "check failed: an error of " in lines[2]
  assert len({line.count("|") for line in lines[: 2 + len(rows)]}) == 1


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_bf16_matmuls_are_checked_too(gemm):
  for name, kind, f, sets in grouped_of(lambda out: out)(128, 256, jnp.full(8, 32)):
    if kind == gemm and name.startswith("bf16"):
      out = f(*sets[0])
      assert checks.check_gemm(gemm, out, sets[0]) <= 1
      with pytest.raises(checks.CheckFailed, match="times its bound"):
        checks.check_gemm(gemm, out * 1.1, sets[0])


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "dx"])
def test_moe_ffn(fault, hopper, monkeypatch):
  inputs = functools.partial(bench._moe_inputs, tokens=140, d=128, f=128)
  monkeypatch.setattr(bench, "_moe_inputs", inputs)
  monkeypatch.setattr(bench, "_saved_bytes", lambda *arguments: {"saved_bytes": 1})

  def check_rows(actual, expected):
    assert actual.keys() == {"y", "dx", "dweights"}
    errors = checks.check_rows(actual, expected)
    assert errors.keys() == actual.keys()
    for name in actual:
      planted = actual | {name: actual[name].at[10:].multiply(1.2)}
      with pytest.raises(checks.CheckFailed, match=f"more than 0.01 of the norm: {name} 0.1"):
        checks.check_rows(planted, expected)
      if name == fault:
        checks.check_rows(planted, expected)
    return errors

  monkeypatch.setattr(bench, "check_rows", check_rows)
  row = bench._moe_ffn("fp8", 4, 2)
  assert "gather_fp8_both" in hopper
  if fault is None:
    assert row["errors"].keys() == {"y", "dx", "dweights"}
    assert row["time_us"] == row["forward_us"] == 1e3 and "failed" not in row
    return
  assert_no_time(row)
  line = tables.moe_ffn_table([row]).splitlines()[2]
  assert line.startswith("| `fp8` | 4, top-2 | check failed: differs from XLA's")
  assert "1.00" not in line
  assert line.count("|") == tables.moe_ffn_table([]).splitlines()[0].count("|")


def test_the_benchmark_ends_with_what_failed(monkeypatch, capsys):
  rows, written = [{"kind": "matmul", "name": "a", "failed": "is wrong"}, {"kind": "copy"}], []
  monkeypatch.setattr(bench, "PARTS", {"part": (lambda: iter(rows), lambda rows: "a table")})
  with pytest.raises(checks.CheckFailed, match=r"^matmul a is wrong$"):
    bench.measure(["part"], written.append)
  assert written == rows and capsys.readouterr().out == "matmul a is wrong\ncopy\na table\n"


@pytest.fixture
def multiply(monkeypatch):
  """Stands in for the kernel of few rows; the weights of a program are four small matrices."""
  monkeypatch.setattr(kernel_few_rows, "SHAPES", [(128, 128)])
  monkeypatch.setattr(kernel_few_rows, "MORE_THAN_L2", 4 * 128 * 128 / 2)

  def of(fault):
    def product(x, codes, scales, config=None):
      fmt = formats.MXFP4 if scales.dtype == jnp.uint8 else formats.FP8_BLOCK_POW2_2D
      w = dequantize(QuantizedArray(codes, scales, None, fmt, -2), jnp.bfloat16)
      return fault(x @ w, config)

    monkeypatch.setattr(kernel_few_rows, "few_rows_matmul", product)

  return of


def test_few_rows(multiply):
  other = kernel_few_rows.VARIANTS["128 of k"]
  multiply(lambda y, config: y.at[3, 5].multiply(1.2) if config == other else y)
  rows = list(kernel_few_rows.few_rows())
  assert len(rows) == sum(2 * (1 + len(own)) for own in kernel_few_rows.PACKED.values())
  for row in rows:
    is_fp8 = row["weights"] == "FP8_BLOCK_POW2_2D"
    if row["name"] == "128 of k" and not is_fp8:
      assert_no_time(row)
      continue
    us = 1e3 / (2 if is_fp8 else 4)  # half as many matrices of twice the size
    size = 128**2 + 4 if is_fp8 else 128**2 * (1 / 2 + 1 / 32)
    assert row["time_us"] == us and row["times_xla_bf16"] == row["times_xla_packed"] == 1
    assert row["tb_per_s"] == pytest.approx(size / us / 1e6)
    assert row["error_to_bound"] <= 1
  line = tables.few_rows_table(rows).splitlines()[2]
  assert line.startswith("| MXFP4 | 8 | 128 | 128 | 250.0 | 0.00 | 1.00 | 1.00 |")
  assert kernel_few_rows.default_us(8, 128, 128) == 1e3 / 4


def test_few_rows_that_are_wrong_have_no_time(multiply):
  multiply(lambda y, config: y.at[0, 0].set(jnp.nan))
  (line,) = {
    line
    for line in tables.few_rows_table(list(kernel_few_rows.few_rows())).splitlines()
    if "MXFP4 | 8 |" in line
  }
  start = "| MXFP4 | 8 | 128 | 128 | check failed: an error of inf"
  assert line.startswith(start) and line.count("|") == 10
  with pytest.raises(checks.CheckFailed):
    kernel_few_rows.default_us(8, 128, 128)


@pytest.mark.parametrize("name", ["fp8", "hopper_fp4"])
def test_rows_of_moe_ffn_may_differ_by_the_last_bits_of_h(name, monkeypatch, request):
  """A noise of 2^-11 of its root mean square passes; of 2^-8, half a bf16 bit of the large, not."""
  recipe, hidden = recipes.by_name(name), ffn_gemms.XlaFfnGemms.hidden
  inputs = bench._moe_inputs(8, 2, tokens=64, d=1024, f=512)
  request.addfinalizer(jax.clear_caches)  # no other test is to find a program with noise

  def rows(noise):
    def noisy(self, h):
      h = h.astype(jnp.float32)
      normal = jax.random.normal(jax.random.key(7), h.shape) * jnp.sqrt(jnp.mean(h**2))
      return hidden(self, (h + noise * normal).astype(jnp.bfloat16))

    monkeypatch.setattr(ffn_gemms.XlaFfnGemms, "hidden", noisy)
    jax.clear_caches()
    y, dx, _, _, dweights = bench._step(recipe, *inputs, implementation="xla")
    return {"y": y, "dx": dx, "dweights": dweights}

  exact = rows(0)
  assert min(checks.check_rows(rows(2.0**-11), exact).values()) > 0
  with pytest.raises(checks.CheckFailed, match="of the norm: y"):
    checks.check_rows(rows(2.0**-8), exact)
