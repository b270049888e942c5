"""Where the time of a step goes."""

import pytest
from small_runs import small

from experiments import profiling


@pytest.mark.parametrize(
  ("kernel", "op_name", "found"),
  [
    ("mosaic_gpu_fprop", "jit(step)/jvp(feed_forward)/pallas_call", ("feed_forward", "kernels")),
    ("nvjet_tst_128x256", "jit(step)/transpose(jvp(attention))/dot", ("attention", "gemm")),
    ("loop_fusion_3", "jit(step)/optimizer/mul", ("optimizer", "rest")),
    ("wrapped_dot.3", "jit(step)/jvp(head)/dot_general", ("head", "gemm")),
    ("fusion.7", "jit(step)/jvp(head)/dot_general", ("head", "gemm")),
    ("sort.2", "", ("other", "rest")),
    ("fusion.9", "jit(step)/attention_scale/mul", ("other", "rest")),
  ],
)
def test_kinds(kernel, op_name, found):
  assert profiling.kind_of(kernel, op_name) == found


# Said of jaxlib's own type when it is first read.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__")
def test_every_part_of_a_step_takes_time(corpus_file):
  config = small(**{"data.path": corpus_file, "model.num_experts": 0})
  found = profiling.profile(config, "bf16")
  assert {part for part, _ in found} >= set(profiling.PARTS)
  assert {kind for part, kind in found if part == "attention"} == {"gemm", "rest"}
  assert all(0 < ms < 1000 for ms in found.values())
