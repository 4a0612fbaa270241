"""A configuration is either exactly what its model asks for, or one line that says what to change."""

import pytest
from pydantic import Field, ValidationError

from specdecode.config import StrictModel, check_config, load_config
from specdecode.errors import ConfigError


class Optimizer(StrictModel):
    learning_rate: float = Field(gt=0)
    warmup_steps: int = 0


class Training(StrictModel):
    name: str
    optimizer: Optimizer
    is_resumed: bool = False
    seed: int = Field(default=0, ge=0)
    layers: list[int] = Field(default_factory=list)


VALID = """
name: draft
optimizer:
  learning_rate: 0.001
layers: [1, 2]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "train.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_valid_file_becomes_its_model(write):
    config = load_config(write(VALID), Training)
    assert config == Training(name="draft", optimizer=Optimizer(learning_rate=0.001), layers=[1, 2])
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VALID + "sede: 1", "sede: unknown key, got 1"),
        (VALID.replace("learning_rate", "lr"), "optimizer.learning_rate: missing (and 1 more)"),
        (VALID.replace("name: draft", ""), "name: missing"),
        (VALID.replace("0.001", "fast"), "optimizer.learning_rate: input should be a valid number, got 'fast'"),
        (VALID.replace("0.001", "-1.0"), "optimizer.learning_rate: input should be greater than 0, got -1.0"),
        (VALID + "seed: '5'", "seed: input should be a valid integer, got '5'"),
        (VALID + "seed: 5.0", "seed: input should be a valid integer, got 5.0"),
        (VALID + "seed: true", "seed: input should be a valid integer, got True"),
        (VALID + "seed: -1", "seed: input should be greater than or equal to 0, got -1"),
        (VALID + "seed:", "seed: input should be a valid integer, got None"),
        (VALID + "is_resumed: 1", "is_resumed: input should be a valid boolean, got 1"),
        (VALID.replace("[1, 2]", "[1, two]"), "layers.1: input should be a valid integer, got 'two'"),
        (VALID.replace("[1, 2]", "1"), "layers: input should be a valid list, got 1"),
        ("name: 3\noptimizer: {learning_rate: 0.1}", "name: input should be a valid string, got 3"),
        ("name: x\noptimizer: 3", "optimizer: input should be a valid dictionary or instance of Optimizer, got 3"),
        ("- 1\n- 2", "expected a mapping of keys to values at the top level, got list"),
        ("", "expected a mapping of keys to values at the top level, got NoneType"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text, message, write):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, Training)
    assert str(caught.value) == f"{path}: {message}"


def test_a_long_value_is_cut_short(write):
    with pytest.raises(ConfigError, match=r"seed: .* got 'x+\.\.\.$") as caught:
        load_config(write(VALID + f"seed: {'x' * 5000}"), Training)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["name: [1, 2", "name: x: y", "a: \t- b", "\x00", "{{ name }}: 1"])
def test_what_is_not_yaml_is_refused_in_one_line(text, write):
    path = write(text)
    with pytest.raises(ConfigError, match=r"train\.yaml: is not valid YAML: ") as caught:
        load_config(path, Training)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not valid YAML"):
        load_config(tmp_path / "latin.yaml", Training)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read: No such file or directory$"):
        load_config(tmp_path / "missing.yaml", Training)
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_config(tmp_path, Training)


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=7", {"seed": 7}),
        ("name=other", {"name": "other"}),
        ("name=", None),
        ("name='5'", {"name": "5"}),
        ("name=a=b", {"name": "a=b"}),
        ("is_resumed=true", {"is_resumed": True}),
        ("layers=[3, 4]", {"layers": [3, 4]}),
        ("layers.1=4", {"layers": [1, 4]}),
        ("optimizer.warmup_steps=10", {"optimizer": Optimizer(learning_rate=0.001, warmup_steps=10)}),
        ("optimizer={learning_rate: 0.5}", {"optimizer": Optimizer(learning_rate=0.5)}),
    ],
)
def test_an_override_replaces_a_value(override, change, write):
    path = write(VALID)
    if change is None:
        with pytest.raises(ConfigError, match="name: input should be a valid string, got None"):
            load_config(path, Training, [override])
    else:
        assert load_config(path, Training, [override]) == load_config(path, Training).model_copy(update=change)


def test_the_last_override_counts_and_may_fill_in_what_a_file_lacks(write):
    config = load_config(write("name: x"), Training, ["seed=1", "optimizer.learning_rate=0.5", "seed=2"])
    assert (config.seed, config.optimizer.learning_rate) == (2, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set seed: expected key=value, such as training\.seed=1$"),
        ("=1", "--set =1: expected key=value"),
        ("seed=[1", r"--set seed=\[1: the value is not valid YAML$"),
        ("name.first=1", r"--set name\.first=1: name is a value, not a section$"),
        ("layers.2=1", r"--set layers\.2=1: expected a place in a list of 2, from 0, got 2$"),
        ("layers.0.a=1", r"--set layers\.0\.a=1: 0 is a value, not a section$"),
        ("sede=1", r"train\.yaml: sede: unknown key, got 1$"),
        ("optimizer.lr=1", r"train\.yaml: optimizer\.lr: unknown key, got 1$"),
        ("seed=x", r"train\.yaml: seed: input should be a valid integer, got 'x'$"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override, message, write):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(VALID), Training, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["1e-4", "1E5", "+2e3", "1.0e-4"])
def test_a_number_with_an_exponent_is_a_number(number, write):
    in_file = load_config(write(VALID.replace("0.001", number)), Training)
    overridden = load_config(write(VALID), Training, [f"optimizer.learning_rate={number}"])
    assert in_file.optimizer.learning_rate == overridden.optimizer.learning_rate == float(number)


def test_values_from_elsewhere_are_named_by_their_origin():
    with pytest.raises(ConfigError, match=r"^deployment router: name: missing"):
        check_config({}, Training, where="deployment router")
