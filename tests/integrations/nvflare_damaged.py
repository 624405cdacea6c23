"""A job in which one reply is damaged on its way; run as a script, in a folder that is given."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.dxo_filter import DXOFilter

from benchmarks.nvflare.job import run
from gradcodec.integrations.nvflare import compress


class Damage(DXOFilter):
    """Changes a byte of the second reply of the first site."""

    def __init__(self) -> None:
        kinds = [DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        self._count = 0

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> DXO | None:
        self._count += 1
        if fl_ctx.get_identity_name() != "site-1" or self._count != 2:
            return None
        part = dxo.data["coded"].copy()
        part[-1] ^= 1
        return DXO(dxo.data_kind, {**dxo.data, "coded": np.asarray(part)}, dict(dxo.meta))


def apply(recipe: Any) -> None:
    compress(recipe, "int4", downlink="int4")
    recipe.add_client_output_filter(Damage(), tasks=["train"])


if __name__ == "__main__":
    print(json.dumps(run(apply, Path(sys.argv[1]), rounds=3, layers=1, seed=0)))
