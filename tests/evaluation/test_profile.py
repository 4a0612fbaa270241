"""The profile tells where a round's time goes: parts add up, floors are counted, what is simulated is said to be."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from specdecode.backends.presets import PRESETS, SHAPES, make_model
from specdecode.backends.synthetic import SyntheticConfig
from specdecode.cli import main
from specdecode.config import check_config
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.loop import step
from specdecode.decoding.sequence import Draft, SamplingParams, Sequence
from specdecode.errors import ConfigError
from specdecode.evaluation.growth import AXES, Curve, exponent
from specdecode.evaluation.growth_chart import draw_growth
from specdecode.evaluation.pairs import PairConfig, open_pair
from specdecode.evaluation.profile import ProfileConfig, simulated
from specdecode.evaluation.roofline import Limits, PassCost, Work, read_bandwidth
from specdecode.evaluation.stopwatch import Stopwatch

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "pair": {"target": {"model": "tiny/target"}, "draft": "tiny/draft-code"},
    "K": [2],
    "temperatures": [0.0, 1.0],
    "num_samples": 1,
    "max_tokens": 12,
    "num_threads": 1,
}
NUM_PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
}


def profile(tmp_path: Path, *options: str, **settings: Any) -> int:
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump({**TINY, **settings}))
    return main(["profile", "--config", str(file), *options])


def figures(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str, **settings: Any) -> dict[str, Any]:
    assert profile(tmp_path, "--json", *options, **settings) == 0
    return json.loads(capsys.readouterr().out)


def test_parts_add_up_and_each_pass_has_a_floor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = figures(capsys, tmp_path)
    for temperature in (0.0, 1.0):
        for way, passes in (("plain", ["verify pass"]), ("K=2", ["draft pass", "verify pass"])):
            rows = [row for row in found["phases"] if (row["temperature"], row["way"]) == (temperature, way)]
            assert sum(row["share"] for row in rows) == pytest.approx(1)
            moving = {row["phase"]: row for row in rows}
            assert all(moving[phase]["num_bytes"] > 1e6 and moving[phase]["to_floor"] > 0.5 for phase in passes)
            assert "exchange" not in moving
    assert {limits["bandwidth"] > 1e8 for limits in found["limits"].values()} == {True}
    assert found["simulated_acceptance"] is None
    assert set(found["versions"]) == {"python", "specdecode", "torch", "transformers"}


def test_every_way_answers_alike_when_greedy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = figures(capsys, tmp_path, peers=["hf_plain", "hf_assisted", "prompt_lookup"], K=[1, 3])
    ways = {row["way"]: row for row in found["ways"] if row["temperature"] == 0}
    assert list(ways) == ["plain", "K=1", "K=3", "hf_plain", "hf_assisted", "prompt_lookup"]
    assert {row["num_different"] for row in ways.values()} == {0}
    assert ways["plain"]["tokens_per_pass"] == 1
    assert ways["plain"]["pass_to_one"] == 1
    assert ways["K=3"]["tokens_per_pass"] > 1
    assert ways["hf_plain"]["to_hf_plain"] == [1, 1, 1]


def test_what_is_simulated_is_said_to_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = figures(capsys, tmp_path, "--simulate-acceptance", "1.0")
    assert found["simulated_acceptance"] == 1.0
    speculative = next(row for row in found["ways"] if row["way"] == "K=2")
    assert speculative["acceptance"] == 1
    assert speculative["num_different"] is None
    assert profile(tmp_path, "--simulate-acceptance", "0.5", "--num-samples", "1", temperatures=[0.0]) == 0
    assert capsys.readouterr().out.count("SIMULATED ACCEPTANCE, coin flips at 0.5") == 2


def test_coin_flips_accept_as_often_as_they_should() -> None:
    verdict = simulated(0.7, 8, np.random.default_rng(0))
    sequences = [Sequence([1], SamplingParams(max_tokens=5)) for _ in range(2000)]
    p = Distributions.of(torch.zeros(4000, 8), [], frozenset())
    lengths, added = verdict(sequences, [Draft.certain([3]) for _ in sequences], p)
    assert np.mean(lengths) == pytest.approx(0.7, abs=0.04)  # four standard errors
    assert [len(tokens) for tokens in added] == [length + 1 for length in lengths]


def test_a_draft_elsewhere_adds_the_exchange(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = figures(capsys, tmp_path, is_remote=True, temperatures=[0.0])
    phases = {row["phase"] for row in found["phases"] if row["way"] == "K=2"}
    assert {"exchange", "draft pass", "verify pass"} <= phases
    assert "draft distributions" not in phases


def test_growth_is_measured_on_every_axis_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    growth = {"batch": [1, 2, 4], "context": [16, 32, 100_000], "K": [0, 2], "vocabulary": [300, 600], "num_rounds": 2}
    found = figures(capsys, tmp_path, temperatures=[0.0], growth=growth)["growth"]
    assert {curve["axis"] for curve in found["curves"]} == {"batch", "context", "K", "vocabulary"}
    assert found["left_out"] == {"context": [100_000]}
    whole = next(curve for curve in found["curves"] if (curve["axis"], curve["phase"]) == ("batch", "round"))
    assert whole["sizes"] == [1, 2, 4]
    assert whole["exponent"] is not None


def test_growth_prints_a_table_and_the_exponent_is_the_powers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    growth = {"batch": [1], "context": [16], "K": [1], "vocabulary": [300], "num_rounds": 1}
    assert profile(tmp_path, temperatures=[0.0], growth=growth) == 0
    assert "us for one more" in capsys.readouterr().out
    sizes = [1, 2, 4, 8, 16, 32]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert exponent([1, 2], [1.0, 2.0]) is None


def test_growth_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra bench")
    curves = [Curve(axis, "round", [1, 2], [1.0, 2.0], None, None) for axis in AXES]
    draw_growth(curves, tmp_path / "charts/growth.png")
    assert (tmp_path / "charts/growth.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_chart_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs the package matplotlib: pip install 'specdecode\[bench\]'"):
        draw_growth([], tmp_path / "growth.png")


@pytest.mark.parametrize("name", SHAPES)
def test_presets_have_the_parameters_of_the_real_models(name: str) -> None:
    model = make_model(SHAPES[name].config(), torch.device("meta"), torch.bfloat16)
    assert sum(weights.numel() for weights in model.parameters()) == NUM_PARAMETERS[name]


def test_a_pass_moves_all_weights_but_a_looked_up_embedding() -> None:
    for name in ("qwen2.5-7b", "qwen2.5-0.5b"):
        shape = SHAPES[name]
        cost = PassCost.of(make_model(shape.config(), torch.device("meta"), torch.bfloat16), 100)
        looked_up = 0 if shape.is_tied else shape.vocab_size * shape.hidden_size
        assert cost.num_weight_bytes == 2 * (NUM_PARAMETERS[name] - looked_up)
        work = cost.work(batch=3, num_new=5, length=10)
        assert work == Work(cost.num_weight_bytes + 3 * 15 * 100, 2 * cost.num_multiplied * 15)


def test_a_preset_decodes_with_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SHAPES["llama-3-8b"].__class__("llama", 1, 32, 48, 4, 2, 300, 128, is_tied=False)
    monkeypatch.setitem(SHAPES, "llama-3-8b", small)
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", small)
    assert set(PRESETS) == {"qwen2.5-7b-0.5b", "qwen2.5-14b-0.5b", "llama-3-8b-1b"}
    pair = open_pair(PairConfig(preset="llama-3-8b-1b", device="cpu"))
    sequence = Sequence(pair.prompts("code", 1, 8)[0], SamplingParams(max_tokens=3))
    step([sequence], NoDrafter(), pair.target)
    assert len(sequence.tokens) == 9


def test_a_synthetic_pair_is_made_once(tmp_path: Path) -> None:
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 48, "vocab_size": 300}
    config = PairConfig(
        synthetic=SyntheticConfig(**shape, agreement=1.0, max_length=256, device="cpu"), folder=str(tmp_path / "pair")
    )
    made = open_pair(config)
    before = (tmp_path / "pair/target/model.safetensors").stat().st_mtime_ns
    assert open_pair(config).target.vocab_size == made.target.vocab_size == 300
    assert (tmp_path / "pair/target/model.safetensors").stat().st_mtime_ns == before
    other = config.model_copy(update={"synthetic": SyntheticConfig(**shape, max_length=512)})
    with pytest.raises(ConfigError, match="holds a pair of another shape"):
        open_pair(other)


def test_a_stopwatch_gives_all_time_to_some_phase() -> None:
    watch = Stopwatch(CPU)
    watch.start()
    watch.lap("one")
    watch.lap("other")
    watch.lap("one")
    watch.move("one", "third", 0.5)
    seconds = watch.read()
    assert seconds["third"] == 0.5
    assert 0 < sum(seconds.values()) < 0.1


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    limits = Limits(bandwidth=100.0, operation_rate=10.0)
    assert limits.floor_s(Work(200.0, 5.0)) == 2.0
    assert limits.floor_s(Work(200.0, 50.0)) == 5.0
    assert 1e8 < read_bandwidth(1 << 20, CPU) < 1e13


@pytest.mark.parametrize("name", ["benchmark_profile.yaml", "tiny/benchmark_profile.yaml", "tiny/profile_synthetic.yaml"])
def test_the_shipped_configurations_load(name: str) -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "configs" / name).read_text())
    check_config(values, ProfileConfig, where=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate-acceptance", "1.5"], "simulate_acceptance: input should be less than or equal to 1, got 1.5"),
        (["--num-samples", "0"], "num_samples: input should be greater than 0, got 0"),
        (["--set", "K=[0]"], "expected every K to be at least 1, as plain decoding is always measured, got 0"),
        (["--set", "temperatures=[-1.0]"], "expected every temperature to be at least 0, got -1"),
        (["--set", "pair={}"], "expected one of target, synthetic and preset, got none"),
        (["--set", "pair.preset=qwen2.5-7b-0.5b"], "expected one of target, synthetic and preset, got target and preset"),
        (["--set", "pair={draft: tiny/draft-code}"], "expected one of target"),
        (["--set", "pair={target: {model: tiny/target}}"], "expected target and draft together, got draft None"),
        (["--set", "pair.target.model=tiny/none"], "model 'tiny/none' does not exist"),
        (["--set", "batch=2", "--set", "peers=[hf_plain]"], "expected batch 1, got 2"),
        (["--set", "growth={batch: [0]}"], "batch: expected positive sizes, got 0"),
        (["--set", "max_tokens=100000"], "max_tokens: the prompt has"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    assert profile(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
