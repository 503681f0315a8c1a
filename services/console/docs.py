"""Every answer of the operators' routes but the good one."""

from __future__ import annotations

from litestar.openapi.datastructures import ResponseSpec

from services.web.docs import documented
from services.web.problems import Problem

#: What any route may answer.
COMMON_RESPONSES: dict[int, ResponseSpec] = {
    401: documented("No API key, or one that is wrong, expired or revoked.", Problem),
    403: documented("The key lacks the scope.", Problem),
    500: documented("A defect on our side.", Problem),
    503: documented("PostgreSQL does not answer; wait for Retry-After and try again.", Problem),
}
#: Every answer to a list of adjustments but 200.
LIST_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("A parameter that does not exist, or a value that it does not take.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to a question about one thing but 200.
ONE_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("The id is none.", Problem),
    404: documented("There is nothing with this id, or it is of another tenant.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to an act on what is chosen but the good one.
ACT_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("A field that does not exist, a value it does not take, or nothing chosen.", Problem),
    409: documented("So many need `force`.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to a question about an hour but 200.
EXPLAIN_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("A parameter that is missing, unknown or not understood; or say which tenant.", Problem),
    404: documented("There is no such tenant, meter or customer; the path says which.", Problem),
    409: documented("Too many records would have to be read.", Problem),
    **COMMON_RESPONSES,
    429: documented("Enough questions to the log are under way; see `Retry-After`.", Problem),
    504: documented("It took too long: ask by command.", Problem),
}
#: Every answer to a decision but 200.
DECIDE_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("The request is malformed.", Problem),
    404: documented("No adjustment has this id, or it is of another tenant.", Problem),
    409: documented("It was decided the other way before, or it is too old to be approved.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer about one webhook event but 200.
SHOW_WEBHOOK_RESPONSES: dict[int, ResponseSpec] = {
    404: documented("No webhook event has this id.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to a replay of webhooks but 200.
REPLAY_WEBHOOKS_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("The body is malformed, or says nothing of which.", Problem),
    404: documented("An id that no webhook event has.", Problem),
    409: documented("None of the ids is dead or failed; or more than 10,000 without `force`.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to a pruning of webhooks but 200.
PRUNE_WEBHOOKS_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("The body is malformed.", Problem),
    **COMMON_RESPONSES,
}
#: Every answer to a request for a reconciliation but the good one.
RECONCILE_RESPONSES: dict[int, ResponseSpec] = {
    400: documented("The body is malformed, a time is none, or say of which tenant.", Problem),
    404: documented("There is no such tenant or meter; the path says which.", Problem),
    **COMMON_RESPONSES,
    429: documented("Enough runs wait already.", Problem),
}
