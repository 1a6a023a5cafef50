'''What command lines print: nothing that controls the terminal.'''
import re
from contextlib import contextmanager

import click

# Line breaks and other control characters, marks that change the direction of text, and what can not be encoded.
UNPRINTABLE = re.compile(
    '[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def one_line(value):
    '''Make a single line of a path, a name or the message of an exception.

    Parameters
    ----------
    value: object
        What to print.

    Returns
    -------
    str
        Its text, with a question mark in the place of each character that controls the terminal or can not be encoded.
        Of exceptions, line breaks become spaces, and the name of the type takes the place of an empty message.
    '''
    text = str(value)
    if isinstance(value, BaseException):
        text = ' '.join(text.split()) or type(value).__name__
    return UNPRINTABLE.sub('?', text)


def printable(text):
    '''Make each line of a text printable.

    Parameters
    ----------
    text: str
        What to print, of one or several lines.

    Returns
    -------
    str
        The text with its line breaks, but without any other character that controls the terminal.
    '''
    return '\n'.join(map(one_line, text.split('\n')))


class Commands(click.Group):
    '''A group of commands of which all error messages are printable, whatever names they contain.'''
    def make_context(self, *args, **kwargs):
        '''Parse the command line.'''
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        '''Run the command.'''
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors():
    try:
        yield
    except click.FileError as error:
        error.ui_filename, error.message = one_line(error.ui_filename), printable(error.message)
        raise
    except click.ClickException as error:
        error.message = printable(error.message) if isinstance(error.message, str) else error.message
        raise
