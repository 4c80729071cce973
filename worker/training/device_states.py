"""Hidden states that stay on a GPU while a run visits them again and again.

From the host's cache each visit would read, check, copy and move them: for 3,000 edits in a model of 8 billion weights
tens of gigabytes in the paper's 25 epochs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.training.packing import to_device

_SHARE_OF_FREE_MEMORY = 0.25


def room_bytes(device: torch.device) -> int:
    """How much of a device's memory may hold states; none of a CPU's, where they are memory-mapped already."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE_OF_FREE_MEMORY * free)


class DeviceStates:
    """States by key, on one device. When there is no room for more, all are let go."""

    def __init__(self, device: torch.device, room_bytes: int) -> None:
        self._device = device
        self._room_bytes = room_bytes
        self._states: dict[bytes, Tensor] = {}
        self._bytes = 0

    def get(self, keys: Sequence[bytes], read: Callable[[Sequence[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The states of `keys`, each [tokens, hidden size], on the device, or where they are read from if too many.

        `read` is asked for what is not here, by its places among the keys, and answers with tensors on the CPU.
        """
        missing = {key: place for place, key in enumerate(keys) if key not in self._states}
        if missing:
            states = dict(zip(missing, read(list(missing.values())), strict=True))
            size = sum(state.nbytes for state in states.values())
            if self._bytes + size > self._room_bytes:
                if not self._states:
                    return [states[key] for key in keys]
                self._states, self._bytes = {}, 0
                return self.get(keys, read)
            self._states |= self._moved(states)
            self._bytes += size
        return [self._states[key] for key in keys]

    def _moved(self, states: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        together = to_device(torch.cat(list(states.values())), self._device)
        return dict(zip(states, together.split([len(state) for state in states.values()]), strict=True))
