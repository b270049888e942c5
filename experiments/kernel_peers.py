"""What a user of torch would pick instead of the kernels, timed in the same run.

torch is asked for only here, and only when the benchmark runs; torchao may be missing. A peer that
its library refuses for a shape is left out.
"""

import functools
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator

import numpy as np

Peer = tuple[str, Callable[[], object]]


def require_torch(parts: list[str]) -> None:
  """Raises ValueError where torch, which gives the copy too, is not installed."""
  if importlib.util.find_spec("torch") is None:
    raise ValueError(
      f"{' and '.join(parts)}: the kernels are timed beside torch, which is not installed here"
    )


def times_us(f: Callable[[], object], repeats: int = 20) -> list[float]:
  """All queued before the first one ends: no gaps between launches, clocks as under load."""
  import torch

  events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
  for event in events[:-1]:
    event.record()
    f()
  events[-1].record()
  torch.cuda.synchronize()
  times = [1000 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
  return times[repeats // 4 :]


def measure(peers: Iterator[Peer]) -> Iterator[tuple[str, float]]:
  """Name and median time in us of each peer that runs."""
  for name, f in peers:
    try:
      f()
      yield name, statistics.median(times_us(f))
    except (RuntimeError, ValueError, AssertionError) as error:
      print(f"{name} does not run: {str(error).splitlines()[0][:200]}", flush=True)


def copy_bytes_per_second() -> float:
  """Of a device-to-device copy of 1 GiB by the driver, counting bytes read and written."""
  import torch

  source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
  target = torch.empty_like(source)
  times = times_us(lambda: target.copy_(source))
  return 2 * source.numel() / statistics.median(times) * 1e6


def quantizers(m: int, k: int) -> Iterator[Peer]:
  """torchao's, on (m, k) bfloat16; nothing without torchao."""
  import torch

  try:
    from torchao.prototype.blockwise_fp8_training import kernels as blockwise
    from torchao.prototype.mx_formats import mx_tensor
  except ImportError as error:
    print(f"torchao is left out: {error}", flush=True)
    return
  x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
  to_mx = torch.compile(functools.partial(mx_tensor.to_mx, block_size=32))
  yield "quantize_mxfp4 floor", lambda: to_mx(x, torch.float4_e2m1fn_x2)
  yield "quantize_fp8_rows", lambda: blockwise.triton_fp8_blockwise_act_quant_lhs(x)
  transposed = blockwise.triton_fp8_blockwise_act_quant_transposed_lhs
  yield "quantize_fp8_columns", lambda: transposed(x)


def matmuls(gemm: str, m: int, n: int, k: int, sizes: np.ndarray) -> Iterator[Peer]:
  """`gemm` of (m, k) rows in groups of `sizes` and weights (e, k, n), or the dense one alike.

  dense_block_scaled has the blocks of the GEMM: 1x128 and 128x128, for wgrad 1x128 on both sides.
  """
  import torch

  ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
  if gemm == "wgrad":
    # torch asserts on the device, which ends the process, that groups are multiples of 16 bytes.
    yield from _wgrads(m, n, k, ends, grouped=not (sizes % 16).any())
    return
  if gemm == "dgrad":
    n, k = k, n
  a, b, groups = _fp8(m, k), _fp8(len(sizes), n, k), len(sizes)
  scale_a, scale_b = _scales(k // 128, m).t(), _scales(n // 128, k // 128).t()
  yield "dense_block_scaled", lambda: _scaled_mm(a, b[0].t(), scale_a, scale_b)
  rows, columns, bt = _scales(m), _scales(groups, n), b.transpose(1, 2)
  yield (
    "grouped_row_scaled",
    lambda: torch._scaled_grouped_mm(a, bt, rows, columns, offs=ends, out_dtype=torch.bfloat16),
  )
  x, w = _bf16(m, k), _bf16(groups, n, k).transpose(1, 2)
  yield "grouped_bf16", lambda: torch._grouped_mm(x, w, offs=ends)


def _wgrads(m, n, k, ends, grouped):
  import torch

  a, b = _fp8(k, m), _fp8(n, m)
  scale_a, scale_b = _scales(m // 128, k).t(), _scales(m // 128, n)
  yield "dense_block_scaled", lambda: _scaled_mm(a, b.t(), scale_a, scale_b)
  square = _scales(n // 128, m // 128).t()
  yield "dense_block_scaled_1x128_128x128", lambda: _scaled_mm(a, b.t(), scale_a, square)
  if grouped:
    rows, columns = _scales(len(ends) * k), _scales(len(ends) * n)
    yield (
      "grouped_row_scaled",
      lambda: torch._scaled_grouped_mm(
        a, b.t(), rows, columns, offs=ends, out_dtype=torch.bfloat16
      ),
    )
  x, dy = _bf16(m, k), _bf16(m, n)
  yield "grouped_bf16", lambda: torch._grouped_mm(x.t(), dy, offs=ends)


def _scaled_mm(a, b, scale_a, scale_b):
  import torch

  return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


def _bf16(*shape):
  import torch

  return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _fp8(*shape):
  import torch

  return _bf16(*shape).to(torch.float8_e4m3fn)


def _scales(*shape):
  import torch

  return torch.rand(shape, device="cuda") + 0.5
