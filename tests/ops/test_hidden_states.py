"""The operators from hidden states: equal to those on logits, whatever the chunks."""

import pytest
import torch

from svd_engine import ops
from svd_engine.ops import hidden_states

N, H, V = 150, 16, 400


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(0)
    adapted, noise = torch.randn(2, N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    target = torch.randint(0, V, (N,), generator=generator)
    return adapted, adapted + 0.4 * noise, weight, target, torch.linspace(-3, 3, N)


HEADS = {
    "weight": lambda w: w,
    "bias": lambda w: ops.Head(w, torch.linspace(-1, 1, V)),
    "softcap and scale": lambda w: ops.Head(w, None, 5.0, 0.5),
}


def both(hidden, head):
    """Each operator from hidden states and from logits."""
    adapted, base, _, target, mu = hidden
    whole = head if isinstance(head, ops.Head) else ops.Head(head)
    z, b = whole.logits(adapted), whole.logits(base)
    for direction in ("projected", "difference"):
        to = {"direction": direction}
        yield ops.linear_topk(adapted, base, head, mu, 3, **to), ops.topk(z, b, mu, 3, **to)
        for penalty in (-float("inf"), -1.0):
            yield (
                ops.linear_score(adapted, base, head, mu, target, penalty=penalty, **to),
                ops.score(z, b, mu, target, penalty=penalty, **to),
            )
        yield (
            ops.linear_project_strength(adapted, base, head, target, **to),
            ops.project_strength(z, b, target, **to),
        )
    yield ops.linear_divergence(adapted, base, head), ops.divergence(z, b)


@pytest.mark.parametrize("rows_at_once", [1, 64, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_equal_to_the_operators_on_logits(hidden, head, rows_at_once, monkeypatch):
    monkeypatch.setattr(hidden_states, "CHUNK_BYTES", rows_at_once * 2 * V * 4)
    for got, truth in both(hidden, HEADS[head](hidden[2])):
        torch.testing.assert_close(got, truth, atol=1e-4, rtol=1e-4)


def test_logits_of_few_rows_are_held_at_once(hidden, monkeypatch):
    sizes = []
    logits = ops.Head.logits
    monkeypatch.setattr(ops.Head, "logits", lambda head, x: sizes.append(len(x)) or logits(head, x))
    monkeypatch.setattr(hidden_states, "CHUNK_BYTES", 10 * 2 * V * 4)
    adapted, base, weight, target, _ = hidden
    ops.linear_score(adapted, base, weight, 1.0, target)
    assert max(sizes) == 10 and sum(sizes) == 2 * N


def test_no_rows(hidden):
    adapted, base, weight, target, _ = hidden
    assert ops.linear_score(adapted[:0], base[:0], weight, 1.0, target[:0]).shape == (0,)
    assert ops.linear_topk(adapted[:0], base[:0], weight, 1.0, 2).token.shape == (0, 2)


def test_traced_as_one_node_each(hidden):
    adapted, base, weight, target, mu = hidden

    def every(adapted, base):
        return (
            ops.linear_topk(adapted, base, weight, mu, 3).logprob,
            ops.linear_score(adapted, base, ops.Head(weight, None, 5.0), 1.0, target),
            ops.linear_project_strength(adapted, base, weight, target).newton,
            ops.linear_divergence(adapted, base, weight),
        )

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for got, truth in zip(compiled(adapted, base), every(adapted, base), strict=True):
        torch.testing.assert_close(got, truth)


def test_opcheck(hidden):
    adapted, base, weight, target, mu = hidden
    shared = (adapted, base, weight, None, None, 1.0)
    registered = torch.ops.svd_engine
    for operator, arguments in {
        registered.linear_topk: (0.0, mu, 0.1, 0.0, "difference", 3),
        registered.linear_score: (1.0, None, 0.1, 0.0, "projected", target),
        registered.linear_project_strength: (target, 0.1, "difference"),
        registered.linear_divergence: (),
    }.items():
        torch.library.opcheck(operator.default, (*shared, *arguments, "auto"))


def test_refusals(hidden):
    adapted, base, weight, target, _ = hidden
    with pytest.raises(ValueError, match=r"head must have shape \[V, H\] with H = 16"):
        ops.linear_divergence(adapted, base, weight[:, :8])
    with pytest.raises(ValueError, match=r"k must lie in \[1, V = 400\]"):
        ops.linear_topk(adapted, base, weight, 1.0, 401)
    with pytest.raises(ValueError, match="target must hold"):
        ops.linear_score(adapted, base, weight, 1.0, target + V)
