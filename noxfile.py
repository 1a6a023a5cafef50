'''All checks: ``nox -s verify`` runs what a machine can check of a release, ``nox -l`` lists everything.

Installing PyTorch takes most of the time of a first run. ``nox -r`` uses the environments of the last one again.
'''
import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = '>=2024.3'
nox.options.sessions = ['lint', 'types', 'docs', 'tests']
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
PYTHONS = ['3.10', '3.11', '3.12', '3.13']
ZENNITS = ['0.5.1', '1.0.0']
# Zennit 1.0.0 needs Python 3.11.11
FIRST = (3, 11, 11)
QUIET = {'MPLBACKEND': 'Agg'}
ASSETS = ROOT / 'examples' / 'assets'
TEMPLATE = 'captum_adapters/evaluation/report/report.html.jinja'
# What an archive must not contain: folders beside the packages, data, and what is left from running
FOREIGN = ('examples/', 'docs/', 'benchmarks/', 'tests/', '.npz', '.safetensors', '.jpg', '.png', '.pyc', '.sqlite')


@nox.session(python=PYTHONS)
@nox.parametrize('zennit', ZENNITS)
def tests(session, zennit):
    '''Run the tests, with each Python and each line of Zennit.'''
    skip_unsupported(session, zennit)
    session.install('-e', '.[test]', f'zennit=={zennit}')
    session.run('python', '-m', 'pytest', '-n', 'auto', *session.posargs, env=QUIET)


def skip_unsupported(session, zennit):
    '''Skip a session if its Python is too old for this line of Zennit.'''
    version = session.run('python', '-c', 'import sys; print(*sys.version_info[:3])', silent=True)
    if zennit == '1.0.0' and tuple(map(int, version.split())) < FIRST:
        session.skip(f'Zennit {zennit} needs Python {".".join(map(str, FIRST))}')


@nox.session(python='3.10')
def oldest(session):
    '''Run the tests with the oldest versions of what is needed.'''
    session.install('-e', '.[test]', 'torch==2.4.*', 'torchvision==0.19.*', 'captum==0.7.*', 'zennit==0.5.1')
    session.run('python', '-m', 'pytest', '-n', 'auto', *session.posargs, env=QUIET)


@nox.session
def lint(session):
    '''Check the style.'''
    session.install('ruff')
    session.run('ruff', 'check', '.')


@nox.session
def types(session):
    '''Check the annotations of captum_adapters.'''
    session.install('mypy', '-e', '.[metrics,evaluation]')
    session.run('mypy')


@nox.session
def docs(session):
    '''Build the documentation. Warnings are errors.'''
    session.install('-e', '.[docs]')
    session.run('sphinx-build', '-W', '--keep-going', '-E', 'docs', 'docs/_build', env=QUIET)


@nox.session
def coverage(session):
    '''Run the tests, and require that they cover 95 % of the lines of both packages.'''
    session.install('-e', '.[test,quantus,cam]', 'pytest-cov')
    # from Python 3.12 on, this takes hardly longer than without
    env = {**QUIET, 'COVERAGE_CORE': 'sysmon'}
    session.run('python', '-m', 'pytest', '-n', 'auto', '--cov', '--cov-fail-under=95', *session.posargs, env=env)


@nox.session
def build(session):
    '''Build wheel and sdist, and check what is in them.'''
    dist = session.cache_dir / 'dist'
    shutil.rmtree(dist, ignore_errors=True)
    session.install('build', 'twine')
    session.run('python', '-m', 'build', '--outdir', str(dist))
    wheel, sdist = find_archives(session)
    session.run('twine', 'check', '--strict', str(wheel), str(sdist))
    check_contents(session, wheel, sdist)


def find_archives(session):
    '''Wheel and sdist of the last build.'''
    dist = (session.cache_dir / 'dist').resolve()
    archives = [path for suffix in ('*.whl', '*.tar.gz') for path in dist.glob(suffix)]
    if len(archives) != 2:
        session.error(f'there is no wheel and sdist in {dist}: run nox -s build first')
    return archives


def check_contents(session, wheel, sdist):
    '''Check what is in the archives.'''
    packages = [path.parent.relative_to(ROOT).as_posix() for name in ('zennit_resnet', 'captum_adapters')
                for path in (ROOT / name).glob('**/__init__.py')]
    modules = {path.relative_to(ROOT).as_posix() for name in packages for path in (ROOT / name).glob('*.py')}
    needed = modules | {'zennit_resnet/py.typed', 'captum_adapters/py.typed', TEMPLATE}
    with zipfile.ZipFile(wheel) as archive:
        names = {'wheel': set(archive.namelist())}
    with tarfile.open(sdist) as archive:
        names['sdist'] = {name.partition('/')[2] for name in archive.getnames()}
    for kind, found in names.items():
        missing = needed - found
        if not any(name.endswith('LICENSE') for name in found):
            missing |= {'LICENSE'}
        foreign = {name for name in found if name.startswith(FOREIGN[:4]) or name.endswith(FOREIGN[4:])}
        if missing or foreign:
            session.error(f'{kind}: missing {sorted(missing)}, foreign {sorted(foreign)}')


@nox.session(python=PYTHONS)
@nox.parametrize('zennit', ZENNITS)
def smoke(session, zennit):
    '''Use what was built in environments that have nothing else, with each Python and each line of Zennit.'''
    skip_unsupported(session, zennit)
    wheel, sdist = find_archives(session)
    # what is built from the sdist is the same for both lines of Zennit
    for archive in (wheel, sdist) if zennit == ZENNITS[0] else (wheel,):
        session.install(f'{archive}[examples]', f'zennit=={zennit}')
        # an environment that is used again may have an older build of the same version, and so may pip's cache
        session.install('--force-reinstall', '--no-deps', '--no-cache-dir', str(archive))
        use(session)


def use(session):
    '''Import the packages, and explain a photograph.'''
    folder = Path(session.create_tmp()) / 'elsewhere'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # elsewhere, as the checkout would be imported in its own folder
    with session.chdir(folder):
        code = 'import captum_adapters.attr, captum_adapters.evaluation, captum_adapters.metrics as last; print(last)'
        if 'site-packages' not in session.run('python', '-c', code, silent=True):
            session.error('this is not what was installed')
        session.run('python', '-m', 'zennit_resnet', '--version')
        session.run('python', '-m', 'captum_adapters', '--help', silent=True)
        weights, photo = ASSETS / 'resnet50_imagenette.safetensors', ASSETS / 'photos' / 'gc_cathedral.jpg'
        session.run('python', '-m', 'zennit_resnet', 'explain', str(photo), '--weights', str(weights), '--out', '.')
        if not list(Path().glob('gc_cathedral*.png')):
            session.error('there is no heatmap')


@nox.session(venv_backend='none')
def verify(session):
    '''Run everything that a machine can check: style, types, documentation, archives, and tests with coverage.'''
    # of a name, only the first session would be run
    smokes = [f"smoke-{python}(zennit='{zennit}')" for python in PYTHONS for zennit in ZENNITS]
    for name in ('lint', 'types', 'docs', 'build', *smokes, 'coverage'):
        session.notify(name)
