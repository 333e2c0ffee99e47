"""A server is called unreachable only if it is, and unusable proxies of the environment are named.

The *client* is the HTTP client of Gemini and of the Hugging Face Hub. It can use SOCKS proxies if
the package socksio is installed.
"""

import importlib.machinery
import importlib.util
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from refusals import refuses
from spear.util import network
from spear.util.network import check_hub_reachable_or_cached, check_proxies, explain_unreachable

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
UNREACHABLE_URL = "http://spear.invalid/"  # no server has a name that ends in .invalid


@pytest.fixture(autouse=True)
def environment_without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins without proxies."""
    for variable in PROXY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


def pretend_socksio(monkeypatch: pytest.MonkeyPatch, is_installed: bool) -> None:
    """Pretend that the package socksio is installed, or that it is not."""
    find_spec = importlib.util.find_spec

    def find(name: str, *args: Any) -> Any:
        if name != "socksio":
            return find_spec(name, *args)
        return importlib.machinery.ModuleSpec(name, None) if is_installed else None

    monkeypatch.setattr(network.importlib.util, "find_spec", find)


SOCKS_VARIABLES = ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY"]


@pytest.mark.parametrize("variable", SOCKS_VARIABLES)
@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:9", "socks5h://user:word@proxy.invalid:1080"]
)
def test_what_the_client_can_use_is_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    pretend_socksio(monkeypatch, is_installed=True)
    monkeypatch.setenv(variable, proxy)

    check_proxies("The service")
    assert explain_unreachable(UNREACHABLE_URL) is None


@pytest.mark.parametrize("variable", SOCKS_VARIABLES)
def test_a_missing_package_for_socks_is_named_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    pretend_socksio(monkeypatch, is_installed=False)
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9")

    refuses(
        rf"^The service cannot be reached, .*{variable} .*\. Run `pip install socksio`",
        check_proxies,
        "The service",
    )
    assert variable in str(explain_unreachable(UNREACHABLE_URL))


@pytest.mark.parametrize("proxy", ["socks4://127.0.0.1:9", "ftp://127.0.0.1:9", "http://host:port"])
def test_a_proxy_that_the_client_cannot_use_is_named_with_the_usable_kinds(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    pretend_socksio(monkeypatch, is_installed=True)
    monkeypatch.setenv("HTTPS_PROXY", proxy)

    refuses(r"HTTPS_PROXY .*\. Set it to .*socks5h", check_proxies, "The service")


def test_no_proxy_for_any_host_switches_proxies_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_socksio(monkeypatch, is_installed=False)  # so this proxy would be refused
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "localhost, *")

    check_proxies("The service")


@pytest.mark.parametrize("model", ["google/paligemma-of-nobody", "someone/something@main"])
def test_a_model_of_the_hub_is_refused_with_the_cure_of_the_proxy(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pretend_socksio(monkeypatch, is_installed=False)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")

    alternative = "a folder"  # what the error proposes to give instead of the model
    refuses(
        rf"{model}.*all_proxy.*pip install socksio",
        check_hub_reachable_or_cached,
        model,
        alternative,
    )


@pytest.fixture
def http_proxy() -> Iterator[str]:
    """The address of a proxy that answers every request itself, with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("prefix", ["", "http://"])
def test_a_server_is_asked_through_an_http_proxy(
    monkeypatch: pytest.MonkeyPatch, http_proxy: str, prefix: str
) -> None:
    monkeypatch.setenv("http_proxy", prefix + http_proxy)
    url_of_this_case = f"http://spear.invalid/behind{len(prefix)}"  # each URL is asked only once

    assert explain_unreachable(url_of_this_case) is None


def test_a_server_behind_an_http_proxy_that_is_gone_is_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as closed_socket:
        closed_socket.bind(("127.0.0.1", 0))
        port = closed_socket.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")

    assert "refused" in str(explain_unreachable("http://spear.invalid/gone"))
