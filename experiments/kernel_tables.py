"""The tables of pallas_kernels/README.md, from results/kernel_bench.jsonl and its neighbours."""

Row = dict

_PEERS = {
  "dense_block_scaled": "dense, block scales",
  "grouped_row_scaled": "grouped, row scales",
  "grouped_bf16": "grouped, bf16",
}
_EQUAL = {True: "every bit", False: "but for the last bits of exp", None: "by statistics"}


def elementwise_table(rows: list[Row]) -> str:
  copy = next(r for r in rows if r["kind"] == "copy")
  torchao = {r["name"]: r["time_us"] for r in rows if r["kind"] == "peer"}
  lines = [
    "| kernel | time, us | TB/s | of the copy | speed, XLA = 1 | torchao = 1 | equals fp4jax |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in (r for r in rows if r["kind"] == "elementwise"):
    if "failed" in row:
      lines.append(_failed(row["name"], row, 7))
      continue
    xla = f"{row['times_xla']:.1f}" if "times_xla" in row else ""
    peer = next((t for n, t in torchao.items() if row["name"] in (n, f"{n} float32")), None)
    lines.append(
      f"| {row['name']} | {row['time_us']:.0f} | {row['tb_per_s']:.2f} | {row['of_copy']:.0%} |"
      f" {xla} | {f'{peer / row["time_us"]:.1f}' if peer else ''} | {_EQUAL[row.get('equal')]} |"
    )
  m, k = next(r["shape"] for r in rows if r["kind"] == "elementwise")
  lines.append(
    f"\n{m} x {k} normal values; the device copy of the same run moved {copy['tb_per_s']:.2f} TB/s."
  )
  return "\n".join(lines)


def matmul_table(rows: list[Row]) -> str:
  lines = [
    f"| GEMM | N | K | groups | TFLOP/s | {' | '.join(f'{p} = 1' for p in _PEERS.values())} |"
    " error, of its bound |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in (r for r in rows if r["kind"] == "matmul"):
    where = f"{row['name']} | {row['n']} | {row['k']} | {row['groups']}"
    if "failed" in row:
      lines.append(_failed(where, row, 9))
      continue
    ratios = (f"{row[key]:.2f}" if (key := f"times_{p}") in row else "" for p in _PEERS)
    error = f"{row['error_to_bound']:.2f}" if "error_to_bound" in row else ""
    lines.append(f"| {where} | {row['tflops']:.0f} | {' | '.join(ratios)} | {error} |")
  return "\n".join(lines) + (
    "\n\nM = 32768 rows, 8 groups. Speeds are relative to torch's matmul of the same shape and"
    " groups; the dense one has\nthe blocks of the GEMM: 1x128 and 128x128, for wgrad 1x128 on both"
    " sides. The error is the largest of a row in\nevery 64, against float32, its bound that of"
    " `experiments/kernel_checks.py`. Blank: torch refuses groups that\n16 does not divide."
  )


def moe_ffn_table(rows: list[Row]) -> str:
  """From results/moe_ffn.jsonl. What is kept for the backward pass: by the compiled program, and as
  the device counts it."""
  lines = [
    "| recipe | experts | forward, ms | forward + backward, ms | speed, BF16 = 1 | kept, GB |"
    " BF16 = 1 | on the device, BF16 = 1 |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in (r for r in rows if r["kind"] == "moe_ffn"):
    what = f"`{row['recipe']}` | {row['experts']}, top-{row['top_k']}"
    if "failed" in row:
      lines.append(_failed(what, row, 8))
      continue
    ratios = ("speed_to_bf16", ".2f"), ("saved_bytes_to_bf16", ".3f")
    ratios = (*ratios, ("saved_on_device_bytes_to_bf16", ".3f"))
    speed, kept, on_device = (f"{row[key]:{form}}" if key in row else "" for key, form in ratios)
    lines.append(
      f"| {what} | {row['forward_us'] / 1e3:.2f} | {row['time_us'] / 1e3:.2f} | {speed} |"
      f" {row['saved_bytes'] / 1e9:.3f} | {kept} | {on_device} |"
    )
  return "\n".join(lines) + "\n\n32768 tokens, d = 7168, f = 2048."


def few_rows_table(rows: list[Row]) -> str:
  """From results/few_rows.jsonl: the configuration that the kernel takes by itself."""
  lines = [
    "| weights | rows | K | N | time, us | packed weights, TB/s | XLA in bf16 = 1 |"
    " XLA, packed = 1 | error, of its bound |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in (r for r in rows if r["kind"] == "few_rows" and r["name"] == "default"):
    # Rows of before there was a kernel for others do not tell.
    what = f"{row.get('weights', 'MXFP4')} | {row['m']} | {row['k']} | {row['n']}"
    if "failed" in row:
      lines.append(_failed(what, row, 9))
      continue
    lines.append(
      f"| {what} | {row['time_us']:.1f} | {row['tb_per_s']:.2f} | {row['times_xla_bf16']:.2f} |"
      f" {row['times_xla_packed']:.2f} | {row['error_to_bound']:.2f} |"
    )
  return "\n".join(lines) + "\n\nSpeeds are relative to XLA's matmul of the same run."


def _failed(what: str, row: Row, columns: int) -> str:
  """A line without a time: what was measured is not what the kernel should compute."""
  return f"| {what} | check failed: {row['failed']} |" + " |" * (columns - 2 - what.count(" | "))
