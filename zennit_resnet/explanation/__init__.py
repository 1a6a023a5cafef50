'''One call from a network and photographs to heatmaps, pictures and files.'''
from .explaining import explain, explain_each
from .photos import list_images, unique_names
from .result import Explanation, Explanations, draw_table, file_stem

__all__ = [
    'Explanation', 'Explanations', 'draw_table', 'explain', 'explain_each', 'file_stem', 'list_images', 'unique_names',
]
