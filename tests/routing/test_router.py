"""A prompt goes to the draft that suits it; the output is the target's whatever it says, and it learns from mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specdecode import create_backend, speculative_decode
from specdecode.decoding.metrics import Verdicts
from specdecode.errors import ConfigError, ModelError
from specdecode.routing.features import Features
from specdecode.routing.router import AdaptiveRouter
from specdecode.text import Tokenizer
from tests.routing.made import TRUE, WORDS, K, made_prompt

DRAFTS = ("chat", "code", "generic")


def router_of(checkpoint: str, **values: object) -> AdaptiveRouter:
    return AdaptiveRouter.from_config({"checkpoint": checkpoint, **values})


@pytest.mark.parametrize("domain", TRUE)
def test_the_best_draft_comes_first(checkpoint: str, domain: str) -> None:
    rng = np.random.default_rng(5)
    texts = [made_prompt(domain, rng) for _ in range(20)]
    forecasts = router_of(checkpoint).forecast(texts, [10] * 20, [domain != "code"] * 20)
    best = max(TRUE[domain], key=lambda name: TRUE[domain][name])
    assert sum(forecast.route(K).drafter == best for forecast in forecasts) >= 19
    for forecast in forecasts:
        assert {arm.drafter for arm in forecast.arms} == set(DRAFTS)
        assert [arm.acceptance for arm in forecast.arms] == sorted((arm.acceptance for arm in forecast.arms), reverse=True)


def test_one_prompt_is_forecast_as_among_others(checkpoint: str) -> None:
    texts = [" ".join(words) for words in WORDS.values()]
    together = router_of(checkpoint).forecast(texts, [5, 6, 7], [True] * 3)
    for number, text in enumerate(texts):
        [alone] = router_of(checkpoint).forecast([text], [5 + number], [True])
        assert alone.uncorrected == pytest.approx(together[number].uncorrected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_said_is_the_targets(checkpoint: str, temperature: float) -> None:
    """Greedy it is equal; sampled, coupled verification makes it a function of the seed alone."""
    target = create_backend("tiny/target", dtype="float32")
    drafts = {name: create_backend(f"tiny/draft-{name}", dtype="float32") for name in DRAFTS}
    router = router_of(checkpoint, tokenizer="tiny/target")
    sampling = {"temperature": temperature, "seed": 3, "verifier": "coupled"}
    tokenizer = Tokenizer("tiny/target")
    num_drafts = 0
    for text in ("def read_lines(path):\n", "How many apples are left?"):
        ids = torch.tensor([tokenizer.encode(text)])
        plain, _ = speculative_decode(target, None, ids, 200, **sampling)
        output, metrics = router.route_and_decode(target, drafts, ids, 200, **sampling)
        assert torch.equal(output, plain)
        assert metrics.verdicts.keys() <= set(DRAFTS)
        assert sum(found.num_drafts for found in metrics.verdicts.values()) == metrics.num_drafts
        num_drafts += metrics.num_drafts
    assert num_drafts > 0  # of the answers, which are long enough for a forecast to come


def test_mistakes_change_what_is_expected_of_prompts_like_it_and_not_of_others(checkpoint: str) -> None:
    router, rng = router_of(checkpoint), np.random.default_rng(7)

    def expected(domain: str) -> dict[str, float]:
        [forecast] = router.forecast([made_prompt(domain, np.random.default_rng(9))], [10], [domain != "code"])
        return {arm.drafter: arm.acceptance for arm in forecast.arms}

    before = {domain: expected(domain) for domain in TRUE}
    for _ in range(30):
        [forecast] = router.forecast([made_prompt("code", rng)], [10], [False])
        router.learn(forecast, {"code": Verdicts(20, 5, 20), "not an arm": Verdicts(1, 1, 1)})
    assert expected("code")["code"] < before["code"]["code"] - 0.3
    assert expected("code")["chat"] == pytest.approx(before["code"]["chat"], abs=0.02)


def test_nothing_is_learned_where_that_is_not_wanted(checkpoint: str) -> None:
    router = router_of(checkpoint, corrects=False)
    [forecast] = router.forecast(["def class"], [2], [False])
    router.learn(forecast, {"code": Verdicts(20, 0, 20)})
    [again] = router.forecast(["def class"], [2], [False])
    assert again.arms == forecast.arms


def test_after_a_change_of_the_traffic_half_of_the_loss_is_made_good_within_200_requests(checkpoint: str) -> None:
    """A fourth kind of prompt, on which the drafts do otherwise than on the kind that it looks like."""
    router, rng = router_of(checkpoint), np.random.default_rng(11)
    true = {"code": 0.25, "chat": 0.35, "generic": 0.75}  # though its words are those of code

    def regret() -> float:
        """Of one request, in tokens of a round."""
        [forecast] = router.forecast([made_prompt("code", rng)], [10], [False])
        chosen = forecast.route(K).drafter
        assert chosen is not None
        num_accepted = rng.binomial(40, true[chosen])
        router.learn(forecast, {chosen: Verdicts(40, int(num_accepted), int(40 - num_accepted))})
        lengths = {name: sum(rate**n for n in range(K + 1)) for name, rate in true.items()}
        return max(lengths.values()) - lengths[chosen]

    losses = [regret() for _ in range(200)]
    assert losses[0] > 1.5
    assert np.mean(losses) < 0.5 * losses[0]
    assert np.mean(losses[100:]) < 0.2 * losses[0]


def test_what_does_not_fit_is_refused(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is one for the drafts"):
        AdaptiveRouter.from_config({"checkpoint": checkpoint}, ["code", "chat"])
    with pytest.raises(ModelError, match=r"missing: expected what jobs\.train_router has made"):
        router_of(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="does not load as a sentence-transformers model"):
        router_of(checkpoint, encoder=str(tmp_path))
    with pytest.raises(ConfigError, match="checkpoint"):
        AdaptiveRouter.from_config({})
    target = create_backend("tiny/draft-code")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ModelError, match=r"draft_models: expected \['chat', 'code', 'generic'\]"):
        router_of(checkpoint, tokenizer="tiny/target").route_and_decode(target, {"code": target}, ids)
    with pytest.raises(ConfigError, match="tokenizer: expected the target's"):
        router_of(checkpoint).route_and_decode(target, dict.fromkeys(DRAFTS, target), ids)


def test_another_encoder_is_refused(checkpoint: str) -> None:
    model = router_of(checkpoint)._model
    about = model.about
    wider = type(model)(type(about)(about.arms, "wider", ["embedding_0", *about.features], about.weights, {}), {})
    with pytest.raises(ModelError, match="expected those of wider"):
        AdaptiveRouter(wider, Features(about.encoder, device="cpu"))


def test_a_file_configures_it(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "router.yaml").write_text(f"checkpoint: {checkpoint}\n")
    assert AdaptiveRouter.from_config(tmp_path / "router.yaml", DRAFTS).drafts == ["chat", "code", "generic"]


def test_the_embedded_router_knows_what_a_prompt_is_about() -> None:
    router = AdaptiveRouter.from_config({"checkpoint": "tiny/router"}, ["code", "chat", "reasoning", "generic"])
    texts = {
        "code": "def read_lines(path):\n",
        "chat": "Can I get a large caramel latte with whole milk?",
        "reasoning": "Tom has 12 pens and buys 3 boxes of 8 pens each. How many pens does he have?",
    }
    forecasts = router.forecast(list(texts.values()), [8, 12, 24], [False, True, True])
    for domain, forecast in zip(texts, forecasts, strict=True):
        assert forecast.arms[0].drafter == domain
