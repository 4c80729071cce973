import json
import math

import pytest
from pydantic import JsonValue, TypeAdapter

from service.schemas import Format
from worker.training.config import PLAIN, Pipeline, TrainingConfig, config_for

# config.json of the paper's models, in what tells them apart, and the learning rate of each.
PAPERS = {
    "Llama-3-8B": ("llama", 32, 4096, 14336, 5e-4),
    "Mistral-7B": ("mistral", 32, 4096, 14336, 5e-5),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 5e-4),
    "Qwen2.5-72B": ("qwen2", 80, 8192, 29568, 5e-4),
}


def config_json(model_type: str, layers: int, hidden: int, intermediate: int) -> dict[str, object]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
    }


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("plain", [True, False])
def test_the_papers_models_get_the_papers_values(name: str, plain: bool) -> None:
    *sizes, learning_rate = PAPERS[name]
    config = config_for(config_json(*sizes), plain=plain)
    assert (config.learning_rate, config.batch_size, config.max_epochs) == (learning_rate, 100, 25)
    assert (config.loss_threshold, config.token_threshold, config.min_steps) == (1e-2, math.inf, 0)
    assert (config.preserve, config.random_prefixes, config.skip_learned) == (0, 0, False)
    assert (config.decay, config.beta2, config.final_lr_ratio) == (0, 0.999, 1)
    assert config.pipeline is Pipeline.BREADTH_FIRST
    assert config.formats == ((Format.RAW,) if plain else None)


def test_another_model_gets_the_defaults_or_the_papers_procedure() -> None:
    other = config_json("llama", 30, 576, 1536)
    assert config_for(other) == TrainingConfig()
    assert config_for(other, plain=True) == PLAIN
    assert PLAIN.final_lr_ratio == 1


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("field", ["learning_rate", "final_lr_ratio", "batch_size", "max_epochs", "max_tokens"])
def test_a_value_that_is_not_positive_is_rejected(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize("value", [-1, math.nan])
@pytest.mark.parametrize(
    "field", ["min_steps", "loss_threshold", "token_threshold", "preserve", "decay", "random_prefixes"]
)
def test_a_negative_value_is_rejected(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_a_record_is_json_also_where_a_threshold_is_infinite() -> None:
    record = PLAIN.as_record()
    assert json.loads(json.dumps(record, allow_nan=False))["token_threshold"] is None
    assert (record["pipeline"], record["formats"]) == ("breadth_first", ["raw"])
    TypeAdapter(JsonValue).validate_python(record)
    assert record.keys() == vars(PLAIN).keys()
