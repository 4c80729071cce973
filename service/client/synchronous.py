"""ErrataClient: the SDK for plain code."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import httpx

from service.client import calls
from service.client.calls import Answer, Call, ImportSource
from service.client.errors import ApiError, connection_errors
from service.client.sse import EventParser
from service.client.transport import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    RETRIES,
    authorization,
    event_request,
    request_options,
    timeouts,
)
from service.client.waiting import Seen, waiting
from service.schemas import (
    Activation,
    AuditEntry,
    Edit,
    EditDetail,
    EditRequest,
    EditState,
    EditStatus,
    Event,
    Health,
    ImportReport,
    Page,
    Run,
    Version,
    VersionDiff,
)

T = TypeVar("T")


class ErrataClient:
    """The service at one address.

    Every method raises ApiError if the service answers with an error, and ConnectionFailedError if it does not answer.
    A connection that cannot be made is tried again twice; a request that was sent is not. Without ``api_key`` the
    environment's ``ERRATA_API_KEY`` is sent, if there is one.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        with connection_errors(base_url):
            self._http = httpx.Client(
                base_url=base_url,
                headers=authorization(api_key),
                timeout=timeouts(timeout_s),
                transport=transport or httpx.HTTPTransport(retries=RETRIES),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def submit(
        self,
        prompt: str,
        target: str,
        *,
        rephrases: Sequence[str] = (),
        paraphrases: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Edit:
        """Stores a correction; with the same key and content a second time, answers with the same edit."""
        call = calls.submit(
            prompt,
            target,
            rephrases=rephrases,
            paraphrases=paraphrases,
            metadata=metadata,
            idempotency_key=idempotency_key,
        )
        return self._send(call)

    def submit_batch(self, edits: Iterable[EditRequest], *, idempotency_key: str | None = None) -> list[Edit]:
        """Stores up to 1,000 corrections, all or none."""
        return self._send(calls.submit_batch(edits, idempotency_key))

    def import_edits(self, source: ImportSource, *, idempotency_key: str | None = None) -> ImportReport:
        """Stores any number of corrections, from requests or from an NDJSON file; valid lines are kept.

        One that broke off may be repeated with the same key and content: what was stored is not stored again.
        """
        return self._send(calls.import_edits(source, idempotency_key))

    def edits(
        self, *, status: EditStatus | None = None, q: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page[Edit]:
        """One page of edits, newest first."""
        return self._send(calls.edits(status, q, after, limit))

    def all_edits(
        self, *, status: EditStatus | None = None, q: str | None = None, page_size: int = 1000
    ) -> Iterator[Edit]:
        """Every edit, newest first, page by page."""
        after: str | None = None
        while True:
            page = self.edits(status=status, q=q, after=after, limit=page_size)
            yield from page.data
            if not page.has_more:
                return
            after = page.data[-1].id

    def edit(self, edit_id: str) -> EditDetail:
        """One edit and the versions that contain it."""
        return self._send(calls.edit(edit_id))

    def status(self, edit_id: str, *, wait_s: float = 0) -> EditState:
        """Where an edit is in its life; waits up to so many seconds for a change."""
        return self._send(calls.status(edit_id, wait_s))

    def wait(
        self, edit_ids: Iterable[str], *, timeout_s: float = 600.0, on_change: Seen | None = None
    ) -> dict[str, EditState]:
        """Waits until every edit is at rest, and tells each change on the way; an API key's rate only slows it down.

        Raises:
            WaitTimeoutError: not all are at rest in time.
        """
        plan = waiting(edit_ids, timeout_s=timeout_s, on_change=on_change)
        try:
            step = next(plan)
            while True:
                time.sleep(step.pause_s)
                try:
                    state = self._send(step.call)
                except ApiError as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(state)
        except StopIteration as end:
            states: dict[str, EditState] = end.value
            return states

    def retract(self, edit_id: str) -> Edit:
        """Takes an edit back."""
        return self._send(calls.retract(edit_id))

    def approve(self, edit_id: str) -> Edit:
        """Lets an edit that another key proposed be trained."""
        return self._send(calls.approve(edit_id))

    def release(self, edit_id: str) -> Edit:
        """Lets an edit that a rollback held join the cumulative set again."""
        return self._send(calls.release(edit_id))

    def versions(self, *, after: int | None = None, limit: int = 100) -> Page[Version]:
        """One page of versions, newest first."""
        return self._send(calls.versions(after, limit))

    def version(self, number: int) -> Version:
        """One version, and the nodes that hold it."""
        return self._send(calls.version(number))

    def diff(self, number: int, other: int) -> VersionDiff:
        """Edits that are in one version and not in the other."""
        return self._send(calls.diff(number, other))

    def activate(self, number: int, *, expected_active: int | None = None) -> Activation:
        """Makes a version the one that ``errata`` means, if ``expected_active`` is the active one or None."""
        return self._send(calls.activate(number, expected_active))

    def rollback(self, to: int | None = None) -> Activation:
        """Activates an older version; without a number, the one that was active before."""
        return self._send(calls.rollback(to))

    def runs(self, *, after: str | None = None, limit: int = 100) -> Page[Run]:
        """One page of runs, newest first."""
        return self._send(calls.runs(after, limit))

    def run(self, run_id: str) -> Run:
        """One run."""
        return self._send(calls.run(run_id))

    def start_run(self) -> Run:
        """Starts a run now, or names the one that already waits."""
        return self._send(calls.start_run())

    def cancel_run(self, run_id: str) -> Run:
        """Stops a run."""
        return self._send(calls.cancel_run(run_id))

    def audit(self, *, after: str | None = None, limit: int = 100) -> Page[AuditEntry]:
        """One page of who changed what the model says, newest first."""
        return self._send(calls.audit(after, limit))

    def health(self) -> Health:
        """Whether the service is ready, and what is missing."""
        return self._send(calls.health())

    def ask(
        self,
        prompt: str,
        *,
        model: str = "errata",
        chat: bool = False,
        max_tokens: int = 64,
        min_version: int | None = None,
    ) -> Answer:
        """The model's greedy answer; ``model`` may name a version: ``errata@7``, ``errata@0`` for the base."""
        return self._send(calls.ask(prompt, model, chat=chat, max_tokens=max_tokens, min_version=min_version))

    def events(self, *, after: str | None = None) -> Iterator[Event]:
        """What happens, as it happens; ends when the service closes the stream. Go on with ``after=event.id``."""
        parser = EventParser()
        with connection_errors(self.base_url), self._http.stream(**event_request(after)) as response:
            if not response.is_success:
                response.read()
                raise ApiError.of(response)
            for line in response.iter_lines():
                if event := parser.feed(line):
                    yield event

    def _send(self, call: Call[T]) -> T:
        with connection_errors(self.base_url):
            response = self._http.request(content=call.body, **request_options(call, self._timeout_s))
        return call.result(response)
