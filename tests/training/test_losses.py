"""The divergences equal slow and obvious references, however the teacher speaks and however few positions are looked at."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, RejectionVerifier
from specdecode.training.losses import (
    LossConfig,
    Teacher,
    acceptance,
    agreement,
    draft_losses,
    forward_kl,
    jensen_shannon,
    log_softmax,
    reverse_kl,
    total_variation,
)

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": lambda log_p, log_q: jensen_shannon(log_p, log_q, 0.3),
    "total_variation": total_variation,
}
NAMES = list(DIVERGENCES)
N, VOCAB = 7, 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config(**values: Any) -> LossConfig:
    return LossConfig.model_validate(values)


def logits(n: int = N, vocab: int = VOCAB, *, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(n, vocab, dtype=torch.float64)


def labels(n: int = N, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (n,))


def value_and_gradient(q_logits: Tensor, labels: Tensor, teacher: Teacher | None, config: LossConfig) -> tuple[Tensor, Tensor]:
    q_logits = q_logits.detach().requires_grad_()
    loss = draft_loss(q_logits, labels, teacher, config)
    (gradient,) = torch.autograd.grad(loss, q_logits)
    return loss.detach(), gradient


def draft_loss(*args: Any) -> Tensor:
    return draft_losses(*args).sum()


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tolerance: float = 1e-11) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def softmax(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_divergence(name: str, p: list[float], q: list[float], beta: float) -> float:
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_a_divergence_equals_a_loop_over_tokens(name: str, temperature: float) -> None:
    p_logits, q_logits = logits(), logits()
    rows = zip(p_logits.tolist(), q_logits.tolist(), strict=True)
    slow = [temperature**2 * slow_divergence(name, softmax(p, temperature), softmax(q, temperature), 0.3) for p, q in rows]

    settings = config(divergence=name, beta=0.3, temperature=temperature, chunk_size=3)
    losses = draft_losses(q_logits, labels(), Teacher.dense(p_logits), settings)

    assert losses.tolist() == pytest.approx(slow, rel=1e-12)


def test_the_parts_of_the_loss_add_up_by_their_weights() -> None:
    p_logits, q_logits, text = logits(), logits(), labels()
    slow = 0.0
    for p_row, q_row, label in zip(p_logits.tolist(), q_logits.tolist(), text.tolist(), strict=True):
        hard, favourite = softmax(q_row, 1.0), p_row.index(max(p_row))
        slow += 0.7 * 4 * slow_divergence("reverse_kl", softmax(p_row, 2.0), softmax(q_row, 2.0), 0.5)
        slow -= 0.2 * math.log(hard[label]) + 1.5 * math.log(hard[favourite])

    weights = {"divergence_weight": 0.7, "cross_entropy_weight": 0.2, "greedy_weight": 1.5}
    loss = draft_loss(q_logits, text, Teacher.dense(p_logits), config(divergence="reverse_kl", temperature=2.0, **weights))

    assert loss.item() == pytest.approx(slow, rel=1e-12)


def test_the_loss_of_text_alone_needs_no_teacher() -> None:
    q_logits, text = logits(), labels()
    slow = -sum(math.log(softmax(row, 1.0)[label]) for row, label in zip(q_logits.tolist(), text.tolist(), strict=True))

    loss = draft_loss(q_logits, text, None, config(divergence_weight=0.0, cross_entropy_weight=1.0))
    assert loss.item() == pytest.approx(slow, rel=1e-12)
    with pytest.raises(ValueError, match="teacher: expected one"):
        draft_loss(q_logits, text, None, config(divergence_weight=0.0, cross_entropy_weight=1.0, greedy_weight=0.1))


def test_a_loss_without_parts_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one above 0"):
        config(divergence_weight=0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_gradient_is_that_of_finite_differences(name: str, top_k: int | None) -> None:
    p_logits, q_logits, text = logits(3, 6), logits(3, 6), labels(3, 6)
    weights = {"cross_entropy_weight": 0.3, "greedy_weight": 0.6}
    settings = config(divergence=name, beta=0.3, temperature=1.7, top_k=top_k, chunk_size=2, **weights)

    def loss(q_logits: Tensor) -> Tensor:
        return draft_loss(q_logits, text, Teacher.dense(p_logits), settings)

    assert torch.autograd.gradcheck(loss, (q_logits.requires_grad_(),))


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("chunk_size", [1, 2, N - 1, N, 100])
def test_the_size_of_the_chunks_changes_nothing(chunk_size: int, top_k: int | None) -> None:
    p_logits, q_logits, text = logits(), logits(), labels()
    values = {"greedy_weight": 0.5, "cross_entropy_weight": 0.5, "top_k": top_k}
    whole = value_and_gradient(q_logits, text, Teacher.dense(p_logits), config(**values))

    assert_same(value_and_gradient(q_logits, text, Teacher.dense(p_logits), config(**values, chunk_size=chunk_size)), whole)
    torch.testing.assert_close(acceptance(p_logits, q_logits, 0.7, chunk_size), acceptance(p_logits, q_logits, 0.7))


def test_no_positions_cost_nothing() -> None:
    loss, gradient = value_and_gradient(logits(0), labels(0), Teacher.dense(logits(0)), config(top_k=2, greedy_weight=1.0))

    assert loss == 0
    assert gradient.shape == (0, VOCAB)
    assert acceptance(logits(0), logits(0)).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sparse_teacher_of_all_tokens_says_what_a_dense_one_says(name: str, dtype: torch.dtype) -> None:
    p_logits, q_logits, text = logits().to(dtype), logits().to(dtype), labels()
    settings = {"divergence": name, "temperature": 1.5, "greedy_weight": 0.5}
    dense = value_and_gradient(q_logits, text, Teacher.dense(p_logits), config(**settings))

    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for teacher in (Teacher.dense(p_logits), Teacher.dense(p_logits).restricted(VOCAB, 1.5)):
        for top_k in (VOCAB, VOCAB + 1):
            sparse = value_and_gradient(q_logits, text, teacher, config(**settings, top_k=top_k))
            assert_same(sparse, dense, tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_teacher_that_was_kept_teaches_what_a_live_one_does(name: str, temperature: float) -> None:
    p_logits, q_logits, text = logits(), logits(), labels()
    settings = {"divergence": name, "temperature": temperature, "greedy_weight": 0.5}
    live = value_and_gradient(q_logits, text, Teacher.dense(p_logits), config(**settings, top_k=4))

    written = Teacher.dense(p_logits).restricted(6, temperature)
    kept = Teacher.sparse(written.ids.int(), written.log_probs.clone(), temperature, VOCAB)

    assert_same(value_and_gradient(q_logits, text, kept, config(**settings, top_k=4)), live)
    assert_same(value_and_gradient(q_logits, text, kept.restricted(4, temperature), config(**settings)), live)


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_counts_as_one_token(name: str) -> None:
    p_logits, q_logits, k = logits(), logits(), 3
    slow = 0.0
    for p_row, q_row in zip(p_logits.tolist(), q_logits.tolist(), strict=True):
        p, q = softmax(p_row, 1.0), softmax(q_row, 1.0)
        chosen = sorted(range(VOCAB), key=p.__getitem__, reverse=True)[:k]
        merged = [[side[token] for token in chosen] + [1 - sum(side[token] for token in chosen)] for side in (p, q)]
        slow += slow_divergence(name, merged[0], merged[1], 0.5)

    loss = draft_loss(q_logits, labels(), Teacher.dense(p_logits), config(divergence=name, top_k=k))

    assert loss.item() == pytest.approx(slow, rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_tokens_told_apart_never_show_a_larger_divergence(name: str) -> None:
    """The data-processing inequality, at 2000 positions from nearly uniform to nearly one-hot.

    Only where the rest of p can be told from the rounding of its sum, by which log p_rest is off.
    """
    spread = torch.logspace(-1, 1, 2000, dtype=torch.float64)[:, None]
    p_logits, q_logits = logits(2000) * spread, logits(2000) * spread.flip(0).roll(700, 0)
    divergence, log_q = DIVERGENCES[name], log_softmax(q_logits)
    teachers = [Teacher.dense(p_logits).restricted(k) for k in (1, 4, 8)] + [Teacher.dense(p_logits)]
    per_position = [divergence(*teacher.beside(log_q)) for teacher in teachers]

    is_exact = teachers[2].log_probs.exp().sum(dim=-1) < 1 - 1e-7
    assert is_exact.sum() > 1000
    for fewer, more in itertools.pairwise(per_position):
        assert (fewer <= more + 1e-7)[is_exact].all()
        assert (fewer < 0.99 * more)[is_exact].any()


def test_a_sparse_teacher_shows_no_lower_acceptance_than_there_is() -> None:
    p_logits, q_logits = logits(200), logits(200)
    exact = acceptance(p_logits, q_logits, 0.8)

    bound = acceptance(Teacher.dense(p_logits).restricted(3, 0.8), q_logits, 0.8)

    assert (bound >= exact - 1e-12).all()
    assert (bound > exact + 1e-3).any()


def test_a_kept_teacher_is_refused_where_it_does_not_fit() -> None:
    kept = Teacher.dense(logits()).restricted(4, 1.5)

    with pytest.raises(ValueError, match=r"temperature: expected 1\.5, at which the teacher was kept, got 1"):
        draft_loss(logits(), labels(), kept, config())
    with pytest.raises(ValueError, match="temperature: expected"):
        draft_loss(logits(), labels(), kept, config(top_k=2))
    with pytest.raises(ValueError, match="top_k: expected at most the 4 tokens that were kept, got 5"):
        draft_loss(logits(), labels(), kept, config(temperature=1.5, top_k=5))
    with pytest.raises(ValueError, match="vocab_size: expected a sparse teacher over 10 tokens at most, got 11"):
        draft_loss(logits(vocab=VOCAB - 1), labels(vocab=10), kept, config(temperature=1.5))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_high_temperature_compares_logits_and_keeps_the_gradients_scale(top_k: int | None) -> None:
    """KL at T goes to the variance of the logits' difference over 2 T^2 (Hinton et al. 2015, section 2.1)."""
    p_logits, q_logits, text = logits(), logits(), labels()
    difference = p_logits - q_logits
    losses = {t: draft_loss(q_logits, text, Teacher.dense(p_logits), config(temperature=t, top_k=top_k)) for t in (1e3, 1e4)}

    assert losses[1e3].item() == pytest.approx(losses[1e4].item(), rel=1e-2)
    if top_k is None:
        assert losses[1e4].item() == pytest.approx(difference.var(dim=-1, correction=0).sum().item() / 2, rel=1e-2)


def test_jensen_shannon_is_symmetric_and_ends_in_both_kls() -> None:
    log_p, log_q = log_softmax(logits()), log_softmax(logits())

    torch.testing.assert_close(jensen_shannon(log_p, log_q, 0.5), jensen_shannon(log_q, log_p, 0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(jensen_shannon(log_p, log_q, 0.2), jensen_shannon(log_q, log_p, 0.8), rtol=1e-12, atol=0)
    torch.testing.assert_close(jensen_shannon(log_p, log_q, 1e-7) / 1e-7, forward_kl(log_p, log_q), rtol=1e-3, atol=0)
    torch.testing.assert_close(jensen_shannon(log_p, log_q, 1 - 1e-7) / 1e-7, reverse_kl(log_p, log_q), rtol=1e-3, atol=0)


def test_total_variation_is_how_often_the_rejection_verifier_rejects() -> None:
    p_logits, q_logits, temperature = logits(1), logits(1), 0.8
    q = (q_logits / temperature).softmax(dim=-1)
    drafts = [Draft([token], torch.arange(VOCAB)[None], q) for token in range(VOCAB)]
    sequence = Sequence([0], SamplingParams(temperature=temperature, max_tokens=9), Route("draft", 1), num_prompt_tokens=1)
    scored = [Scored(sequence, draft.tokens, 2) for draft in drafts]
    p = Distributions.of(p_logits.repeat(2 * VOCAB, 1), scored, frozenset())
    accepted = (q[0] * RejectionVerifier().reach(Block.of(drafts, p))[:, 0]).sum()  # over all drafts of one token

    expected = 1 - total_variation(log_softmax(p_logits, temperature), log_softmax(q_logits, temperature))
    torch.testing.assert_close(accepted, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(acceptance(p_logits, q_logits, temperature), expected, rtol=1e-12, atol=0)
    assert 0.01 < accepted < 0.99


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [None, 3])
def test_padding_of_either_vocabulary_is_cut_before_anything_else(name: str, top_k: int | None) -> None:
    p_logits, q_logits, text = logits(), logits(), labels()
    padding = torch.full((N, 2), 50.0, dtype=torch.float64)
    longer_p, longer_q = torch.cat([p_logits, padding], dim=-1), torch.cat([q_logits, padding], dim=-1)
    settings = config(divergence=name, top_k=top_k, greedy_weight=1.0, cross_entropy_weight=1.0, chunk_size=3)
    expected = value_and_gradient(q_logits, text, Teacher.dense(p_logits), settings)

    assert_same(value_and_gradient(q_logits, text, Teacher.dense(longer_p), settings), expected)
    loss, gradient = value_and_gradient(longer_q, text, Teacher.dense(p_logits), settings)
    assert_same((loss, gradient[:, :VOCAB]), expected)
    assert (gradient[:, VOCAB:] == 0).all()
    kept = Teacher.dense(longer_p).cut(VOCAB).restricted(3)
    for q in (q_logits, longer_q):
        torch.testing.assert_close(acceptance(kept, q), acceptance(Teacher.dense(p_logits).restricted(3), q_logits))
        torch.testing.assert_close(acceptance(longer_p, q_logits), acceptance(p_logits, q))
        assert torch.equal(agreement(kept, q), p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1))


def test_agreement_is_of_first_choices_and_takes_the_first_of_equals() -> None:
    p_logits = torch.tensor([[0.0, 3.0, 3.0, 3.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    q_logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [5.0, 1.0, 2.0, 4.0]], dtype=torch.bfloat16)

    for k in (1, 2, 4):
        assert agreement(Teacher.dense(p_logits).restricted(k), q_logits).tolist() == [True, False]
    assert agreement(p_logits, q_logits).tolist() == [True, False]


EXTREMES = {
    "far apart": (torch.tensor([[1e4, -1e4, 0.0, 5.0]]), torch.tensor([[-1e4, 1e4, 5.0, 0.0]])),
    "one-hot p": (torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])),
    "one-hot q": (torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[-1e4, -1e4, 1e4, -1e4]])),
    "both one-hot": (torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.tensor([[1e4, 0.0, 0.0, 0.0]])),
    "no rest of p": (torch.tensor([[0.0, 0.0, 0.0, -1e4]]), torch.tensor([[0.0, 1.0, 0.0, 3.0]])),
    "hardly a rest of p": (torch.tensor([[0.0, -1.0, -30.0, -31.0]]), torch.tensor([[0.0, 1.0, 0.0, 3.0]])),
    "no rest of q": (torch.tensor([[3.0, 2.9, 2.8, 2.7]]), torch.tensor([[1e4, 1e4, 1e4, -1e4]])),
    "hardly anything but a rest": (torch.zeros(1, 4), torch.tensor([[-30.0, -30.0, -30.0, 0.0]])),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, case: str, top_k: int | None, dtype: torch.dtype) -> None:
    p_logits, q_logits = (side.to(dtype) for side in EXTREMES[case])
    settings = config(divergence=name, top_k=top_k, greedy_weight=1.0, cross_entropy_weight=1.0)

    loss, gradient = value_and_gradient(q_logits, torch.tensor([0]), Teacher.dense(p_logits), settings)

    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert loss >= -1e-4


@pytest.mark.parametrize("log_probs", [[0.0, -1e5], [math.log(1e-12), -1e5], [-1e-12, -30.0], [1e-4, -9.0], [-torch.inf] * 2])
@pytest.mark.parametrize("name", NAMES)
def test_any_mass_of_a_kept_rest_is_safe(name: str, log_probs: list[float]) -> None:
    """Nothing, all but 1e-12, 1e-12, less than nothing as 16-bit log-probabilities may add up to, and everything."""
    kept = Teacher.sparse(torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([log_probs], dtype=torch.float32))
    for q_logits in (torch.tensor([[0.0, 1.0, -1.0, 0.5]]), torch.tensor([[0.0, 1e4, 0.0, 0.0]])):
        loss, gradient = value_and_gradient(q_logits, torch.tensor([0]), kept, config(divergence=name))

        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_a_draft_that_forgot_the_rest_is_taught_it() -> None:
    """The rest of q is far below a rounding error of 1, and still has a gradient: that of -0.5 log q_rest."""
    kept = Teacher.sparse(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))

    loss, gradient = value_and_gradient(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]), kept, config())

    assert loss.item() == pytest.approx(0.5 * (100 - math.log(2)) + math.log(0.5), rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0.5, -0.25, -0.25], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_come_back_in_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    p_logits, q_logits, text = logits().to(dtype), logits().to(dtype), labels()
    loss, gradient = value_and_gradient(q_logits, text, Teacher.dense(p_logits), config(chunk_size=3))
    exact, slow = value_and_gradient(q_logits.double(), text, Teacher.dense(p_logits.double()), config())

    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), slow, rtol=torch.finfo(dtype).eps, atol=1e-6)


class Tables(TorchDispatchMode):
    """Counts the numbers in the float32 tensors that are made: the most in one, and the most in all alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                self._alive[StorageWeakRef(tensor.untyped_storage())] = size
                self.largest = max(self.largest, size)
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


@pytest.mark.parametrize(
    "values", [{"greedy_weight": 1.0}, {"divergence": "jensen_shannon"}, {"top_k": 8}], ids=["dense", "mixture", "sparse"]
)
def test_no_more_than_a_chunks_float32_tables_exist_forward_or_backward(values: dict[str, Any]) -> None:
    n, vocab, chunk_size = 512, 4000, 32
    p_logits, q_logits = torch.randn(n, vocab).bfloat16(), torch.randn(n, vocab).bfloat16()
    tables = {}
    for size in (chunk_size, n):
        with Tables() as tables[size]:
            value_and_gradient(q_logits, labels(n, vocab), Teacher.dense(p_logits), config(**values, chunk_size=size))

    assert tables[chunk_size].largest == chunk_size * vocab
    assert tables[chunk_size].peak < 10 * chunk_size * vocab  # those of the one chunk; all 16 would have two or more each
    assert tables[n].largest == n * vocab
    assert tables[n].peak > 4 * n * vocab
