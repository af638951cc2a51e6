"""Numbers as French spells them: the pairs and texts that the examples train on without DATA."""

from __future__ import annotations

ONES = (
    "zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze",
    "douze", "treize", "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf",
)  # fmt: skip
TENS = ("", "", "vingt", "trente", "quarante", "cinquante", "soixante", "", "quatre-vingt")


def in_french(number: int) -> str:
    """Return a number from 0 to 999 999 in words: 1984 → mille neuf cent quatre-vingt-quatre."""
    thousands, rest = divmod(number, 1000)
    if not thousands:
        return _below_1000(rest, last=True)
    words = "mille" if thousands == 1 else f"{_below_1000(thousands, last=False)} mille"
    return f"{words} {_below_1000(rest, last=True)}" if rest else words


def _below_1000(number: int, last: bool) -> str:
    """`last`: nothing follows, so that "cent" and "quatre-vingt" have their s."""
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return _below_100(rest, last)
    words = "cent" if hundreds == 1 else f"{ONES[hundreds]} cent"
    if rest:
        return f"{words} {_below_100(rest, last)}"
    return f"{words}s" if hundreds > 1 and last else words


def _below_100(number: int, last: bool) -> str:
    if number < 20:
        return ONES[number]
    ten, one = divmod(number, 10)
    if ten in (7, 9):  # soixante-dix, quatre-vingt-onze
        ten, one = ten - 1, one + 10
    if not one:
        return "quatre-vingts" if ten == 8 and last else TENS[ten]
    joint = " et " if one in (1, 11) and ten != 8 else "-"
    return f"{TENS[ten]}{joint}{ONES[one]}"
