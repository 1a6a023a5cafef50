'''Text that is printed or named in errors: nothing that controls the terminal.'''
import re

# Line breaks and other control characters, marks that change the direction of text, and what can not be encoded.
UNPRINTABLE = re.compile(
    '[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def one_line(value):
    '''Make a single line of a path, a name or the message of an exception, which does not control the terminal.'''
    text = str(value)
    if isinstance(value, BaseException):
        text = ' '.join(text.split()) or type(value).__name__
    return UNPRINTABLE.sub('?', text)


def printable(text):
    '''Make each line of a text printable.'''
    return '\n'.join(map(one_line, text.split('\n')))
