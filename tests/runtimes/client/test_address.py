"""Which URLs name a server, and what they mean."""

from __future__ import annotations

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.client import Address


@pytest.mark.parametrize("url", ["x", "ftp://x", "http://", "http://me:secret@x", "http://x?a=b", "http://x y",
                                 "http://x:99999", "http://x/\r\nHost: y", "http://kühe", "http://[::1", "file:///etc"])
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(HerdError) as caught:
        Address.of(url)
    assert "secret" not in str(caught.value)


def test_addresses() -> None:
    found = [Address.of(url) for url in ("http://cow", "https://cow:1/openai/v1/", "http://[::1]:80/v1")]
    assert [(to.secure, to.host, to.port, to.path) for to in found] == [
        (False, "cow", 80, "/v1"), (True, "cow", 1, "/openai/v1"), (False, "::1", 80, "/v1")]
