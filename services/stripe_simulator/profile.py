"""A profile: one YAML file that says how a simulator behaves, what goes wrong, and what it holds at first.

    mode            live or sandbox: the documented rates and webhook retries of either; none by default
    config          fields of SimulatorConfig, over what the mode set
    seed            for chance and lag, instead of config.seed
    customers       ids, or objects as POST /v1/customers takes them plus `id`
    meters          event names, or objects as POST /v1/billing/meters takes them plus `id` and `status`
    faults          rules of requests, as POST /_simulator/faults takes them
    webhook_faults  rules of deliveries, as POST /_simulator/webhook_faults takes them

Everything is checked before anything starts; InvalidProfile names the place and what is allowed there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import yaml

from services.stripe_simulator.config import SimulatorConfig
from services.stripe_simulator.deliveries import read_webhook_rule
from services.stripe_simulator.errors import ApiError, Json
from services.stripe_simulator.faults import RULES_MAX, read_rule
from services.stripe_simulator.meters import Registry
from services.stripe_simulator.seeding import customer_from, meter_from
from services.stripe_simulator.store import Store

T = TypeVar("T")

BYTES_MAX = 1024 * 1024
SECTIONS = ("mode", "config", "seed", "customers", "meters", "faults", "webhook_faults")
#: Rates from docs.stripe.com/rate-limits, retries from docs.stripe.com/webhooks.
MODES: dict[str, Json] = {
    "live": {"rate_per_second": 1000.0, "basic_rate_per_second": 100.0, "webhook_retries": "live"},
    "sandbox": {"rate_per_second": 25.0, "basic_rate_per_second": None, "webhook_retries": "sandbox"},
}
#: Where it listens and what it keeps is said by whoever starts it.
OUTSIDE = frozenset({"host", "port", "data_path"})
CONFIG_FIELDS = tuple(one.name for one in fields(SimulatorConfig) if one.name not in OUTSIDE)


class InvalidProfile(ValueError):
    """The file cannot be used; the message names the place in it."""


@dataclass(frozen=True, slots=True)
class Profile:
    config: Json = field(default_factory=dict)
    customers: list[Any] = field(default_factory=list)
    meters: list[Any] = field(default_factory=list)
    faults: list[Json] = field(default_factory=list)
    webhook_faults: list[Json] = field(default_factory=list)


EMPTY = Profile()


def load_profile(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidProfile(f"cannot read {path}: {reason}") from error
    try:
        return read_profile(text)
    except InvalidProfile as error:
        raise InvalidProfile(f"{path}: {error}") from error


def read_profile(text: str) -> Profile:
    if len(text) > BYTES_MAX:
        raise InvalidProfile(f"a profile has at most {BYTES_MAX} characters")
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidProfile(f"not YAML: {' '.join(str(error).split())}") from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise InvalidProfile(f"a profile is a mapping with some of {', '.join(SECTIONS)}")
    _refuse_unknown(given, SECTIONS, "the profile")
    return Profile(
        config=_config(given),
        customers=_list(given, "customers", _customer),
        meters=_list(given, "meters", _meter(Registry(Store(None)))),
        faults=_list(given, "faults", _rule(read_rule)),
        webhook_faults=_list(given, "webhook_faults", _rule(read_webhook_rule)),
    )


def _config(given: Json) -> Json:
    mode = given.get("mode")
    if mode is not None and mode not in MODES:
        raise InvalidProfile(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    named = given.get("config")
    named = {} if named is None else named
    if not isinstance(named, dict):
        raise InvalidProfile("config is a mapping of names to values")
    _refuse_unknown(named, CONFIG_FIELDS, "config")
    if "seed" in given:
        named = named | {"seed": given["seed"]}
    hints = get_type_hints(SimulatorConfig)
    config: Json = dict(MODES.get(str(mode), {}))
    for name, value in named.items():
        place = "seed" if name == "seed" and "seed" in given else f"config.{name}"
        config[name] = _converted(value, hints[name], place)
    try:
        SimulatorConfig(**config)
    except ValueError as error:
        raise InvalidProfile(f"config: {error}") from error
    return config


def _converted(value: object, hint: Any, place: str) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise InvalidProfile(f"{place}: {error}") from error


def _list(given: Json, name: str, read: Callable[[Any], T]) -> list[T]:
    items = given.get(name)
    items = [] if items is None else items
    if not isinstance(items, list):
        raise InvalidProfile(f"{name} is a list")
    if name.endswith("faults") and len(items) > RULES_MAX:
        raise InvalidProfile(f"{name} has at most {RULES_MAX} rules")
    result = []
    for number, item in enumerate(items):
        try:
            result.append(read(item))
        except ApiError as error:
            raise InvalidProfile(f"{name}[{number}]: {error.message}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidProfile(f"{name}[{number}]: {error}") from error
    return result


def _customer(given: Any) -> Any:
    _need_id(given)
    customer_from(given, 0)
    return given


def _meter(registry: Registry) -> Callable[[Any], Any]:
    """Keeps each meter in an empty registry, which refuses a second active one of the same event name."""

    def checked(given: Any) -> Any:
        _need_id(given)
        registry.keep_meter(meter_from(given, 0))
        return given

    return checked


def _need_id(given: Any) -> None:
    if isinstance(given, dict) and "id" not in given:
        raise ValueError("id is needed, so that a restart finds the same object")


def _rule(read: Callable[[Any], object]) -> Callable[[Any], Json]:
    def checked(given: Any) -> Json:
        read(given)
        return dict(given)

    return checked


def _refuse_unknown(given: Json, known: tuple[str, ...], where: str) -> None:
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise InvalidProfile(f"unknown field {', '.join(unknown)}: {where} has {', '.join(known)}")
