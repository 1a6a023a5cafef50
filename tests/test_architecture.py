'''The floors of docs/architecture.md: no module imports from a floor above its own, and there are no circles.'''
import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A name stands for the module or the package.
FLOORS = [
    ('zennit_resnet._compat', 'zennit_resnet.arguments', 'zennit_resnet.layer', 'zennit_resnet._text',
     'zennit_resnet._choices', 'zennit_resnet._files', 'zennit_resnet._nested'),
    ('zennit_resnet._autograd', 'zennit_resnet._gates', 'zennit_resnet._inplace', 'zennit_resnet._weights'),
    ('zennit_resnet.rules',),
    ('zennit_resnet.canonizers',),
    ('zennit_resnet.composites', 'zennit_resnet.classic', 'zennit_resnet.gamma', 'zennit_resnet.attribution',
     'zennit_resnet.registration', 'zennit_resnet.attributors'),
    ('zennit_resnet._graphs', 'zennit_resnet._pooling', 'zennit_resnet.tracing'),
    ('zennit_resnet.conservation', 'zennit_resnet.postprocess', 'zennit_resnet.image', 'zennit_resnet.checkpoints',
     'zennit_resnet.models'),
    ('zennit_resnet.methods',),
    ('zennit_resnet.export', 'zennit_resnet.explanation', 'zennit_resnet._public', 'zennit_resnet'),
    ('zennit_resnet.cli',),
    ('captum_adapters._compat', 'captum_adapters._light'),
    ('captum_adapters._validation', 'captum_adapters.statistics'),
    ('captum_adapters.curves',),
    ('captum_adapters.metrics', 'captum_adapters.attr'),
    ('captum_adapters.quantus', 'captum_adapters.evaluation'),
    ('captum_adapters.cli', 'captum_adapters'),
]


def imports():
    '''What each module imports when it is imported, of modules of the project.'''
    paths = {}
    for package in ('zennit_resnet', 'captum_adapters'):
        for path in (ROOT / package).rglob('*.py'):
            parts = path.relative_to(ROOT).with_suffix('').parts
            if parts[-1] != '__main__':
                paths['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    found = {}
    for name, path in paths.items():
        package = name if path.name == '__init__.py' else name.rpartition('.')[0]
        found[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                base = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
                base = '.'.join([*base, *([node.module] if node.module else [])])
                # a name may be that of a module
                found[name] |= {f'{base}.{alias.name}' if f'{base}.{alias.name}' in paths else base
                                for alias in node.names}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] = {elem for elem in found[name] if elem in paths and elem != name}
    return found


def floor(name):
    '''The floor of a module.'''
    while True:
        for number, names in enumerate(FLOORS):
            if name in names:
                return number
        name = name.rpartition('.')[0]


def test_no_circles():
    '''Modules can be imported in some order, one after the other.'''
    # that of a package is run before those of its modules, but they do not import it
    graph = imports()
    assert len(graph) > 60
    list(TopologicalSorter(graph).static_order())


def test_floors():
    '''No module imports from a floor above.'''
    wrong = [(name, other) for name, others in imports().items() for other in others if floor(other) > floor(name)]
    assert wrong == []


OPTIONAL = (
    'pandas', 'jinja2', 'tabulate', 'torchmetrics', 'quantus', 'torchcam', 'click',
    'captum_adapters.metrics.plots', 'captum_adapters.curves', 'captum_adapters.evaluation',
)


def test_imports_are_what_is_used():
    '''Importing a package loads nothing that only a part of it needs.'''
    code = 'import sys\n' + ''.join(
        f'import {names}\nprint([other for other in {others!r} if other in sys.modules])\n' for names, others in (
            ('zennit_resnet', ('captum', 'captum_adapters', 'cv2', 'matplotlib', 'scipy', *OPTIONAL)),
            # captum.attr itself imports matplotlib
            ('captum_adapters.attr, captum_adapters.metrics', OPTIONAL),
        )
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == ['[]', '[]']
