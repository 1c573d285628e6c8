"""A fault of vLLM 0.32's build for CPUs, put right in its workers for the comparison at temperature 1.

Temperature, top-k and top-p of a request are repeated for each of its drafted tokens by `expand_kernel`. The stand-in
for CPUs without Triton writes the result into a converted copy, so that the logits of drafted tokens are divided by
whatever lay in memory (vllm-project/vllm#42638): almost no draft is accepted, and the texts are noise. GPUs run the
kernel itself. vLLM imports this module as the place of its `worker_extension_cls`, after its own stand-ins.
"""

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import register_kernels


class WorkerExtension:
    """Adds nothing to a worker."""


def expand(output, values, ends, replace_from, replace_to, longest) -> None:
    """values [B], a row for each request -> output [N], one for each of its drafted tokens, which end before ends [B];
    one value may be replaced.
    """
    counts = ends.long().diff(prepend=ends.new_zeros(1, dtype=torch.int64))
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))


if not HAS_TRITON:
    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})
