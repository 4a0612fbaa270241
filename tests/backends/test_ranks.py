"""Two processes with a part of every layer each, in step: they score as one process does."""

from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import GPT2Config

from specdecode.backends.backend import ModelConfig, Row, create_backend
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.loading import check_divides, read_config
from specdecode.backends.ranks import RowWords, join
from specdecode.config import check_config
from specdecode.decoding.drafters import PromptLookupDrafter
from specdecode.decoding.loop import speculative_decode
from specdecode.errors import ConfigError, ModelError
from tests.conftest import SaveModel

SIZE = 2


def batches() -> list[list[Row]]:
    """Rows that grow, are rolled back, come and go, are more than the cache has, and share prefixes."""
    generator = torch.Generator().manual_seed(3)
    sequences = {name: torch.randint(61, (40,), generator=generator).tolist() for name in "abcdefg"}
    steps = [
        [Row("a", sequences["a"][:3], 2), Row("b", sequences["b"][:21], 1)],
        [Row("a", sequences["a"][:9], 3), Row("b", [*sequences["b"][:10], 7], 1), Row("c", [3], 1)],
        [Row(name, sequences[name][:12], 2) for name in "abcdefg"],
        [Row("c", [3, 4, 5], 3)],
        [Row("h", [*sequences["a"][:12], 1, 2], 1), Row("b", sequences["b"][:30], 5)],
        [Row("g", sequences["g"][:13], 0)],
    ]
    return steps + [[Row("a", sequences["a"][:length], 1)] for length in range(13, 40)]


def options(size: int) -> dict[str, Any]:
    return {"max_rows": 4, "prefill_chunk": 8, "preallocate": True, "tp": size} | ({"device": "cpu"} if size == 1 else {})


def score(rank: int, folder: str, model: str) -> None:
    """What each process does: the first one scores all batches and decodes, the other follows; at last that is lost."""
    torch.set_num_threads(1)
    join(rank, SIZE, folder)
    backend = create_backend(model, **options(SIZE))
    assert isinstance(backend, HuggingFaceBackend)
    found: dict[str, Any] = {}
    if rank == 0:
        found["logits"] = [backend.logits(rows) for rows in batches()]
        found["tokens"] = decode(backend)
        backend.check()
        backend.close()
    else:
        backend.follow()
    backend.cache.check()
    found["rows"] = [row.tokens for row in backend.cache.rows]
    found["heads"] = [layer.keys.shape[2] for layer in backend.cache.layers]
    found["computed"] = backend.num_computed_tokens
    lost = create_backend(model, tp=SIZE)
    assert isinstance(lost, HuggingFaceBackend)
    if rank == 0:
        found["refusals"] = refusals(lost)
    torch.save(found, f"{folder}/{rank}.pt")


def refusals(backend: HuggingFaceBackend) -> list[str]:
    """What is said once a pass has failed because the other process is gone."""
    row = Row("a", [1, 2, 3], 1)
    with pytest.raises(RuntimeError):
        while True:  # until then messages to it are on their way
            backend.logits([row])
    said = []
    for call in (backend.check, lambda: backend.logits([row])):
        with pytest.raises(ModelError) as caught:
            call()
        said.append(str(caught.value))
    return said


def decode(backend: HuggingFaceBackend) -> list[int]:
    prompt = torch.tensor([[5, 6, 7, 5, 6]])
    output, metrics = speculative_decode(backend, PromptLookupDrafter(), prompt, 40, 4, temperature=0.8, seed=1)
    assert metrics.num_drafted > 0
    return output[0].tolist()


@pytest.fixture(scope="module")
def found(target_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(score, (str(folder), target_folder), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def test_two_processes_score_as_one(found: list[dict[str, Any]], target_folder: str) -> None:
    backend = create_backend(target_folder, **options(1))
    assert isinstance(backend, HuggingFaceBackend)
    for rows, logits in zip(batches(), found[0]["logits"], strict=True):
        torch.testing.assert_close(logits, backend.logits(rows), rtol=0, atol=2e-5)
    assert found[0]["tokens"] == decode(backend)
    assert found[0]["computed"] == backend.num_computed_tokens


def test_the_processes_remember_the_same_and_hold_half_the_heads_each(found: list[dict[str, Any]]) -> None:
    first, other = found
    assert first["rows"] == other["rows"]
    assert first["computed"] == other["computed"]
    assert first["heads"] == other["heads"] == [1, 1]


def test_a_process_that_is_lost_is_noticed(found: list[dict[str, Any]]) -> None:
    assert len(found[0]["refusals"]) == 2
    assert all(refusal.startswith("the ranks of the model are out of step: ") for refusal in found[0]["refusals"])


def test_what_is_told_is_what_is_heard() -> None:
    words = RowWords(max_rows=4)
    told: list[list[int]] = []
    for rows in batches():
        told.append(words.encode(rows))
        heard = words.decode(told[-1])
        assert [(row.tokens, row.num_scored) for row in heard] == [(row.tokens, row.num_scored) for row in rows]
        assert len({row.id for row in heard}) == len(rows)
    assert {len(message) for message in told[-20:]} == {1 + 4 + 1}  # one new token


def test_a_group_of_another_size_is_refused(target_folder: str) -> None:
    with pytest.raises(ModelError, match=r"^tp: expected 2 processes that torch.distributed connects, got 1$"):
        create_backend(target_folder, tp=2)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"device": "cpu"}, "tp: expected no device beside it, got device 'cpu'"),
        ({"device_map": "auto"}, "tp: expected no device_map beside it, got device_map 'auto'"),
        ({"compile": True}, "tp: expected no compile beside it, got compile True"),
        ({"adapter": "x"}, "tp: expected no adapter beside it, got adapter 'x'"),
        ({"quantization": {"a": 1}}, "tp: expected no quantization beside it, got quantization {'a': 1}"),
    ],
)
def test_what_does_not_go_with_several_processes_is_refused(beside: dict[str, Any], message: str, target_folder: str) -> None:
    with pytest.raises(ModelError) as caught:
        create_backend(target_folder, tp=2, **beside)
    assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"^x: top level: ") as refused:
        check_config({"model": target_folder, "tp": 2, **beside}, ModelConfig, "x")
    assert message in str(refused.value)


def test_a_model_that_cannot_be_shared_out_is_refused(target_folder: str, save_model: SaveModel) -> None:
    config = read_config(target_folder)
    with pytest.raises(ModelError, match=r"^tp 4: expected a divisor of the num_key_value_heads of model '.*', which is 2$"):
        check_divides(4, config, target_folder)
    gpt2 = save_model(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64), 0)
    with pytest.raises(ModelError, match=r"^tp 2: model '.*' has no plan for it in transformers: expected 1$"):
        check_divides(2, read_config(gpt2), gpt2)
