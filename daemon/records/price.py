"""What a row of usage costs by the public price list: an estimate beside the provider's own figure, never added to it.

A bucket sums many requests, so it is priced by rates. Handing its totals to the price list would trip the tiers for long
contexts, which look at one request, and come out up to 1.8 times too high.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time
from decimal import Context, Decimal
from typing import NamedTuple

from daemon.domain.record import Rating

UNPRICED = "unpriced"
LONG_TOKENS = 200_000
"""The input beyond which `Rating.is_long` calls a request long."""

FREE = frozenset({("openai", "moderation")})
"""Models that cost nothing by the vendor's word (https://developers.openai.com/api/docs/guides/moderation). Any other
price of zero means that the list bills the model in a unit which the row does not count."""

CACHED_MAX = 20_000

# The class of a count, and the price list's rates for it, the first that the model has. A class without a rate of its
# own costs what the class around it costs, as in the price list.
_RATES: Mapping[str, tuple[str, ...]] = {
    "input": ("input_mtok",),
    "cache_read": ("cache_read_mtok", "input_mtok"),
    "cache_write": ("cache_write_mtok", "input_mtok"),
    "cache_write_1h": ("cache_write_1h_mtok", "cache_write_mtok", "input_mtok"),
    "output": ("output_mtok",),
    "input_audio": ("input_audio_mtok", "input_mtok"),
    "input_image": ("input_image_mtok", "input_mtok"),
    "cache_audio_read": ("cache_audio_read_mtok", "cache_read_mtok", "input_audio_mtok", "input_mtok"),
    "cache_image_read": ("cache_image_read_mtok", "cache_read_mtok", "input_image_mtok", "input_mtok"),
    "output_audio": ("output_audio_mtok", "output_mtok"),
    "output_image": ("output_image_mtok", "output_mtok"),
    "web_search": ("web_searches_kcount",),
    "input_audio_seconds": ("input_audio_hours", "audio_hours"),
    "input_characters": ("input_mchars",),
}
_PER = {"mtok": 1_000_000, "kcount": 1_000, "hours": 3_600, "mchars": 1_000_000}
_RATES_CONTEXT = Context(prec=60)
"""Exact for all rates of the list but those by the hour, whose price of a second may have no end."""


class Priced(NamedTuple):
    """A local price. `amount` is in USD; None means that no price is known.

    `is_estimate` says that rates had to be guessed: a sum over context tiers, or a service tier that the price list
    does not know for that model and day. `rate_version` names the price list, or is "unpriced".
    """

    amount: Decimal | None
    is_estimate: bool
    rate_version: str


_UNKNOWN = Priced(None, is_estimate=False, rate_version=UNPRICED)


@dataclass(frozen=True, slots=True)
class _Card:
    """The rates of one model on one day, per unit."""

    rates: Mapping[str, Decimal]
    is_estimate: bool
    is_free: bool
    version: str


class Pricer:
    """Prices rows from the bundled price list, and keeps the rates that it looked up. Safe to share in a process.

    The first price takes about a second: the price list is imported then, so that commands without prices start fast.
    """

    def __init__(self) -> None:
        self._cards: dict[tuple[str, str, tuple[tuple[str, str], ...], bool | None, int], _Card | None] = {}

    def price(self, rating: Rating, at: datetime) -> Priced:
        """The price of a row whose bucket starts at `at` (UTC)."""
        key = (rating.provider, rating.model, rating.context, rating.is_long, at.toordinal())
        try:
            card = self._cards[key]
        except KeyError:
            if len(self._cards) >= CACHED_MAX:
                self._cards.clear()
            card = self._cards[key] = _look_up(rating, at)
        if card is None:
            return _UNKNOWN
        if card.is_free:
            return Priced(Decimal(0), is_estimate=False, rate_version=card.version)
        amount = Decimal(0)
        for name, count in rating.counts:
            rate = card.rates.get(name)
            if rate is None:
                return _UNKNOWN
            amount = _RATES_CONTEXT.fma(rate, count, amount)
        if not amount and any(count for _, count in rating.counts):
            return _UNKNOWN
        return Priced(amount, card.is_estimate, card.version)


def _look_up(rating: Rating, at: datetime) -> _Card | None:
    from genai_prices import __version__, data_snapshot  # noqa: PLC0415 - takes 0.9 s
    from genai_prices.types import Tier, TieredPrices  # noqa: PLC0415

    try:
        provider, model = data_snapshot.get_snapshot().find_provider_model(rating.model, None, rating.provider, None)
    except LookupError:
        return None
    day = datetime.combine(at.date(), time(), UTC)
    version = f"genai-prices {__version__}"
    if (provider.id, model.id) in FREE:
        return _Card({}, is_estimate=False, is_free=True, version=version)
    context = dict(rating.context)
    # The list gives the standard price for a choice that it does not know, and says nothing.
    known = {
        choice
        for variant in model.price_variants or ()
        if variant.constraint is None or variant.constraint.active(day)
        for choice in variant.when.items()
    }
    is_estimate = not known.issuperset(rating.context)
    prices = model.get_prices(day, context)

    def crossed(tiers: list[Tier]) -> Decimal | None:
        """The rate of a long request, when it is one; notes where that cannot be told."""
        nonlocal is_estimate
        below = [tier for tier in tiers if tier.start <= LONG_TOKENS]
        if rating.is_long is None or (rating.is_long and len(below) < len(tiers)):
            is_estimate = True
        if rating.is_long is False and any(tier.start < LONG_TOKENS for tier in tiers):
            is_estimate = True
        return below[-1].price if rating.is_long and below else None

    rates: dict[str, Decimal] = {}
    for name, candidates in _RATES.items():
        for candidate in candidates:
            price = getattr(prices, candidate, None)
            if isinstance(price, TieredPrices):
                price = crossed(price.tiers) or price.base
            if price is not None:
                rates[name] = _RATES_CONTEXT.divide(price, _PER[candidate.rsplit("_", 1)[1]])
                break
    return _Card(rates, is_estimate, is_free=False, version=version)
