"""Race detection for wgmma, which JAX's emulator runs at once and does not check.

On the GPU a wgmma reads SMEM in the async proxy until it has been waited for. Here its reads are
recorded where it is issued and become known to its warpgroup only by the wait, as the emulator
does for copies from SMEM to GMEM. A slot that is handed back too early is then reported. What
stays unseen: multicasts (each CTA of a cluster copies for itself), and who waits for GMEM.
"""

import collections
import contextlib
import functools
import types
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret as interpreter
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu

# Each copy or wgmma takes the next of these in turn. With few of them two that are unordered may
# share one and pass for ordered.
PARAMS = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=256)


@contextlib.contextmanager
def checked():
  """Kernels that are traced and run within are checked; a race is an AssertionError."""
  gpu_callbacks.reset_gpu_interpret_mode_state()  # of a kernel that failed before
  pending = collections.defaultdict(collections.deque)

  def wgmma(*, thread, source_info, **kwargs):
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())
    for operand in "ab":
      key = gpu_callbacks.HostAllocationKey.from_array(kwargs[f"{operand}_allocation_key_as_array"])
      transforms = gpu_callbacks._remove_noop_transforms(kwargs[f"{operand}_transforms"])
      access = memory.access(key, jax.tree.map(int, transforms))
      now = clock.async_smem_clock.copy()
      gpu_callbacks.get_races().check_read(thread, now, key, access, source_info)
    pending[thread].append(clock)
    return original_wgmma(thread=thread, source_info=source_info, **kwargs)

  def wait(token, thread, in_flight):
    memory = gpu_callbacks._get_shared_memory()
    with memory.lock:
      while len(pending[thread]) > int(in_flight):
        memory.clocks[thread].update(pending[thread].popleft())
    return token

  def load(*, token, thread, wait_n, **kwargs):
    if wait_n is not None:
      wait(token, thread, wait_n)
    return original_load(token=token, thread=thread, wait_n=wait_n, **kwargs)

  def interpret_wait(self, eqn, token, _):
    callback = functools.partial(wait, in_flight=eqn.params["n"])
    return io_callback(callback, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, self.thread), []

  original_wgmma, original_load = gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref
  # The interpreter skips waits for wgmma. Those for TMEM, which Hopper lacks, lend their hook.
  names = {**vars(primitives), "commit_tmem_p": primitives.wgmma_wait_p}
  with (
    mock.patch.object(gpu_callbacks, "wgmma", wgmma),
    mock.patch.object(gpu_callbacks, "wgmma_accumulator_deref", load),
    mock.patch.object(interpreter, "gpu_primitives", types.SimpleNamespace(**names)),
    mock.patch.object(interpreter.JaxprInterpreter, "_interpret_commit_tmem_p", interpret_wait),
  ):
    yield
    jax.effects_barrier()
  assert not gpu_callbacks.get_races().races_found, "the emulator printed RACE DETECTED"
