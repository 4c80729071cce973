"""AsyncErrataClient: the SDK for asyncio; the same methods as ErrataClient."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
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


class AsyncErrataClient:
    """The service at one address; what ErrataClient says of errors, retries and the API key holds here too."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        with connection_errors(base_url):
            self._http = httpx.AsyncClient(
                base_url=base_url,
                headers=authorization(api_key),
                timeout=timeouts(timeout_s),
                transport=transport or httpx.AsyncHTTPTransport(retries=RETRIES),
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def submit(
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
        return await self._send(call)

    async def submit_batch(self, edits: Iterable[EditRequest], *, idempotency_key: str | None = None) -> list[Edit]:
        """Stores up to 1,000 corrections, all or none."""
        return await self._send(calls.submit_batch(edits, idempotency_key))

    async def import_edits(self, source: ImportSource, *, idempotency_key: str | None = None) -> ImportReport:
        """Stores any number of corrections, from requests or from an NDJSON file; valid lines are kept.

        One that broke off may be repeated with the same key and content: what was stored is not stored again.
        """
        return await self._send(calls.import_edits(source, idempotency_key))

    async def edits(
        self, *, status: EditStatus | None = None, q: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page[Edit]:
        """One page of edits, newest first."""
        return await self._send(calls.edits(status, q, after, limit))

    async def all_edits(
        self, *, status: EditStatus | None = None, q: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[Edit]:
        """Every edit, newest first, page by page."""
        after: str | None = None
        while True:
            page = await self.edits(status=status, q=q, after=after, limit=page_size)
            for edit in page.data:
                yield edit
            if not page.has_more:
                return
            after = page.data[-1].id

    async def edit(self, edit_id: str) -> EditDetail:
        """One edit and the versions that contain it."""
        return await self._send(calls.edit(edit_id))

    async def status(self, edit_id: str, *, wait_s: float = 0) -> EditState:
        """Where an edit is in its life; waits up to so many seconds for a change."""
        return await self._send(calls.status(edit_id, wait_s))

    async def wait(
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
                await asyncio.sleep(step.pause_s)
                try:
                    state = await self._send(step.call)
                except ApiError as error:
                    step = plan.throw(error)
                else:
                    step = plan.send(state)
        except StopIteration as end:
            states: dict[str, EditState] = end.value
            return states

    async def retract(self, edit_id: str) -> Edit:
        """Takes an edit back."""
        return await self._send(calls.retract(edit_id))

    async def approve(self, edit_id: str) -> Edit:
        """Lets an edit that another key proposed be trained."""
        return await self._send(calls.approve(edit_id))

    async def release(self, edit_id: str) -> Edit:
        """Lets an edit that a rollback held join the cumulative set again."""
        return await self._send(calls.release(edit_id))

    async def versions(self, *, after: int | None = None, limit: int = 100) -> Page[Version]:
        """One page of versions, newest first."""
        return await self._send(calls.versions(after, limit))

    async def version(self, number: int) -> Version:
        """One version, and the nodes that hold it."""
        return await self._send(calls.version(number))

    async def diff(self, number: int, other: int) -> VersionDiff:
        """Edits that are in one version and not in the other."""
        return await self._send(calls.diff(number, other))

    async def activate(self, number: int, *, expected_active: int | None = None) -> Activation:
        """Makes a version the one that ``errata`` means, if ``expected_active`` is the active one or None."""
        return await self._send(calls.activate(number, expected_active))

    async def rollback(self, to: int | None = None) -> Activation:
        """Activates an older version; without a number, the one that was active before."""
        return await self._send(calls.rollback(to))

    async def runs(self, *, after: str | None = None, limit: int = 100) -> Page[Run]:
        """One page of runs, newest first."""
        return await self._send(calls.runs(after, limit))

    async def run(self, run_id: str) -> Run:
        """One run."""
        return await self._send(calls.run(run_id))

    async def start_run(self) -> Run:
        """Starts a run now, or names the one that already waits."""
        return await self._send(calls.start_run())

    async def cancel_run(self, run_id: str) -> Run:
        """Stops a run."""
        return await self._send(calls.cancel_run(run_id))

    async def audit(self, *, after: str | None = None, limit: int = 100) -> Page[AuditEntry]:
        """One page of who changed what the model says, newest first."""
        return await self._send(calls.audit(after, limit))

    async def health(self) -> Health:
        """Whether the service is ready, and what is missing."""
        return await self._send(calls.health())

    async def ask(
        self,
        prompt: str,
        *,
        model: str = "errata",
        chat: bool = False,
        max_tokens: int = 64,
        min_version: int | None = None,
    ) -> Answer:
        """The model's greedy answer; ``model`` may name a version: ``errata@7``, ``errata@0`` for the base."""
        return await self._send(calls.ask(prompt, model, chat=chat, max_tokens=max_tokens, min_version=min_version))

    async def events(self, *, after: str | None = None) -> AsyncIterator[Event]:
        """What happens, as it happens; ends when the service closes the stream. Go on with ``after=event.id``."""
        parser = EventParser()
        with connection_errors(self.base_url):
            async with self._http.stream(**event_request(after)) as response:
                if not response.is_success:
                    await response.aread()
                    raise ApiError.of(response)
                async for line in response.aiter_lines():
                    if event := parser.feed(line):
                        yield event

    async def _send(self, call: Call[T]) -> T:
        with connection_errors(self.base_url):
            body = None if call.body is None else _asynchronous(call.body)
            response = await self._http.request(content=body, **request_options(call, self._timeout_s))
        return call.result(response)


async def _asynchronous(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
