"""A trained model behind HTTP, JSON rows in and probabilities out: what `serve` runs.

    POST /predict   {"rows": [{"column": value, ...}, ...]} -> {"probabilities": [p, ...]}
    GET /health     {"status": "ok", "run": ...}
    GET /metrics    counters since the start, as Prometheus reads them

Rows that come while the model computes wait, and are then computed by one call, whoever sent them. What is
refused gets a status from 400 on and {"error": reason}. This stands above models and data, as commands do.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from data_pipeline.bags import Bags, IdsOfRows, joined
from data_pipeline.schema import DataError
from robe.config import ConfigError
from robe.errors import RobeError
from robe.packages import extra
from robe.run_folder import TrainedModel

MOST_CONNECTIONS = 256
STOPPING = 30  # seconds that requests at hand have to end
JSON, TEXT = b"application/json", b"text/plain; version=0.0.4"

Value = str | int | float | bool | None
Cell = Value | list[str | int | None]  # the ids of a bag; those with weights are texts, "3:0.5"


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a question."""

    rows: list[dict[str, Cell]]


class Refused(Exception):
    """A request that cannot be answered: a status of HTTP and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Server:
    """The ASGI application.

    most_rows, most_bytes: of the body of a request.
    """

    def __init__(self, model: TrainedModel, most_rows: int, most_bytes: int):
        self.model, self.most_rows, self.most_bytes = model, most_rows, most_bytes
        self.schema = model.schema
        self.counts: Counter[str] = Counter()
        self.worker = ThreadPoolExecutor(1)
        self.waiting: list[tuple[np.ndarray, IdsOfRows, asyncio.Future]] = []
        self.computing: asyncio.Task | None = None

    async def __call__(self, scope: dict, receive: Callable[[], Awaitable[dict]], send: Callable) -> None:
        status, kind = 200, JSON
        try:
            if (asked := f"{scope['method']} {scope['path']}") == "POST /predict":
                answer = {"probabilities": await self._predict(await self._body(scope, receive))}
            elif asked == "GET /health":
                answer = {"status": "ok", "run": str(self.model.run)}
            elif asked == "GET /metrics":
                answer, kind = self._metrics(), TEXT
            else:
                known = {"/predict": "POST", "/health": "GET", "/metrics": "GET"}
                if scope["path"] in known:
                    raise Refused(405, f"{scope['path']} takes {known[scope['path']]} alone")
                raise Refused(404, f"there are {', '.join(known)}")
        except Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        except (DataError, RobeError) as error:
            status, answer = 400, {"error": str(error)}
        except ConnectionAbortedError:
            return  # who asked has gone
        except Exception:
            self.counts["500"] += 1
            raise  # to the log, and as 500 to who asked
        self.counts[str(status)] += 1
        body = answer.encode() if isinstance(answer, str) else msgspec.json.encode(answer)
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _body(self, scope: dict, receive: Callable[[], Awaitable[dict]]) -> bytes:
        """The body of a request; no more of it is kept than is allowed."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        size, parts, more = int(length) if length.isdigit() else 0, [], True
        while more and size <= self.most_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionAbortedError
            parts.append(message.get("body", b""))
            size, more = max(size, sum(map(len, parts))), message.get("more_body", False)
        if size > self.most_bytes:
            raise Refused(413, f"a body has at most {self.most_bytes:,} bytes; send its rows in parts")
        return b"".join(parts)

    async def _predict(self, body: bytes) -> list[float]:
        dense, ids = await asyncio.to_thread(self._read, body)
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((dense, ids, answer))
        if self.computing is None:
            self.computing = asyncio.create_task(self._compute())
        found = await answer
        if not (finite := np.isfinite(found)).all():
            raise Refused(400, f"row {np.argmin(finite)}: its probability is not finite; scale its numbers")
        return found.tolist()

    def _read(self, body: bytes) -> tuple[np.ndarray, IdsOfRows]:
        """The rows of a body as the model takes them; raises Refused or DataError."""
        try:
            rows = msgspec.json.decode(body, type=Request).rows
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            form = '{"rows": [{"column": value, ...}, ...]}'
            raise Refused(400, f"the body must be {form}: {error}") from None
        if not 1 <= len(rows) <= self.most_rows:
            raise Refused(413 if rows else 400, f"give from 1 to {self.most_rows:,} rows, not {len(rows):,}")
        names = self.schema.sources
        for number, row in enumerate(rows):
            if unknown := row.keys() - {*names, self.schema.label}:
                known = ", ".join(names)
                raise Refused(400, f"row {number}: {min(unknown)!r} is no column; there are {known}")
            if missing := [name for name in names if name not in row]:
                raise Refused(400, f"row {number}: lacks {missing[0]!r}; what is not known is null")
            single = (name for name in names if name not in self.schema.bags)
            if listed := [name for name in single if isinstance(row[name], list)]:
                raise Refused(
                    400, f"row {number}: {listed[0]!r} is a list, but that column has one value a row"
                )
        columns = {name: [row[name] for row in rows] for name in names}
        for name in self.schema.dense:  # in JSON 1 and 1.5 are of one type
            try:
                columns[name] = [float(v) if type(v) is int else v for v in columns[name]]
            except OverflowError:
                raise Refused(400, f"{name!r} has a number that is too large for float64") from None
        return self.model.read_table(columns)

    async def _compute(self) -> None:
        """Answer those that wait, all at once, until nobody does."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting, []
            dense, ids = (joined([each[part] for each in batch]) for part in (0, 1))
            started = time.perf_counter()
            try:
                found = await loop.run_in_executor(self.worker, self.model.predict, dense, ids)
            except Exception as error:
                for *_, answer in batch:
                    if not answer.done():  # as it is once who asked has gone
                        answer.set_exception(error)
                continue
            self.counts.update(rows=len(dense), batches=1)
            self.counts["microseconds"] += round(1e6 * (time.perf_counter() - started))
            ends = np.cumsum([len(its) for its, *_ in batch])
            for (*_, answer), part in zip(batch, np.split(found, ends[:-1]), strict=True):
                if not answer.done():
                    answer.set_result(part)
        self.computing = None

    def _metrics(self) -> str:
        statuses = sorted(key for key in self.counts if key.isdigit())
        lines = [f'robe_requests_total{{status="{key}"}} {self.counts[key]}' for key in statuses]
        lines += [f"robe_{name}_total {self.counts[name]}" for name in ("rows", "batches")]
        lines.append(f"robe_prediction_seconds_total {self.counts['microseconds'] / 1e6}")
        return "".join(f"{line}\n" for line in lines)


def serve(model: TrainedModel, host: str, port: int, most_rows: int, most_bytes: int) -> None:
    """Answer until asked to stop, by SIGTERM or Ctrl-C; requests at hand are then still answered."""
    try:
        import uvicorn
    except ImportError:
        raise ConfigError(f"serving needs uvicorn: {extra('serve')}") from None
    for name, value in (("--max-rows", most_rows), ("--max-bytes", most_bytes)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be from 0 to {2**16 - 1}, not {port}")
    server = Server(model, most_rows, most_bytes)
    # The first call compiles, or loads, the kernels.
    ids: IdsOfRows = np.zeros((1, len(model.data.cardinalities)), np.uint32)
    if model.data.pooling:
        ids = Bags(ids[0], np.arange(ids.size + 1), None)
    model.predict(np.zeros((1, model.data.dense)), ids)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{host}, port {port}: {reason}; choose another --host or --port") from None
    # Head and body of an answer are written one after the other: else the second waits, some 40 ms, until the
    # first is acknowledged. Connections inherit it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with listening, server.worker:
        print(f"{model.run}: http://{host}:{listening.getsockname()[1]}/predict answers", flush=True)
        config = uvicorn.Config(
            server,
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=STOPPING,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # which uvicorn raises again when all is done
