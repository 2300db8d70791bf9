"""Who is let in: names, pages, keys, quotas; and what a request may look like."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from server.device.model import DeviceModel
from server.front.auth import KeyRing
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import URL, House, serving

EVIL = "http://attacker.example"
FRIEND = "https://studio.example"
ALICE, OTHER = {"Authorization": "Bearer sécret"}, {"Authorization": "Bearer plain"}


@pytest.fixture(scope="module")
def open_house(checkpoint: Path, loaded: DeviceModel) -> Iterator[House]:
    with serving(loaded, make_settings(checkpoint, allowed_origins=f"{FRIEND}/", root_path="/rmd")) as running:
        yield running


@pytest.fixture(scope="module")
def keyed_house(checkpoint: Path, loaded: DeviceModel) -> Iterator[House]:
    settings = make_settings(
        checkpoint, api_keys="alice=sécret,plain", log_level="info", key_requests=1, allowed_origins=FRIEND
    )
    with serving(loaded, settings) as running:
        yield running


def refused(reply: httpx.Response, status: int, code: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code and reply.json()["error"]["message"]


def spoken(house: House, text: str) -> bytes:
    """Send raw bytes and read until the server closes."""
    address = urlsplit(house.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(text.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


# -- names and pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["same-origin", None])
def test_a_page_whose_name_was_made_to_point_here_neither_draws_nor_reads(open_house: House, site: str | None) -> None:
    port = urlsplit(open_house.url).port
    headers = {"Host": f"attacker.example:{port}", "Origin": f"{EVIL}:{port}"}
    headers |= {"Sec-Fetch-Site": site} if site else {}
    refused(open_house.client.post(URL, json={"prompt": "a"}, headers=headers), 403, "unknown_host")
    for path in ("/v1/models", "/", "/files/x", "/docs"):
        refused(open_house.client.get(path, headers=headers), 403, "unknown_host")
    for path in ("/health/live", "/metrics"):
        assert open_house.client.get(path, headers=headers).status_code == 200, "machines know no name"


@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1", "https://studio.example.attacker.example"])
def test_a_foreign_pages_form_orders_nothing(open_house: House, origin: str) -> None:
    """Browsers omit Sec-Fetch-Site on plain http, and ask nobody's leave for a form."""
    for path in (URL, "/v1/videos", "/v1/nowhere"):
        refused(open_house.client.post(path, data={"prompt": "a"}, headers={"Origin": origin}), 403, "cross_site")
    refused(open_house.client.get("/v1/models", headers={"Origin": origin}), 403, "cross_site")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pictures_and_links_of_other_sites_get_nothing_of_the_api(open_house: House, site: str) -> None:
    refused(open_house.client.get("/v1/models", headers={"Sec-Fetch-Site": site}), 403, "cross_site")
    assert open_house.client.get("/", headers={"Sec-Fetch-Site": site}).status_code == 200, "the page may be linked to"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "box.localhost", "127.0.0.1", "10.1.2.3:80", "[::1]:80"])
def test_addresses_and_localhost_are_this_servers_names(open_house: House, host: str) -> None:
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert open_house.client.get("/v1/models", headers=own).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "[",
        "127.0.0.1.attacker.example",
        "localhost.attacker.example",
        "a@b",
        "attacker.example@localhost",
        "attacker.example\\@localhost",
        "localhost/attacker.example",
        "localhost#.attacker.example",
        "localhost?.attacker.example",
    ],
)
def test_no_other_name_passes(open_house: House, host: str) -> None:
    refused(open_house.client.get("/v1/models", headers={"Host": host}), 403, "unknown_host")


def test_allowed_hosts_are_names_and_domains() -> None:
    settings = ServerSettings(
        allowed_hosts="rmd, *.lan", public_url="https://draw.example/x", host="gpu.local", allow_open=True
    )
    assert settings.known_hosts == ("rmd", "*.lan", "gpu.local", "draw.example")
    assert settings.known_origins == ("https://draw.example",), "its own pages, where a proxy hides the Host header"
    assert ServerSettings(api_keys="k").known_hosts == ("*",), "a foreign page has no key"


def test_a_page_of_an_allowed_origin_may_draw(open_house: House) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = open_house.client.options(URL, headers={"Origin": FRIEND, "Sec-Fetch-Site": "cross-site", **asked})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == FRIEND
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    page = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
    drawn = open_house.client.post(URL, json={"prompt": "a"}, headers=page)
    assert drawn.status_code == 200 and drawn.headers["access-control-allow-origin"] == FRIEND
    assert "x-request-id" in drawn.headers["access-control-expose-headers"]
    bad = open_house.client.post(URL, json={}, headers=page)
    assert bad.status_code == 400 and bad.headers["access-control-allow-origin"] == FRIEND, "errors can be read too"
    refused(open_house.client.options(URL, headers={"Origin": EVIL, **asked}), 403, "cross_site")


def test_listening_beyond_this_machine_without_keys_must_be_meant() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "gpu.local"):
        with pytest.raises(ValidationError, match="no api_keys: set some, or allow_open"):
            ServerSettings(host=host)
        assert ServerSettings(host=host, allow_open=True).host == host
        assert ServerSettings(host=host, api_keys="k").host == host
    assert ServerSettings(host="::1").host == "::1"


def test_a_prefix_is_a_path() -> None:
    assert ServerSettings(root_path="/a/b").root_path == "/a/b"
    for wrong in ("rmd", "/rmd/", "https://example.org/rmd"):
        with pytest.raises(ValidationError, match="root_path"):
            ServerSettings(root_path=wrong)


# -- paths and methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1//images/generations", "//v1/images/generations", f"{URL}/", f"/rmd{URL}", f"/rmd/{URL}"]
)
def test_one_route_has_many_spellings(open_house: House, path: str) -> None:
    assert open_house.client.post(open_house.url + path, json={"prompt": "a"}).status_code == 200


def test_a_whole_url_as_a_target_is_understood(open_house: House) -> None:
    reply = spoken(
        open_house, "GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_links_are_below_the_proxys_prefix(open_house: House) -> None:
    reply = open_house.client.post(f"/rmd{URL}", json={"prompt": "a", "response_format": "url"}).json()
    url = reply["data"][0]["url"]
    assert url.startswith(f"{open_house.url}/rmd/files/")
    assert open_house.client.get(url).status_code == 200
    assert open_house.client.get(url.replace("/rmd/", "/")).status_code == 200, "the proxy may take the prefix off"
    assert "'/rmd/openapi.json'" in open_house.client.get("/rmd/docs").text
    assert open_house.metric("rmd_requests_total", route="other", outcome="completed") == 0, "counted by its route"


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/v1/models", "/v1/models/tiny", "/metrics"])
def test_head_is_get_without_a_body(open_house: House, path: str) -> None:
    got, head = open_house.client.get(path), open_house.client.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


def test_allow_lists_every_method_of_a_path(open_house: House) -> None:
    for path, methods in (("/v1/videos", "GET, HEAD, POST"), ("/v1/videos/x", "DELETE, GET, HEAD"), (URL, "POST")):
        wrong, asked = open_house.client.put(path), open_house.client.options(path)
        refused(wrong, 405, "method_not_allowed")
        assert wrong.headers["allow"] == asked.headers["allow"] == methods and asked.status_code == 204


def test_what_is_no_http_gets_the_one_error_shape(open_house: House) -> None:
    reply = spoken(open_house, "what is this\r\n\r\n")
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert b'"code":"invalid_http"' in body


def test_a_body_of_two_lengths_ends_the_connection(open_house: House) -> None:
    """The bytes behind it were answered as a second request."""
    one = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    reply = spoken(open_house, f"{one}GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply.count(b"HTTP/1.1 ") == 1 and reply.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"ambiguous_length"' in reply


def test_the_openapi_page_tells_what_is_answered(open_house: House) -> None:
    schema = open_house.client.get("/openapi.json").json()
    answered = {path: {s for op in ops.values() for s in op["responses"]} for path, ops in schema["paths"].items()}
    assert not any("422" in statuses for statuses in answered.values())
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert all("404" in answered[path] for path in ("/files/{name}", "/v1/models/{model_id}", "/v1/videos/{video_id}"))
    films = {op: set(found["responses"]) for op, found in schema["paths"]["/v1/videos"].items()}
    assert not films["post"] & {"412", "416"} and {"409", "413", "429", "500"} <= films["post"]
    assert {"409", "412", "416"} <= answered["/v1/videos/{video_id}/content"]
    assert "frame-ancestors 'none'" in open_house.client.get("/docs").headers["content-security-policy"]


# -- linked pictures ---------------------------------------------------------------------------------------------------


def test_a_linked_picture_is_sent_once_to_who_has_it(open_house: House) -> None:
    url = open_house.draw(response_format="url").json()["data"][0]["url"]
    first = open_house.client.get(url)
    etag = first.headers["etag"]
    assert open_house.client.head(url).headers["content-length"] == str(len(first.content))
    for tags in (etag, f'"x", W/{etag}', "*"):
        again = open_house.client.get(url, headers={"If-None-Match": tags})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == etag
    assert open_house.client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    refused(open_house.client.get(url, headers={"If-Match": '"other"'}), 412, "precondition_failed")
    for moment in (
        "1 Jan 2020 {}:00:00 GMT",
        "{} Jan 2020 00:00:00 GMT",
        "1 Jan {} 00:00:00 GMT",
        "1 Jan 2020 0:0:0 +{}",
    ):
        for condition in ("If-Modified-Since", "If-Unmodified-Since"):  # a date that is none is ignored
            odd = open_house.client.get(url, headers={condition: f"Wed, {moment.format('9' * 20)}"})
            assert odd.status_code == 200 and odd.content == first.content, moment
    assert 3590 < int(first.headers["cache-control"].removeprefix("private, max-age=")) <= 3600


def test_the_links_of_one_reply_live_together(checkpoint: Path, loaded: DeviceModel, tmp_path: Path) -> None:
    """The store pushed out pictures of the very reply that linked to them."""
    with serving(loaded, make_settings(checkpoint, files_megabytes=0.02, videos=tmp_path)) as house:
        data = house.draw(n=10, response_format="url").json()["data"]
        assert house.service.pictures.stored_bytes > 20_000, "they are more than the store holds"
        house.service.pictures.tidy()
        assert [house.client.get(picture["url"]).status_code for picture in data] == [200] * 10
        later = house.draw(response_format="url").json()["data"][0]["url"]
        house.until(lambda: house.client.get(data[0]["url"]).status_code == 404, "room for the next reply")
        assert house.client.get(later).status_code == 200


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_browser_asks_for_leave_without_the_key_and_sends_it_afterwards(keyed_house: House) -> None:
    """It was 401 before any page could send its key; and a page must be able to read that its key is wrong."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = keyed_house.client.options(URL, headers={"Origin": FRIEND, **asked})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == FRIEND
    refused(keyed_house.client.options(URL, headers={"Origin": EVIL, **asked}), 403, "cross_site")
    wrong = keyed_house.client.get("/v1/models", headers={"Origin": FRIEND, "Authorization": "Bearer x"})
    refused(wrong, 401, "invalid_api_key")
    assert wrong.headers["access-control-allow-origin"] == FRIEND
    assert keyed_house.client.get("/v1/models", headers={"Origin": FRIEND, **OTHER}).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_keys_beyond_ascii_are_heard_in_either_spelling(keyed_house: House, encoding: str) -> None:
    right = {b"Authorization": "Bearer sécret".encode(encoding)}
    assert keyed_house.client.get("/v1/models", headers=right).status_code == 200
    for wrong in ("scret", "s?cret", "alice=sécret"):
        refused(
            keyed_house.client.get("/v1/models", headers={b"Authorization": f"Bearer {wrong}".encode()}),
            401,
            "invalid_api_key",
        )


def test_no_prefix_goes_round_the_key(keyed_house: House) -> None:
    for path in (
        "/v1/models",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/./models",
        "/%76%31/models",
        "/V1/models",
    ):
        assert keyed_house.client.get(keyed_house.url + path).status_code in (401, 404), path


def test_keys_are_named_and_never_shown(keyed_house: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rmd.access"):
        for headers in (ALICE, OTHER):
            header = {b"Authorization": headers["Authorization"].encode()}
            assert keyed_house.client.get("/v1/models?api_key=hush", headers=header).status_code == 200
        keyed_house.client.get("/health/live")
        keyed_house.client.get("/v1/models?key=hush", headers={"Authorization": "Bearer guessed"})

        def lines_of() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.name == "rmd.access"]

        keyed_house.until(lambda: len(lines_of()) == 3, "three lines")
    lines = lines_of()
    assert [line.split()[1] for line in lines] == ["alice", "key-2", "-"]
    assert '"GET /v1/models" 200 completed' in lines[0] and '" 401 unauthorized' in lines[2]
    assert not any(secret in line for line in lines for secret in ("hush", "cret", "plain", "guessed"))
    shown = keyed_house.client.get("/metrics").text
    assert 'rmd_key_requests_total{key="alice",outcome="completed"}' in shown and "cret" not in shown
    assert "2 key(s), hidden: alice, key-2" in keyed_house.service.settings.describe()


def test_a_name_keeps_its_films_when_its_key_changes() -> None:
    def account(keys: str, key: str) -> str:
        return KeyRing(ServerSettings(api_keys=keys).api_keys).caller(f"Bearer {key}").account

    assert account("alice=old,alice=new", "old") == account("alice=newest", "newest") != account("bob=old", "old")
    assert account("c2VjcmV0==", "c2VjcmV0==") != account("x", "x"), "padding names nobody"


def test_one_key_has_so_many_requests_under_way(keyed_house: House) -> None:
    def draw(headers: dict[str, str]) -> httpx.Response:
        encoded = {b"Authorization": headers["Authorization"].encode()}
        return keyed_house.client.post(URL, json={"prompt": "a"}, headers=encoded)

    keyed_house.gate.close()
    first = keyed_house.in_background(lambda: draw(OTHER))
    keyed_house.until_waiting(1)
    again, more = draw(OTHER), [draw(OTHER) for _ in range(5)]
    other = keyed_house.in_background(lambda: draw(ALICE))
    keyed_house.until_waiting(2)
    keyed_house.gate.open()
    refused(again, 429, "key_busy")
    told = [int(reply.headers["retry-after"]) for reply in (again, *more)]
    assert told[0] in (1, 2) and len(set(told)) > 2, "not all come back at once"
    assert first.result().status_code == other.result().status_code == 200
    assert draw(OTHER).status_code == 200


def test_one_key_may_send_so_many_in_a_time(checkpoint: Path, loaded: DeviceModel) -> None:
    with serving(loaded, make_settings(checkpoint, api_keys="a=1,b=2", key_rate="2/hour")) as house:
        one, two = ({"Authorization": f"Bearer {key}"} for key in "12")
        drawn = [house.client.post(URL, json={"prompt": "a"}, headers=one) for _ in range(3)]
        assert [reply.status_code for reply in drawn] == [200, 200, 429]
        refused(drawn[2], 429, "rate_limit_exceeded")
        assert (
            60 <= int(drawn[2].headers["retry-after"]) <= 120 and "2 per 1 hour" in drawn[2].json()["error"]["message"]
        )
        assert house.client.get("/v1/models", headers=one).status_code == 200, "looking is free"
        assert house.client.post(URL, json={"prompt": "a"}, headers=two).status_code == 200
    with pytest.raises(ValidationError, match="'often' is no rate"):
        ServerSettings(key_rate="often")
