"""The page of `gptfast serve` in a real Chromium: it types, streams, stops, shows probabilities and
errors, and fits a phone."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import random_model
from serving import Defaults, Running, server

from gptfast.generation.stop import REPLACEMENT
from gptfast.ops.backend import EXTENSION

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with server(random_model(vocab_size=257, block_size=512).eval()) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # The sandbox of Chromium does not start for root.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, tiny: Running) -> Iterator[Any]:
    context = browser.new_context()
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda message: _note(problems, message))
    yield made
    context.close()
    assert not problems


def _note(problems: list[str], message: Any) -> None:
    # Chromium itself reports replies of 400 and above.
    if message.type == "error" and "Failed to load resource" not in message.text:
        problems.append(message.text)


def opened(page: Any, tiny: Running, settings: str = "") -> Any:
    page.goto(f"http://127.0.0.1:{tiny.port}/{settings}")
    page.wait_for_selector("body[data-ready]")
    return page


def finished(page: Any) -> None:
    page.wait_for_selector("#stop[disabled]", state="attached")
    page.wait_for_selector("#go:not([disabled])")


def plain(text: str) -> str:
    """Return a text without what a browser shows in its own way: controls and line ends."""
    return "".join(c for c in text if c.isprintable() and c not in f" {REPLACEMENT}")


def test_it_writes_what_the_server_gives(page: Any, tiny: Running) -> None:
    opened(page, tiny)
    page.fill("#prompt", "Once upon")
    page.fill("#max_tokens", "40")
    page.fill("#seed", "7")
    page.keyboard.press("Control+Enter")
    finished(page)
    wanted = tiny.complete("Once upon", max_tokens=40, seed=7, temperature=1.0)
    got = page.text_content("#output")
    assert plain(got) == plain("Once upon" + wanted["choices"][0]["text"])
    assert "first token" in page.text_content("#speed")
    assert "tokens/s" in page.text_content("#speed")
    page.click("#again")
    finished(page)
    assert page.input_value("#seed") != "7"
    assert plain(page.text_content("#output")) != plain(got)


def test_a_link_holds_the_settings(page: Any, tiny: Running) -> None:
    opened(page, tiny)
    page.fill("#prompt", "Two\nlines & more")
    page.fill("#seed", "11")
    page.fill("#top_k", "9")
    page.fill("#key", "secret")
    page.check("#tokens")
    link = page.evaluate("location.href")
    assert "secret" not in link
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#prompt") == "Two\nlines & more"
    assert page.input_value("#seed") == "11" and page.input_value("#top_k") == "9"
    assert page.is_checked("#tokens")


def test_a_link_for_the_open_page(page: Any, tiny: Running) -> None:
    opened(page, tiny)
    page.evaluate("location.hash = 'mode=chat&seed=12&temperature=0.83&prompt=Hi'")
    page.wait_for_selector("#tab-chat[aria-selected=true]")
    assert page.input_value("#prompt") == "Hi" and page.input_value("#seed") == "12"
    assert page.input_value("#temperature") == page.text_content("#shown-temperature") == "0.83"


def test_controls_have_the_servers_defaults(page: Any) -> None:
    """Also those beyond a slider or between its steps, and where the key comes later."""
    values = {"temperature": 2.5, "top_p": 0.93, "min_p": 0.0055, "repetition_penalty": 0.9}
    model = random_model(vocab_size=257, block_size=64).eval()
    with server(model, defaults=Defaults(**values, top_k=7), keys=("one",)) as running:
        opened(page, running)
        assert "send one of the server's keys" in page.text_content("#error")
        page.fill("#prompt", "ab")
        page.fill("#key", "one")
        page.keyboard.press("Tab")
        page.wait_for_selector("#model:has-text('context')")
        shown = {name: float(page.input_value(f"#{name}")) for name in values}
        assert shown == values and page.input_value("#top_k") == "7"
        assert page.input_value("#prompt") == "ab" and page.text_content("#error") == ""


def without_text(route: Any) -> None:
    """Answer a request for a chat with a reply that ends before its first text."""
    end = {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    body = f"data: {json.dumps({'choices': [end]})}\n\ndata: [DONE]\n\n"
    route.fulfill(content_type="text/event-stream", body=body)


def test_a_chat_without_a_reply(page: Any, tiny: Running) -> None:
    """The message comes back to where it was written, and can be sent again."""
    opened(page, tiny, "#mode=chat&max_tokens=10&seed=3")
    replies = "**/v1/chat/completions"
    page.route(replies, without_text)
    page.fill("#prompt", "Hello")
    page.click("#go")
    finished(page)
    assert page.text_content("#speed") == "no text, ended by itself"
    assert page.input_value("#prompt") == "Hello" and not page.query_selector(".turn")
    page.unroute(replies)
    page.click("#again")
    finished(page)
    assert len(page.query_selector_all(".turn")) == 2 and page.input_value("#prompt") == ""


def test_again_after_a_later_message_without_a_reply(page: Any, tiny: Running) -> None:
    """That message is sent, not the answered one before it; then its answer is made anew."""
    opened(page, tiny, "#mode=chat&max_tokens=10&seed=3")
    page.fill("#prompt", "Hello")
    page.click("#go")
    finished(page)
    first = page.text_content(".turn:nth-child(2)")
    replies = "**/v1/chat/completions"
    page.route(replies, without_text)
    page.fill("#prompt", "More")
    page.click("#go")
    finished(page)
    assert page.input_value("#prompt") == "More" and len(page.query_selector_all(".turn")) == 2
    page.unroute(replies)
    for _ in range(2):
        with page.expect_request(replies) as sent:
            page.click("#again")
        finished(page)
        said = [message["content"] for message in sent.value.post_data_json["messages"]]
        assert (said[0], *said[2:]) == ("Hello", "More")
        assert len(page.query_selector_all(".turn")) == 4 and page.input_value("#prompt") == ""
        assert page.text_content(".turn:nth-child(2)") == first


def test_a_server_that_is_not_there_yet(page: Any, tiny: Running) -> None:
    """One that loads is asked again; one that does not answer is named in the page's own words."""
    message = json.dumps({"error": {"message": "the server is still loading the model"}})
    busy = lambda route: route.fulfill(status=503, body=message)  # noqa: E731
    page.route("**/settings", busy)
    opened(page, tiny, "#prompt=ab&max_tokens=3")
    assert "still loading" in page.text_content("#error")
    page.unroute("**/settings")
    page.wait_for_selector("#model:has-text('context')")
    assert page.text_content("#error") == ""
    page.route("**/v1/completions", lambda route: route.abort())
    page.fill("#seed", "")
    page.click("#go")
    finished(page)
    assert page.text_content("#error") == "the server cannot be reached; is it running?"
    assert page.input_value("#seed") != ""


def test_tokens_show_their_probability(page: Any, tiny: Running) -> None:
    opened(page, tiny, "#seed=3&max_tokens=12&prompt=ab&tokens=1&temperature=1.5")
    page.click("#go")
    finished(page)
    fields = {"max_tokens": 12, "seed": 3, "temperature": 1.5, "logprobs": 10}
    logprobs = tiny.complete("ab", **fields)["choices"][0]["logprobs"]
    tokens = page.query_selector_all(".token")
    assert len(tokens) == len(logprobs["tokens"])

    shown = [float(token.get_attribute("data-p")) for token in tokens]
    assert shown == pytest.approx([math.exp(x) for x in logprobs["token_logprobs"]], rel=1e-3)
    tokens[0].hover()
    page.wait_for_selector("#likely:not([hidden])")
    assert 10 <= len(page.query_selector_all("#likely tr")) <= 11
    assert len(page.query_selector_all("#likely .drawn")) == 1


def test_stop_frees_the_server(page: Any, tiny: Running) -> None:
    opened(page, tiny, "#seed=3&max_tokens=500&prompt=ab")
    engine = tiny.service.model.engine
    with engine.turn():
        page.click("#go")
        page.wait_for_selector("#stop:not([disabled])")
        page.keyboard.press("Escape")
        finished(page)
    assert "stopped" in page.text_content("#speed")
    assert page.text_content("#error") == ""
    assert tiny.idle()


def test_errors_are_shown(page: Any, tiny: Running) -> None:
    opened(page, tiny, "#max_tokens=9999&prompt=ab")
    page.click("#go")
    finished(page)
    assert "maximum context length is 512 tokens" in page.text_content("#error")
    page.fill("#max_tokens", "3")
    page.click("#go")
    finished(page)
    assert page.text_content("#error") == ""


def test_a_chat(page: Any, tiny: Running) -> None:
    opened(page, tiny, "#seed=3&max_tokens=10")
    page.click("#tab-chat")
    for text in ("Hello", "More"):
        page.fill("#prompt", text)
        page.keyboard.press("Control+Enter")
        finished(page)
    turns = page.query_selector_all(".turn")
    who = [turn.query_selector(".who").text_content() for turn in turns]
    assert who == ["You", "Model", "You", "Model"]
    messages = [{"role": "user", "content": "Hello"}]
    wanted = tiny.post("/v1/chat/completions", {"messages": messages, "seed": 3, "max_tokens": 10})
    reply = turns[1].text_content().removeprefix("Model")
    assert plain(reply) == plain(wanted["choices"][0]["message"]["content"])
    page.click("#clear")
    assert page.text_content("#output") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, tiny: Running, scheme: str) -> None:
    size = {"width": 360, "height": 700}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = opened(context.new_page(), tiny)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.query_selector("#go").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(22, 23, 21)") == (scheme == "dark")
    context.close()
