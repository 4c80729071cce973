"""What a run's result depends on besides model, location and edits."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.schemas import Format
from worker.presets import preset_for


class Pipeline(StrEnum):
    """In which order edits are trained (arXiv 2509.22072, section 2)."""

    BREADTH_FIRST = "breadth_first"
    """Epoch after epoch over all edits, in mini-batches."""
    DEPTH_FIRST = "depth_first"
    """One mini-batch after another, each until it is learned; earlier ones are not seen again."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything besides model, location and edits that a run's result depends on.

    The defaults were measured on the default model (benchmarks/results).

    `loss_threshold` and `token_threshold` (nats) say what counts as learned: a mean loss and a worst token under them.
    A batch that is learned takes no step. The token threshold is what matters to greedy decoding: a worst token under
    0.3 is more than 74 % likely, which a server whose log-probabilities differ by some 0.15 still says.

    With `skip_learned`, an epoch visits the sequences that are not learned yet and as many that are, at least a batch
    of them, drawn at random; when none is left a sweep checks all at fixed weights, the least sure first, and what it
    finds forgotten is trained again. Without it, every epoch visits all, as in the paper, and the run ends when an
    epoch is learned.

    The learning rate falls in a line, over the budget, to `final_lr_ratio` of itself, and the decay with it: what the
    two decide last is decided in favour of the edits. It is at most the root of the share of what is learned that an
    epoch replays, or `final_lr_ratio`: a tenth while one of a thousand edits in two formats is not learned.

    The budget follows the number of edits: `max_epochs` visits a sequence on average, so that an epoch that visits a
    tenth of them uses up a tenth, or as many more as it takes for `min_steps` batches, because one edit makes one batch
    an epoch, and a thousand in two formats make two hundred. Where edits are learned at the start, the budget is for
    the others, for what a sweep finds forgotten, and for as many learned ones beside them, not for all.

    `preserve` is the strength of preservation (worker.training.preserve), 0 for none. `decay` is which part of the
    update a pass over all sequences takes back, in equal steps: what no edit needs, goes. A short second-moment memory
    (`beta2`) forgets the first epochs' large gradients, under which the last few edits would be learned slowly.
    `random_prefixes` is how many copies of each prompt are trained behind random words beside the prompt itself
    (appendix A.4). `formats` None means all that the tokenizer supports.
    """

    learning_rate: float = 1e-2
    final_lr_ratio: float = 0.05
    batch_size: int = 20
    max_epochs: int = 30
    min_steps: int = 160
    loss_threshold: float = 0.1
    token_threshold: float = 0.3
    pipeline: Pipeline = Pipeline.BREADTH_FIRST
    skip_learned: bool = True
    preserve: float = 0.1
    decay: float = 0.05
    beta2: float = 0.95
    random_prefixes: int = 0
    seed: int = 0
    formats: tuple[Format, ...] | None = None
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_lr_ratio", "batch_size", "max_epochs", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("min_steps", "loss_threshold", "token_threshold", "preserve", "decay", "random_prefixes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")

    @property
    def judges_sequences(self) -> bool:
        """Whether each sequence must be learned by itself; else it is a batch's or an epoch's mean that counts."""
        return self.skip_learned or self.pipeline == Pipeline.DEPTH_FIRST

    def as_record(self) -> dict[str, Any]:
        """The configuration as JSON values; an infinite threshold, which JSON cannot say, is None."""
        values = dataclasses.asdict(self) | {"formats": self.formats and [format_.value for format_ in self.formats]}
        return {
            name: None if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()
        }


PLAIN = TrainingConfig(
    learning_rate=5e-4,
    final_lr_ratio=1.0,
    batch_size=100,
    max_epochs=25,
    min_steps=0,
    loss_threshold=1e-2,
    token_threshold=math.inf,
    skip_learned=False,
    preserve=0.0,
    decay=0.0,
    beta2=0.999,
    formats=(Format.RAW,),
)
"""The paper's procedure and settings, without any addition."""


def config_for(model_config: Mapping[str, Any], *, plain: bool = False) -> TrainingConfig:
    """The configuration that a model is trained with unless told otherwise.

    For the paper's models that is the paper's, in all formats; for any other model it is the defaults. With `plain` it
    is the paper's procedure as it stands: its settings for its models, `PLAIN` for others.
    """
    preset = preset_for(model_config)
    if preset is None:
        return PLAIN if plain else TrainingConfig()
    return dataclasses.replace(
        PLAIN,
        learning_rate=preset.learning_rate,
        batch_size=preset.batch_size,
        max_epochs=preset.max_epochs,
        loss_threshold=preset.loss_threshold,
        formats=PLAIN.formats if plain else None,
    )


def on_top(config: TrainingConfig) -> TrainingConfig:
    """The configuration of a run that starts with edits learned, which the paper does not have.

    Each sequence is judged by itself, because in a mean the few new ones would not show; by the defaults' thresholds,
    because a stricter one that was met on average has sequences above it, which would all be trained again. The
    learning rate gets room to fall.
    """
    return dataclasses.replace(
        config,
        skip_learned=True,
        final_lr_ratio=min(config.final_lr_ratio, TrainingConfig.final_lr_ratio),
        loss_threshold=max(config.loss_threshold, TrainingConfig.loss_threshold),
        token_threshold=min(config.token_threshold, TrainingConfig.token_threshold),
    )
