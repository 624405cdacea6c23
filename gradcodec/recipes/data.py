"""The data of the recipes; what other packages need of it, from one place.

sources      reads examples: the standard library, files, Hugging Face data sets
examples     what one is, and the rows of data sets that are read as one
tokens       encodes examples for a model, and pads batches
partition    deals them out to clients, and holds some out
choices      makes multiple-choice questions of them

``corpus`` has the text of the standard library.
"""

from gradcodec.recipes.choices import Choice, multiple_choice
from gradcodec.recipes.examples import UNLABELLED, Example, check_filled, example_of
from gradcodec.recipes.partition import dirichlet_partition, held_out, split_d1_d2
from gradcodec.recipes.sources import load_examples, rows_of_file
from gradcodec.recipes.tokens import IGNORED, Encoded, collate, encode_example

__all__ = [
    "IGNORED",
    "UNLABELLED",
    "Choice",
    "Encoded",
    "Example",
    "check_filled",
    "collate",
    "dirichlet_partition",
    "encode_example",
    "example_of",
    "held_out",
    "load_examples",
    "multiple_choice",
    "rows_of_file",
    "split_d1_d2",
]
