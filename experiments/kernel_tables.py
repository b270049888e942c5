"""The tables of pallas_kernels/README.md, from results/kernel_bench.jsonl."""

Row = dict

_PEERS = {
  "torch_scaled_mm_dense": "torch `_scaled_mm`, dense, block scales",
  "torch_scaled_grouped_mm": "torch `_scaled_grouped_mm`, row scales",
  "torch_grouped_mm_bf16": "torch `_grouped_mm`, bf16",
}
_EQUAL = {True: "every bit", False: "within a bf16 rounding", None: "by statistics"}


def elementwise_table(rows: list[Row]) -> str:
  copy = next(r for r in rows if r["kind"] == "copy")
  lines = [
    "| kernel | time, us | TB/s | of the copy | times XLA | equals fp4jax |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    if row["kind"] != "elementwise":
      continue
    equal = {True: "every bit", False: "within a bf16 rounding", None: "by statistics"}[
      row["equal"]
    ]
    xla = f"{row['times_xla']:.1f}" if "times_xla" in row else ""
    lines.append(
      f"| {row['name']} | {row['time_us']:.0f} | {row['tb_per_s']:.2f} | {row['of_copy']:.0%} |"
      f" {xla} | {equal} |"
    )
  m, k = next(r["shape"] for r in rows if r["kind"] == "elementwise")
  lines.append(f"\n{m} x {k}; the device copy of the same run moved {copy['tb_per_s']:.2f} TB/s.")
  return "\n".join(lines)


def matmul_table(rows: list[Row]) -> str:
  peers = {(r["name"], r["n"]): r["tflops"] for r in rows if r["kind"] == "peer"}
  lines = [
    f"| GEMM | N | K | groups | TFLOP/s | {' | '.join(f'times {p}' for p in _PEERS.values())} |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    if row["kind"] == "matmul":
      ratios = (f"{row['tflops'] / peers[peer, row['n']]:.2f}" for peer in _PEERS)
      lines.append(
        f"| {row['name']} | {row['n']} | {row['k']} | {row['groups']} | {row['tflops']:.0f} |"
        f" {' | '.join(ratios)} |"
      )
  for (name, n), tflops in peers.items():
    lines.append(f"| {_PEERS[name]} | {n} | | even | {tflops:.0f} | | | |")
  return "\n".join(lines) + "\n\nM = 32768 rows, 8 groups; the peers compute even groups or none."


def moe_ffn_table(rows: list[Row]) -> str:
  lines = [
    "| recipe | experts | forward, ms | forward + backward, ms | speed, BF16 = 1 |"
    " kept for the backward pass, MB | BF16 = 1 |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    if row["kind"] == "moe_ffn":
      lines.append(
        f"| `{row['recipe']}` | {row['experts']}, top-{row['top_k']} |"
        f" {row['forward_us'] / 1000:.2f} | {row['time_us'] / 1000:.2f} |"
        f" {row['speed_to_bf16']:.2f} | {row['saved_bytes'] / 1e6:.0f} |"
        f" {row['saved_to_bf16']:.2f} |"
      )
  return "\n".join(lines) + "\n\n32768 tokens, d = 7168, f = 2048; device time."
