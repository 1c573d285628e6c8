"""The attention kernels of training equal dense attention, in values and gradients."""

import pytest
import torch

from draftsmith.models.features import Packing
from draftsmith.models.heads import attention
from tests.models.heads.ragged import RaggedInPlain

KERNELS = [attention.FlashOnCPU, attention.BlockwiseAttention, RaggedInPlain]


def test_a_kernel_that_says_something_else_is_found_out():
    class Wrong(RaggedInPlain):
        @classmethod
        def forward(cls, query, key, value, blocks, scale):
            out, lse = super().forward(query, key, value, blocks, scale)
            return out, lse + 0.1

    device = torch.device("cpu")
    assert attention.disagreement(RaggedInPlain, device) < 1e-5 and attention.disagreement(Wrong, device) > 1e-2
    assert attention.kernel_for(device) is attention.FlashOnCPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ragged_kernel_of_cuda(dtype):
    limit = 1e-2 if dtype == torch.float32 else 3e-2
    assert attention.disagreement(attention.RaggedOnCUDA, torch.device("cuda"), dtype) < limit


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_dense_attention_alone_and_merged_with_other_scores(kernel):
    """The merged attention has one more key per query; with the merged output and log-sum-exp the kernel's backward
    gives its own share.
    """
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)  # noqa: E731
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    packing, heads, dim, scale = Packing((0, 10, 13, 22), mask), 2, 4, 0.3
    rows, count = packing.rows, len(packing.rows)
    query, key, value, other, more, weight = (
        make(count, heads, dim),
        make(22, heads, dim),
        make(22, heads, dim),
        make(count, heads),
        make(count, heads, dim),
        make(count, heads, dim).detach(),
    )
    out, lse = [], []
    for p, row in enumerate(rows.tolist()):
        first = max(b for b in packing.borders if b <= row)
        scores = torch.cat([torch.einsum("hd,khd->hk", query[p], key[first : row + 1]) * scale, other[p][:, None]], 1)
        out.append(torch.einsum("hk,khd->hd", scores.softmax(1), torch.cat([value[first : row + 1], more[p][None]])))
        lse.append(scores.logsumexp(1))
    want = torch.autograd.grad((torch.stack(out) * weight).sum(), (query, key, value))
    blocks = attention.query_blocks(packing, packing.rows, 3)
    with torch.no_grad():
        alone, total = kernel.forward(query, key, value, blocks, scale)
        merged = torch.logaddexp(total, other)
        both = alone * (total - merged).exp()[..., None] + more * (other - merged).exp()[..., None]
        torch.testing.assert_close(merged, torch.stack(lse), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(both, torch.stack(out), atol=1e-12, rtol=1e-12)
        sums = torch.ones_like(key), torch.ones_like(value)  # gradients are added
        d_query = kernel.backward(weight, query, key, value, both, merged, blocks, scale, *sums)
        for got, w in zip((d_query, sums[0] - 1, sums[1] - 1), want):
            torch.testing.assert_close(got, w, atol=1e-11, rtol=1e-11)
