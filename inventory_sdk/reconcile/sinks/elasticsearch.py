"""Elasticsearch: a data stream of documents, with an index template of its own, written in bulk through the official async client.

It was tested against a double that speaks the wire format (``_index_template``, ``_bulk``, ``_search``), not against a server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics.events import Retried
from inventory_sdk.reconcile.sinks.protocol import Document, SinkAway, SinkRefused, document
from inventory_sdk.sync.backoff import Backoff

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch

    from inventory_sdk.beside import Ground

CHUNK: Final = 500
"""Documents of one bulk request."""
TRIES: Final = 4
PASSES: Final = frozenset({408, 429, 500, 502, 503, 504})
"""What a server answers that is busy or on its way: the same again a little later may be taken."""
ALREADY_THERE: Final = 409
UNREADABLE: Final = frozenset({400, 413})
"""What a server answers to a request that it can't read, or that is too large: one document may be to blame for all."""

MAPPINGS: Final[dict[str, Any]] = {
    # A field that is not here is a defect of ours, and must not grow the mapping of a cluster that others use too.
    "dynamic": "strict",
    "properties": {
        "@timestamp": {"type": "date"},
        **{
            name: {"type": "keyword"}
            for name in ("id", "event", "namespace", "what", "name", "merchant", "sku", "reservation", "cause", "state")
        },
        **{name: {"type": "long"} for name in ("at_ms", "number", "available", "reserved", "found_ms", "resolved_ms")},
        # Kept and shown, and not searched: its names differ from cause to cause.
        "evidence": {"type": "object", "enabled": False},
        "correction": {"type": "object", "enabled": False},
    },
}


class ElasticsearchSink:
    """``hosts`` and ``options`` (``api_key``, ``basic_auth``, ``ca_certs``, …) are the client's. ``stream`` is the data stream's name.

    ``ImportError`` names the extra where the client is missing.
    """

    name = "elasticsearch"

    def __init__(
        self, hosts: str | Sequence[str], *, stream: str = "inventory-discrepancies", first_delay: float = 0.2, **options: Any
    ) -> None:
        try:
            import elasticsearch
        except ImportError as error:
            raise ImportError(f"ElasticsearchSink needs the client ({error}): pip install 'inventory_sdk[elasticsearch]'") from error
        if not stream or stream != stream.lower() or set(stream) & set('\\/*?"<>| ,#:') or stream[0] in "-_+.":
            raise InvalidOperation("stream", stream, "must be a data stream's name: lower case, no spaces or wildcards")
        self.stream = stream
        self._library = elasticsearch
        self._hosts = [hosts] if isinstance(hosts, str) else list(hosts)
        self._options = {"request_timeout": 10, **options, "max_retries": 0, "retry_on_timeout": False}
        self._first_delay = first_delay
        self._client: AsyncElasticsearch | None = None
        self._ground: Ground | None = None
        self._templated = False

    async def start(self, ground: Ground) -> None:
        """A client for this event loop; the first write makes the template."""
        self._ground = ground
        self._client = self._library.AsyncElasticsearch(self._hosts, **self._options)
        self._templated = False

    async def write(self, documents: Sequence[Document]) -> None:
        """In bulks; what the server was too busy for is sent again a few times. ``SinkAway`` when that was not enough,
        ``SinkRefused`` for documents that no mapping fits."""
        refused: dict[str, str] = {}
        for start in range(0, len(documents), CHUNK):
            await self._insist(list(documents[start : start + CHUNK]), refused)
        if refused:
            raise SinkRefused(list(refused), next(iter(refused.values())))

    async def _insist(self, waiting: list[Document], refused: dict[str, str]) -> None:
        backoff, why = Backoff(self._first_delay, 5.0), ""
        while waiting:
            if backoff.attempts:
                assert self._ground is not None
                self._ground.metrics.record(Retried("elasticsearch", why.partition(":")[0]))
            try:
                await self._make_template()
                waiting, why = await self._bulk(waiting, refused)
            except self._library.ApiError as error:
                if error.meta.status in UNREADABLE and self._templated:
                    await self._in_halves(waiting, refused, f"status {error.meta.status}: {error.body}")
                    return
                if error.meta.status not in PASSES:
                    raise SinkAway(f"Elasticsearch refused: {error.meta.status} {error.body}") from error
                why = f"status {error.meta.status}"
            except self._library.TransportError as error:
                why = f"{type(error).__name__}: {error}"
            if waiting and backoff.attempts + 1 >= TRIES:
                raise SinkAway(f"Elasticsearch did not take {len(waiting)} documents: {why}")
            if waiting:
                await asyncio.sleep(backoff.delay())

    async def _in_halves(self, documents: list[Document], refused: dict[str, str], why: str) -> None:
        """Until the one that can't be read stands alone: it must not hold up the others for ever."""
        if len(documents) == 1:
            refused[documents[0].id] = why
            return
        middle = len(documents) // 2
        await self._insist(documents[:middle], refused)
        await self._insist(documents[middle:], refused)

    async def _make_template(self) -> None:
        """The template must stand before the first document: without it that document would make an ordinary index."""
        if not self._templated:
            assert self._client is not None, "started"
            await self._client.indices.put_index_template(
                name=self.stream, index_patterns=[self.stream], data_stream={}, priority=200, template={"mappings": MAPPINGS}
            )
            self._templated = True

    async def _bulk(self, documents: Sequence[Document], refused: dict[str, str]) -> tuple[list[Document], str]:
        """One request; the documents that were not taken yet, and why."""
        assert self._client is not None, "started"
        operations: list[Any] = []
        for each in documents:
            # ``create`` under an id of ours: sent twice it is there once, and a data stream takes nothing else. In ASCII: a reason may
            # hold what no UTF-8 can, and the client would send it.
            operations.append(json.dumps({"create": {"_index": self.stream, "_id": each.id}}))
            operations.append(json.dumps({"@timestamp": each.at_ms, **each.fields()}))
        answer = await self._client.bulk(operations=operations, require_data_stream=True)
        if not answer["errors"]:
            return [], ""
        left: list[Document] = []
        why = ""
        for each, item in zip(documents, answer["items"], strict=True):
            status = int(item["create"]["status"])
            if status in (200, 201, ALREADY_THERE):
                continue
            if status in PASSES:
                why = f"status {status}: {item['create'].get('error')}"
                left.append(each)
            else:
                refused[each.id] = f"status {status}: {item['create'].get('error')}"
        return left, why

    async def search(
        self, *, merchant: str | None = None, sku: str | None = None, cause: str | None = None, event: str | None = None, limit: int = 50
    ) -> list[Document]:
        """The newest documents that match, none before the first was written. What was written a moment ago appears after the index'
        refresh (a second, by default)."""
        assert self._client is not None, "started"
        wanted = {"merchant": merchant, "sku": sku, "cause": cause, "event": event}
        terms = [{"term": {name: value}} for name, value in wanted.items() if value is not None]
        try:
            found = await self._client.search(
                index=self.stream, query={"bool": {"filter": terms}}, sort=[{"@timestamp": {"order": "desc"}}], size=limit
            )
        except self._library.NotFoundError:
            return []
        return [document(hit["_source"]) for hit in found["hits"]["hits"]]

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
