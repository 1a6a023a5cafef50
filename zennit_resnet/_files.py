'''Files that are there as a whole or not at all.'''
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path, overwrite=True):
    '''Name of a file to write, which replaces the path when it is complete, or a FileExistsError if it may not.'''
    path = Path(path)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f'.{path.stem[:40]}-', dir=path.parent)
    os.close(handle)
    try:
        yield name
        # the content has to be there before the name, also if the machine stops
        with open(name, 'rb') as file:
            os.fsync(file)
        # files of this kind are for their owner only
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        # another one may have been written in the meantime
        check_free(path, overwrite)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def check_free(path, overwrite=False):
    '''Raise a FileExistsError if a path exists, unless it is a file that may be overwritten.'''
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f'{path} exists already: choose another name, or overwrite it.')
