"""Answers of materials databases, kept on disk as they arrive.

A query has a folder, named after what was asked; each answer is a JSON file in it, written whole or not at all. Asking
again reads what is there and fetches the rest: an interrupted download goes on, a finished one needs no network, no key
and no client library. To ask anew, delete the folder.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from defectnet.digests import digest
from defectnet.errors import InputError
from defectnet.files import write_atomically

if TYPE_CHECKING:
    from mp_api.client import MPRester
    from optimade.client import OptimadeClient

log = logging.getLogger(__name__)

PAUSE_S = 0.5
"""Least time in seconds between two requests; a database may ask for more (``request_delay``)."""

RETRIES = 6
"""Times a request is repeated while the database is busy."""

BACKOFF_S = 1.0
"""The repetitions come when ``Retry-After`` says, or else after 0, 2, 4, 8, ... times this, in seconds."""

BUSY = (429, 500, 502, 503, 504)
"""HTTP answers after which the same request is repeated."""

OPTIMADE_FIELDS = (
    "chemical_formula_reduced",
    "dimension_types",
    "lattice_vectors",
    "cartesian_site_positions",
    "species",
    "species_at_sites",
)
"""What is asked of an OPTIMADE database, beside band gaps."""

MATERIALS_PROJECT_FIELDS = ("material_id", "structure", "band_gap")
"""What is asked of the Materials Project."""

MATERIALS_PER_PAGE = 500
"""Materials per request to the Materials Project."""

SECONDS_BETWEEN_LINES = 10.0


def optimade(
    provider: str, query: str, gap_fields: Sequence[str], folder: Path, page_limit: int | None = None
) -> list[Path]:
    """Pages of all structures that match an OPTIMADE filter, in order.

    ``provider`` is a base URL, or a provider id such as ``mp`` that is looked up and stands for all databases of that
    provider. Of the provider's own fields those that match the shell patterns ``gap_fields`` are asked for.
    ``page_limit`` is the number of structures per page, by default what the server thinks best.
    A page holds ``data``, ``meta``, ``links`` as the server sent them, and ``retrieved``, the date.
    Raises :class:`InputError` when the client library is missing, the filter is no OPTIMADE filter, or the provider
    refuses or stops answering; pages that arrived are kept.
    """
    databases = [provider]
    if "://" not in provider:
        databases = _kept(folder / f"optimade-{provider}.json", lambda: _databases(provider))
    return [page for database in databases for page in _optimade_pages(database, query, gap_fields, folder, page_limit)]


def _optimade_pages(
    database: str, query: str, gap_fields: Sequence[str], folder: Path, page_limit: int | None
) -> list[Path]:
    name = urlsplit(database).netloc.replace(":", "_")
    asked = {"database": database, "filter": query, "gap_fields": list(gap_fields), "page_limit": page_limit}
    folder = folder / f"{name}-{digest(**asked)[:8]}"
    _kept(folder / "query.json", lambda: asked)

    @cache
    def client() -> OptimadeClient:
        return _optimade_client(database, query)

    def fetch(url: str | None) -> dict[str, Any]:
        # One page per call: the client by itself neither continues where it stopped nor waits between pages.
        fields = None if url else [*OPTIMADE_FIELDS, *_offered(client(), database, gap_fields)]
        page = _ask_optimade(client(), database, query, response_fields=fields, page_limit=page_limit, override_url=url)
        time.sleep(max(PAUSE_S, page["meta"].get("request_delay") or 0.0))
        return page

    pages: list[Path] = []
    followed: set[str] = set()
    structures, url, tell = 0, None, _Progress(name)
    while not pages or url:
        file = folder / f"page-{len(pages):05d}.json"
        try:
            page = _kept(file, lambda url=url: fetch(url))
        except _RefusedError as error:
            raise InputError(
                f"--provider: {database}: {error}; {len(pages)} pages are kept in {folder}, run the same command again "
                "to go on from there"
            ) from None
        pages.append(file)
        structures += len(page["data"])
        tell(structures, page["meta"].get("data_returned"))
        url = page["links"].get("next") if page["data"] else None
        url = url["href"] if isinstance(url, dict) else url
        if url in followed:
            raise InputError(
                f"--provider: {database}: page {len(pages)} leads back to an earlier one; tell its maintainers"
            )
        followed.add(url)
    log.info("%s: %d structures in %s", name, structures, folder)
    return pages


class _RefusedError(Exception):
    """A database gave no answer, or an error for an answer."""


def _databases(provider: str) -> list[str]:
    """Base URLs of the databases of a provider id. Raises :class:`InputError` when there are none."""
    with _installed("optimade", "optimade[http-client]"):
        from optimade.utils import get_all_databases

    try:
        found = list(get_all_databases(include_providers=[provider], session=_patient_session()()))
    except Exception as error:  # whatever the list of providers, or what is served in its place, leads to
        raise InputError(f"--provider: {provider}: cannot be looked up ({error}); give its base URL instead") from None
    if not found:
        raise InputError(
            f"--provider: {provider}: no database answers to this id; look it up on optimade.org or give a base URL"
        )
    return found


def _optimade_client(database: str, query: str) -> OptimadeClient:
    with _installed("optimade", "optimade[http-client]"):
        from optimade.client import OptimadeClient
        from optimade.exceptions import BadRequest
        from optimade.filterparser import LarkParser

    try:
        LarkParser().parse(query)
    except BadRequest as error:
        message = " ".join(str(error).split())
        raise InputError(f"--filter: {query!r} is not an OPTIMADE filter ({message}); correct it") from None
    return OptimadeClient(base_urls=database, http_client=_patient_session(), silent=True)


def _offered(client: OptimadeClient, database: str, patterns: Sequence[str]) -> list[str]:
    """Fields of a database that match the patterns."""
    properties = _ask_optimade(client, database, "", endpoint="info/structures")["data"].get("properties", {})
    fields = sorted(name for name in properties if any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns))
    if not fields:
        log.warning("%s offers no field that matches %s: its hosts have no gap", database, ", ".join(patterns))
    return fields


def _ask_optimade(client: OptimadeClient, database: str, query: str, **options: Any) -> dict[str, Any]:
    """One answer, as the server sent it, with its date. Raises :class:`_RefusedError`."""
    options = {"endpoint": "structures", "paginate": False} | options
    answer = client.get_one(filter=query, base_url=database, **options)[database].asdict()
    if answer["errors"]:
        raise _RefusedError("; ".join(map(str, answer["errors"])))
    return answer | {"retrieved": _today()}


@cache
def _patient_session() -> type:
    """A session class that waits and asks again while a server is busy."""
    from requests import Session
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class PatientSession(Session):
        def __init__(self):
            super().__init__()
            retry = Retry(total=RETRIES, connect=2, status_forcelist=BUSY, backoff_factor=BACKOFF_S)
            for scheme in ("http://", "https://"):
                self.mount(scheme, HTTPAdapter(max_retries=retry))

    return PatientSession


def materials_project(query: Mapping[str, Any], folder: Path) -> list[Path]:
    """Pages of all materials that match arguments of ``MPRester.materials.summary.search``, in order of id.

    A page holds ``data``, one summary document per material (:data:`MATERIALS_PROJECT_FIELDS`), ``database``, the
    version, and ``retrieved``, the date. The list of ids is fetched first, so pages do not shift when the database
    changes in between. The key is read from ``MP_API_KEY`` and is not written anywhere.
    Raises :class:`InputError` when the client library or the key is missing, or the Materials Project refuses or stops
    answering; pages that arrived are kept.
    """
    folder = folder / f"materials-project-{digest(**query)[:8]}"
    _kept(folder / "query.json", lambda: dict(query))
    client = cache(_materials_project_client)

    def fetch(fields: Sequence[str], **criteria: Any) -> dict[str, Any]:
        try:
            found = client().materials.summary.search(**criteria, fields=list(fields))
        except InputError:
            raise
        except Exception as error:  # besides its own errors the client lets those of bad arguments and networks through
            message = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"materials-project: {message}; correct --filter, or run the same command again to go on: what arrived "
                f"is kept in {folder}"
            ) from None
        time.sleep(PAUSE_S)
        return {"data": found, "database": client().db_version, "retrieved": _today()}

    listed = _kept(folder / "ids.json", lambda: fetch(["material_id"], **query))
    ids = sorted(str(document["material_id"]) for document in listed["data"])
    pages: list[Path] = []
    tell = _Progress("materials-project")
    for first in range(0, len(ids), MATERIALS_PER_PAGE):
        pages.append(folder / f"page-{len(pages):05d}.json")
        wanted = ids[first : first + MATERIALS_PER_PAGE]
        _kept(pages[-1], lambda wanted=wanted: fetch(MATERIALS_PROJECT_FIELDS, material_ids=wanted))
        tell(first + len(wanted), len(ids))
    log.info("materials-project: %d structures in %s", len(ids), folder)
    return pages


def _materials_project_client() -> MPRester:
    with _installed("materials-project", "mp-api"):
        from mp_api.client import MPRester

    key = os.environ.get("MP_API_KEY")
    if not key:
        raise InputError(
            "MP_API_KEY: not set; get a key from https://materialsproject.org/api and `export MP_API_KEY=...`"
        )
    return MPRester(key, use_document_model=False, mute_progress_bars=True)


def _kept(file: Path, fetch: Callable[[], Any]) -> Any:
    """What a JSON file holds, fetched and written first if it does not exist."""
    if not file.exists():
        write_atomically(file, json.dumps(fetch()).encode())
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error}); delete it and run the same command again") from None


@contextmanager
def _installed(source: str, package: str) -> Iterator[None]:
    """Turn a failed import into an :class:`InputError` with the command that installs the package."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"--source {source}: {error}; run `pip install '{package}'`") from None


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


class _Progress:
    """Says every now and then how far a download has come."""

    def __init__(self, name: str):
        self.name, self.told = name, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            log.info("%s: %d of %s structures", self.name, done, "?" if total is None else total)
