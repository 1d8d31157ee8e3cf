"""One order's way as OpenTelemetry spans: the decorated call, the batch that took its stock, the message, the ledger's transaction.

Off until ``enable()``; off, it costs each place that asks one look at ``active``. Needs the API only (extra ``otel``).

A call has a span of its own. Those who share a batch share its span: it is a child where all of them are of one trace, else it begins a
trace of its own; either way it links to each of them, and each of them to it. The message carries the context of its publication in
its headers, and the worker's transaction stands to its messages as a batch stands to its calls. What nobody traces has no span.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeVar

from inventory_sdk.errors import InventoryError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext, SpanKind, TracerProvider

C = TypeVar("C")

PARENT: Final = "traceparent"
HEADERS: Final = (PARENT, "tracestate")
"""Of a message: W3C Trace Context."""
MAX_LINKS: Final = 128
"""What an SDK keeps of a span unless it is told otherwise."""

active: Tracing | None = None


def enable(tracer_provider: TracerProvider | None = None) -> None:
    """Trace from now on, in this process; ``tracer_provider``: None is OpenTelemetry's global one. ``ImportError`` without the extra."""
    global active  # a process has one set of spans, as OpenTelemetry itself has one current span
    active = Tracing(tracer_provider)


def disable() -> None:
    """Trace no more."""
    global active  # see enable
    active = None


def current() -> AbstractContextManager[Mapping[str, str] | None]:
    """For one publication: a span of its own and the headers that carry it, where something traced is published; else None."""
    return nullcontext() if active is None else active.publishing()


def applying(carriers: Iterable[Mapping[str, str]], **facts: int) -> AbstractContextManager[None]:
    """Around a worker's dealing with messages that came with these headers."""
    return nullcontext() if active is None else active.applying(carriers, facts)


def transaction() -> AbstractContextManager[None]:
    """Around one transaction of the ledger, inside ``applying``."""
    return nullcontext() if active is None else active.transaction()


class Tracing:
    """The spans, while tracing is on."""

    def __init__(self, tracer_provider: TracerProvider | None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.context import Context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ImportError("tracing needs the extra otel: pip install 'inventory_sdk[otel]'") from error
        self._trace = trace
        self._nowhere = Context()
        self._carrier = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("inventory_sdk", tracer_provider=tracer_provider)

    async def call(self, name: str, proceed: Callable[[C], Awaitable[Any]], call: C) -> Any:
        """A decorated call. What the SDK refuses is an answer (``inventory.refused``), anything else that is raised an error."""
        with self._span(name, self._trace.SpanKind.INTERNAL) as span:
            try:
                return await proceed(call)
            except InventoryError as error:
                span.set_attribute("inventory.refused", type(error).__name__)
                raise
            except Exception as error:
                span.record_exception(error)
                span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
                raise

    def asking(self, operation: Sequence[Any]) -> Span | None:
        """The span that an operation is submitted in, told which one it is; None where nobody records one."""
        span = self._trace.get_current_span()
        if not span.is_recording():
            return None
        merchant, _, name = operation[1].partition("\x1f")
        if "\x1f" not in name:  # else derived: what it closes or undoes was named before
            span.set_attributes({"inventory.merchant": merchant, "inventory.operation_id": name})
            if operation[4]:
                span.set_attribute("inventory.order", operation[4])
        return span

    @contextmanager
    def batch(self, askers: Iterable[Span | None], partition: int, lane: str, operations: int) -> Iterator[None]:
        """Around one batch of operations that were submitted in these spans."""
        spans = list({id(span): span for span in askers if span is not None}.values())
        if not spans:
            with self._detached():
                yield
            return
        facts = {"inventory.partition": partition, "inventory.lane": lane, "inventory.operations": operations}
        with self._joining("inventory batch", self._trace.SpanKind.INTERNAL, [span.get_span_context() for span in spans], facts) as batch:
            for span in spans:
                if span.is_recording():  # its call may have gone away
                    span.add_link(batch.get_span_context())
            yield

    def carried(self) -> dict[str, str]:
        """The current span as headers; empty where nobody records one."""
        carrier: dict[str, str] = {}
        if self._sampled():
            self._carrier.inject(carrier)
        return carrier

    def journaled(self, epoch: int, sequence: int) -> None:
        """The batch that is sent stands at this position."""
        self._trace.get_current_span().set_attributes({"inventory.epoch": epoch, "inventory.sequence": sequence})

    @contextmanager
    def publishing(self) -> Iterator[Mapping[str, str] | None]:
        """See ``current``."""
        if not self._sampled():
            yield None
            return
        with self._span("inventory publish", self._trace.SpanKind.PRODUCER):
            yield self.carried()

    @contextmanager
    def applying(self, carriers: Iterable[Mapping[str, str]], facts: Mapping[str, int]) -> Iterator[None]:
        """See ``applying`` of the module."""
        contexts = [self._trace.get_current_span(self._carrier.extract(carrier, self._nowhere)).get_span_context() for carrier in carriers]
        contexts = [context for context in contexts if context.is_valid]
        if not contexts:
            with self._detached():
                yield
            return
        named = {f"inventory.{name}": value for name, value in facts.items()}
        with self._joining("inventory apply", self._trace.SpanKind.CONSUMER, contexts, named):
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See ``transaction`` of the module."""
        if not self._sampled():
            yield
            return
        with self._span("inventory ledger transaction", self._trace.SpanKind.CLIENT) as span:
            try:
                yield
            except Exception as error:
                span.record_exception(error)
                span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
                raise

    def _sampled(self) -> bool:
        """Also when it has ended by now: a batch has answered its callers before its entry is published."""
        context = self._trace.get_current_span().get_span_context()
        return context.is_valid and context.trace_flags.sampled

    def _span(self, name: str, kind: SpanKind) -> AbstractContextManager[Span]:
        return self._tracer.start_as_current_span(name, kind=kind, record_exception=False, set_status_on_exception=False)

    @contextmanager
    def _joining(self, name: str, kind: SpanKind, contexts: list[SpanContext], facts: Mapping[str, Any]) -> Iterator[Span]:
        """A span that stands for several: see the module."""
        trace = self._trace
        one = len({context.trace_id for context in contexts}) == 1
        parent = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0]), self._nowhere) if one else self._nowhere
        links = [trace.Link(context) for context in contexts[:MAX_LINKS]]
        with self._tracer.start_as_current_span(
            name, parent, kind, facts, links, record_exception=False, set_status_on_exception=False
        ) as span:
            yield span

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """No current span: a batch's task was begun by a call, and works for others by now."""
        with self._trace.use_span(self._trace.INVALID_SPAN):
            yield
