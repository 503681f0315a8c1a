"""How an answer leaves, whole or not: resets, cut bodies and stalls at the level of the socket."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web

from services.stripe_simulator.errors import Answer
from services.stripe_simulator.faults import Fault

CUT_SHORT_BYTES = 500


async def deliver(
    request: web.Request, answer: Answer, headers: dict[str, str], fault: Fault, closing: asyncio.Event
) -> web.StreamResponse:
    """Send the answer as the fault wants it. Waiting ends early when the simulator shuts down."""
    if fault.resets:
        reset(request)
        return web.Response()
    if fault.name == "cut_body":
        response = await _start(request, answer, headers, len(answer.body) + CUT_SHORT_BYTES)
        if request.transport is not None:
            request.transport.close()
        return response
    if fault.name == "stall_body":
        response = await _start(request, answer, headers, len(answer.body))
        await pause(fault.seconds, closing)
        reset(request)
        return response
    if fault.name == "stall_before_answer":
        await pause(fault.seconds, closing)
    return web.Response(body=answer.body, status=answer.status, headers=headers)


async def _start(
    request: web.Request, answer: Answer, headers: dict[str, str], promised_length: int
) -> web.StreamResponse:
    """Send the headers and half of the body."""
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = promised_length
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    return response


def reset(request: web.Request) -> None:
    """Close with RST instead of FIN: linger on, zero seconds."""
    transport = request.transport
    if transport is None:
        return
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def pause(seconds: float, closing: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(closing.wait(), seconds)
    except TimeoutError:
        return
