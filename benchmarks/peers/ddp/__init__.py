"""Other projects' gradient compression, from their own code, which is not in this repository.

``GRADCODEC_PEERS`` names a folder with their clones; a peer that is not there is left out, with a
line that says so:

    mkdir peers && cd peers
    git clone https://github.com/epfml/powersgd && git -C powersgd checkout f07be92
    git clone https://github.com/sands-lab/grace && git -C grace checkout fd3a7f4
    git clone https://github.com/bloc97/DeMo && git -C DeMo checkout 0e48145
    pip install einops    # for DeMo
    GRADCODEC_PEERS=$PWD python -m benchmarks.run ddp

torch's own hooks need nothing.
"""
