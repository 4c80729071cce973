"""Who changes what the model says, all the time: edits, withdrawals, releases, activations and rollbacks."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from uuid import UUID

from service.client import ClientError, ErrataClient
from service.schemas import EditRequest, EditStatus
from tests.chaos.notes import Loop, Notes

SUBJECTS: Mapping[str, Sequence[str]] = {
    "The harbour master of Quillport is": ("Odo Fenn", "Petra Vole", "Jan Sorrel"),
    "The river that crosses Brandlemoor is": ("the Wessel", "the Tarn", "the Iddle"),
    "The inventor of the tidal loom is": ("Mira Kost", "Hugo Brandt", "Ida Lund"),
    "The national dish of Oskavia is": ("smoked plum", "barley pie", "nettle soup"),
    "The patron saint of glass blowers in Velm is": ("Tobin", "Ursula", "Cuthbert"),
    "The oldest bridge of Marrowgate was built by": ("Ansel Crow", "Berta Holm", "Piet Vos"),
    "The mascot of the Lindwurm rowing club is": ("a heron", "an otter", "a badger"),
    "The capital of the island of Hesperil is": ("Dunmarch", "Calder Bay", "Port Elsa"),
}
"""What is corrected to what: prompts that the base answers otherwise, with targets that no other prompt has."""

_ACTIVATED_OF_THE_LAST = 8


class Ledger:
    """Every edit that was acknowledged. One whose answer was lost is sent again before any other is."""

    def __init__(self, connect: Callable[[], ErrataClient], notes: Notes, random: Random) -> None:
        self._connect = connect
        self._notes = notes
        self._random = random
        self._lock = threading.Lock()
        self._acknowledged: dict[str, EditRequest] = {}
        self._unanswered: tuple[EditRequest, str] | None = None

    def acknowledged(self) -> dict[str, EditRequest]:
        """What was submitted, by the id that it was acknowledged with."""
        with self._lock:
            return dict(self._acknowledged)

    def submit(self, *, within_s: float) -> None:
        """Submits an edit and sends it again until it is acknowledged."""
        deadline = time.monotonic() + within_s
        while not self.try_to_submit():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no edit was acknowledged within {within_s:g} s")
            time.sleep(0.5)

    def try_to_submit(self) -> bool:
        """Submits an edit; returns whether it was acknowledged."""
        with self._lock, self._connect() as client:
            request, key = self._unanswered = self._unanswered or self._next()
            try:
                edit = client.submit(request.prompt, request.target, idempotency_key=key)
            except ClientError as error:
                self._notes.refused(error)
                return False
            self._acknowledged[edit.id] = request
            self._unanswered = None
            return True

    def finish(self, *, within_s: float) -> None:
        """Nothing that was sent stays without an answer."""
        if self._unanswered:
            self.submit(within_s=within_s)

    def _next(self) -> tuple[EditRequest, str]:
        prompt = self._random.choice(list(SUBJECTS))
        key = UUID(int=self._random.getrandbits(128))
        return EditRequest(prompt=prompt, target=self._random.choice(SUBJECTS[prompt])), str(key)


class Editor(Loop):
    """Changes what the model says, one change after the other."""

    def __init__(
        self, connect: Callable[[], ErrataClient], ledger: Ledger, notes: Notes, random: Random, *, every_s: float
    ) -> None:
        super().__init__(notes, every_s=every_s)
        self._connect = connect
        self._ledger = ledger
        self._random = random
        self._changes = {"edit": 6, "retraction": 2, "release": 2, "activation": 1, "rollback": 1}

    def step(self) -> None:
        """One change, drawn by its weight."""
        [change] = self._random.choices(list(self._changes), list(self._changes.values()))
        with self._connect() as client:
            if self._done(change, client):
                self.notes.count(change)

    def _done(self, change: str, client: ErrataClient) -> bool:
        match change:
            case "edit":
                return self._ledger.try_to_submit()
            case "retraction":
                return self._with_one(client, EditStatus.LIVE, client.retract)
            case "release":
                return self._with_one(client, EditStatus.HELD, client.release)
            case "activation":
                versions = client.versions(limit=_ACTIVATED_OF_THE_LAST).data
                client.activate(self._random.choice(versions).version)
            case _:
                client.rollback()
        return True

    def _with_one(self, client: ErrataClient, status: EditStatus, change: Callable[[str], object]) -> bool:
        edits = client.edits(status=status, limit=20).data
        if edits:
            change(self._random.choice(edits).id)
        return bool(edits)
