'''All code in the documentation runs, commands and links are right, and the reference is complete.'''
import ast
import doctest
import importlib
import pkgutil
import re
import shlex
from contextlib import suppress
from pathlib import Path

import click
import pytest
import torch
import torchvision
from helpers.networks import narrow_resnet18
from zennit.composites import COMPOSITES

import zennit_resnet
from zennit_resnet import ResNetLRP

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = sorted(path for path in [ROOT / 'README.md', *DOCS.glob('**/*.md')] if '_build' not in path.parts)
TEXTS = {path: path.read_text(encoding='utf-8') for path in PAGES}
BLOCK = re.compile(r'^```(?:python|py)\n(.*?)^```$', re.S | re.M)
SHELL = re.compile(r'^```(?:sh|bash|shell|console)\n(.*?)^```$', re.S | re.M)
COMMAND = re.compile(r'(?:python|torchrun .*?) -m (zennit_resnet|captum_adapters) (.*)')
BLOCKS = [
    pytest.param(match.group(1), id=f'{path.relative_to(ROOT).as_posix()}-{num}')
    for path, text in TEXTS.items() for num, match in enumerate(BLOCK.finditer(text))
]


def commands(block):
    '''Packages and arguments of all commands of this project in a block for the shell.'''
    block = re.sub(r'\\\n *', '', block)
    variables = dict(re.findall(r'^(\w+)="([^"]*)"$', block, re.M))
    # of any other variable, the value is no option
    block = re.sub(r'\$\{.*?\}|\$(\w+)', lambda match: variables.get(match.group(1), 'value'), block)
    for package, line in COMMAND.findall(block):
        # a command may itself be in quotes
        yield package, shlex.split(line.rstrip("'"), comments=True)


COMMANDS = [
    pytest.param(*found, id=f'{path.relative_to(ROOT).as_posix()}-{" ".join(found[1])}')
    for path, text in TEXTS.items() for block in SHELL.findall(text) for found in commands(block)
]
PACKAGES = (
    'zennit_resnet', 'captum_adapters.attr', 'captum_adapters.attr.abn', 'captum_adapters.metrics',
    'captum_adapters.metrics.torchmetrics', 'captum_adapters.metrics.plots', 'captum_adapters.quantus',
    'captum_adapters.evaluation',
)


def page_id(path):
    '''Path of a page as the name of a test.'''
    return path.relative_to(ROOT).as_posix()


def write_explanation(path):
    '''Write what the command at the beginning of the page does, of a small network.'''
    pytest.importorskip('onnxscript')
    from zennit_resnet.export import export
    from zennit_resnet.tracing import trace
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    ).eval()
    image = torch.rand(1, 3, 60, 80)
    metadata = {'classes': ['a', 'b', 'c'], 'preprocessing': {'size': [60, 80]}}
    export(trace(model, ResNetLRP(), image), image, path, normalization=([.5], [.2]), metadata=metadata)


@pytest.mark.parametrize('block', BLOCKS)
def test_block(block, tmp_path, monkeypatch):
    '''Each block is complete, run from a clone. Those for optional packages are skipped without them.'''
    optional = r'^ *(?:import|from) (quantus|torchmetrics|torchcam|timm|onnxruntime|captum\.insights\.\w+)'
    for name in re.findall(optional, block, re.M):
        pytest.importorskip(name)
    # blocks may write files, and register composites
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'examples').symlink_to(ROOT / 'examples')
    # most blocks have one, with weights that take longer than all else
    monkeypatch.setattr(torchvision.models, 'resnet18', narrow_resnet18)
    block = block.replace("model='resnet18'", "model='narrow_resnet18'")
    if 'InferenceSession(\'explain.onnx\'' in block:
        write_explanation(tmp_path / 'explain.onnx')
    import zennit_resnet.composites  # noqa: F401 (which registers its own)
    registered = dict(COMPOSITES)
    try:
        exec(compile(block, 'documentation', 'exec'), {'__name__': '__main__'})
    finally:
        COMPOSITES.clear()
        COMPOSITES.update(registered)


@pytest.mark.parametrize('path', PAGES, ids=page_id)
def test_all_blocks_run(path):
    '''No block of Python is written in a way that is not found above.'''
    written = re.findall(r'^[ >]*(?:```+|~~~+) *(?:\{[\w-]+\} *)?(?:py|ipy)', TEXTS[path], re.M | re.I)
    assert len(written) == len(BLOCK.findall(TEXTS[path]))
    assert not re.search(r'^ *>>> ', TEXTS[path], re.M)


@pytest.mark.parametrize('package, args', COMMANDS)
def test_command(package, args):
    '''Commands have all options that they are given, with values of the right types.'''
    main = importlib.import_module(f'{package}.cli').main
    # what --help and --list end with
    with suppress(click.exceptions.Exit), click.Context(main) as context:
        name, command, args = main.resolve_command(context, args)
        command.make_context(name, args, context)


@pytest.mark.parametrize('path', PAGES, ids=page_id)
def test_links(path):
    '''All files and pictures that the documentation links to exist.'''
    text = re.sub(r'^```.*?^```$', '', TEXTS[path], flags=re.S | re.M)
    # code within a line, but for the texts of links
    text = re.sub(r'`[^`\n]*\]\([^`\n]*`', '', text)
    links = re.findall(r'\]\(([^)\s]+)[^)]*\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links += re.findall(r'^\[[^\]]+\]: (\S+)', text, re.M)
    links = [link.partition('#')[0] for link in links if not re.match(r'\w+:', link)]
    assert [link for link in links if link and not (path.parent / link).exists()] == []


def test_overview():
    '''All pages are listed in the overview, and in the tree of the site.'''
    paths = *DOCS.glob('*.md'), *DOCS.glob('results/*.md')
    pages = {path.relative_to(DOCS).with_suffix('').as_posix() for path in paths} - {'README'}
    assert pages == set(re.findall(r'\]\((results/[\w-]+|[\w-]+)\.md\)', TEXTS[DOCS / 'README.md']))
    tree = (DOCS / 'index.rst').read_text(encoding='utf-8')
    assert pages == set(re.findall(r'^   (results/[\w-]+|[\w-]+)$', tree, re.M))


def test_results():
    '''All pages of results are listed in their overview.'''
    pages = {path.stem for path in DOCS.glob('results/*.md')} - {'README'}
    assert pages <= set(re.findall(r'\]\(([\w-]+)\.md\)', TEXTS[DOCS / 'results' / 'README.md']))


def test_anchors():
    '''Links to sections of other pages lead to their titles.'''
    wrong = []
    for path, text in TEXTS.items():
        text = re.sub(r'^```.*?^```$', '', text, flags=re.S | re.M)
        for link, anchor in re.findall(r'\]\(([\w/.-]*)#([^)\s]+)\)', text):
            titles = re.findall(r'^#+ (.*)$', TEXTS.get((path.parent / link).resolve() if link else path, ''), re.M)
            if anchor not in {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}:
                wrong.append((path.name, link, anchor))
    assert wrong == []


def test_paths():
    '''Scripts that pages name exist, and so do pages that scripts and docstrings name.'''
    named = re.findall(r'python ((?:examples|benchmarks)/[\w/]+\.py)', ''.join(TEXTS.values()))
    folders = 'zennit_resnet', 'captum_adapters', 'examples', 'benchmarks'
    for path in (ROOT / 'noxfile.py', *(path for name in folders for path in (ROOT / name).glob('**/*.py'))):
        named += re.findall(r'\bdocs/[\w/.-]*\w', path.read_text(encoding='utf-8'))
    assert [name for name in named if name != 'docs/_build' and not (ROOT / name).exists()] == []


def messages():
    '''All texts in the packages, with an ellipsis for what is not known before they run.'''
    for path in (path for name in ('zennit_resnet', 'captum_adapters') for path in (ROOT / name).glob('**/*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(elem.value if isinstance(elem, ast.Constant) else '…' for elem in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TROUBLES = re.findall(r'`([^`]+)`', '\n'.join(
    line for line in TEXTS[DOCS / 'troubleshooting.md'].splitlines() if line.startswith('### ')
))


@pytest.fixture(scope='module')
def known():
    '''What the packages may say.'''
    return '\n'.join(messages())


@pytest.mark.parametrize('title', TROUBLES)
def test_troubleshooting(title, known):
    '''Titles are parts of messages.'''
    assert title in known


@pytest.mark.parametrize('name', PACKAGES)
def test_reference(name):
    '''The reference has all public names.'''
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    pages = ''.join(path.read_text(encoding='utf-8') for path in DOCS.glob('reference/*.rst'))
    documented = set(re.findall(r'^\.\. automodule:: (\S+)$', pages, re.M))
    public = getattr(module, '__all__', None) or [
        key for key, value in vars(module).items()
        if not key.startswith('_') and getattr(value, '__module__', None) == name
    ]
    # rooms document what they export
    exported = {key for room in documented - {'zennit_resnet.cli'}
                for key in getattr(importlib.import_module(room), '__all__', ())}
    missing = [key for key in public if key not in exported
               and not {name, getattr(getattr(module, key), '__module__', name)} & documented]
    assert missing == []


@pytest.mark.parametrize('name', [
    info.name for info in pkgutil.walk_packages(zennit_resnet.__path__, 'zennit_resnet.')
    if not info.name.endswith('__main__')
])
def test_examples_of_docstrings(name, monkeypatch):
    '''Examples in docstrings run, and have the results that they show.'''
    monkeypatch.setattr(torchvision.models, 'resnet18', narrow_resnet18)
    # as they are copied, without what the module imports
    result = doctest.testmod(importlib.import_module(name), globs={}, optionflags=doctest.ELLIPSIS)
    assert not result.failed
