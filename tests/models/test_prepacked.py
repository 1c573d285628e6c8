"""Prepacked matrices give the products that torch gives, whatever happens to them."""

import copy

import pytest
import torch
from torch import nn

from draftsmith.models import prepacked
from draftsmith.models.features import FeatureSpec
from draftsmith.models.prepacked import PrepackedLinear, gains, use_plain, use_prepacked
from draftsmith.models.targets.copies import quantised
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_target


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(prepacked, "SMALLEST", dict.fromkeys(prepacked.SMALLEST, 1))
    with torch.no_grad():
        yield


def layer(bias: bool = False, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    use_prepacked(made)
    if not gains(made.weight):
        assert type(made) is nn.Linear
        pytest.skip(f"no oneDNN here that multiplies in {dtype}")
    assert type(made) is PrepackedLinear
    return made


def close(found: torch.Tensor, layer: nn.Linear, rows: torch.Tensor) -> bool:
    exact = nn.functional.linear(
        rows.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    return torch.allclose(
        found.double(),
        exact,
        **({"rtol": 1e-5, "atol": 1e-5} if rows.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 11), (8, 8), (1, 65), (2, 3, 5)])
def test_products_are_right(shape, dtype, bias):
    made, rows = layer(bias, dtype), torch.randn(*shape, 48).to(dtype)
    found = made(rows)
    assert found.shape == (*shape, 80) and found.dtype == dtype
    assert close(found, made, rows)
    count = rows[..., 0].numel()
    assert (made.packed is not None) == (prepacked.FEWEST_ROWS[dtype] <= count <= prepacked.MOST_ROWS)


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_a_changed_matrix_is_prepacked_anew(change):
    made, rows = layer(), torch.randn(8, 48)
    made(rows)
    if change == "in place":
        made.weight.mul_(3)
    else:
        made.weight = nn.Parameter(torch.randn(80, 48), requires_grad=False)
    assert close(made(rows), made, rows)


def test_matrices_made_in_inference_mode():
    with torch.inference_mode():
        made = layer(True)
    rows = torch.randn(8, 48)
    assert made.weight.is_inference() and close(made(rows), made, rows) and made.packed is not None


def test_rows_that_are_no_block_of_memory():
    made, rows = layer(), torch.randn(48, 10).T
    assert close(made(rows), made, rows)


def test_gradients_take_torch_s_product():
    made = layer()
    with torch.enable_grad():
        rows = torch.randn(8, 48, requires_grad=True)
        made(rows).sum().backward()
    assert made.packed is None
    assert torch.allclose(rows.grad, made.weight.sum(0).expand(8, -1), atol=1e-5)


def test_copies_and_states_are_those_of_a_linear_layer():
    made, rows = layer(True), torch.randn(8, 48)
    made(rows)
    copied = copy.deepcopy(made)
    copied.weight.mul_(2)
    assert close(copied(rows), copied, rows) and close(made(rows), made, rows)
    assert list(made.state_dict()) == ["weight", "bias"]
    use_plain(made)
    assert type(made) is nn.Linear and made.packed is None


def test_without_memory_nothing_is_prepacked(monkeypatch):
    monkeypatch.setattr(prepacked, "SHARE", 1e-12)
    made = nn.Linear(48, 80)
    use_prepacked(made)
    assert type(made) is nn.Linear


def test_a_target_decodes_with_prepacked_matrices():
    target, plain = tiny_target(), tiny_target()
    tree = DraftTree.of(torch.arange(3, 13)[None], torch.arange(-1, 9)[None])
    session, other = (t.open(FeatureSpec(("last",)), 1, 64) for t in (target, plain))
    use_plain(plain.model)
    for one in (session, other):
        one.prefill([[1, 5, 9, 2]])
    assert any(getattr(module, "packed", None) for module in target.model.modules())
    assert torch.allclose(session.verify(tree).logits, other.verify(tree).logits, atol=1e-4)


def test_a_copy_in_8_bits_finds_the_layers(monkeypatch):
    """torch's quantisation looks for layers of torch's own class."""
    target = tiny_target()
    target.open(FeatureSpec(("last",)), 1, 64)
    monkeypatch.setattr("draftsmith.models.targets.copies.seconds_per_pass", lambda targets, rows: (2.0, 1.0))
    kinds = {type(module).__module__ for module in quantised(target).body.modules()}
    assert any("quantized" in kind for kind in kinds)
    assert type(target.head) is PrepackedLinear
