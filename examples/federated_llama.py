"""CG-FedLLM end to end: TGAP, then FAF with several codecs, compared.

    python examples/federated_llama.py                   # embedded model and data, a CPU, minutes
    python examples/federated_llama.py --full --out runs/full
    python examples/federated_llama.py --preset dolly --out runs/dolly       # a GPU and the Hub
    python examples/federated_llama.py --model gpt2 --targets c_attn --dataset my.jsonl --out runs/x

The same as ``gradcodec run-federated``; the code is in ``gradcodec/recipes/``.
"""

import sys

from gradcodec.cli import main

if __name__ == "__main__":
    sys.exit(main(["run-federated", *sys.argv[1:]]))
