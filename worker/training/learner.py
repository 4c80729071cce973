"""The tuned tensors while they are trained: fp32 masters, the optimiser, one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.model import BaseModel
from worker.training.config import TrainingConfig
from worker.training.encode import TokenSequence
from worker.training.objective import batch_loss
from worker.training.packing import pack, to_device
from worker.training.parallel import Ranks
from worker.training.partial_forward import logits_above
from worker.training.prefix import PrefixCache
from worker.training.preserve import Factors


@dataclass(frozen=True)
class Losses:
    """What a batch's sequences lost before its step, on the device.

    `per_sequence` and `worst_token` are [sequences] fp32, nats, in the batch's order; `stepped` is a bool scalar.
    """

    per_sequence: Tensor
    worst_token: Tensor
    stepped: Tensor


class Learner:
    """What is trained is an update: a tuned tensor is its start plus the update through the preservation's factor.

    Master copies and optimiser states are fp32. The model computes in its own dtype, but always with values that a
    version can hold: what is learned is what will be served.
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainingConfig,
        prefix: PrefixCache,
        *,
        start: Mapping[str, Tensor],
        factors: Factors,
        ranks: Ranks,
    ) -> None:
        self._base = base
        self._config = config
        self._prefix = prefix
        self._ranks = ranks
        devices = {name: tensor.device for name, tensor in base.tuned_tensors().items()}
        self._start = {name: start[name].detach().to(device, torch.float32) for name, device in devices.items()}
        self._factors = {name: factor.to(devices[name], base.model.dtype) for name, factor in factors.items()}
        self.updates = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in self._start.items()}
        # What decays is the update: the tensors are pulled to where they started, not to zero.
        self.optimiser = torch.optim.AdamW(
            self.updates.values(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=0.0,  # set before every step
            fused=True,
        )

    def visit(self, batch: Sequence[TokenSequence], *, share: float = 1.0) -> Losses:
        """Look at a batch, which is this `share` of all sequences, and, unless it is learned, take a step.

        Nothing waits for the device: whether to step is decided there, by the switch that fused optimisers have for
        overflowing gradients. A loss that is not finite takes no step either.
        """
        mine = self._ranks.share(batch)
        self.optimiser.zero_grad()
        per_sequence = worst_token = torch.zeros(0, device=self._base.device)
        if mine:
            total, per_sequence, worst_token = self._forward(mine)
            torch.autograd.backward(total / len(batch))
        per_sequence = self._ranks.gather(per_sequence, len(batch))
        worst_token = self._ranks.gather(worst_token, len(batch))
        self._ranks.reduce(list(self.updates.values()))
        mean = per_sequence.mean()
        # Judged otherwise than its sequences, a batch could be called learned while one of them never is.
        judged = per_sequence.max() if self._config.judges_sequences else mean
        learned = (judged < self._config.loss_threshold) & (worst_token.max() < self._config.token_threshold)
        stepped = ~learned & mean.isfinite()
        self._step(stepped, decay=self._config.decay * share)
        return Losses(per_sequence, worst_token, stepped)

    def start_over(self) -> None:
        """Forget the gradients so far: moments and step count of the optimiser begin at zero. The updates stay."""
        self.optimiser.state.clear()

    def set_learning_rate(self, progress: float, *, at_most: float = 1.0) -> None:
        """Set the learning rate for what comes: learning_rate * max(final, min(at_most, 1 - (1 - final) * progress)).

        Args:
            progress: the part of the budget that is used up, from 0 to 1.
            at_most: a bound on the ratio to the configuration's learning rate; `final`, its `final_lr_ratio`, is kept.
        """
        final = self._config.final_lr_ratio
        ratio = max(min(at_most, 1 - (1 - final) * progress), final)
        (group,) = self.optimiser.param_groups
        group["lr"] = self._config.learning_rate * ratio

    def _step(self, wanted: Tensor, *, decay: float) -> None:
        (group,) = self.optimiser.param_groups
        # AdamW takes back the product with the rate, so that the decay falls with the rate.
        group["weight_decay"] = decay / self._config.learning_rate
        # What torch.amp.GradScaler sets on an optimiser that can skip a step by itself.
        vars(self.optimiser).update(grad_scale=None, found_inf=(~wanted).float())
        self.optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        """The tuned tensors as they are now, in a version's dtype, on the model's device."""
        with torch.no_grad():
            return {name: weight.to(self._base.dtype) for name, weight in self._weights().items()}

    def state(self) -> dict[str, Tensor]:
        """Updates and optimiser states by name, copies on the CPU."""
        state: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            kept = {"update": update.detach(), **self.optimiser.state.get(update, {})}
            state |= {f"{name}:{part}": tensor.to("cpu", copy=True) for part, tensor in kept.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, update in self.updates.items():
            parts = {key.rpartition(":")[2]: value for key, value in state.items() if key.rpartition(":")[0] == name}
            with torch.no_grad():
                update.copy_(parts.pop("update"))
            self.optimiser.state[update] = {part: value.to(update.device) for part, value in parts.items()}

    def _forward(self, batch: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the losses, with its gradient; each sequence's loss and worst token, in the batch's order."""
        packing = pack(batch).to(self._base.device)
        hidden = self._prefix.row(self._base, packing, batch)
        logits = logits_above(self._base, self._weights(), packing, hidden)
        loss = batch_loss(logits, packing.target_ids, packing.target_counts)
        place = to_device(torch.tensor(packing.order).argsort(), self._base.device)
        return loss.total, loss.per_sequence[place], loss.worst_token[place]

    def _weights(self) -> dict[str, Tensor]:
        dtype = self._base.model.dtype
        weights: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            factor = self._factors.get(name)
            change = update if factor is None else (update.to(dtype) @ factor).float()
            weights[name] = (self._start[name] + change).to(self._base.dtype).to(dtype)
        return weights
