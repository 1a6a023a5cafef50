'''The page of a report in a real browser, as on a phone.'''
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.evaluation import jpeg, make_run

from captum_adapters.evaluation import summarize
from captum_adapters.evaluation.report import figures

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
# The page in a frame as wide as a phone, as windows cannot be that narrow, and what is found there
FRAME = '''<!DOCTYPE html><iframe width="390" height="844" srcdoc="{page}"></iframe><pre></pre><script>
onload = () => {{
  const page = document.querySelector("iframe"), root = page.contentDocument.documentElement;
  for (const each of page.contentDocument.querySelectorAll("details")) each.open = true;
  const button = page.contentDocument.querySelector(".copy button");
  if (button) button.click();
  document.querySelector("pre").textContent = JSON.stringify({{
    requests: page.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
    width: [root.scrollWidth, root.clientWidth],
    selected: String(page.contentWindow.getSelection()),
    button: button && [button.hidden, button.textContent],
    pictures: [...page.contentDocument.images].map(each => each.naturalWidth),
  }});
}};
</script>'''


def browse(page, folder):
    '''What a browser finds in a page, and what it writes to the console.'''
    (folder / 'page.html').write_text(FRAME.format(page=html.escape(page)), encoding='utf-8')
    result = subprocess.run([
        BROWSER, '--headless=new', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--dump-dom',
        f'--user-data-dir={folder / "profile"}', (folder / 'page.html').as_uri(),
    ], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search('<pre>(.*?)</pre>', result.stdout, re.S)[1]))
    return found, [line for line in result.stderr.splitlines() if 'CONSOLE' in line]


@pytest.mark.skipif(BROWSER is None, reason='there is no Chromium')
def test_browser(tmp_path):
    '''No request leaves, nothing is wrong, nothing is wider than a phone, and the command can be copied.'''
    names = [f'rise:n_masks=1000,seed={number}' for number in range(5)]
    run = make_run(
        {name: [0.1, 0.2, 0.3] for name in [*names, 'random']}, pictures=jpeg, command='evaluate ' + 200 * 'x',
        curves=lambda number: {name: np.linspace(0, 1, 3) for name in ('fractions', 'insertion', 'deletion')},
        data='folder/' * 30,
    )
    report = summarize([run], n_resamples=200)
    page = figures.make_page(report, figures.draw_curves(report), figures.make_montages(report))
    found, console = browse(page, tmp_path)
    assert found['requests'] == [] and console == []
    assert found['width'][0] <= found['width'][1] <= 390
    assert found['selected'].strip() == run.settings['command']
    assert found['button'][0] is False and found['button'][1] != 'Copy'
    assert len(found['pictures']) == 1 + 3 * 6 and min(found['pictures']) > 0
    # all of this would be found
    bad = '<img src="http://127.0.0.1:9/x.png"><p style="width: 600px">wide</p><script>missing()</script>'
    found, console = browse(re.sub('<meta http-equiv[^>]*>', '', page) + bad, tmp_path)
    assert found['requests'] == ['http://127.0.0.1:9/x.png'] and found['width'][0] > 390
    assert any('missing' in line for line in console)
    # and the page itself would not let it out
    found, console = browse(page + bad, tmp_path)
    assert any('Content Security Policy' in line for line in console)
