"""Names of the Redis keys, one class for each noun. ``…`` stands for an id, a status, a version number or a hash."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache


@dataclass(frozen=True)
class EditKeys:
    """Keys that EditStore owns."""

    edit: str = "errata:edit:"  # … id: hash of one edit
    edits: str = "errata:edits"  # sorted set of all ids by sequence number
    edits_in: str = "errata:edits:in:"  # … status: sorted set of ids by sequence number
    seq: str = "errata:edits:seq"  # last sequence number given
    prompt: str = "errata:edits:prompt:"  # … SHA-256 of the normalised prompt: set of ids
    settled: str = "errata:edits:settled"  # number of the version that the statuses agree with
    unsettled: str = "errata:edits:unsettled"  # set of the prompts (SHA-256) of which an edit was put aside since
    idempotency: str = "errata:idempotency:"  # … actor:SHA-256 of the key: hash of body digest and ids; expires


@dataclass(frozen=True)
class VersionKeys:
    """Keys that VersionRegistry owns."""

    version: str = "errata:version:"  # … number: JSON record
    versions: str = "errata:versions"  # sorted set of committed numbers
    version_edits: str = "errata:version_edits:"  # … number: bitmap over the edits' sequence numbers
    version_confident: str = "errata:version_confident:"  # … number: bitmap of the edits answered right by a margin
    version_seq: str = "errata:versions:seq"  # last number given
    active: str = "errata:active"  # hash: version, previous, epoch, and the canary if there is one
    canary: str = "errata:canary"  # hash: version, since, and how requests ended meanwhile; there is one or none


@dataclass(frozen=True)
class RunKeys:
    """Keys that RunStore owns."""

    run: str = "errata:run:"  # … id: hash of one run
    runs: str = "errata:runs"  # sorted set of all ids by creation
    run_seq: str = "errata:runs:seq"
    next: str = "errata:runs:next"  # id of the one queued run
    current: str = "errata:runs:current"  # id of the one run under way
    token: str = "errata:runs:token"  # noqa: S105 - the last fencing token given
    lease: str = "errata:runs:lease"  # the current run's token, expiring unless renewed
    hold: str = "errata:runs:hold"  # a cancelled run stopped the triggers until there is news
    workers: str = "errata:workers"  # sorted set of train workers by last heartbeat, Unix seconds


@dataclass(frozen=True)
class NodeKeys:
    """Keys that EjectedNodes owns."""

    ejected: str = "errata:nodes:ejected"  # hash: JSON by address


@dataclass(frozen=True)
class EventKeys:
    """Keys that EventStream owns."""

    events: str = "errata:events"


@dataclass(frozen=True)
class MetricKeys:
    """Keys that Measures owns."""

    metrics: str = "errata:metrics"  # hash: counters and histograms' buckets, by metric and labels
    held: str = "errata:metrics:held"  # hash: JSON of the versions that a node held, by its address
    ticked: str = "errata:metrics:ticked"  # when the control worker last looked, Unix seconds


@dataclass(frozen=True)
class ApiKeyKeys:
    """Keys that KeyStore owns."""

    api_key: str = "errata:api_key:"  # … id: hash of one API key, its secret as a SHA-256
    api_keys: str = "errata:api_keys"  # list of all ids, newest first


@dataclass(frozen=True)
class AuditKeys:
    """Keys that AuditLog owns."""

    audit: str = "errata:audit"  # stream that is never trimmed


@cache
def all_keys() -> Mapping[str, str]:
    """Every key by its field's name, as the scripts want them."""
    owners = (EditKeys(), VersionKeys(), RunKeys(), EventKeys(), MetricKeys(), ApiKeyKeys(), AuditKeys())
    return {name: key for owner in owners for name, key in asdict(owner).items()}
