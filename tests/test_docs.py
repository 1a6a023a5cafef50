'''All code in the documentation runs.'''
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / 'README.md', *(ROOT / 'docs').glob('**/*.md')])
BLOCKS = [
    pytest.param(match.group(1), id=f'{path.name}-{num}')
    for path in PAGES
    for num, match in enumerate(re.finditer(r'^```python\n(.*?)^```', path.read_text(encoding='utf-8'), re.S | re.M))
]


@pytest.mark.parametrize('block', BLOCKS)
def test_block(block):
    '''Each block is complete. Those for optional packages are skipped without them.'''
    for name in re.findall('^(?:import|from) (quantus|torchmetrics|torchcam)', block, re.M):
        pytest.importorskip(name)
    exec(compile(block, 'documentation', 'exec'), {'__name__': '__main__'})


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_links(path):
    '''All files that the documentation links to exist.'''
    links = re.findall(r'\]\(([^)#]+)\)', path.read_text(encoding='utf-8'))
    missing = [link for link in links if not link.startswith('http') and not (path.parent / link).exists()]
    assert not missing
