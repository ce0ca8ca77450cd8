"""Databases as host sources: the real clients against a server on this machine that fails the way databases do."""

import json
import logging
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from test_hosts import GAAS, RUTILE, SILICON, ids, optimade_entry, problems_of, run
from typer.testing import CliRunner

from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.errors import InputError
from defectnet.hosts import downloads, sources
from defectnet.hosts.commands import app
from defectnet.hosts.sheet import check_hosts, read_sheet

PER_PAGE = 3


def rock_salts(n: int) -> list[Structure]:
    """Distinct crystals."""
    metals = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Mn", "Fe", "Co", "Ni"][:n]
    return [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.0 + 0.1 * i), [metal, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        for i, metal in enumerate(metals)
    ]


def works(number: int, path: str) -> int:
    return 200


class Server:
    """A server that answers with a function of path and parameters, except where it is told to fail.

    ``fault`` takes the number of a request (from 1) and its path and gives an HTTP status, 0 for a connection that is
    cut off.
    """

    def __init__(self, answer):
        self.requests: list[str] = []
        self.fault = works
        self.request_delay: float | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                parts = urlsplit(self.path)
                server.requests.append(self.path)
                status = server.fault(len(server.requests), self.path)
                body = json.dumps(
                    answer(server, parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()})
                    if status == 200
                    else {"errors": [{"title": "Fault", "detail": f"made up, {status}"}], "meta": {}}
                ).encode()
                if status == 0:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"{")
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if status in (429, 503):
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()

    def forget(self) -> None:
        self.requests.clear()
        self.fault = works

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)
    monkeypatch.setattr(downloads, "BACKOFF_S", 0.0)


# --- OPTIMADE ---------------------------------------------------------------------------------------------------------

HOSTS = [GAAS, RUTILE, SILICON]


@cache
def optimade_entries() -> list[dict]:
    """Seven structures; one is a slab, one has no id of the provider's, gaps stand in a field of the provider's own."""
    entries = [optimade_entry(host, _test_band_gap=1.0 + i) for i, host in enumerate(HOSTS)]
    for i, structure in enumerate(rock_salts(3)):
        formula = structure.reduced_formula
        entries.append(
            {
                "id": f"test-{i}",
                "type": "structures",
                "attributes": {
                    "chemical_formula_reduced": formula,
                    "dimension_types": None,
                    "lattice_vectors": structure.lattice.matrix.tolist(),
                    "cartesian_site_positions": structure.cart_coords.tolist(),
                    "species_at_sites": [site.specie.symbol for site in structure],
                    "species": [
                        {"name": e.symbol, "chemical_symbols": [e.symbol], "concentration": [1.0]}
                        for e in structure.composition
                    ],
                    "_test_band_gap": None,
                },
            }
        )
    slab = optimade_entry(GAAS, dimension_types=[1, 1, 0])
    return [*entries, {**slab, "id": "slab"}]


def optimade_answer(server: Server, path: str, asked: dict) -> dict:
    """What the OPTIMADE specification (1.1) prescribes for links, info and structures, in pages."""
    meta = {
        "api_version": "1.1.0",
        "query": {"representation": path},
        "more_data_available": False,
        "request_delay": server.request_delay,
        "provider": {"name": "Test", "description": "A test", "prefix": "test"},
    }
    if path == "/v1/links":
        link = {"name": "Test", "description": "A test", "homepage": None, "aggregate": "ok"}
        child = {"id": "main", "type": "links", "attributes": {**link, "base_url": server.url, "link_type": "child"}}
        provider = {"id": "test", "type": "links", "attributes": {**link, "base_url": server.url + "/index"}}
        provider["attributes"]["link_type"] = "external"
        return {"data": [provider, child], "meta": meta}
    if path == "/index/v1/links":
        attributes = {"name": "Test", "description": "A test", "homepage": None, "aggregate": "ok"}
        attributes |= {"base_url": server.url, "link_type": "child"}
        return {"data": [{"id": "main", "type": "links", "attributes": attributes}], "meta": meta}
    if path == "/v1/info/structures":
        fields = [*optimade_entries()[0]["attributes"], "nsites", "_test_energy"]
        known = {field: {"description": field} for field in fields}
        return {"data": {"description": "structures", "properties": known}, "meta": meta}
    assert path == "/v1/structures"
    entries = optimade_entries()
    first, count = int(asked.get("page_offset", 0)), int(asked.get("page_limit", PER_PAGE))
    fields = asked["response_fields"].split(",")
    page = [
        entry | {"attributes": {name: entry["attributes"].get(name) for name in fields}}
        for entry in entries[first : first + count]
    ]
    left = first + count < len(entries)
    query = f"filter={asked['filter'].replace(' ', '+').replace('=', '%3D')}&response_fields={asked['response_fields']}"
    following = f"{server.url}/v1/structures?{query}&page_offset={first + count}&page_limit={count}"
    meta |= {"data_returned": len(entries), "data_available": 100, "more_data_available": left}
    return {"data": page, "links": {"next": {"href": following} if left else None}, "meta": meta}


@pytest.fixture
def optimade():
    pytest.importorskip("optimade.client", reason="needs the extra [optimade]")
    server = Server(optimade_answer)
    yield server
    server.close()


FILTER = "nelements=2"


def test_optimade_structures_become_hosts(optimade, tmp_path):
    found = sources.optimade([optimade.url], FILTER, tmp_path)
    assert ids(found.hosts) == ["test-GaAs-zincblende", "test-TiO2", "test-Si", "test-0", "test-1", "test-2"]
    assert [host.gap_eV for host in found.hosts] == [1.0, 2.0, 3.0, None, None, None]
    assert [(r.id, r.rule) for r in found.rejected] == [("test-slab", "dimensions")]
    check_hosts(found.hosts, "sheet", PUBLISHED_VOCABULARY)
    assert StructureMatcher(scale=False).fit(found.hosts[1].build(), RUTILE.build())
    assert {host.source for host in found.hosts} == {"optimade"}
    assert all(host.reference.startswith("OPTIMADE test ") for host in found.hosts)
    assert found.hosts[3].reference.endswith(f"test-0, {downloads._today()}")


def test_only_what_is_needed_is_asked_for(optimade, tmp_path):
    sources.optimade([optimade.url], FILTER, tmp_path)
    first = next(path for path in optimade.requests if path.startswith("/v1/structures"))
    asked = parse_qs(urlsplit(first).query)
    assert asked["filter"] == [FILTER]
    assert set(asked["response_fields"][0].split(",")) == {*downloads.OPTIMADE_FIELDS, "_test_band_gap"}


def test_page_size_is_the_servers_or_the_users(optimade, tmp_path):
    assert len(downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path / "a")) == 3
    assert len(downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path / "b", page_limit=5)) == 2


def test_a_finished_download_needs_no_server(optimade, tmp_path):
    before = sources.optimade([optimade.url], FILTER, tmp_path)
    optimade.forget()
    assert sources.optimade([optimade.url], FILTER, tmp_path) == before
    assert optimade.requests == []


@pytest.mark.parametrize("fault", [400, 0], ids=["refused", "cut off"])
def test_an_interrupted_download_goes_on(optimade, tmp_path, fault):
    whole = sources.optimade([optimade.url], FILTER, tmp_path / "whole")
    optimade.forget()
    optimade.fault = lambda number, path: fault if number == 3 else 200  # info, page, page
    (problem,) = problems_of(sources.optimade, [optimade.url], FILTER, tmp_path / "parts")
    assert "1 pages are kept in" in problem and "run the same command again" in problem
    optimade.forget()
    found = sources.optimade([optimade.url], FILTER, tmp_path / "parts")
    assert found.hosts == whole.hosts
    assert [path.count("page_offset=") for path in optimade.requests] == [1, 1]
    assert f"page_offset={PER_PAGE}&" in optimade.requests[0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(optimade, tmp_path, status):
    optimade.fault = lambda number, path: status if number in (3, 4) else 200
    found = sources.optimade([optimade.url], FILTER, tmp_path)
    assert len(found.hosts) == 6
    assert optimade.requests[2] == optimade.requests[3] == optimade.requests[4]


def test_a_server_that_stays_busy_is_given_up(optimade, tmp_path):
    optimade.fault = lambda number, path: 503 if number > 1 else 200
    (problem,) = problems_of(sources.optimade, [optimade.url], FILTER, tmp_path)
    assert "503" in problem and "0 pages are kept" in problem
    assert len(optimade.requests) == 1 + 1 + downloads.RETRIES


def test_pages_that_lead_in_circles_are_an_error(optimade, tmp_path):
    pages = downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path)
    last = json.loads(pages[-1].read_text())
    last["links"] = json.loads(pages[0].read_text())["links"]
    pages[-1].write_text(json.dumps(last))
    (problem,) = problems_of(downloads.optimade, optimade.url, FILTER, ["*gap*"], tmp_path)
    assert "page 3 leads back to an earlier one" in problem


@pytest.mark.parametrize(("asked_s", "kept_s"), [(None, 0.25), (0.1, 0.25), (2.0, 2.0)])
def test_requests_are_as_far_apart_as_the_server_asks(optimade, tmp_path, monkeypatch, asked_s, kept_s):
    waits = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    monkeypatch.setattr(downloads, "PAUSE_S", 0.25)
    optimade.request_delay = asked_s
    downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path)
    assert waits == [kept_s] * 3


def test_queries_do_not_share_pages(optimade, tmp_path):
    downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path)
    downloads.optimade(optimade.url, "nelements=3", ["*gap*"], tmp_path)
    folders = sorted(file.parent for file in tmp_path.glob("*/query.json"))
    assert len(folders) == 2
    assert {json.loads((folder / "query.json").read_text())["filter"] for folder in folders} == {FILTER, "nelements=3"}


def test_a_provider_without_gaps_says_so(optimade, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = sources.optimade([optimade.url], FILTER, tmp_path, ["_other_gap"])
    assert "offers no field that matches _other_gap" in caplog.text
    assert {host.gap_eV for host in found.hosts} == {None}


def test_providers_are_looked_up_once(optimade, tmp_path, monkeypatch):
    monkeypatch.setattr("optimade.utils.PROVIDER_LIST_URLS", (optimade.url + "/v1/links",))
    found = sources.optimade(["test"], FILTER, tmp_path)
    assert len(found.hosts) == 6
    optimade.forget()
    assert sources.optimade(["test"], FILTER, tmp_path) == found
    assert optimade.requests == []
    (problem,) = problems_of(sources.optimade, ["nobody"], FILTER, tmp_path)
    assert "--provider: nobody: no database answers to this id" in problem


def test_a_wrong_filter_is_refused_before_anything_is_asked(optimade, tmp_path):
    (problem,) = problems_of(sources.optimade, [optimade.url], "nelements==2", tmp_path)
    assert "--filter: 'nelements==2' is not an OPTIMADE filter" in problem
    assert optimade.requests == []


def test_a_damaged_page_is_named(optimade, tmp_path):
    pages = downloads.optimade(optimade.url, FILTER, ["*gap*"], tmp_path)
    pages[1].write_text("{")
    (problem,) = problems_of(downloads.optimade, optimade.url, FILTER, ["*gap*"], tmp_path)
    assert str(pages[1]) in problem and "delete it" in problem


def test_optimade_from_the_command_line(optimade, tmp_path):
    sheet = tmp_path / "hosts.tsv"
    arguments = ["--source", "optimade", "--provider", optimade.url, "--filter", FILTER, "--path", tmp_path]
    out = run("select", *arguments, "--require-gap", "--n", 2, "--output", sheet)
    assert "7 candidates" in out and "2 hosts, 2 of them new" in out
    assert ids(read_sheet(sheet)) == ["test-GaAs-zincblende", "test-TiO2"]
    assert sheet.read_text().startswith(f"# optimade: {optimade.url}, {FILTER}\n")
    run("select", *arguments, "--extend", sheet)
    assert len(read_sheet(sheet)) == 5


# --- Materials Project ------------------------------------------------------------------------------------------------

KEY = "0123456789abcdef0123456789abcdef"
MATERIALS = {f"mp-{10 + i}": structure for i, structure in enumerate(rock_salts(7))}
DATABASE = "2025.09.25"


def documents(asked: dict) -> list[dict]:
    """Summary documents for parameters as the Materials Project's API takes them."""
    wanted = asked["material_ids"].split(",") if "material_ids" in asked else list(MATERIALS)
    found = []
    for name in wanted:
        gap = 0.5 * list(MATERIALS).index(name)
        if float(asked.get("band_gap_min", 0)) <= gap <= float(asked.get("band_gap_max", 99)):
            whole = {"material_id": name, "structure": MATERIALS[name].as_dict(), "band_gap": gap}
            found.append({field: whole[field] for field in asked["_fields"].split(",")})
    return found


def materials_project_answer(server: Server, path: str, asked: dict) -> dict:
    if path == "/heartbeat":
        return {"db_version": DATABASE, "version": "0.90.0", "access_controlled_batch_ids": []}
    assert path == "/materials/summary/"
    found = documents(asked)
    first = int(asked.get("_skip", 0))
    return {"data": found[first : first + int(asked["_limit"])], "meta": {"total_doc": len(found)}}


class Stub:
    """What :mod:`defectnet` uses of ``MPRester``, for environments without mp-api."""

    server: Server

    def __init__(self, key, use_document_model, mute_progress_bars):
        assert not use_document_model
        self.db_version = self._get("/heartbeat")["db_version"]
        self.materials = SimpleNamespace(summary=SimpleNamespace(search=self._search))

    def _get(self, path: str, **parameters) -> dict:
        import requests

        answer = requests.get(self.server.url + path, params=parameters, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def _search(self, band_gap=None, material_ids=(), fields=()) -> list[dict]:
        asked = {"_fields": ",".join(fields), "_limit": 1000}
        if band_gap:
            asked |= {"band_gap_min": band_gap[0], "band_gap_max": band_gap[1]}
        if material_ids:
            asked["material_ids"] = ",".join(material_ids)
        return self._get("/materials/summary/", **asked)["data"]


@pytest.fixture(params=["mp-api", "stub"])
def materials_project(request, monkeypatch):
    server = Server(materials_project_answer)
    monkeypatch.setenv("MP_API_KEY", KEY)
    monkeypatch.setattr(downloads, "MATERIALS_PER_PAGE", PER_PAGE)
    if request.param == "mp-api":
        pytest.importorskip("mp_api.client", reason="needs the extra [mp]")
        from mp_api.client.core.settings import MAPI_CLIENT_SETTINGS

        monkeypatch.setattr(MAPI_CLIENT_SETTINGS, "ENDPOINT", server.url + "/")
    else:
        module = ModuleType("mp_api.client")
        module.MPRester = type("MPRester", (Stub,), {"server": server})
        monkeypatch.setitem(sys.modules, "mp_api", ModuleType("mp_api"))
        monkeypatch.setitem(sys.modules, "mp_api.client", module)
    yield server
    server.close()


def searches(server: Server) -> list[str]:
    return [path for path in server.requests if path.startswith("/materials/summary")]


QUERY = {"band_gap": [0.1, 10]}


def test_materials_become_hosts(materials_project, tmp_path):
    found = sources.materials_project(QUERY, tmp_path)
    assert ids(found.hosts) == [f"mp-{i}" for i in range(11, 17)]
    assert [host.gap_eV for host in found.hosts] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert found.hosts[0].reference == f"Materials Project {DATABASE} mp-11, {downloads._today()}"
    assert (found.hosts[0].source, found.hosts[0].n_atoms) == ("materials-project", 2)
    check_hosts(found.hosts, "sheet", PUBLISHED_VOCABULARY)
    assert StructureMatcher(scale=False).fit(found.hosts[0].build(), MATERIALS["mp-11"])
    assert len(searches(materials_project)) == 1 + 2


def test_the_key_is_not_written(materials_project, tmp_path):
    sources.materials_project(QUERY, tmp_path)
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*.json"))


def test_an_interrupted_search_goes_on(materials_project, tmp_path, monkeypatch):
    whole = sources.materials_project(QUERY, tmp_path / "whole")
    materials_project.fault = lambda number, path: 500 if "mp-14" in path else 200
    (problem,) = problems_of(sources.materials_project, QUERY, tmp_path / "parts")
    assert "run the same command again" in problem and str(tmp_path / "parts") in problem
    materials_project.forget()
    assert sources.materials_project(QUERY, tmp_path / "parts") == whole
    assert len(searches(materials_project)) == 1
    materials_project.forget()
    monkeypatch.delenv("MP_API_KEY")
    assert sources.materials_project(QUERY, tmp_path / "parts") == whole
    assert materials_project.requests == []


def test_a_missing_key_says_where_to_get_one(materials_project, tmp_path, monkeypatch):
    monkeypatch.delenv("MP_API_KEY")
    (problem,) = problems_of(sources.materials_project, QUERY, tmp_path)
    assert "MP_API_KEY: not set" in problem and "materialsproject.org/api" in problem


def test_unknown_search_arguments_are_refused(materials_project, tmp_path):
    (problem,) = problems_of(sources.materials_project, {"bandgap": [0.1, 10]}, tmp_path)
    assert "bandgap" in problem and "correct --filter" in problem


def test_materials_project_from_the_command_line(materials_project, tmp_path):
    sheet = tmp_path / "hosts.tsv"
    arguments = ["--source", "materials-project", "--filter", json.dumps(QUERY), "--path", tmp_path]
    assert "3 hosts, 3 of them new" in run("select", *arguments, "--gap-max", 1.5, "--n", 3, "--output", sheet)
    assert sheet.read_text().splitlines()[0] == f"# materials-project: {json.dumps(QUERY)}"


def test_disordered_and_missing_structures_are_rejected(materials_project, tmp_path, monkeypatch):
    alloy = Structure(Lattice.cubic(4.0), [{"Si": 0.5, "Ge": 0.5}], [[0, 0, 0]])
    monkeypatch.setitem(MATERIALS, "mp-11", alloy)
    monkeypatch.setitem(MATERIALS, "mp-12", SimpleNamespace(as_dict=lambda: None))
    found = sources.materials_project(QUERY, tmp_path)
    assert {(r.id, r.rule) for r in found.rejected} == {("mp-11", "unreadable"), ("mp-12", "unreadable")}
    assert len(found.hosts) == 4


# --- without the clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "hidden", "command"),
    [
        (["optimade", "--provider", "http://127.0.0.1:9", "--filter", FILTER], "optimade", "optimade[http-client]"),
        (["optimade", "--provider", "mp", "--filter", FILTER], "optimade", "optimade[http-client]"),
        (["materials-project", "--filter", '{"formula": "GaAs"}'], "mp_api", "mp-api"),
    ],
)
def test_missing_clients_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch, source, hidden, command):
    for name in [name for name in sys.modules if name.partition(".")[0] == hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    arguments = ["select", "--source", *source, "--path", str(tmp_path), "--output", str(tmp_path / "hosts.tsv")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert f"pip install '{command}'" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "optimade", "--provider", "mp"], "--filter: needed with --source optimade"),
        (["--source", "optimade", "--filter", FILTER], "--provider: needed with --source optimade"),
        (["--source", "materials-project", "--filter", FILTER], "is not a JSON object of arguments"),
        (["--source", "snumat"], "--path: needed with --source snumat"),
        (["--source", "curated", "--provider", "mp"], "not for --source curated"),
    ],
)
def test_incomplete_commands_say_what_to_add(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["select", *arguments, "--output", str(tmp_path / "hosts.tsv")])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
