"""Grouped-query attention without repeated keys is the library's `sdpa`, whatever the mask."""

import pytest
import torch
from transformers import AttentionInterface

from draftsmith.models.targets import grouped
from tests.conftest import tiny_target


class Module(torch.nn.Module):
    is_causal, num_key_value_groups = True, 3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["additive", "bool", "none"])
def test_attention_equals_the_library_with_repeated_keys(rows, kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((6, rows), (2, 7), (2, 7)))
    seen = torch.rand(2, 1, rows, 7, generator=generator) < 0.6
    seen[..., 0] = True
    mask = {"bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -1e30), "none": None}[kind]
    if kind == "none":
        key, value = key[:, :, :rows], value[:, :, :rows]
    want, _ = AttentionInterface()["sdpa"](Module(), query, key, value, mask, scaling=0.3)
    got, _ = grouped.attend(Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    for form in (grouped.shared_by_kernel, grouped.folded) if mask is not None else ():
        torch.testing.assert_close(form(query, key, value, mask, 0.3), want, atol=1e-6, rtol=1e-6)


def test_a_target_whose_queries_share_keys_attends_so():
    target = tiny_target()
    config = target.body.config
    assert config.num_key_value_heads < config.num_attention_heads and config._attn_implementation == grouped.NAME
