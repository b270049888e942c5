"""Numbers as people read them, for the reports and the pages."""

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def fixed(value: float | None, digits: int = 3, unit: str = "") -> str:
  unit = unit and f"\N{NO-BREAK SPACE}{unit}"
  if value is None:
    return MISSING
  return f"{round(value, digits) + 0.0:.{digits}f}{unit}".replace("-", MINUS)  # no −0.00


def short(value: float | None) -> str:
  """Three decimals, of large numbers fewer."""
  if value is not None and abs(value) >= 1e5:
    return f"{value:.1e}".replace("e+", "e")
  return fixed(value, 3 if value is None or abs(value) < 10 else 1)


def thousands(value: float | None) -> str:
  return MISSING if value is None else f"{value:,.0f}"


def signed(value: float | None, digits: int = 2, unit: str = "") -> str:
  return "+" * (value is not None and round(value, digits) > 0) + fixed(value, digits, unit)
