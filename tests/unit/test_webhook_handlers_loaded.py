"""How a user's handlers are found: what is wrong is said before anything starts."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from services.webhooks import UserHandler
from services.webhooks.own import load_user_handlers
from services.wire.errors import Misconfigured


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("planted_handlers")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(
        good=UserHandler("good", ("invoice.*",), print),
        other=UserHandler("other", ("charge.failed",), print),
        again=UserHandler("good", ("*",), print),
        ours=UserHandler("tidemeter", ("*",), print),
        loud=UserHandler("Loud!", ("*",), print),
        text=UserHandler("text", "invoice.paid", print),  # type: ignore[arg-type]
        empty=UserHandler("empty", (), print),
        still=UserHandler("still", ("*",), None),  # type: ignore[arg-type]
        plain=print,
    )
    return module


def test_handlers_are_named_by_module_and_name() -> None:
    found = load_user_handlers(" planted_handlers:good , planted_handlers:other,")
    assert [one.name for one in found] == ["good", "other"]
    assert load_user_handlers(None) == load_user_handlers("") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("planted_handlers", "module:name"),
        ("no_such_module_here:x", "cannot be imported"),
        ("planted_handlers:missing", "cannot be imported"),
        ("planted_handlers:plain", "no services.webhooks.UserHandler"),
        ("planted_handlers:ours", "is taken"),
        ("planted_handlers:good,planted_handlers:again", "is taken"),
        ("planted_handlers:loud", "a-z"),
        ("planted_handlers:text", "tuple of globs"),
        ("planted_handlers:empty", "tuple of globs"),
        ("planted_handlers:still", "cannot be called"),
    ],
)
def test_what_is_no_handler_is_a_sentence_for_the_operator(text: str, why: str) -> None:
    with pytest.raises(Misconfigured, match="TIDEMETER_WEBHOOK_HANDLERS") as caught:
        load_user_handlers(text)
    assert why in str(caught.value)


def test_a_module_that_exits_when_it_is_imported_is_no_way_out(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with open(f"{tmp_path}/exiting_handlers.py", "w", encoding="utf-8") as file:
        file.write("raise SystemExit(0)\n")
    with pytest.raises(Misconfigured, match="SystemExit"):
        load_user_handlers("exiting_handlers:x")


@pytest.mark.parametrize(
    ("pattern", "event_type", "takes"),
    [
        ("invoice.*", "invoice.paid", True),
        ("invoice.*", "invoiceitem.created", False),
        ("*", "anything.at.all", True),
        ("charge.failed", "charge.failed", True),
        ("charge.failed", "charge.failed.again", False),
        ("Charge.*", "charge.failed", False),
    ],
)
def test_types_are_globs(pattern: str, event_type: str, takes: bool) -> None:
    assert UserHandler("one", (pattern,), print).takes(event_type) is takes
