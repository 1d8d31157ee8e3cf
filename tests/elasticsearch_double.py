"""A double of Elasticsearch that speaks the wire format of what the sink uses, and is strict: what a server would refuse, it refuses.

``_index_template``, ``_bulk`` and ``_search`` of data streams, with the product header that the official client insists on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from aiohttp import web

JSON_TYPES = ("application/vnd.elasticsearch+json", "application/json")
NDJSON_TYPES = ("application/vnd.elasticsearch+x-ndjson", "application/x-ndjson")


@dataclass
class Elasticsearch:
    """``busy``: so many bulk items, from the first on, are answered 429 each time they come. ``failing``: so many requests in a row are
    answered with ``status``; ``most``: items that one bulk may have; ``refuse``: ids or SKUs of documents that no mapping fits."""

    url: str = ""
    templates: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    failing: int = 0
    status: int = 503
    busy: int = 0
    most: int = 10**6
    refuse: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    bulks: list[int] = field(default_factory=list)

    def documents(self, stream: str = "inventory-discrepancies") -> list[dict[str, Any]]:
        return list(self.streams.get(stream, {}).values())


def _answer(status: int, body: Any) -> web.Response:
    return web.json_response(body, status=status, headers={"X-Elastic-Product": "Elasticsearch"})


def _error(status: int, kind: str, reason: str) -> web.Response:
    return _answer(status, {"error": {"type": kind, "reason": reason}, "status": status})


def _fits(kind: str, value: Any) -> bool:
    if kind in ("long", "date"):
        return type(value) is int and abs(value) < 2**63
    if kind == "keyword":
        return isinstance(value, str) and len(value.encode()) <= 32_766  # Lucene's longest term
    return isinstance(value, {"object": dict, "text": str}[kind])


class _Server:
    def __init__(self, state: Elasticsearch) -> None:
        self.state = state

    @web.middleware
    async def guarded(self, request: web.Request, handler: Any) -> web.StreamResponse:
        state = self.state
        state.requests.append(f"{request.method} {request.path}")
        if state.failing:
            state.failing -= 1
            return _error(state.status, "unavailable", "not now")
        if request.can_read_body:
            wanted = NDJSON_TYPES if request.path.endswith("_bulk") else JSON_TYPES
            if request.content_type not in wanted:
                return _error(406, "media_type_header_exception", f"Content-Type {request.content_type}")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def template(self, request: web.Request) -> web.Response:
        body = await request.json()
        unknown = set(body) - {"index_patterns", "data_stream", "priority", "template", "version", "_meta", "composed_of"}
        unknown |= set(body.get("template", {})) - {"mappings", "settings", "aliases", "lifecycle"}
        if unknown or not body.get("index_patterns"):
            return _error(400, "parse_exception", f"unknown or missing: {unknown}")
        properties = body["template"]["mappings"]["properties"]
        if body.get("data_stream") is None or properties.get("@timestamp", {}).get("type") != "date":
            return _error(400, "illegal_argument_exception", "a data stream needs a template with data_stream and a date @timestamp")
        self.state.templates[request.match_info["name"]] = body
        return _answer(200, {"acknowledged": True})

    def mapping(self, stream: str) -> dict[str, Any] | None:
        for body in sorted(self.state.templates.values(), key=lambda each: -each.get("priority", 0)):
            if any(fnmatchcase(stream, pattern) for pattern in body["index_patterns"]):
                mappings: dict[str, Any] = body["template"]["mappings"]
                return mappings
        return None

    async def bulk(self, request: web.Request) -> web.Response:
        raw = await request.read()
        if not raw.endswith(b"\n"):
            return _error(400, "illegal_argument_exception", "The bulk request must be terminated by a newline [\\n]")
        try:
            lines = [json.loads(line.decode()) for line in raw.split(b"\n")[:-1]]
        except ValueError as error:  # no UTF-8, or no JSON
            return _error(400, "x_content_parse_exception", str(error))
        if len(lines) // 2 > self.state.most:
            return _error(413, "content_too_large", "the request is too large")
        if not lines or len(lines) % 2:
            return _error(400, "illegal_argument_exception", "an action without its document")
        self.state.bulks.append(len(lines) // 2)
        items = [{"create": self.create(request, *lines[at : at + 2])} for at in range(0, len(lines), 2)]
        return _answer(200, {"took": 1, "errors": any(item["create"]["status"] >= 300 for item in items), "items": items})

    def create(self, request: web.Request, action: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        def refused(status: int, kind: str, reason: str) -> dict[str, Any]:
            return {"_index": stream, "_id": identity, "status": status, "error": {"type": kind, "reason": reason}}

        (verb, about), *more = action.items()
        stream, identity = about.get("_index", ""), about.get("_id", "")
        if set(about) - {"_index", "_id"} or not 0 < len(identity.encode()) <= 512:
            return refused(400, "illegal_argument_exception", f"Malformed action/metadata line: {about}")
        if verb != "create" or more:
            return refused(400, "illegal_argument_exception", "only write ops with an op_type of create are allowed in data streams")
        if request.query.get("require_data_stream") != "true":
            return refused(400, "strict_double", "the sink asks for a data stream, so that a typo makes no index")
        mapping = self.mapping(stream)
        if mapping is None:
            return refused(404, "index_not_found_exception", f"no such data stream [{stream}], and no template matches it")
        if self.state.busy:
            self.state.busy -= 1
            return refused(429, "es_rejected_execution_exception", "rejected execution")
        if {identity, document.get("sku")} & self.state.refuse:
            return refused(400, "document_parsing_exception", "no mapping fits")
        for name, value in document.items():
            kind = mapping["properties"].get(name)
            if kind is None and mapping.get("dynamic") == "strict":
                return refused(400, "strict_dynamic_mapping_exception", f"introduction of [{name}] is not allowed")
            if kind is None:
                mapping["properties"][name] = {"type": "text"}  # as a server would, in the index: a test sees that it grew
            elif value is not None and not _fits(kind["type"], value):
                return refused(400, "document_parsing_exception", f"[{name}] is {value!r}, not {kind['type']}")
        if "@timestamp" not in document:
            return refused(400, "document_parsing_exception", "data stream timestamp field [@timestamp] is missing")
        if identity in self.state.streams.setdefault(stream, {}):
            return refused(409, "version_conflict_engine_exception", f"[{identity}]: document already exists")
        self.state.streams[stream][identity] = document
        return {"_index": f".ds-{stream}-2026.11.25-000001", "_id": identity, "_version": 1, "result": "created", "status": 201}

    async def search(self, request: web.Request) -> web.Response:
        body = await request.json()
        stream = request.match_info["index"]
        if stream not in self.state.streams:
            return _error(404, "index_not_found_exception", f"no such index [{stream}]")
        mapping = self.mapping(stream)
        assert mapping is not None
        if set(body) - {"query", "sort", "size", "from", "_source"} or not 0 <= body.get("size", 10) <= 10_000:
            return _error(400, "illegal_argument_exception", "unknown keys, or a result window that is too large")
        found = self.state.documents(stream)
        for term in body["query"]["bool"]["filter"]:
            ((name, value),) = term["term"].items()
            if mapping["properties"].get(name, {}).get("type") != "keyword":
                return _error(400, "query_shard_exception", f"[{name}] is not a keyword")
            found = [each for each in found if each[name] == value]
        (order,) = body["sort"]
        found.sort(key=lambda each: -each["@timestamp"] if order["@timestamp"]["order"] == "desc" else each["@timestamp"])
        hits = [{"_index": stream, "_id": each["id"], "_source": each} for each in found[: body["size"]]]
        return _answer(200, {"took": 1, "timed_out": False, "hits": {"total": {"value": len(found), "relation": "eq"}, "hits": hits}})


@asynccontextmanager
async def elasticsearch(state: Elasticsearch | None = None) -> AsyncIterator[Elasticsearch]:
    """On a free port of loopback until the block ends."""
    double = state or Elasticsearch()
    server = _Server(double)
    app = web.Application(middlewares=[server.guarded], client_max_size=2**26)
    app.router.add_put("/_index_template/{name}", server.template)
    app.router.add_put("/_bulk", server.bulk)
    app.router.add_post("/_bulk", server.bulk)
    app.router.add_post("/{index}/_search", server.search)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        double.url = f"http://127.0.0.1:{port}"
        yield double
    finally:
        await runner.cleanup()
