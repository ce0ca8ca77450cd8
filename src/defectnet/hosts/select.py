"""Deterministic choice of hosts under a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from defectnet.errors import InputError
from defectnet.hosts.sheet import Host


def select_hosts(candidates: Iterable[Host], n: int | None, seed: int, existing: Sequence[Host] = ()) -> list[Host]:
    """Choose hosts so that there are ``n`` together with ``existing``; None takes all candidates.

    Every candidate has a rank drawn from (seed, id) alone, uniform over candidates, and the lowest ranks win. So the
    choice does not depend on input order, a larger ``n`` adds to a smaller one, and new candidates displace few.
    Returns the new hosts in order of id. Raises :class:`InputError` when there are not enough.
    """
    taken = {host.id for host in existing}
    pool = sorted((host for host in candidates if host.id not in taken), key=lambda host: _rank(seed, host.id))
    wanted = len(pool) if n is None else max(n - len(taken), 0)
    if wanted > len(pool):
        raise InputError(
            f"--n: {n} hosts wanted, but only {len(taken) + len(pool)} are available; lower --n or relax the filters"
        )
    return sorted(pool[:wanted], key=lambda host: host.id)


def _rank(seed: int, host_id: str) -> str:
    """A uniformly distributed hexadecimal number; its own stream, so other draws from the seed are independent."""
    return hashlib.sha256(f"host-selection/{seed}/{host_id}".encode()).hexdigest()
