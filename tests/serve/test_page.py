"""The chat page in a real browser: talking, stopping, settings, and text from a model that would like to be code."""

from __future__ import annotations

import time

import pytest

from fewbit.serve.settings import Settings

HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2"> <svg onload="window.hit = 3">
[one](javascript:window.hit=4) [two](JaVaScRiPt:window.hit=5) [three](data:text/html,<script>window.hit=6</script>)
[four](https://example.org/a"onmouseover="window.hit=7) [five](vbscript:x) [six](//example.org) **<b>bold</b>**

```html"><img src=x onerror="window.hit = 8">
<iframe srcdoc="<script>parent.hit = 9</script>"></iframe>
```

# <style>* { display: none }</style>
- <a href="javascript:window.hit=10">item</a>
> `<img src=x onerror=window.hit=11>`
"""

MARKDOWN = """# Title

A *soft* and a **loud** word, `code`, and [a place](https://example.org/).

1. first
2. second

- point

> said

---

```python
print("hi")
```
end of 2 * 3 * 4 and snake_case_name"""


@pytest.fixture
def visit(browser):
    """`visit(served)` opens the page; whatever the console complains about fails the test unless `noisy`."""
    contexts = []

    def open_page(served, noisy: bool = False, script: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 900, "height": 700}, **options})
        context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        if not noisy:
            page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        contexts.append((context, complaints))
        page.goto(served.url)
        wait(page, "document.getElementById('model').textContent")
        return page

    yield open_page
    for context, complaints in contexts:
        context.close()
        assert complaints == []


def wait(page, expression: str) -> None:
    """Until a JavaScript expression holds. Playwright's own way is evaluated in the page, whose policy forbids it."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"waited in vain for {expression}"
        time.sleep(0.01)


def say(page, text: str) -> None:
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def begun(page) -> None:
    """Until there is some of the last answer."""
    wait(page, "document.querySelector('.message.model:last-child .text')?.textContent.length > 8")


def finished(page, answers: int = 1) -> None:
    wait(page, f"document.querySelectorAll('.message.model:not(.busy)').length === {answers}")


def test_a_message_is_answered_and_timed(serve, visit):
    served = serve(script="Hello there, how are you?")
    page = visit(served)
    assert page.title() == "fake \u00b7 fewbit"
    assert page.locator("#send").is_disabled()
    say(page, "hi\n<b>you</b>")
    finished(page)
    assert page.locator(".message.user .text").inner_text() == "hi\n<b>you</b>"
    assert page.locator(".message.model .text").inner_text() == "Hello there, how are you?"
    assert "7 tokens" in page.locator(".numbers").inner_text()
    assert "tokens/s" in page.locator(".numbers").inner_text()
    assert page.locator("#input").evaluate("element => element === document.activeElement && !element.value")


def test_the_conversation_and_the_settings_go_along(serve, visit):
    served = serve(script="yes")
    page = visit(served)
    page.keyboard.press("Alt+s")
    page.locator("#system").fill("be kind")
    page.locator("#temperature").fill("0.25")
    page.locator("#max-tokens").fill("33")
    page.keyboard.press("Escape")
    for number, text in enumerate(("one", "two"), 1):
        say(page, text)
        finished(page, number)
    assert served.engine.chats[-1] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"},
    ]
    assert (served.engine.seen[-1].temperature, served.engine.seen[-1].max_tokens) == (0.25, 33)
    page.reload()
    assert page.locator("#system").input_value() == "be kind"
    say(page, "three")
    finished(page)
    assert [turn["content"] for turn in served.engine.chats[-1]] == ["be kind", "three"]


def test_stop_ends_the_answer_and_frees_the_slot(serve, visit, until):
    served = serve(script="word " * 500, step_seconds=0.01)
    page = visit(served)
    say(page, "go")
    wait(page, "document.querySelector('.message.model .text').textContent.length > 8")
    assert page.locator("#send").get_attribute("aria-label") == "Stop"
    page.keyboard.press("Escape")
    finished(page)
    until(lambda: served.engine.stats()["running"] == 0)
    # Chunks were counted, which hold a token or more.
    numbers = page.locator(".numbers").inner_text()
    assert numbers.startswith("at least ")
    assert numbers.endswith("stopped")
    # What was said so far is part of the conversation.
    say(page, "go on")
    until(lambda: len(served.engine.chats) == 2)
    assert served.engine.chats[-1][1]["content"].startswith("word ")
    page.locator("#send").click()
    finished(page, 2)


def test_a_new_chat_begins_with_nothing(serve, visit, until):
    served = serve(script="word " * 500, step_seconds=0.01)
    page = visit(served)
    say(page, "go")
    wait(page, "document.querySelector('.message.model .text').textContent.length > 8")
    page.keyboard.press("Alt+n")
    assert page.locator(".message").count() == 0
    assert page.locator("#empty").is_visible()
    until(lambda: served.engine.stats()["running"] == 0)
    served.engine.script = "new"
    page.locator(".idea").first.click()
    finished(page)
    assert len(served.engine.chats[-1]) == 1


def test_the_chat_before_a_new_one_can_be_had_back(serve, visit, until):
    served = serve(script="word " * 500, step_seconds=0.01)
    page = visit(served)
    assert page.locator("#back").is_hidden()
    say(page, "go")
    begun(page)
    page.keyboard.press("Alt+n")
    until(lambda: served.engine.stats()["running"] == 0)
    page.keyboard.press("Alt+n")  # nothing is lost with an empty chat
    page.get_by_text("Back to the last chat").click()
    assert page.locator("#empty").is_hidden()
    assert page.locator(".message.user .text").inner_text() == "go"
    assert page.locator(".numbers").inner_text().endswith("stopped")
    served.engine.script = "more"
    say(page, "go on")
    finished(page, 2)
    first, answer, second = served.engine.chats[-1]
    assert (first["content"], second["content"]) == ("go", "go on")
    assert answer["content"].startswith("word ")


def test_letters_that_a_mac_types_with_option_do_nothing_else(serve, visit):
    mac = "Object.defineProperty(Navigator.prototype, 'platform', { get: () => 'MacIntel' })"
    page = visit(serve(script="yes"), script=mac)
    say(page, "hi")
    finished(page)
    for letter in "ns":
        page.keyboard.press(f"Alt+{letter}")
    assert page.locator(".message").count() == 2
    assert page.locator("#settings").is_hidden()
    assert page.locator("#new").get_attribute("title") == "New chat (Control+Option+N)"
    page.keyboard.press("Control+Alt+s")
    page.locator("#system").press("Control+Alt+n")
    page.keyboard.press("Control+Alt+s")
    assert page.locator(".message").count() == 2
    page.keyboard.press("Control+Alt+n")
    assert page.locator(".message").count() == 0


@pytest.mark.parametrize("event", ["{ keyCode: 229 }", "{ isComposing: true }"])
def test_keys_of_an_input_method_neither_send_nor_stop(serve, visit, event):
    served = serve(script="word " * 500, step_seconds=0.01)
    page = visit(served)
    press = f"""key => document.getElementById('input').dispatchEvent(
        new KeyboardEvent('keydown', {{ key, bubbles: true, cancelable: true, ...{event} }}))"""
    page.locator("#input").fill("かな")
    assert page.evaluate(press, "Enter")
    assert page.locator(".message").count() == 0
    page.keyboard.press("Enter")
    begun(page)
    page.evaluate(press, "Escape")
    time.sleep(0.1)
    assert page.locator(".busy").count() == 1


def test_trying_again_replaces_the_answer(serve, visit):
    served = serve(script="first")
    page = visit(served)
    say(page, "hi")
    finished(page)
    served.engine.script = "second"
    page.get_by_text("Try again").press("Enter")
    wait(page, "document.querySelector('.message.model .text').textContent === 'second'")
    finished(page)
    assert served.engine.chats[-1] == [{"role": "user", "content": "hi"}]
    assert page.locator("#input").evaluate("element => element === document.activeElement")


def test_text_that_would_be_code_stays_text(serve, visit):
    served = serve(script=HOSTILE)
    page = visit(served)
    say(page, HOSTILE)
    finished(page)
    time.sleep(0.1)
    assert page.evaluate("window.hit") is None
    found = "script, img, svg, iframe, style, b, [onerror], [onload], [onmouseover]"
    assert page.locator("#messages").locator(found).count() == 0
    links = page.locator("#messages a")
    assert links.count() == 1
    assert links.get_attribute("href") == "https://example.org/a%22onmouseover=%22window.hit=7"
    assert links.get_attribute("rel") == "noopener noreferrer"
    shown = page.locator(".message.model .text").inner_text()
    for part in ("<script>window.hit = 1</script>", 'onerror="window.hit = 2"', "javascript:window.hit=4", "<iframe"):
        assert part in shown
    assert page.locator(".message.user .text").inner_text().strip() == HOSTILE.strip()


def test_the_policy_stops_code_even_where_it_got_in(serve, visit):
    page = visit(serve(script="x"), noisy=True)
    page.evaluate(
        """() => { const image = document.createElement('div');
        image.innerHTML = '<img src=x onerror="window.hit = 1">'; document.body.append(image);
        const script = document.createElement('script'); script.textContent = 'window.hit = 2';
        document.body.append(script);
        const far = document.createElement('script'); far.src = 'https://example.org/x.js';
        document.body.append(far); }"""
    )
    time.sleep(0.1)
    assert page.evaluate("window.hit") is None


def test_markdown_becomes_elements(serve, visit):
    page = visit(serve(script=MARKDOWN))
    say(page, "show")
    finished(page)
    text = page.locator(".message.model .text")
    kinds = ["h2", "p", "ol", "ul", "blockquote", "hr", "div", "p"]
    assert text.evaluate("element => [...element.children].map(child => child.localName)") == kinds
    assert text.locator("em").all_inner_texts() == ["soft"]
    assert text.locator("strong").all_inner_texts() == ["loud"]
    assert text.locator("li").all_inner_texts() == ["first", "second", "point"]
    assert text.locator("pre").inner_text() == 'print("hi")'
    assert text.locator("a").get_attribute("href") == "https://example.org/"
    assert text.locator("p").last.inner_text() == "end of 2 * 3 * 4 and snake_case_name"


FENCES = """```x = f(1)``` sets x

````python
```
still code
```python
````

``a ` b`` and `c`

~~~
``` is not the end
~~~
end"""


def test_a_fence_ends_with_its_like_and_backticks_in_a_line_are_no_fence(serve, visit):
    page = visit(serve(script=FENCES))
    say(page, "show")
    finished(page)
    text = page.locator(".message.model .text")
    kinds = ["p", "div", "p", "div", "p"]
    assert text.evaluate("element => [...element.children].map(child => child.localName)") == kinds
    assert text.locator("pre").all_text_contents() == ["```\nstill code\n```python", "``` is not the end"]
    assert text.locator(".bar span").all_inner_texts() == ["python", ""]
    assert text.locator("p").all_inner_texts() == ["x = f(1) sets x", "a ` b and c", "end"]
    assert text.locator("p code").all_inner_texts() == ["x = f(1)", "a ` b", "c"]


LINES = """An old pond\x20\x20
A frog jumps in
Water's sound

Basho said:
> one
> two
>
> > ```
> > deep
> > ```
- point
  more
"""


def test_lines_stay_lines_and_quotes_hold_blocks(serve, visit):
    page = visit(serve(script=LINES + "\n" + "> " * 3000 + "bottom"))
    say(page, "show")
    finished(page)
    text = page.locator(".message.model .text")
    assert text.locator("> p").all_inner_texts() == ["An old pond\nA frog jumps in\nWater's sound", "Basho said:"]
    assert text.locator("> blockquote:first-of-type > p").inner_text() == "one\ntwo"
    assert text.locator("> blockquote:first-of-type > blockquote pre").inner_text() == "deep"
    assert text.locator("li").inner_text() == "point\nmore"
    assert text.locator("> blockquote:last-child").inner_text().endswith("> bottom")


def test_what_is_in_use_stays_while_the_answer_grows(serve, visit, until):
    served = serve(script="First words.\n\n```python\nline()\n" + "more()\n" * 40 + "```\nend", step_seconds=0.01)
    page = visit(served)
    say(page, "go")
    wait(page, "document.querySelector('.block code')?.textContent.includes('more()')")
    page.evaluate(
        """() => { window.copying = document.querySelector('.block button'); copying.focus();
        getSelection().selectAllChildren(document.querySelector('.message.model p')); }"""
    )
    assert page.locator(".busy").count() == 1
    finished(page)
    assert page.evaluate("copying === document.querySelector('.block button') && copying === document.activeElement")
    assert page.evaluate("getSelection().toString()") == "First words."
    assert page.locator("pre").inner_text() == "line()\n" + "\n".join(["more()"] * 40)
    assert page.locator(".message.model p").all_inner_texts() == ["First words.", "end"]


def test_a_refused_message_comes_back_and_blocks_nothing(serve, visit):
    served = serve(script="fine")
    page = visit(served, noisy=True)
    long = "z" * 1100
    say(page, long)
    finished(page)
    assert "shorten it" in page.get_by_role("alert").inner_text()
    assert page.locator("#input").input_value() == long
    assert page.locator(".message.user").count() == 0
    say(page, "short")
    finished(page)
    assert page.get_by_role("alert").count() == 0
    say(page, long)
    finished(page, 2)
    page.locator("#input").fill("next")
    page.keyboard.press("Enter")
    finished(page, 2)
    assert [turn["content"] for turn in served.engine.chats[-1]] == ["short", "fine", "next"]


def test_a_question_without_an_answer_goes_along_with_the_next(serve, visit):
    served = serve(script="fine")
    page = visit(served, noisy=True)
    served.engine.failure = RuntimeError("broken")
    say(page, "one")
    finished(page)
    say(page, "z" * 1100)
    finished(page, 2)
    say(page, "two")
    finished(page, 2)
    assert served.engine.chats[-1] == [{"role": "user", "content": "one\n\ntwo"}]


def test_a_server_that_comes_back_is_talked_to_under_its_new_name(serve, visit):
    served = serve(script="fine")
    page = visit(served, noisy=True)
    page.route("**/*", lambda route: route.abort())
    say(page, "hi")
    wait(page, "document.getElementById('model').matches('.off')")
    page.unroute("**/*")
    served.app.state.service.name = "another"
    page.get_by_text("Try again").click()
    wait(page, "document.querySelector('.message.model .text').textContent === 'fine'")
    wait(page, "document.querySelector('#model:not(.off)')?.textContent === 'another'")


def test_the_settings_close_with_a_click_beside_them_and_no_other(serve, visit):
    page = visit(serve())
    page.keyboard.press("Alt+s")
    box = page.locator("#settings").bounding_box()
    inside, beside = (box["x"] + 8, box["y"] + 8), (box["x"] - 30, box["y"] + 50)
    page.mouse.click(*inside)
    for start, end in ((inside, beside), (beside, inside)):
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end)
        page.mouse.up()
        assert page.locator("#settings").is_visible()
    page.mouse.click(*beside)
    assert page.locator("#settings").is_hidden()


def test_errors_are_shown_and_the_question_can_be_asked_again(serve, visit):
    served = serve(script="fine")
    page = visit(served, noisy=True)
    served.engine.failure = RuntimeError("broken")
    say(page, "hi")
    finished(page)
    assert "its log says why" in page.get_by_role("alert").inner_text()
    page.get_by_text("Try again").click()
    wait(page, "document.querySelector('.message.model .text').textContent === 'fine'")
    assert page.get_by_role("alert").count() == 0


def test_a_key_is_asked_for(serve, visit):
    served = serve(Settings(api_key="sesame"), script="open")
    page = visit(served, noisy=True)
    assert page.locator("#key").is_visible()
    page.keyboard.press("Escape")
    say(page, "hi")
    page.get_by_role("alert").wait_for()
    assert page.locator("#key").is_visible()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    assert page.locator("#input").input_value() == "hi"
    page.keyboard.press("Enter")
    wait(page, "document.querySelector('.message.model .text').textContent === 'open'")
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("width", [320, 390, 900])
def test_nothing_is_wider_than_the_window(serve, visit, width):
    script = MARKDOWN + "\n" + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n"
    served = serve(Settings(model_name="a-model-with-a-very-long-name" * 4), script=script)
    page = visit(served, viewport={"width": width, "height": 640})
    say(page, "z" * 300)
    finished(page)
    # Code scrolls inside its block; everything else must fit.
    rights = "[...document.querySelectorAll('body *:not(pre, pre *)')].map(e => e.getBoundingClientRect().right)"
    assert page.evaluate(f"Math.max(...{rights})") <= width


def test_it_follows_the_answer_unless_the_reader_went_up(serve, visit):
    served = serve(script="line\n\n" * 200, step_seconds=0.003)
    page = visit(served)
    say(page, "go")
    gap = "pane.scrollHeight - pane.scrollTop - pane.clientHeight"
    page.evaluate("window.pane = document.getElementById('scroll')")
    wait(page, "pane.scrollHeight > 2 * pane.clientHeight")
    wait(page, f"{gap} < 80")
    page.evaluate("pane.scrollTop = 0")
    finished(page)
    assert page.evaluate("pane.scrollTop") == 0
