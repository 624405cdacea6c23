"""What a recipe's job says about the filters, and what a site needs in order to load it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")

from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.fuel.utils.class_utils import instantiate_class

import gradcodec as gc
from gradcodec.integrations.nvflare import (
    DecodeModel,
    DecodeUpdate,
    EncodeModel,
    EncodeUpdate,
    compress,
)

PAGE = Path(__file__).parents[2] / "docs" / "nvflare.md"
ENTRY = "gradcodec.integrations.nvflare."
UP = gc.make_codec("int4-rotated").config


def filters(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Class path, arguments and tasks of each filter of a site's configuration."""
    for chain in ("task_data_filters", "task_result_filters"):
        for entry in config[chain]:
            for one in entry["filters"]:
                yield one["path"], one["args"], entry["tasks"]


def exported(folder: Path, codec: Any, **options: Any) -> Path:
    """The job of a recipe with our filters."""
    recipe = recipe_in(folder)
    compress(recipe, codec, **options)
    recipe.export(str(folder / "jobs"))
    return folder / "jobs" / "job"


def recipe_in(folder: Path) -> FedAvgRecipe:
    """A recipe without filters, and its script."""
    (folder / "train.py").write_text("print('train')\n")
    return FedAvgRecipe(
        name="job",
        model={"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 2}},
        min_clients=2,
        train_script=str(folder / "train.py"),
        params_transfer_type=TransferType.DIFF,
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job with all four filters."""
    rules = [("bias", "fp32")]
    return exported(tmp_path, UP, downlink="int8", error_feedback=False, rules=rules)


def configs(job: Path) -> dict[str, dict[str, Any]]:
    return {
        side: json.loads(next(job.rglob(f"config_fed_{side}.json")).read_text())
        for side in ("client", "server")
    }


def test_sites_build_from_the_job_what_the_recipe_was_given(job: Path) -> None:
    built = {
        side: [(instantiate_class(path, args), tasks) for path, args, tasks in filters(config)]
        for side, config in configs(job).items()
    }
    kinds = {side: [type(one) for one, _ in made] for side, made in built.items()}
    assert kinds == {
        "client": [DecodeModel, EncodeUpdate],
        "server": [EncodeModel, DecodeUpdate],
    }
    for made in built.values():
        for one, tasks in made:
            assert tasks == ["train"]
            assert one.rules == [["bias", "fp32"]]
            of_models = isinstance(one, DecodeModel | EncodeModel)
            assert one.codec == ("int8" if of_models else UP.to_dict())
            if isinstance(one, EncodeUpdate):
                assert one.error_feedback is False


def test_the_job_does_not_contain_our_sources(job: Path) -> None:
    shipped = {path.name for path in job.rglob("*.py")}
    assert shipped == {"train.py"}


def test_without_a_downlink_models_travel_as_they_are(tmp_path: Path) -> None:
    both = configs(exported(tmp_path, "int4"))
    names = [path.rpartition(".")[2] for config in both.values() for path, _, _ in filters(config)]
    assert names == ["EncodeUpdate", "DecodeUpdate"]


@pytest.mark.parametrize("number", range(3))
def test_the_blocks_of_the_page_make_jobs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names = {"recipe": recipe_in(tmp_path)}
    exec(blocks[number], names)
    names["recipe"].export(str(tmp_path / "jobs"))
    (made,) = (tmp_path / "jobs").iterdir()
    count = sum(len(list(filters(config))) for config in configs(made).values())
    assert count == (2 if number == 2 else 4)


class Workspace:
    """Where NVFLARE's authorizer looks for a site's policy."""

    def __init__(self, resources: Path) -> None:
        self.resources = resources

    def get_resources_file_path(self) -> str:
        return str(self.resources)


def test_sites_load_the_filters_with_the_entry_of_the_page_and_not_without(
    job: Path, tmp_path: Path
) -> None:
    assert f'"class_allow_list": [..., "{ENTRY}"]' in PAGE.read_text()
    resources = tmp_path / "resources.json"
    asked = [
        ({"path": path, "args": args}, Workspace(resources))
        for config in configs(job).values()
        for path, args, _ in filters(config)
    ]
    assert len(asked) == 4
    resources.write_text(json.dumps({"class_allow_list": [ENTRY]}))
    for config, workspace in asked:
        ComponentPathAuthorizer().authorize_component_config(config, workspace=workspace)
    resources.write_text(json.dumps({"class_allow_list": ["nvflare.app_common."]}))
    for config, workspace in asked:
        with pytest.raises(UnsafeComponentError):
            ComponentPathAuthorizer().authorize_component_config(config, workspace=workspace)
