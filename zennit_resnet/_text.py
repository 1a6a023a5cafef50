'''Text that is printed or named in errors: nothing that controls the terminal, and names that may be meant.'''
import re
from difflib import get_close_matches

# Line breaks and other control characters, marks that change the direction of text, and what cannot be encoded.
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def one_line(value):
    '''Make a single line of a path, a name or the message of an exception, which does not control the terminal.'''
    text = str(value)
    if isinstance(value, BaseException):
        text = ' '.join(text.split()) or type(value).__name__
    return UNPRINTABLE.sub('?', text)


def printable(text):
    '''Make each line of a text printable.'''
    return '\n'.join(map(one_line, text.split('\n')))


def suggest(name, known):
    '''The end of a message: similar names, or the first ones.'''
    known = list(known)
    similar = get_close_matches(name, known)
    if similar:
        return f': did you mean {" or ".join(map(repr, similar))}?'
    return f': choose one of {", ".join(map(repr, known[:8]))}{", ..." if len(known) > 8 else "."}'
