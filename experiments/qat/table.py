"""The rows of `python -m experiments.qat` as a table in Markdown."""

from experiments.environment import told_source
from experiments.numbers import fixed
from experiments.qat.rows import Row
from experiments.qat.settings import METHODS
from fp4jax.formats import FORMATS

_HEAD = (
  "| method | weights | activations | bits/weight | perplexity | accuracy, % | tokens trained |"
  " seconds |"
)


def qat_table(rows: list[Row]) -> str:
  """By method and format as `METHODS` and `FORMATS` have them, the last row of each case."""
  of_case = {(row["method"], row["format"], row["operands"]): row for row in rows}
  known = [*METHODS], [*FORMATS]
  of_case = dict(sorted(of_case.items(), key=lambda item: _place(item[0], known)))
  lines = [_HEAD, "|---" * 8 + "|"]
  for row in of_case.values():
    lines.append(
      f"| `{row['method']}` | {row['weights']} | {row['activations']} | {row['bits_per_value']:g} |"
      f" {fixed(row['perplexity'])} | {_percent(row)} |"
      f" {row['tokens_trained']:,} | {row['seconds']:.0f} |"
    )
  return "\n".join(lines) + f"\n\n{_told(rows)}"


def _place(case, known):
  method, fmt, operands = case
  methods, formats = known
  # LLM-FP4's and a recipe's are no entries of FORMATS.
  return methods.index(method), formats.index(fmt) if fmt in formats else -1, operands != "weights"


def _percent(row: Row) -> str:
  return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_error']:.1f}"


def _told(rows: list[Row]) -> str:
  """How it was measured; rows that differ in that are no table."""
  how = (
    "{windows} windows of {window} tokens of {corpus}; {problems} problems of {task}"
    " ({task_options}), {shots} solved ones before each."
  )
  told = {how.format(**row["settings"], corpus=row["corpus"]) for row in rows}
  if len(told) != 1:
    raise ValueError(f"the rows were measured in {len(told)} ways: {'; '.join(sorted(told))}")
  where = {told_source(row) for row in rows}
  return " ".join([*told, *sorted(where)])
