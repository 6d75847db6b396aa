"""Traces of a text: the arrays, what the page holds of them, and what a browser makes of that."""

import base64
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from stackformer import TextTrace, build_byte_tokenizer, train_bpe_tokenizer
from stackformer.stack_trace import split_text
from tests.models import SHAPES, tiny_model

HOSTILE = "</script><img src=x onerror=alert(1)> &amp; \"'`${1}$&{{data}}\u2028"
TEXT = f"Caf\u00e9 \U0001f642\n\ttea {HOSTILE}"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def _trace(text=TEXT, tokenizer=None, **shape) -> TextTrace:
    model = tiny_model(torch.float32, vocab_size=600, **shape)
    return model.stack_trace(text, tokenizer or build_byte_tokenizer())


def _page_data(page: str) -> dict:
    """What is in the page's JSON, with arrays as arrays."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    data["arrays"] = {
        name: array["scale"]
        * np.frombuffer(base64.b64decode(array["data"]), "<u2").reshape(array["shape"])
        / 65535
        for name, array in data["arrays"].items()
    }
    return data


@torch.no_grad()
def test_arrays_are_the_models():
    model, tokenizer = tiny_model(), build_byte_tokenizer()
    trace = model.stack_trace(TEXT, tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    outputs = model(ids, labels=ids, output_stack_trace=True)
    assert trace.ids.tolist() == ids[0].tolist()
    for name in ("active", "pointer", "actions", "bank_reads", "bank_writes", "bank_decays", "step_sizes"):
        np.testing.assert_array_equal(getattr(trace, name), outputs.stack_trace[name][0].numpy())
    assert math.isnan(trace.surprise[0])
    assert trace.surprise[1:].mean() * math.log(2) == pytest.approx(outputs.loss.item(), rel=1e-6)
    np.testing.assert_allclose(trace.finished.sum(-1), 1)
    steps = (trace.finished * np.arange(1, 5)).sum(-1)
    np.testing.assert_allclose(steps, trace.ponder_steps, rtol=1e-9)
    assert trace.active.sum(-1).min() < trace.active.sum(-1).max(), "the test model does not halt"
    np.testing.assert_allclose(trace.over_steps(trace.bank_reads).sum(-1), 1)
    assert str(trace) == f"TextTrace of {ids.shape[1]} tokens, {steps.mean():.2f} ponder steps each"


@torch.no_grad()
def test_decays_are_what_memories_keep():
    """Of twice the memory, a token leaves as much more as it keeps of it."""
    model = tiny_model(num_hidden_layers=1, stack_depth=1, max_ponder_steps=1, num_memory_banks=3)
    ids = torch.tensor([[7, 8, 9]])
    once = model(ids[:, :2], use_cache=True).past_key_values
    twice = once.clone()
    memory, *rest = (tensor.clone() for tensor in once.layers[0].slices[0])  # decoding writes in place
    twice.layers[0].slices[0] = (2 * memory, *rest)
    trace = model(ids[:, 2:], past_key_values=once, output_stack_trace=True).stack_trace
    model(ids[:, 2:], past_key_values=twice)
    kept = twice.layers[0].slices[0][0] - once.layers[0].slices[0][0]
    decays = trace.bank_decays[:, 0, 0, 0]  # [B, H, N]
    assert decays.max() < 0 and decays.min() < -0.05
    torch.testing.assert_close(kept, decays.exp()[..., None, None] * memory)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_page_holds_the_trace(shape):
    trace = _trace(**shape)
    data = _page_data(trace.to_html())
    assert "".join(data["tokens"]) == TEXT and data["tokens"] == trace.tokens
    assert data["ids"] == trace.ids.tolist()
    assert data["steps"] == trace.active.sum(-1).tolist()
    np.testing.assert_allclose(data["depth"], trace.ponder_steps, atol=1e-4)
    assert data["surprise"][0] is None
    np.testing.assert_allclose(data["surprise"][1:], trace.surprise[1:], atol=1e-4)
    expected = {
        "pointer": trace.pointer,
        "actions": trace.actions,
        "finished": trace.finished,
    }
    if trace.bank_reads is not None:
        expected |= {
            "read": trace.bank_reads,
            "written": trace.bank_writes,
            "forgotten": 1 - np.exp(trace.bank_decays),
        }
    deltas = [i for i, name in enumerate(shape.get("mixer_types", [])) if name == "banked_delta_rule"]
    assert data["delta_layers"] == trace.delta_layers == deltas
    if deltas:
        expected["step size"] = trace.step_sizes[:, :, deltas, :, None]
    assert data["arrays"].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(data["arrays"][name], array, atol=2e-5, err_msg=name)


HYBRID = {"mixer_types": ["banked_linear_attention", "banked_delta_rule"]}


@pytest.mark.parametrize("max_step_size", [0.5, 2.0])
def test_step_sizes_are_those_of_the_delta_rule_only(max_step_size):
    """A layer that adds has none to show, and the scale does not depend on the text."""
    trace = _trace(**HYBRID, max_step_size=max_step_size)
    assert trace.delta_layers == [1] and trace.max_step_size == max_step_size
    np.testing.assert_array_equal(trace.delta_step_sizes, trace.step_sizes[:, :, 1:])
    assert (trace.step_sizes[:, :, 0][trace.active] == 1).all()
    shown = trace.delta_step_sizes[trace.active]
    assert max_step_size / 2 < shown.max() < max_step_size
    page = json.loads(re.findall(r'id="data">(.*?)</script>', trace.to_html(), re.DOTALL)[0])
    assert page["arrays"]["step size"]["scale"] == max_step_size
    assert page["arrays"]["step size"]["shape"] == [*trace.active.shape, 1, 2, 1]
    assert _trace().delta_step_sizes is None


def test_the_picture_has_a_panel_of_step_sizes(tmp_path, monkeypatch):
    """Only layers of the delta rule show step sizes. Their colours end at the largest one that is allowed."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    for shape in ({}, HYBRID):
        _trace(**shape).to_png(tmp_path / "trace.png")
    titles = [[axis.get_title(loc="left") for axis in figure.axes] for figure in figures]
    assert not any("Step size" in title for title in titles[0])
    (axis,) = (axis for axis in figures[1].axes if axis.get_title(loc="left").startswith("Step size"))
    assert axis.images[0].get_clim() == (0, 2)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["layer 2, head 1", "layer 2, head 2"]


def test_a_page_without_banks():
    """Mixers need not have any."""
    trace = _trace()
    trace = TextTrace(**{**vars(trace), "bank_reads": None, "bank_writes": None, "bank_decays": None})
    assert _page_data(trace.to_html())["arrays"].keys() == {"pointer", "actions", "finished"}


def test_text_cannot_leave_its_place_in_the_page():
    page = _trace().to_html()
    assert "<img" not in page and page.count("</script>") == 2
    frame = _trace()._repr_html_()
    assert frame.count("<") == 2 and frame.startswith("<iframe srcdoc=") and frame.count('"') == 4
    for scheme in ("http:", "https:", "src=", "url(", "import"):
        assert scheme not in _trace("harmless").to_html(), "the page is for itself"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a\u00e9b", ["a", "", "\u00e9", "b"]),
        ("\U0001f642!", ["", "", "", "\U0001f642", "!"]),
        ("\ufffd.", ["", "", "", "\ufffd."]),
        ("<|eos|>x", ["<|eos|>", "x"]),
    ],
)
def test_split_text_of_bytes(text, tokens):
    tokenizer = build_byte_tokenizer()
    assert split_text(tokenizer(text).input_ids, tokenizer) == tokens


def test_split_text_of_pieces_that_never_meet():
    tokenizer = build_byte_tokenizer()
    ids = [0xE2, 0x82, 65, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 66, 0xC3]
    tokens = split_text(ids, tokenizer)
    assert len(tokens) == len(ids) and "".join(tokens) == tokenizer.decode(ids)
    assert tokens[-1] and tokens[-2].endswith("B")


def test_split_text_of_a_bpe():
    """Tokens of several bytes may end within one character and go on with others."""
    texts = ["caf\u00e9s and th\u00e9s, \u00e9t\u00e9s ", "\u65e5\u672c\u8a9e\u3092 "]
    tokenizer = train_bpe_tokenizer(texts * 50, 300, show_progress=False)
    for text in (*texts, TEXT, "  two  spaces\n\n"):
        ids = tokenizer(text).input_ids
        tokens = split_text(ids, tokenizer)
        assert len(tokens) == len(ids) and "".join(tokens) == text


def test_ids_and_what_is_no_text():
    model, tokenizer = tiny_model(torch.float32), build_byte_tokenizer()
    ids = tokenizer("abc", return_tensors="pt").input_ids
    for same in ("abc", ids, ids[0]):
        assert model.stack_trace(same, tokenizer).tokens == ["a", "b", "c"]
    assert model.stack_trace("a", tokenizer).to_html()
    for bad in ("", ids.repeat(2, 1), ids[:, :0]):
        with pytest.raises(ValueError, match="`text` must be one text of at least one token"):
            model.stack_trace(bad, tokenizer)


def test_files_appear_whole(tmp_path, monkeypatch):
    trace, page, picture = _trace("$ \u00e9\n"), tmp_path / "trace.html", tmp_path / "trace.png"
    assert trace.to_html(page) == page.read_text(encoding="utf-8")
    trace.to_png(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"trace.html", "trace.png"}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    page.write_text("old")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        trace.to_html(page)
    assert page.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"trace.html", "trace.png"}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser: apt-get install chromium-headless-shell")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a trace's page; what went wrong in it comes up when the test is over."""
    messages, requests, pages = [], [], []

    def open_page(trace, **options):
        trace.to_html(tmp_path / "trace.html")
        page = browser.new_page(**options)
        pages.append(page)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (messages.append("dialog"), dialog.dismiss()))
        page.goto((tmp_path / "trace.html").as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert messages == []
    assert requests == [(tmp_path / "trace.html").as_uri()] * len(pages)


def _table(page, selector: str) -> dict[str, list[str]]:
    """Rows of a table by their titles."""
    return {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in page.locator(f"{selector} tbody tr").all()
    }


def test_browser_shows_the_numbers(open_page):
    trace = _trace()
    page = open_page(trace)
    assert page.locator("#text").inner_text().replace("\n", "") == TEXT.replace("\n", "")
    token = int(np.flatnonzero(trace.active.sum(-1) == 3)[-1])
    page.hover(f'[data-index="{token}"]')
    depth, bits = trace.ponder_steps[token], trace.surprise[token]
    assert f"{depth:.2f} of 3 steps  {bits:.2f} bits" in page.inner_text("#tip")

    page.click(f'[data-index="{token}"]')
    assert page.inner_text("#which").startswith(
        f"token {token + 1} of {len(trace.ids)}, id {trace.ids[token]}"
    )
    facts = page.locator("#facts dd").all_inner_texts()
    assert facts == [f"{depth:.2f}", "3 of 4", f"{bits:.2f} bits", facts[3]]
    assert float(facts[3]) == pytest.approx(2**-bits, rel=0.06)

    def shown(values):  # the token had three steps out of four
        return [f"{value:.2f}" for value in np.rint(values * 65535)[:3] / 65535] + ["\u00b7"]

    table = _table(page, "#steps")
    expected = {f"level {s + 1}": trace.pointer[token, :, s] for s in (2, 1, 0)}
    expected |= {name: trace.actions[token, :, a] for a, name in enumerate(("push", "no-op", "pop"))}
    expected |= {"finished": trace.finished[token]}
    assert table == {name: shown(values) for name, values in expected.items()}


def test_browser_opens_banks_to_heads_and_steps(open_page):
    trace = _trace()
    page = open_page(trace)
    page.click('[data-index="5"]')
    for kind, weights in enumerate(trace.banks.values()):
        rows = page.locator("#banks table").nth(kind).locator("tbody tr")
        for layer, row in enumerate(rows.all()):
            cells = [float(text) for text in row.locator("td").all_inner_texts()]
            np.testing.assert_allclose(cells, trace.over_steps(weights)[5, layer], atol=0.0051)
    page.click("#banks button >> text=step 1")
    page.locator("#banks tbody tr.opens").nth(1).click()  # layer 2
    for kind, weights in enumerate(trace.banks.values()):
        rows = page.locator("#banks table").nth(kind).locator("tbody tr")
        assert rows.count() == 4  # layer 1, layer 2 and its two heads
        for head in range(2):
            cells = [float(text) for text in rows.nth(2 + head).locator("td").all_inner_texts()]
            np.testing.assert_allclose(cells, weights[5, 0, 1, head], atol=0.0051)
    page.locator("#banks td").first.hover()
    assert page.inner_text("#tip").startswith("read, layer 1, mean of heads, bank 1: 0.")


def test_browser_shows_step_sizes(open_page):
    """Of one layer of two, which opens to its heads, and as colours of the text on a fixed scale."""
    trace = _trace(**HYBRID)
    page = open_page(trace)
    page.click('[data-index="5"]')
    table = page.locator("#banks table").last
    assert table.locator("thead th").all_inner_texts() == ["step size", "of 2"]
    sizes, mass = trace.delta_step_sizes[5, :, 0], trace.mass[5] / trace.mass[5].sum()  # [P, H], [P]
    table.locator("tr.opens").click()
    rows = page.locator("#banks table").last.locator("tbody tr")
    assert rows.locator("th").all_inner_texts() == ["\u25be layer 2", "\u2003head 1", "\u2003head 2"]
    shown = [float(text) for text in rows.locator("td").all_inner_texts()]
    np.testing.assert_allclose(shown, [(mass @ sizes).mean(), *(mass @ sizes)], atol=0.0051)
    rows.locator("td").nth(2).hover()
    assert page.inner_text("#tip") == f"step size, layer 2, head 2: {(mass @ sizes)[1]:.4f}"

    page.select_option("#colour", label="step size of layer 2")
    assert [page.inner_text(end) for end in ("#low", "#high")] == ["0.00", "2.00"]
    level = page.locator('[data-index="5"]').evaluate("(token) => token.style.getPropertyValue('--level')")
    assert float(level.removesuffix("%")) == pytest.approx(50 * (mass @ sizes).mean(), abs=0.1)
    assert "step size of layer 1" not in page.inner_text("#colour")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_colours_and_wraps(open_page, scheme):
    trace = _trace(text="words of a long text " * 20)
    page = open_page(trace, color_scheme=scheme, viewport={"width": 400, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400

    def chosen():
        return int(page.locator(".token.chosen").get_attribute("data-index"))

    deepest = chosen()
    assert trace.ponder_steps[deepest] == pytest.approx(trace.ponder_steps.max(), abs=1e-4)

    def levels():
        return [
            float(text.removesuffix("%"))
            for text in page.evaluate(
                "[...document.querySelectorAll('.token')].map((t) => t.style.getPropertyValue('--level'))"
            )
        ]

    for value, values in ((0, trace.ponder_steps), (3, np.nan_to_num(trace.surprise))):
        page.select_option("#colour", str(value))
        expected = 100 * (values - values.min()) / (values.max() - values.min())
        np.testing.assert_allclose(levels(), expected, atol=0.1)
    page.focus("#text")
    page.keyboard.press("ArrowLeft")
    assert chosen() == deepest - 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_browser_shows_every_shape_and_no_nonsense(open_page, shape):
    trace = _trace(**shape)
    page = open_page(trace)
    text = page.inner_text("body")
    assert "NaN" not in text and "undefined" not in text and "Infinity" not in text
    strips = (2 if trace.bank_reads is None else 5) + bool(trace.delta_layers)
    assert page.locator("canvas").count() == strips
