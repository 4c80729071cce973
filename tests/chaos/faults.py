"""The kinds of faults by name, and the order in which a campaign injects them."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from tests.chaos import damage, messages, processes
from tests.chaos.world import World

Inject = Callable[[World, Random], None]
"""Does it, and returns when it is over: what was killed is dead, what was damaged is put right again."""

FAULTS: Mapping[str, Inject] = {
    "API killed": processes.service_killed,
    "control worker killed": processes.control_worker_killed,
    "train worker killed while it trains": processes.train_worker_killed,
    "Redis killed": processes.redis_killed,
    "Redis restarted": processes.redis_restarted,
    "node killed": processes.node_killed,
    "everything killed at once": processes.everything_killed,
    "train worker asleep past its lease": processes.train_worker_asleep,
    "node asleep": processes.node_asleep,
    "disk full under the train worker": processes.train_worker_disk_full,
    "disk full under Redis": processes.redis_disk_full,
    "version store away": damage.store_away,
    "committed delta with a flipped bit": damage.delta_flipped,
    "committed delta truncated": damage.delta_truncated,
    "node's cache damaged": damage.node_cache_damaged,
    "half-written version folders": damage.half_written_folders,
    "tasks delivered again": messages.tasks_delivered_again,
    "tasks lost": messages.tasks_lost,
    "claim left behind": messages.claim_left_behind,
    "Redis connections cut": messages.redis_connections_cut,
    "clients break off streams": messages.clients_break_off,
    "burst beyond the gateway's bound": messages.burst,
}


def order(random: Random, kinds: Sequence[str], count: int) -> list[str]:
    """So many faults: each kind once in random order, then each again."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += random.sample(list(kinds), len(kinds))
    return drawn[:count]
