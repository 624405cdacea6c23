"""One call that adds the filters to a recipe of NVFLARE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.recipe.spec import Recipe

from gradcodec.integrations.nvflare.model import DecodeModel, EncodeModel
from gradcodec.integrations.nvflare.update import DecodeUpdate, EncodeUpdate
from gradcodec.settings import CodecConfig

Choice = str | CodecConfig | Mapping[str, Any]


def compress(
    recipe: Recipe,
    codec: Choice,
    *,
    downlink: Choice | None = None,
    error_feedback: bool | None = None,
    rules: Sequence[Sequence[str]] = (),
    tasks: Sequence[str] = ("train",),
) -> None:
    """Send updates, and with ``downlink`` also models, through a codec.

        recipe = FedAvgRecipe(..., params_transfer_type=TransferType.DIFF)
        compress(recipe, "int4", downlink="int4")

    The sites take ``gradcodec`` from their own installation: the job does not contain its sources,
    so sites that allow no code in jobs need ``"gradcodec.integrations.nvflare."`` in their
    ``class_allow_list``.

    Args:
        recipe: one whose clients send ``WEIGHT_DIFF``.
        codec: of updates; see ``EncodeUpdate``.
        downlink: of models; see ``EncodeModel``. ``None``: they travel as NVFLARE sends them.
        error_feedback: see ``EncodeUpdate``.
        rules: for both directions; see ``EncodeUpdate``.
        tasks: the tasks that train.

    Raises:
        ConfigError: an argument is of another kind, or settings that make no codec.
        HubError: there is no codec of this name.
    """
    encode = EncodeUpdate(codec, error_feedback=error_feedback, rules=rules)
    recipe.add_client_output_filter(encode, tasks=list(tasks))
    recipe.add_server_input_filter(DecodeUpdate(codec, rules=rules), tasks=list(tasks))
    if downlink is not None:
        recipe.add_server_output_filter(EncodeModel(downlink, rules=rules), tasks=list(tasks))
        recipe.add_client_input_filter(DecodeModel(downlink, rules=rules), tasks=list(tasks))
    # Otherwise NVFLARE copies the modules of this package, one by one, into the job.
    recipe._job.set_app_packages([*recipe._job.job.app_packages, "gradcodec"])
