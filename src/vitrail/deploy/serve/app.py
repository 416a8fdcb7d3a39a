"""The addresses of a server, as a FastAPI app: what is asked where, and how it is answered.

An error is `{"error": "what, and what to do"}` everywhere: Triton's client reads no other.
"""

import asyncio
import base64
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from vitrail import __version__
from vitrail.data import UnreadableImage
from vitrail.deploy.answers import palette, told
from vitrail.deploy.serve import kserve
from vitrail.deploy.serve.bodies import images_in, whole_body
from vitrail.deploy.serve.counts import CONTENT_TYPE
from vitrail.deploy.serve.gate import Gate, Tokens, busy
from vitrail.deploy.serve.service import Failed, Full, Late, Served, Service
from vitrail.errors import DataError

T = TypeVar("T")
TIMEOUT = "x-request-timeout"
"""The header in which a client says for how many seconds it wants an answer."""
_FILE, _TEXT = {"type": "string", "format": "binary"}, {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"schema": {"type": "object", "properties": properties}}


_BODIES = {
    "application/octet-stream": {"schema": _FILE},
    "image/*": {"schema": _FILE},
    "multipart/form-data": _object(image=_FILE),
    "application/json": _object(image=_TEXT, images={"type": "array", "items": _TEXT}),
}
_INFERENCES = {
    "application/json": _object(inputs={"type": "array"}),
    "application/octet-stream": {"schema": _FILE},
}
_MEANINGS = {
    400: "What is sent cannot be read",
    401: "A token is needed",
    403: "Not from this page, or not under this name",
    404: "There is no such thing here",
    405: "Not with this method",
    408: "The request took too long to come",
    413: "Too large, or too many images",
    415: "A kind of body that is not read",
    422: "An image that cannot be decoded, or a parameter out of range",
    429: "More than can be answered now: Retry-After says when to come again",
    431: "Headers that are too long",
    500: "A fault of the server's",
    503: "Stopping, or not ready",
    504: "No answer in time",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "content": {"application/json": _object(error=_TEXT)}}
    for status, meaning in _MEANINGS.items()
}


def make_app(service: Service, tokens: Tokens, *, local: bool) -> ASGIApp:
    """All that is served. `local`: as of `Gate`."""
    app = FastAPI(
        title="vitrail",
        version=__version__,
        docs_url=None,  # pages that fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    _add_errors(app, service)
    _add_health(app, service)
    _add_predict(app, service)
    _add_kserve(app, service)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=1)
    return Gate(app, service, tokens, local=local)


def _add_errors(app: FastAPI, service: Service) -> None:
    def error(status: int, text: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.exception_handler(AnyHTTPException)
    async def _(request: Request, fault: AnyHTTPException) -> Response:
        return error(fault.status_code, str(fault.detail), fault.headers)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, fault: RequestValidationError) -> Response:
        first = fault.errors()[0]
        return error(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(UnreadableImage)
    async def _(request: Request, fault: UnreadableImage) -> Response:
        return error(422, f"cannot read the image: {fault.reason}")

    @app.exception_handler(Full)
    async def _(request: Request, fault: Full) -> Response:
        refusal = busy(429, service)
        headers = {name.decode(): value.decode() for name, value in refusal.headers.items()}
        return error(refusal.status, refusal.error, headers)

    @app.exception_handler(Late)
    async def _(request: Request, fault: Late) -> Response:
        return error(504, "there was no answer in time: ask for less, or wait longer")

    @app.exception_handler(Failed)
    async def _(request: Request, fault: Failed) -> Response:
        return error(500, "the model failed on this image; the server's log says how")

    @app.exception_handler(ClientDisconnect)
    async def _(request: Request, fault: ClientDisconnect) -> Response:
        return error(499, "hung up")  # which nobody reads

    @app.exception_handler(Exception)
    async def _(request: Request, fault: Exception) -> Response:
        text = "a fault of the server's, of which its log says more"
        return error(500, text, {"connection": "close"})


def _add_health(app: FastAPI, service: Service) -> None:
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/health/live")
    @app.get("/v2/health/live", tags=["KServe"])
    async def live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/health/ready")
    @app.get("/v2/health/ready", tags=["KServe"])
    async def ready() -> Response:
        if service.draining:
            return JSONResponse({"error": "this server is stopping"}, 503)
        return JSONResponse({"ready": True})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics(), media_type=CONTENT_TYPE)

    @app.get("/card")
    async def card() -> Response:
        """What is to be known of the model, and how its classes are coloured."""
        model = service.served.model
        first = int(model.kind == "detect")  # the palette begins with black, for a background
        colours = palette(len(model.names) + first)[first:].tolist()
        return JSONResponse({**service.card(), "colours": colours})


def _add_predict(app: FastAPI, service: Service) -> None:
    @app.post(
        "/predict",
        openapi_extra={"requestBody": {"required": True, "content": _BODIES}},
    )
    async def predict(
        request: Request,
        top: Annotated[int | None, Query(ge=1, description="of classes, the likeliest")] = None,
        score: Annotated[float | None, Query(ge=0, le=1, description="of boxes, the least")] = None,
        mask: Annotated[bool, Query(description="of masks, a PNG in base64 too")] = False,
    ) -> Response:
        """What the model says of an image, or, of several, a list of `answers`."""
        served = service.served
        seconds = _seconds(request.headers.get(TIMEOUT), service)

        def plain(answers: list[Any]) -> list[dict[str, Any]]:
            return [
                {"error": str(one)}
                if isinstance(one, UnreadableImage)
                else plainly(served, one, top, score, mask)
                for one in answers
            ]

        async with whole_body(request, service) as body:
            images, several = await images_in(request.headers, body, service.limits)
            with service.admitted(len(images)):
                due = time.monotonic() + seconds
                asked = [service.answer(served, image, due) for image in images]
                answers = await _unless_gone(request, asked, several)
                found = await _aside(served, plain, answers)
        return JSONResponse({"answers": found} if several else found[0])


def _add_kserve(app: FastAPI, service: Service) -> None:
    def named(model: str, version: str = kserve.VERSION) -> Served:
        if model != service.served.name or version != kserve.VERSION:
            raise HTTPException(
                404,
                f"unknown model '{model[:60]}', version '{version[:20]}': this server has "
                f"'{service.served.name}', version '{kserve.VERSION}'",
            )
        return service.served

    def get(path: str, tell: Callable[[Served], Any]) -> None:
        @app.get(f"/v2/models/{{model}}{path}", tags=["KServe"])
        async def about(model: str) -> Response:
            return JSONResponse(tell(named(model)))

        @app.get(f"/v2/models/{{model}}/versions/{{version}}{path}", tags=["KServe"])
        async def about_version(model: str, version: str) -> Response:
            return JSONResponse(tell(named(model, version)))

    @app.get("/v2", tags=["KServe"])
    async def server() -> Response:
        return JSONResponse(kserve.SERVER)

    @app.get("/v2/models/stats", tags=["KServe"])
    async def stats() -> Response:
        return JSONResponse(_stats(service.served, service))

    get("", kserve.describe)
    get("/ready", lambda served: {"ready": True})
    get("/config", lambda served: kserve.config(served, service.limits.images))
    get("/stats", lambda served: _stats(served, service))

    content = {"requestBody": {"required": True, "content": _INFERENCES}}

    @app.post("/v2/models/{model}/infer", tags=["KServe"], openapi_extra=content)
    @app.post("/v2/models/{model}/versions/{version}/infer", tags=["KServe"], openapi_extra=content)
    async def infer(request: Request, model: str, version: str = kserve.VERSION) -> Response:
        """An inference; a body of JSON, or of JSON and tensors."""
        served = named(model, version)
        async with whole_body(request, service) as body:
            length = request.headers.get(kserve.LENGTH)
            asked = kserve.wanted(body, length, served.model.kind, service.limits)
            seconds = min(service.limits.answer_seconds, asked.seconds or math.inf)
            with service.admitted(len(asked.images)):
                due = time.monotonic() + seconds
                waited = [service.answer(served, image, due) for image in asked.images]
                answers = await _unless_gone(request, waited, False)
                answers = [shown_of(served, answer, None) for answer in answers]
                content, headers = await _aside(served, kserve.written, served, asked, answers)
        return Response(content, headers=headers)

    @app.post("/v2/repository/index", tags=["KServe"])
    async def models() -> Response:
        name = service.served.name
        row = {"name": name, "version": kserve.VERSION, "state": "READY", "reason": ""}
        return JSONResponse([row])

    @app.post("/v2/repository/models/{model}/load", tags=["KServe"])
    async def load(model: str) -> Response:
        """Take what lies in the model's place now."""
        named(model)
        try:
            await service.reload()
            service.reloaded()
        except DataError as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse({})

    @app.post("/v2/repository/models/{model}/unload", tags=["KServe"])
    async def unload(model: str) -> Response:
        named(model)
        raise HTTPException(400, "this server has one model, and keeps it: stop the server")


def plainly(
    served: Served, answer: Any, top: int | None, score: float | None, mask: bool
) -> dict[str, Any]:
    """An answer as plain values; with its mask as a PNG in base64."""
    found = told(shown_of(served, answer, score), top)
    if mask and served.model.kind == "segment":
        found["mask"] = base64.b64encode(kserve.png(answer)).decode()
    return found


def shown_of(served: Served, answer: Any, score: float | None) -> Any:
    """The answer; of boxes those of at least this score, or of the model's own."""
    if served.model.kind != "detect":
        return answer
    return answer.above(served.threshold if score is None else score)


def _seconds(asked: str | None, service: Service) -> float:
    """How long an answer is waited for. Raises `HTTPException`."""
    if asked is None:
        return service.limits.answer_seconds
    try:
        wanted = float(asked)
    except ValueError:
        wanted = math.nan
    if not wanted > 0:
        raise HTTPException(400, f"{TIMEOUT} '{asked[:40]}': give a number of seconds")
    return min(service.limits.answer_seconds, wanted)


async def _aside(served: Served, work: Callable[..., T], *given: Any) -> T:
    """What a function makes; of masks, which may be large, in a thread."""
    return await asyncio.to_thread(work, *given) if served.model.kind == "segment" else work(*given)


async def _unless_gone(
    request: Request, asked: Sequence[Awaitable[Any]], several: bool
) -> list[Any]:
    """The answers, in their order; of `several` `UnreadableImage` is one.

    When the client hangs up, none is waited for: raises `ClientDisconnect`.
    """

    async def together() -> list[Any]:
        return await asyncio.gather(*asked, return_exceptions=True)

    work = asyncio.create_task(together())
    gone = asyncio.ensure_future(request.receive())  # after the body nothing else can come
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
    finally:
        work.cancel()
        gone.cancel()
    answers = work.result()
    for one in answers:
        if isinstance(one, BaseException) and not (several and isinstance(one, UnreadableImage)):
            raise one
    return answers


def _stats(served: Served, service: Service) -> dict[str, Any]:
    """As Triton counts: nanoseconds, and images."""
    value = service.counts.value
    images = int(value("vitrail_images_total"))

    def stage(name: str) -> dict[str, int]:
        count = int(value("vitrail_seconds_count", stage=name))
        return {"count": count, "ns": int(1e9 * value("vitrail_seconds_sum", stage=name))}

    row = {
        "name": served.name,
        "version": kserve.VERSION,
        "inference_count": images,
        "execution_count": int(value("vitrail_batch_images_count")),
        "inference_stats": {
            "success": stage("all"),
            "queue": stage("wait"),
            "compute_input": stage("decode"),
            "compute_infer": stage("engine"),
        },
    }
    return {"model_stats": [row]}


def _page() -> tuple[str, str]:
    """The page, and a policy by which nothing runs in it but its own script."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script, style = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (
            re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0],
            re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0],
        )
    )
    return text, (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        f"img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'"
    )
