"""The fused scan over trees equals the PyTorch form: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from draftsmith.models.targets.recurrent import fused, ssd  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trees(batch: int, size: int, g) -> torch.Tensor:
    """[B, N, N] bool, random trees; the second half of the last row is padding."""
    own = torch.eye(size, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for i in range(1, size if b < batch - 1 else max(1, size // 2)):
            own[b, i] |= own[b, int(torch.randint(0, i, (1,), generator=g))]
    return own


@pytest.mark.parametrize(
    "batch, size, heads, width, groups, numbers",
    [(1, 1, 2, 8, 1, 16), (2, 7, 4, 16, 2, 8), (1, 20, 6, 40, 3, 48), (2, 33, 2, 64, 1, 64)],
)
@pytest.mark.parametrize("begun", [False, True])
def test_the_fused_scan_equals_the_pytorch_form(batch, size, heads, width, groups, numbers, begun):
    g = torch.Generator().manual_seed(size)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)  # noqa: E731
    own, x = trees(batch, size, g).to(DEVICE), draw(batch, size, heads, width)
    dt, A = draw(batch, size, heads).abs(), -10 * draw(heads).abs()
    B, C = draw(batch, size, groups, numbers), draw(batch, size, groups, numbers)
    state = draw(batch, heads, width, numbers) if begun else None
    want = ssd.scan(state, own, x, dt, A, B, C)
    torch.testing.assert_close(fused.scan(state, own, x, dt, A, B, C), want, atol=2e-4, rtol=1e-5)


def test_the_form_is_chosen_by_device_and_size():
    assert ssd.scan_on(torch.device("cpu"), 8) is ssd.scan
    assert ssd.scan_on(torch.device("cuda"), 8) is fused.scan
    assert ssd.scan_on(torch.device("cuda"), fused.LARGEST + 1) is ssd.scan
