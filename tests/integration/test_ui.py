"""The page in a real browser: it streams an answer, and sees a worker die and come back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Request, expect, sync_playwright

from tests.cluster import ROOT, Cluster
from tests.conftest import StartCluster

PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)

# Notes, in the page, the answer's length at every change and which KV was seen to flow: either can be over
# between two of our questions.
WATCH = """() => {
  const answer = document.querySelector("#answer");
  window.lengths = [];
  new MutationObserver(() => {
    if (answer.classList.contains("streaming")) window.lengths.push(answer.textContent.length);
  }).observe(answer, {childList: true, characterData: true, subtree: true});
  const links = document.querySelector("#links");
  window.flows = [];
  new MutationObserver(() => {
    window.flows.push(links.querySelectorAll("path.kv.moving").length);
  }).observe(links, {childList: true});
}"""


@pytest.fixture(scope="module")
def cluster_of_two(start_cluster: StartCluster) -> Iterator[Cluster]:
    """A cluster that prefills remotely, so that KV flows."""
    with start_cluster("--policy", "round-robin") as up:
        yield up


@pytest.fixture
def page(cluster_of_two: Cluster) -> Iterator[Page]:
    """The page, opened; fails when it complains or asks anybody else for anything."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "the browser test needs Chromium: sudo apt-get install chromium"
    strangers: list[str] = []
    complaints: list[str] = []

    def check(request: Request) -> None:
        if not request.url.startswith(cluster_of_two.own_url):
            strangers.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.set_default_timeout(PATIENCE_MS)
        opened.on("request", check)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(f"{cluster_of_two.own_url}/ui")
        yield opened
        browser.close()
    assert not strangers
    assert not complaints


def test_it_streams_an_answer_and_shows_when_what_happened(page: Page) -> None:
    for worker in ("prefill-0", "decode-0"):
        expect(page.locator(f'[data-worker="{worker}"]')).to_contain_text("running")
    page.evaluate(WATCH)
    page.locator("#prompt").fill("What does a list do?")
    page.locator("#tokens").fill("200")
    page.locator("#prompt").press("Enter")
    # The text grew while it streamed: one change of many tokens would be no stream.
    page.wait_for_function("() => new Set(window.lengths).size > 2")
    expect(page.locator("#timeline")).to_be_visible(timeout=PATIENCE_MS)
    phases = page.locator("#timeline .phase")
    for name in ("tokenize", "queue at worker", "prefill", "transfer KV", "decode"):
        expect(phases.filter(has_text=name).first).to_be_visible()
    expect(page.locator("#rows tr").first).to_contain_text("prefill-0 → decode-0")
    page.wait_for_function("() => Math.max(...window.flows) === 1")


def test_it_says_where_a_prompt_would_go_without_sending_it(page: Page) -> None:
    page.locator("#prompt").fill("def factorial(n):")
    expect(page.locator("#policy")).to_contain_text("round-robin")
    page.locator("#why").click()
    expect(page.locator("#routes .chosen")).to_contain_text("decode-0")


def test_a_terminal_shows_the_same(cluster_of_two: Cluster) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "top", "--once", cluster_of_two.own_url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    for words in ("baton-small", "round-robin", "decode-0", "prefill-0"):
        assert words in shown


def test_it_sees_a_worker_die_and_come_back(page: Page, cluster_of_two: Cluster) -> None:
    card = page.locator('[data-worker="decode-0"]')
    expect(card).to_contain_text("running")
    os.kill(cluster_of_two.pids()["decode-0"], signal.SIGKILL)
    gone = page.locator('[data-worker="decode-0"].gone')
    expect(gone.filter(has_text="not answering")).to_be_visible()
    expect(gone).to_have_count(0)
    expect(card).to_contain_text("running")
