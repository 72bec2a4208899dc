"""What stands before the routes: keys, sizes, pages of browsers; and how what goes wrong is told."""

import hmac
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relearn_jax.errors import InputError
from relearn_jax.process import FULL, disk_trouble
from relearn_jax.serve.engine import Busy
from relearn_jax.serve.http_server import KEY, is_loopback
from relearn_jax.serve.limits import Limits
from relearn_jax.serve.wire import problem

LOG = logging.getLogger(__name__)
MAX_BODY = 16 * 1024**2  # bytes of a request that is no upload
FORM = 64 * 1024  # bytes that a form has beside its file


class Refusal(Exception):
  """A status with its message."""

  def __init__(self, status: int, message: str, **more: Any):
    self.status, self.body = status, problem(message, **more)


class Guard:
  """What every request passes first: its key, and its size, counted while it comes in."""

  def __init__(self, app: ASGIApp, key: str, limits: Limits):
    self.app, self.limits = app, limits
    self.wanted = f"Bearer {key}".encode() if key else b""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    headers = dict(scope["headers"])
    if self.wanted and not hmac.compare_digest(headers.get(b"authorization", b""), self.wanted):
      refusal = problem("The key is missing or wrong.", kind="authentication_error", code="invalid_api_key")
      await JSONResponse(refusal, 401)(scope, receive, send)
      return
    # A web page that a person has open may reach this machine, too, under a name of its own.
    host = headers.get(b"host", b"").decode("latin-1").rpartition(":")[0] or headers.get(b"host", b"").decode("latin-1")
    if not self.wanted and (b"origin" in headers or not is_loopback(host.strip("[]"))):
      refusal = problem(f"Pages of browsers are served with a key alone; set {KEY}.", kind="authentication_error")
      await JSONResponse(refusal, 403)(scope, receive, send)
      return
    upload = scope["path"] == "/v1/files" and scope["method"] == "POST"
    most, seen = self.limits.max_upload + FORM if upload else MAX_BODY, 0
    stated = headers.get(b"content-length", b"0")
    too_large = problem(f"The request is larger than {most} bytes.", code="request_too_large")
    if stated.isdigit() and int(stated) > most:
      await JSONResponse(too_large, 413, {"connection": "close"})(scope, receive, send)
      return

    class TooLarge(Exception):
      pass

    async def counted() -> Message:
      nonlocal seen
      message = await receive()
      seen += len(message.get("body", b""))
      if seen > most:
        raise TooLarge
      return message
    try:
      await self.app(scope, counted, send)
    except TooLarge:
      await JSONResponse(too_large, 413, {"connection": "close"})(scope, receive, send)


def add_errors(app: FastAPI) -> None:
  """Every refusal and every failure has the form that clients expect."""
  async def refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status)

  async def input_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InputError)
    return JSONResponse(problem(str(error), param=error.field), 400)

  async def busy(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(problem("Too many requests wait.", kind="rate_limit_error", code="busy"), 429,
                        {"retry-after": "1"})

  async def system(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OSError)
    LOG.warning("the disk refused: %s", error.strerror)
    full = error.errno in FULL or disk_trouble(error, {}) is not None
    return JSONResponse(problem(f"The server's disk refused ({error.strerror}).", kind="server_error"),
                        507 if full else 500)

  async def other(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(problem("The server failed; its log has more.", kind="server_error"), 500)

  async def refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(problem(str(error.detail)), error.status_code)
  app.add_exception_handler(Refusal, refusal)
  app.add_exception_handler(InputError, input_error)
  app.add_exception_handler(Busy, busy)
  app.add_exception_handler(OSError, system)
  app.add_exception_handler(HTTPException, refused)
  app.add_exception_handler(Exception, other)
