'''Groups of commands.'''
import atexit
import gc
from contextlib import contextmanager

import click

from .._text import one_line, printable


def start(main, **kwargs):
    '''Run a program, and spare Python the search for garbage in what libraries load, which lives until the end.'''
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    main(**kwargs)


class Commands(click.Group):
    '''A group of commands whose error messages are all printable, whatever names they contain.'''
    def make_context(self, *args, **kwargs):
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors():
    try:
        yield
    except click.FileError as error:
        error.ui_filename, error.message, error.exit_code = one_line(error.ui_filename), printable(error.message), 2
        raise
    except click.ClickException as error:
        # 1 says that relevance is not conserved
        error.exit_code = 2
        error.message = printable(error.message) if isinstance(error.message, str) else error.message
        raise
