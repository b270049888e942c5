"""The 6-bit elements of OCP Microscaling Formats v1.0, in blocks of 32 with an E8M0 scale.

E2M3 reaches 7.5 in steps of 1/8 near zero, E3M2 reaches 28 in steps of 1/16. Four codes are packed
in three bytes. Rule "floor" as the specification has it.
"""

import dataclasses

from fp4jax.formats.grids import E2M3, E3M2
from fp4jax.formats.mx import MXFP8

MXFP6_E2M3 = dataclasses.replace(MXFP8, name="MXFP6_E2M3", element_dtype=E2M3)
MXFP6_E3M2 = dataclasses.replace(MXFP8, name="MXFP6_E3M2", element_dtype=E3M2)
