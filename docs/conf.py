'''Configuration of the documentation: sphinx-build -W docs docs/_build'''
from zennit_resnet import __version__

project = 'zennit-resnet'
author = 'the zennit-resnet authors'
copyright = f'2026, {author}'
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',  # reads both numpydoc (zennit_resnet) and Google style (captum_adapters)
    'sphinx.ext.viewcode',
]
# README.md is the page of the folder where the repository is hosted, and included in index.rst
exclude_patterns = ['_build', 'README.md']
# captum_adapters writes code in single backticks
default_role = 'code'
myst_enable_extensions = ['dollarmath']
# ```math is what repository hosts render as well
myst_fence_as_directive = ['math']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_default_options = {'show-inheritance': True}
autodoc_typehints = 'none'
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_title = f'zennit-resnet {version}'


def skip_member(app, what, name, obj, skip, options):
    '''Leave out what Python says about the fields of named tuples, described in the docstring of the class.'''
    return True if (getattr(obj, '__doc__', None) or '').startswith('Alias for field number') else None


def process_bases(app, name, obj, options, bases):
    '''Leave out private base classes.'''
    bases[:] = [base for base in bases if not getattr(base, '__name__', '').startswith('_')]


def setup(app):
    '''Register the functions above.'''
    app.connect('autodoc-skip-member', skip_member)
    app.connect('autodoc-process-bases', process_bases)
