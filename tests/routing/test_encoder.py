"""Encoders are read by name; a static one is the mean of a model's token embeddings, and reads nothing else of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdecode.embedded import resolve_model
from specdecode.errors import ModelError
from specdecode.routing.encoder import load_encoder
from specdecode.routing.features import Features

TEXTS = ["def read(path):", "How many apples are left?" * 200, "日本語 😀"]


def expected(text: str) -> np.ndarray:
    """By the definition, token by token."""
    folder = resolve_model("tiny/target")
    table = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight.detach()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    mean = (table - table.mean(0))[ids].mean(0)
    return (mean / mean.norm()).numpy()


def test_a_static_encoder_averages_token_embeddings() -> None:
    together = Features("static:tiny/target", device="cpu").embed(TEXTS)
    for row, text in zip(together, TEXTS, strict=True):
        np.testing.assert_allclose(row, expected(text), atol=1e-5)
        np.testing.assert_array_equal(Features("static:tiny/target", device="cpu").embed([text])[0], row)


def copied(folder: Path) -> Path:
    """The model in three files and an index, of which the embeddings' has them alone."""
    AutoModelForCausalLM.from_pretrained(resolve_model("tiny/draft-code")).save_pretrained(folder, max_shard_size="3MB")
    AutoTokenizer.from_pretrained(resolve_model("tiny/draft-code")).save_pretrained(folder)
    return folder


def test_a_static_encoder_reads_one_file_of_a_model_in_several(tmp_path: Path) -> None:
    whole = Features("static:tiny/draft-code", device="cpu").embed(TEXTS)
    folder = copied(tmp_path / "parts")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(places.values()) - {places["model.embed_tokens.weight"]}:
        (folder / file).unlink()
    np.testing.assert_allclose(Features(f"static:{folder}", device="cpu").embed(TEXTS), whole, atol=1e-6)


def test_a_model_without_embeddings_in_its_files_is_one_line(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    file = folder / places["weight_map"].pop("model.embed_tokens.weight")
    index.write_text(json.dumps(places))
    with pytest.raises(ModelError, match=r"expected model\.embed_tokens\.weight in model\.safetensors, or in a file of"):
        load_encoder(f"static:{folder}", "cpu")
    index.unlink()
    with pytest.raises(ModelError, match=r"expected model\.embed_tokens\.weight in model\.safetensors"):
        load_encoder(f"static:{folder}", "cpu")
    tensors = load_file(file)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "embed" not in name} or {"other": torch.zeros(1)},
        folder / "model.safetensors",
    )
    with pytest.raises(ModelError, match="does not load"):
        load_encoder(f"static:{folder}", "cpu")


@pytest.mark.parametrize("kind", ["", "static:"])
def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_encoder(f"{kind}{tmp_path / 'missing'}", "cpu")
    assert "\n" not in str(caught.value)
    assert "missing" in str(caught.value)
