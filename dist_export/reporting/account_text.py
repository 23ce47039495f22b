"""Write the account of a checkpoint's payload as text for people."""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.humanize import amount, count, few
from dist_export.manifest import AccountEntry

_LEFT_OUT = "left_out"


def say_account(account: AccountEntry) -> str:
    """Return the account as text for people."""

    def by_reason(what: str, sizes: Mapping[str, int]) -> str:
        reasons = ", ".join(f"{reason} {amount(size)}" for reason, size in sizes.items())
        return f"{what} {amount(sum(sizes.values()))} ({reasons})" if sizes else ""

    names = [tensor.name for tensor in account.others if tensor.fate == _LEFT_OUT]
    parts = [
        f"exported {amount(account.exported)}",
        f"in the program {amount(account.in_program)}" if account.in_program else "",
        by_reason("dropped", account.dropped),
        by_reason("left out", account.left_out) + (f": {few(names)}" if names else ""),
    ]
    return f"{count(account.tensors, 'tensor')}, {amount(account.num_bytes)}: {', '.join(filter(None, parts))}"
