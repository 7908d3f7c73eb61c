"""Push the model of a run and its model card to the Hugging Face Hub, or write them as a folder."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from snella_app.files import write_text
from snella_app.records.record import read
from snella_app.records.run import RunInfo, reject_cross_validation
from snella_app.report.card import model_card
from snella_app.runs.folder import RunFolder, sibling_path
from snella_app.runs.merge import merge
from snella_app.runs.model import get_task
from snella_app.text import first_line

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class PushResult:
    """Result of `push`.

    Attributes:
        location: URL on the Hugging Face Hub, or path of the written folder.
        error: Reason why the Hub could not be reached. None if the model was pushed, or a folder was requested.
    """

    location: str
    error: str | None = None


def write_hub_folder(run: str | Path, folder: str | Path, name: str, *, adapter: bool = False) -> Path:
    """Write the folder of a Hugging Face Hub repository: weights and model card (`README.md`).

    Args:
        run: Run folder.
        folder: New or empty folder.
        name: Repository name on the Hub, for the loading code.
        adapter: Write the PEFT adapter instead of the merged model.

    Raises:
        FileExistsError: If the folder is not empty, or is a file.
        FileNotFoundError: If `run` is not a run folder or has no adapter.
        ValueError: If the run is damaged, is a cross-validation run, or has an unsupported task; if its method cannot
            be merged; if `adapter` is set and the run has no PEFT adapter; or if `folder` ends with `.safetensors`.
    """
    path = Path(folder)
    if path.suffix == ".safetensors":  # `merge` would write a file
        raise ValueError(f"to_folder must be a folder, got {str(path)!r}; leave out the suffix")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        state = "not empty" if path.is_dir() else "a file"
        raise FileExistsError(f"to_folder={path} is {state}; choose a new folder")
    reject_cross_validation(Path(run))
    info = read(RunInfo, run)
    task = get_task(info)
    if adapter:
        source = RunFolder(run)
        source.check_adapter()
        if not (source.adapter / CONFIG_NAME).is_file():
            raise ValueError(
                f"adapter={adapter} pushes a PEFT adapter, which runs of {info.method} lack; leave it out to push the "
                "merged model"
            )
        shutil.copytree(source.adapter, path, dirs_exist_ok=True)
        use = (
            f"```python\nfrom huggingface_hub import snapshot_download\nfrom peft import PeftModel\n\n"
            f"import snella  # registers the adapter's type\n\nmodel = PeftModel.from_pretrained(backbone, "
            f"snapshot_download({name!r}))\n```\n\n`backbone` is the base model with "
            f"{info.backbone.num_classes} outputs."
        )
        card = model_card(run, use, name=name, library="peft", tags=("peft",), has_final_head=False)
        write_text(path / "README.md", card)
        return path
    is_timm = task.name == "classification" and info.backbone.architecture is not None
    merged = merge(run, path if is_timm else path / _WEIGHTS)
    # the loading code must refer to the repository instead of this folder
    snippet = merged.snippet.replace(repr(f"local-dir:{path}"), repr(f"hf-hub:{name}"))
    for file in path.iterdir():
        snippet = snippet.replace(repr(str(file)), f"folder + {'/' + file.name!r}")
    if "folder + " in snippet:  # timm downloads only its own files
        snippet = f"from huggingface_hub import snapshot_download\nfolder = snapshot_download({name!r})\n{snippet}"
    use = f"```python\n{snippet}\n```\n\nThe files contain {merged.description}."
    if info.trained_head_temperature != 1.0:
        use += f" Calibrated probabilities are `(logits / {info.trained_head_temperature:g}).softmax(-1)`."
    use += "".join(f" In snella, {note}." for note in merged.notes)
    write_text(path / "README.md", model_card(run, use, name=name, library="timm" if is_timm else "snella"))
    return path


def push(
    run: str | Path,
    name: str,
    *,
    to_folder: str | Path | None = None,
    adapter: bool = False,
    private: bool = False,
    overwrite: bool = False,
) -> PushResult:
    """Push the model of a run to the Hugging Face Hub.

    With `to_folder`, the repository is written to this folder instead. If the Hub cannot be reached, the repository is
    written to `RUN-hub`.

    Args:
        run: Run folder.
        name: Repository name on the Hub, `user/model`.
        to_folder: Write to this new or empty folder, without any network access.
        adapter: Push the PEFT adapter instead of the merged model.
        private: Create a private repository.
        overwrite: Add a commit to an existing repository; earlier files stay in its history.

    Returns:
        URL on the Hub, or the written folder, with an error if the Hub could not be reached.

    Raises:
        FileExistsError: If the repository exists and `overwrite` is not set, if `to_folder` is not empty or is a file,
            or if the Hub cannot be reached and `RUN-hub` exists.
        PermissionError: If you are not logged in, or lack write permission.
        FileNotFoundError: As for `write_hub_folder`.
        ValueError: If `name` is not a valid repository name, or as for `write_hub_folder`.
        HfHubHTTPError: If a request fails for another reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the user or organization is missing")
    except HFValidationError as error:
        raise ValueError(
            f"name must be a repository name on the Hugging Face Hub such as user/photos, got {name!r}: {error}"
        ) from None
    if to_folder is not None:
        return PushResult(str(write_hub_folder(run, to_folder, name, adapter=adapter)))
    api: Any = HfApi()
    # connection errors of the Hub's HTTP library need not be OSErrors, but share a base class with HfHubHTTPError
    unreachable: tuple[Any, ...] = (OfflineModeIsEnabled, OSError, *HfHubHTTPError.__bases__)
    with tempfile.TemporaryDirectory(prefix="snella-push-") as temporary:
        folder = write_hub_folder(run, Path(temporary, "model"), name, adapter=adapter)
        try:
            url = api.create_repo(name, private=private, exist_ok=overwrite)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model and card")
        except LocalTokenNotFoundError as error:
            raise PermissionError(f"name={name} needs a login to the Hugging Face Hub; run `hf auth login`") from error
        except HfHubHTTPError as error:
            status = None if error.response is None else error.response.status_code
            if status == 409:
                raise FileExistsError(
                    f"name={name} already exists on the Hugging Face Hub; choose another name, or add a commit with "
                    "--overwrite (overwrite=True)"
                ) from error
            if status in (401, 403):
                raise PermissionError(f"no write permission for name={name}; run `hf auth login`") from error
            raise
        except unreachable as error:
            kept = sibling_path(run, "-hub")
            if kept.exists():
                raise FileExistsError(
                    f"the Hub could not be reached ({first_line(error)}), and {kept} exists; remove it, or choose "
                    "another folder with --to-folder"
                ) from error
            shutil.move(folder, kept)
            return PushResult(str(kept), first_line(error))
    return PushResult(str(url))
